"""The figures of docs/tasks.md on t5 and marian: python tools/seq2seq_figures.py [--threads 2] [--rounds 5].

Random models of the shapes of t5-small and of opus-mt's, written once into the user's cache; texts are random ids, and
every answer is as long as asked for. Engines one after the other, each in a process of its own; the best of the rounds.
ctranslate2, where it is installed, runs t5 in int8 from its own converter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

CACHE = Path.home() / ".cache" / "millis" / "seq2seq_figures"
WAYS = ((1, 1), (4, 1), (1, 8))  # beams, texts together
OPUS = {
    "vocab_size": 65001,
    "d_model": 512,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048,
    "max_position_embeddings": 512,
    "activation_function": "swish",
    "scale_embedding": True,
    "pad_token_id": 65000,
    "decoder_start_token_id": 65000,
    "eos_token_id": 0,
}
Run = Callable[[list[list[int]], int], Any]  # ids of the texts, beams


def make(family: str) -> Path:
    """The model's folder."""
    import torch
    from transformers import MarianConfig, MarianMTModel, T5Config, T5ForConditionalGeneration

    folder = CACHE / family
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(0)
        made = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0)) if family == "t5" else None
        (made or MarianMTModel(MarianConfig(**OPUS))).save_pretrained(folder)
    return folder


def ours(folder: Path, precision: str, threads: int, tokens: int) -> Run:
    from millis.config import EngineConfig
    from millis.engine.seq2seq import Wish, Writer
    from millis.engine.seq2seq_runner import Seq2SeqRunner
    from millis.models.generation import read_generation
    from millis.models.load import load_model
    from millis.types import SamplingParams

    model = load_model(folder)
    generation = replace(read_generation(folder, model.plan.vocab), min_length=tokens + 1, forced_end=None)
    writer = Writer(Seq2SeqRunner(model, EngineConfig(threads=threads, precision=precision)))  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=tokens)
    return lambda texts, beams: writer.write(texts, Wish(generation=generation, params=params, beams=beams))


def transformers(folder: Path, threads: int, tokens: int) -> Run:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    torch.set_num_threads(threads)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    exactly: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "forced_eos_token_id": None}

    def run(texts: list[list[int]], beams: int) -> Any:
        ids = torch.tensor(texts)
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=beams, do_sample=False, **exactly
        )

    return run


def ctranslate2(folder: Path, threads: int, tokens: int) -> Run:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    converted = folder / "ctranslate2"
    if not converted.is_dir():
        TransformersConverter(str(folder)).convert(str(converted), quantization="int8")
    words = json.loads((converted / "shared_vocabulary.json").read_text("utf-8"))
    translator = ctranslate2.Translator(str(converted), compute_type="int8", intra_threads=threads)
    exactly = {"max_decoding_length": tokens, "min_decoding_length": tokens}
    return lambda texts, beams: translator.translate_batch(
        [[words[token] for token in text] for text in texts], beam_size=beams, **exactly
    )


def measure(engine: str, family: str, threads: int, tokens: int, rounds: int) -> None:
    """Prints a line for each of WAYS."""
    folder = make(family)
    if engine in ("fast", "exact"):
        run = ours(folder, engine, threads, tokens)
    else:
        run = (transformers if engine == "transformers" else ctranslate2)(folder, threads, tokens)
    for beams, count in WAYS:
        texts = [np.random.default_rng(i).integers(3, 30000, 32).tolist() for i in range(count)]
        run(texts, beams)
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            run(texts, beams)
            times.append(time.perf_counter() - begin)
        per = f"{1000 * min(times) / count:7.1f} ms a text, {count * tokens / min(times):6.0f} tokens/s"
        print(f"{family:7} {engine:13} {beams} beams, {count} together: {per}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs=2, metavar=("ENGINE", "FAMILY"), help="one engine, in this process")
    given = parser.parse_args()
    if given.only:
        return measure(*given.only, given.threads, given.tokens, given.rounds)
    for family in ("t5", "marian"):
        for engine in ("fast", "exact", "transformers", "ctranslate2"):
            if engine != "ctranslate2" or family == "t5":
                sizes = ["--threads", str(given.threads), "--tokens", str(given.tokens), "--rounds", str(given.rounds)]
                subprocess.run([sys.executable, __file__, *sizes, "--only", engine, family], check=False)


if __name__ == "__main__":
    main()
