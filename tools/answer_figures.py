"""the figures of docs/answer.md: python tools/answer_figures.py --index bank.idx [--scale] [--misses]

--index: an index of the 698 documents that tests/data/bank_questions.jsonl asks about. --scale: retrieval over 100,000
passages instead, made by mixing lines of the documents and noise into their vectors.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from millis.documents.passages import Span
from millis.documents.store import Document, Entry
from millis.documents.terms import terms
from millis.documents.vectors import quantise
from millis.tasks.answer import ask
from millis.tasks.answerable import LOOK_AT
from millis.tasks.index import Index
from millis.tasks.model import LanguageModel

QUESTIONS = Path(__file__).parent.parent / "tests" / "data" / "bank_questions.jsonl"
SCALE = 100_000
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--misses", action="store_true", help="also which questions went wrong")
    options = parser.parse_args()
    questions = [json.loads(line) for line in options.questions.read_text(encoding="utf-8").splitlines()]
    with Index.open(options.index) as index:
        if options.scale:
            record = at_scale(index, questions)
        else:
            lm = LanguageModel(options.model, threads=options.threads, prefix_cache=True)
            record = figures(index, lm, questions, misses=options.misses)
        print(json.dumps(record, indent=2))


def figures(index: Index, lm: LanguageModel, questions: list[dict[str, Any]], *, misses: bool) -> dict[str, Any]:
    answers = [ask(lm, q["question"], index).result() for q in questions]
    truths = [bool(q["documents"]) for q in questions]
    ranks = [rank(index, q) for q in questions if q["documents"]]
    right = [answer.found == truth for answer, truth in zip(answers, truths, strict=True)]
    written = [answer for answer in answers if answer.timings.first_token_ms]
    record: dict[str, Any] = {
        "questions": len(questions),
        "passages": len(index),
        "right document first": share([r == 1 for r in ranks]),
        "right document in the top 3": share([r <= 3 for r in ranks]),
        "found or not found, right": share(right),
        "right where there is no answer": share([ok for ok, truth in zip(right, truths, strict=True) if not truth]),
        "right where there is one": share([ok for ok, truth in zip(right, truths, strict=True) if truth]),
        "model's sentence taken": share([answer.written == "model" for answer in written]),
        "ms until the quote": percentiles([a.timings.quote_ms for a in answers]),
        "ms until the model's first token": percentiles([a.timings.first_token_ms for a in written]),
        "ms until the answer is whole": percentiles([a.timings.total_ms for a in written]),
        "prompt tokens not cached": percentiles([a.timings.prompt_tokens - a.timings.cached_tokens for a in written]),
    }
    if misses:
        record["misses"] = [
            f"{a.question} ({a.probability:.2f})" for a, ok in zip(answers, right, strict=True) if not ok
        ] + [q["question"] for q in questions if q["documents"] and rank(index, q) > 3]
    return record


def rank(index: Index, question: dict[str, Any]) -> int:
    """Where the first right document stands among the documents found."""
    found = dict.fromkeys(hit.document.id for hit in index.search(question["question"], 30).hits)
    return next((i for i, id in enumerate(found, 1) if id in question["documents"]), len(found) + 1)


def at_scale(index: Index, questions: list[dict[str, Any]]) -> dict[str, Any]:
    """Retrieval over SCALE passages: loading, searching with and without the question's vector, adding one document."""
    rng, noise = random.Random(0), np.random.default_rng(0)
    store = index._store
    now = store.snapshot()
    texts = [d.text[s.start : s.stop] for d, s in (store.passage(int(n)) for n in now.numbers)]
    bags = [Counter(terms(text)) for text in texts]
    codes = now.vectors._codes.astype(np.float32) * now.vectors._scale[:, None]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scale.idx"
        with Index.open(path, create=True) as large:
            entries = []
            for number in range(SCALE // 100):
                rows = [rng.randrange(len(texts)) for _ in range(200)]
                mixed = [bags[a] + bags[b] for a, b in zip(rows[::2], rows[1::2], strict=True)]
                vectors = codes[rows[::2]] + noise.standard_normal((100, codes.shape[1])) * 0.03
                passages = [
                    Entry(Span(0, 1, ""), bag, code)
                    for bag, code in zip(mixed, quantise(vectors.astype(np.float32)), strict=True)
                ]
                entries.append((Document(str(number), "", "-"), passages))
            large._store.put(entries)
        with Index.open(path) as large:
            begin = time.perf_counter()
            count = len(large)
            load_ms = 1000 * (time.perf_counter() - begin)
            vectors = [large.embed(q["question"]) for q in questions]
            search, whole = [], []
            for _ in range(ROUNDS):
                for q, vector in zip(questions, vectors, strict=True):
                    search.append(timed(lambda q=q, v=vector: large.search_with(v, q["question"], LOOK_AT)))
                    whole.append(timed(lambda q=q: large.search(q["question"], LOOK_AT)))
            common = [t for t, n in now.terms.items() if n in set(np.argsort(now.postings.idf)[:10].tolist())]
            usual = [timed(lambda: large.search_with(vectors[0], " ".join(common), LOOK_AT)) for _ in range(20)]
            return {
                "passages": count,
                "load ms": round(load_ms),
                "file MB": round(path.stat().st_size / 1e6, 1),
                "search ms, vector given": percentiles(search),
                "search ms, with the question's vector": percentiles(whole),
                "search ms, the ten commonest terms, vector given": percentiles(usual),
            }


def timed(call: Any) -> float:
    begin = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begin)


def share(values: list[bool]) -> str:
    return f"{sum(values)} of {len(values)} ({100 * sum(values) / max(len(values), 1):.1f} %)"


def percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{p}": round(float(np.percentile(values, p)), 1) for p in (50, 90, 99)}


if __name__ == "__main__":
    main()
