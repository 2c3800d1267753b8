"""fits what decides "not in the documents": python tools/answer_fit.py --index bank.idx --cmrc cmrc2018_trial.json

--index: an index of the 698 documents that tests/data/bank_tuning.jsonl asks about (docs/answer.md says where they come
from). --cmrc: CMRC 2018's trial set, for Chinese, where passages are found by words alone. Writes
src/millis/tasks/answerable.json and prints how well ten-fold cross-validation does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from millis.tasks.answerable import LOOK_AT, features
from millis.tasks.index import Index

ROOT = Path(__file__).parent.parent
TUNING = ROOT / "tests" / "data" / "bank_tuning.jsonl"
WEIGHTS = ROOT / "src" / "millis" / "tasks" / "answerable.json"
MEANING = ["cosine", "covered", "unknown"]
WORDS = ["words", "covered", "unknown", "missed"]
L2 = 0.3  # of standardised weights


def logistic(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights [F] and bias of an L2-regularised logistic regression of y [N] on x [N, F], by Newton's method."""
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-9
    z = np.column_stack([(x - mean) / std, np.ones(len(x))])
    ridge = np.diag([*[L2] * x.shape[1], 1e-6])
    b = np.zeros(z.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-z @ b))
        b -= np.linalg.solve(z.T @ (z * (p * (1 - p))[:, None]) + ridge, z.T @ (p - y) + ridge @ b)
    weights = b[:-1] / std
    return weights, float(b[-1] - weights @ mean)


def cross_validated(x: np.ndarray, y: np.ndarray, folds: int = 10, repeats: int = 5) -> dict[str, float]:
    """Shares of right decisions: of all questions, of those without an answer, of those with one."""
    right = []
    for seed in range(repeats):
        order = np.random.default_rng(seed).permutation(len(y))
        for fold in range(folds):
            held = order[fold::folds]
            rest = np.setdiff1d(order, held)
            weights, bias = logistic(x[rest], y[rest])
            right += [(bool(y[i]), bool((x[i] @ weights + bias > 0) == y[i])) for i in held]
    share = lambda kind: float(np.mean([ok for truth, ok in right if kind is None or truth is kind]))  # noqa: E731
    return {"all": share(None), "unanswerable": share(False), "answerable": share(True)}


def bank(index: Index, words_only: bool) -> tuple[list[dict[str, float]], list[bool]]:
    questions = [json.loads(line) for line in TUNING.read_text(encoding="utf-8").splitlines()]
    rows = []
    for q in questions:
        vector = None if words_only else index.embed(q["question"])
        found = index.search_with(vector, q["question"], LOOK_AT)
        if found.hits:  # nothing found needs no model
            rows.append((features(found), bool(q["documents"])))
    return [row for row, _ in rows], [truth for _, truth in rows]


def cmrc(path: Path, most: int = 120) -> tuple[list[dict[str, float]], list[bool]]:
    """One question for each context; every second context is indexed: its question has an answer there."""
    topics = json.loads(path.read_text(encoding="utf-8"))["data"][:most]
    documents = [{"id": t["id"], "title": t["title"], "text": t["paragraphs"][0]["context"]} for t in topics[::2]]
    questions = [t["paragraphs"][0]["qas"][0]["question"] for t in topics]
    with Index.of(documents, embedder=None) as index:
        found = [index.search(question, LOOK_AT) for question in questions]
    some = [i for i, f in enumerate(found) if f.hits]
    return [features(found[i]) for i in some], [i % 2 == 0 for i in some]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--cmrc", type=Path, required=True)
    options = parser.parse_args()
    with Index.open(options.index) as index:
        print(json.dumps(fit(index, options.cmrc), indent=2))


def fit(index: Index, cmrc_file: Path) -> dict[str, dict[str, float]]:
    meaning, words, chinese = bank(index, False), bank(index, True), cmrc(cmrc_file)
    fitted, report = {}, {}
    for kind, names, rows, truths in [
        ("meaning", MEANING, *meaning),
        ("words", WORDS, words[0] + chinese[0], words[1] + chinese[1]),
    ]:
        x, y = np.array([[row[name] for name in names] for row in rows]), np.array(truths)
        weights, bias = logistic(x, y)
        report[kind] = cross_validated(x, y)
        fitted[kind] = {"bias": round(bias, 4), "weights": dict(zip(names, weights.round(4).tolist(), strict=True))}
    x, y = np.array([[row[name] for name in WORDS] for row in chinese[0]]), np.array(chinese[1])
    w = fitted["words"]
    decided = x @ np.array([w["weights"][n] for n in WORDS]) + w["bias"] > 0
    report["words, Chinese only, not held out"] = {"all": float((decided == y).mean())}
    note = "Written by tools/answer_fit.py. P(answered) = 1 / (1 + exp(-(bias + sum of weight x feature)))."
    WEIGHTS.write_text(json.dumps({"note": note, "models": fitted}, indent=2) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
