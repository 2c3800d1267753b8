"""whether documents answer a question: a logistic regression over what the search found"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from millis.documents.terms import terms
from millis.tasks.index import Found

LOOK_AT = 8  # hits: the best decides, the next are quoted


@dataclass(frozen=True, slots=True)
class Model:
    """P(answered) = 1 / (1 + exp(-(bias + Σ weight · feature)))."""

    bias: float
    weights: dict[str, float]

    def probability(self, features: dict[str, float]) -> float:
        z = self.bias + sum(weight * features[name] for name, weight in self.weights.items())
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, z))))


def probability(found: Found) -> float:
    """How probable it is that the documents answer the question, by the best passages; 0 where nothing was found."""
    if not found.hits:
        return 0.0
    kind = "words" if found.hits[0].cosine is None else "meaning"
    return models()[kind].probability(features(found))


@cache
def models() -> dict[str, Model]:
    """The fitted models: `meaning` where passages have cosines, `words` where they have not."""
    fitted = json.loads(files("millis.tasks").joinpath("answerable.json").read_text(encoding="utf-8"))
    return {kind: Model(m["bias"], m["weights"]) for kind, m in fitted["models"].items()}


def features(found: Found) -> dict[str, float]:
    """What tells an answered question from another. Shares are of the summed idf of the question's terms.

    cosine, words: of the best hit, as `Hit` has them; covered: the share that its passage holds; unknown: the share of
    terms that no document holds; missed: the rarest term that its document lacks, as a share of an unknown one's.
    """
    best, idf = found.hits[0], found.idf
    total = sum(idf.values()) or 1.0
    in_passage = set(terms(f"{best.document.title}\n{best.span.heading}\n{best.text}"))
    in_document = in_passage | set(terms(best.document.text))
    return {
        "cosine": best.cosine or 0.0,
        "words": best.words,
        "covered": sum(v for term, v in idf.items() if term in in_passage) / total,
        "unknown": sum(v for term, v in idf.items() if term in found.unknown) / total,
        "missed": max((v for term, v in idf.items() if term not in in_document), default=0.0) / found.most,
    }
