"""A model in other engines' forms: the exported folder against transformers on the file, and converters that fail."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gguf_files import VOCAB, write_tiny
from millis.bench.forms import export, prepare, tokenizer_words
from millis.bench.process import WorkerError
from millis.models.load import read_checkpoint
from reference import next_logits, reference_model, tiny_model

PYTHON = Path(sys.executable)
IDS = [3, 1, 4, 1, 5, 9]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_the_folder_is_the_same_model(architecture: str, tmp_path: Path) -> None:
    path, folder = tmp_path / "tiny.gguf", tmp_path / "folder"
    write_tiny(path, architecture)
    folder.mkdir()
    export(read_checkpoint(path), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    want = next_logits(reference_model(path), IDS)
    np.testing.assert_allclose(next_logits(model, IDS), want, atol=0.05 * np.abs(want).max())  # bfloat16 weights
    assert AutoConfig.from_pretrained(folder).vocab_size == VOCAB
    assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}


def test_the_folders_tokenizer_has_every_id_once(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    words = [f"word {i}" for i in range(VOCAB - 1)] + ["word 1"]  # one of them twice
    write_tiny(path, keys={"tokenizer.ggml.tokens": words})
    checkpoint = read_checkpoint(path)
    assert tokenizer_words(checkpoint) == [*words[:-1], f"<again {VOCAB - 1}>"]
    export(checkpoint, tmp_path)
    vocabulary = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab()
    assert sorted(vocabulary.values()) == list(range(VOCAB))
    assert vocabulary["word 7"] == 7
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == VOCAB


def test_a_folder_is_made_once_and_named_by_the_bytes(tmp_path: Path) -> None:
    path, kept = tmp_path / "tiny.gguf", tmp_path / "kept"
    write_tiny(path)
    made = prepare("folder", path, PYTHON, kept)
    written = (made / "model.safetensors").stat().st_mtime_ns
    copy = tmp_path / "other name.gguf"
    copy.write_bytes(path.read_bytes())
    assert prepare("folder", copy, PYTHON, kept) == made
    assert (made / "model.safetensors").stat().st_mtime_ns == written
    write_tiny(path, "qwen2")
    assert prepare("folder", path, PYTHON, kept) != made


def test_an_export_that_was_cut_short_is_not_taken_for_one(tmp_path: Path) -> None:
    path, kept = tmp_path / "tiny.gguf", tmp_path / "kept"
    write_tiny(path)
    made = prepare("folder", path, PYTHON, kept)
    made.rename(made.with_name("folder.part"))
    (made.with_name("folder.part") / "config.json").write_text("{")
    assert '"llama"' in (prepare("folder", path, PYTHON, kept) / "config.json").read_text()


def test_forms_that_need_no_work(tmp_path: Path) -> None:
    path, folder = tmp_path / "tiny.gguf", tmp_path / "folder"
    write_tiny(path)
    tiny_model("llama").save_pretrained(folder)
    assert prepare("gguf", path, PYTHON, tmp_path / "kept") == path
    assert prepare("folder", folder, PYTHON, tmp_path / "kept") == folder
    with pytest.raises(WorkerError, match="reads GGUF files"):
        prepare("gguf", folder, PYTHON, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("form", ["onnx", "ctranslate2"])
def test_a_converter_that_fails_says_why_and_leaves_nothing_to_trust(form: str, tmp_path: Path) -> None:
    """Under an interpreter without the converter's package."""
    path, kept = tmp_path / "tiny.gguf", tmp_path / "kept"
    write_tiny(path)
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    for _ in range(2):
        with pytest.raises(WorkerError, match="its converter failed.*No module named"):
            prepare(form, path, bare, kept)  # type: ignore[arg-type]


def test_a_converter_gets_the_folder_and_its_output_is_kept(tmp_path: Path) -> None:
    """With a converter of ours that copies the configuration it was given."""
    path, kept, called = tmp_path / "tiny.gguf", tmp_path / "kept", tmp_path / "called"
    write_tiny(path)
    fake = tmp_path / "python"
    lines = [
        "#!/bin/sh",
        'while [ "$1" != --model ]; do shift; done',
        f'cp "$2/config.json" "$4/"; echo "$@" >> "{called}"',
    ]
    fake.write_text("\n".join(lines) + "\n")
    fake.chmod(0o755)
    made = prepare("ctranslate2", path, fake, kept)
    assert '"llama"' in (made / "config.json").read_text()
    assert prepare("ctranslate2", path, fake, kept) == made
    assert len(called.read_text().splitlines()) == 1
