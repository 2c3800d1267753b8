"""How closely Millis follows the float32 reference: greedy continuations and the next-token distribution.

As a program, it measures all prompts: python tests/agreement.py smollm2 [--precision exact] [--llama-cpp]
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import millis
from millis.engine.runner import Batch
from prompts import texts
from reference import greedy, next_logits, reference_model


@dataclass
class Report:
    same: int = 0  # continuations that agree to the end
    margins: list[float] = field(default_factory=list)  # of the reference where the others first differ
    kl: list[float] = field(default_factory=list)  # nats, one a position
    peer_kl: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        worst = max(self.margins, default=0.0)
        text = (
            f"{self.same} identical, {len(self.margins)} differ, largest margin {worst:.4f}, KL {np.mean(self.kl):.6f}"
        )
        return text + (f", llama.cpp's {np.mean(self.peer_kl):.6f}" if self.peer_kl else "")


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[T] KL(reference ‖ other) of two rows of logits, in nats."""
    p, q = (x.astype(np.float64) - x.max(-1, keepdims=True) for x in (reference, other))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


def all_logits(lm: millis.LanguageModel, ids: list[int]) -> np.ndarray:
    """[T, vocab] logits of Millis after every token."""
    pages = np.arange(-(-len(ids) // lm.runner.page_tokens), dtype=np.int32)[None]
    ints = [np.asarray(x, np.int32) for x in (ids, [0], [len(ids)])]
    return lm.runner.logits(Batch(*ints, pages), every=True)


def compare(
    lm: millis.LanguageModel, reference: Any, prompts: list[list[int]], tokens: int, peer: Any = None
) -> Report:
    report = Report()
    for ids in prompts:
        want, margins = greedy(reference, ids, tokens)
        got = lm.generate(ids, max_tokens=tokens, ignore_eos=True).tokens
        assert len(got) == len(want) == tokens
        split = next((i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b), None)
        if split is None:
            report.same += 1
        else:
            report.margins.append(margins[split])
        logits = next_logits(reference, ids)
        report.kl += divergence(logits, all_logits(lm, ids)).tolist()
        if peer is not None:
            peer.reset()
            peer.eval(ids)
            report.peer_kl += divergence(logits, np.array(peer.scores[: len(ids)])).tolist()
    return report


def token_prompts(lm: millis.LanguageModel, count: int | None = None) -> list[list[int]]:
    """The first `count` prompts as ids of at least 16 tokens; a spread of all kinds."""
    chosen = texts() if count is None else texts()[:: max(1, 20 // count)][:count]
    prompts = [lm.tokenizer.encode(text)[:keep] for text, keep in chosen]
    return [(ids * 16)[:16] if len(ids) < 16 else ids for ids in prompts]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--precision", default="fast")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--llama-cpp", action="store_true")
    args = parser.parse_args()
    lm = millis.load(args.model, precision=args.precision, max_batch_tokens=1024)
    peer = None
    if args.llama_cpp:
        import llama_cpp

        peer = llama_cpp.Llama(str(lm.path), n_ctx=1024, n_threads=2, logits_all=True, verbose=False)
    import torch

    reference = reference_model(Path(lm.path))
    torch.set_num_threads(os.cpu_count() or 1)
    print(args.model, args.precision, compare(lm, reference, token_prompts(lm, args.prompts), 64, peer))


if __name__ == "__main__":
    main()
