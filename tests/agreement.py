"""How closely Millis follows the float32 reference: greedy continuations and the next-token distribution.

As a program, it measures all prompts: python tests/agreement.py smollm2 [--precision exact] [--llama-cpp]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import millis
from millis.engine.runner import Batch
from prompts import texts
from reference import next_logits, reference_model


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
    """[T] KL(reference ‖ other) of two [T, vocab] arrays of logits, in nats; a few rows at a time, to save memory."""
    parts = []
    for at in range(0, len(reference), 32):
        p, q = (x[at : at + 32].astype(np.float64) for x in (reference, other))
        p, q = (x - x.max(-1, keepdims=True) for x in (p, q))
        p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
        parts.append((np.exp(p) * (p - q)).sum(-1))
    return np.concatenate(parts)


def all_logits(lm: millis.LanguageModel, ids: list[int]) -> np.ndarray:
    """[T, vocab] logits of Millis after every token."""
    pages = np.arange(-(-len(ids) // lm.runner.page_tokens), dtype=np.int32)[None]
    ints = [np.asarray(x, np.int32) for x in (ids, [0], [len(ids)])]
    return lm.runner.logits(Batch(*ints, pages), every=True)


def compare(
    lm: millis.LanguageModel,
    reference: Callable[[tuple[int, ...]], np.ndarray],
    prompts: list[list[int]],
    tokens: int,
    kl_tokens: int = 1024,
    peer: Any = None,
) -> Report:
    """What Millis continues each prompt by, `tokens` of them, against the reference's choices in the same places.

    `reference` gives the [T, vocab] logits after each of T tokens: one forward says whether an answer is greedy. KL is
    that of each prompt's first `kl_tokens`.
    """
    report = Report()
    for ids in prompts:
        got = lm.generate(ids, max_tokens=tokens, ignore_eos=True).tokens
        logits = reference((*ids, *got[:-1]))
        chosen = logits[len(ids) - 1 :]  # before each token of the answer
        split = next((i for i, (a, b) in enumerate(zip(got, chosen.argmax(-1), strict=True)) if a != b), None)
        if split is None:
            report.same += 1
        else:
            second, best = np.partition(chosen[split], -2)[-2:]
            report.margins.append(float(best - second))
        head = ids[:kl_tokens]
        report.kl += divergence(logits[: len(head)], all_logits(lm, head)).tolist()
        if peer is not None:
            peer.reset()
            peer.eval(head)
            report.peer_kl += divergence(logits[: len(head)], np.array(peer.scores[: len(head)])).tolist()
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

    model = reference_model(Path(lm.path))
    torch.set_num_threads(os.cpu_count() or 1)
    total = Report()
    for ids in token_prompts(lm, args.prompts):
        one = compare(lm, lambda text: next_logits(model, list(text)), [ids], 64, peer=peer)
        total.same += one.same
        total.margins += one.margins
        total.kl += one.kl
        total.peer_kl += one.peer_kl
    print(args.model, args.precision, total)


if __name__ == "__main__":
    main()
