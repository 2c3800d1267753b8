"""A model in the form that another engine reads: the file itself, a Hugging Face folder, or what a converter makes.

Made once and kept in a folder named by the SHA-256 of the model's bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

from millis.bench.process import WorkerError
from millis.bench.reference import reference_model, torch_module
from millis.bench.system import files_under
from millis.models.checkpoint import Checkpoint
from millis.models.load import read_checkpoint

Form = Literal["gguf", "folder", "onnx", "ctranslate2"]
CONVERT_TIMEOUT_S = 3600


def prepare(form: Form, source: Path, python: Path, kept: Path) -> Path:
    """The model's path in that form, converted with the peer's own tools under `python` if it is not in `kept` yet.

    WorkerError where it cannot be had; ModelError where the float32 reference cannot.
    """
    if form == "gguf":
        if source.is_dir():
            raise WorkerError("reads GGUF files, and this model is a folder")
        return source
    if form == "folder" and source.is_dir():
        return source
    home = kept / _digest(source)
    made = home / form
    if not made.exists():
        if form != "folder":
            folder = prepare("folder", source, python, kept)
        temporary = home / f"{form}.part"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if form == "folder":
            export(read_checkpoint(source), temporary)
        else:
            _convert(form, folder, temporary, python)
        temporary.rename(made)
    return made


def export(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes the dequantised weights in bfloat16, config.json and a tokenizer as a Hugging Face folder."""
    torch = torch_module()
    from transformers.utils import logging

    quiet: Any = logging
    quiet.disable_progress_bar()
    model = reference_model(checkpoint, threads=1).to(torch.bfloat16)
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.save_pretrained(folder)
    words = tokenizer_words(checkpoint)
    (folder / "tokenizer.json").write_text(_word_tokenizer(words), "utf-8")
    special = dict.fromkeys(("unk_token", "bos_token", "eos_token"), words[0])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def tokenizer_words(checkpoint: Checkpoint) -> list[str]:
    """The vocabulary in order of ids, every entry once."""
    words = [str(word) for word in checkpoint.metadata["tokenizer.ggml.tokens"]]
    seen: set[str] = set()
    for i, word in enumerate(words):
        words[i] = word if word not in seen else f"<again {i}>"
        seen.add(words[i])
    return words


def _word_tokenizer(words: list[str]) -> str:
    """A tokenizer of whole words: converters want one, but every prompt here is made of ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {word: i for i, word in enumerate(words)}
    return str(Tokenizer(WordLevel(vocabulary, unk_token=words[0])).to_str())


def _convert(form: Form, folder: Path, out: Path, python: Path) -> None:
    """Runs the peer's converter; its last words become the error."""
    module: list[Any]
    if form == "onnx":
        module = ["onnxruntime_genai.models.builder", "-i", folder, "-o", out, "-p", "int4", "-e", "cpu"]
        module += ["-c", out / "cache", "--extra_options", "int4_accuracy_level=4"]
    else:
        module = ["ctranslate2.converters.transformers", "--model", folder, "--output_dir", out, "--force"]
        module += ["--quantization", "int8"]
    command = [str(part) for part in [python, "-m", *module]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CONVERT_TIMEOUT_S, cwd=out)
    if done.returncode:
        words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise WorkerError(f"its converter failed: {' | '.join(words[-2:])[:400]}")
    shutil.rmtree(out / "cache", ignore_errors=True)


def _digest(source: Path) -> str:
    digest = hashlib.sha256()
    for path in files_under(source):
        with path.open("rb") as file:
            while part := file.read(1 << 22):
                digest.update(part)
    return digest.hexdigest()[:16]
