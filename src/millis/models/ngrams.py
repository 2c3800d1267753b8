"""What the words of a text say for each label, beside what a network reads in it: a linear classifier on n-grams.

A text is the set of its tokens, and of its pairs of neighbours, each weighted by how rare it was in training (tf-idf
without counts; Spärck Jones, 1972), at unit length. Its logits are added to those of the network's head, as in wide and
deep learning (Cheng et al., 2016). It lies in a model's folder as ngrams.safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from millis.models.safetensors import read_safetensors
from millis.types import FormatError

FILE = "ngrams.safetensors"
TOKENS = 512  # of a text that are looked at
_NAMES = ("bias", "idf", "ngrams", "weights")
_NO_TOKEN = -1.0  # before the token of an n-gram of one


@dataclass(frozen=True, slots=True)
class Ngrams:
    """F n-grams and what each says for each of L labels. `keys`: sorted; see `ngrams_of`."""

    keys: NDArray[np.int64]  # [F]
    idf: NDArray[np.float32]  # [F]
    weights: NDArray[np.float32]  # [F, L]; a text of this n-gram alone has these logits, less the bias
    bias: NDArray[np.float32]  # [L]

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """[L] of a text. N-grams that training did not have are not there."""
        at, shares = known(self.keys, self.idf, ngrams_of(ids))
        found: NDArray[np.float32] = self.bias + shares @ self.weights[at]
        return found


def ngrams_of(ids: Sequence[int]) -> NDArray[np.int64]:
    """[n] the different tokens and pairs among the first TOKENS ids, sorted: a token as itself, a pair of a and b as
    2^32 (a + 1) + b."""
    tokens = np.asarray(ids[:TOKENS], np.int64)
    return np.unique(np.concatenate((tokens, _keys(tokens[:-1], tokens[1:]))))


def known(
    keys: NDArray[np.int64], idf: NDArray[np.float32], ngrams: NDArray[np.int64]
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Which of `keys` a text's n-grams are, and the share of each in the text: their idf, at unit length."""
    at = np.minimum(np.searchsorted(keys, ngrams), len(keys) - 1)
    at = at[keys[at] == ngrams]
    return at, idf[at] / max(1e-9, float(np.linalg.norm(idf[at])))


def _keys(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    found: NDArray[np.int64] = ((first + 1) << 32) | second
    return found


def as_tensors(ngrams: Ngrams) -> dict[str, NDArray[np.float32]]:
    """What the file holds. `ngrams` is [F, 2] the tokens of each, whole numbers; the first -1 where it has but one."""
    first, second = (ngrams.keys >> 32) - 1, ngrams.keys & 0xFFFFFFFF
    tokens = np.stack((first, second), axis=1).astype(np.float32)
    return {"ngrams": tokens, "idf": ngrams.idf, "weights": ngrams.weights, "bias": ngrams.bias}


def read_ngrams(folder: Path, vocab: int, labels: int) -> Ngrams | None:
    """What lies in a model's folder, None where nothing does. FormatError names what is malformed."""
    file = folder / FILE
    if not file.is_file():
        return None
    tensors = read_safetensors(file)
    if sorted(tensors) != list(_NAMES):
        raise FormatError(f"{FILE} must hold {', '.join(_NAMES)}, not {', '.join(sorted(tensors))!r:.80}")
    tokens = tensors["ngrams"].shape
    if len(tokens) != 2 or tokens[0] == 0:
        raise FormatError(f"{FILE}: ngrams must be a table of two columns and a row or more, not {tokens}")
    count = tokens[0]
    shapes = {"bias": (labels,), "idf": (count,), "ngrams": (count, 2), "weights": (count, labels)}
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.type.name != "F32" or tensor.shape != shape:
            raise FormatError(
                f"{FILE}: {name} is {tensor.type.name} {tensor.shape}; a model of {labels} labels has F32 {shape}"
            )
    values = {name: np.array(tensors[name].data.view(np.float32).reshape(shapes[name])) for name in shapes}
    if not all(np.isfinite(array).all() for array in values.values()) or not (values["idf"] > 0).all():
        raise FormatError(f"{FILE}: a value is not finite, or an idf not above 0")
    pairs = values["ngrams"]
    if not ((pairs == np.floor(pairs)) & (pairs >= (_NO_TOKEN, 0)) & (pairs < vocab)).all():
        raise FormatError(f"{FILE}: an n-gram names a token outside the vocabulary of {vocab}")
    keys = _keys(*pairs.astype(np.int64).T)
    if not (np.diff(keys) > 0).all():
        raise FormatError(f"{FILE}: the n-grams are not in order, each once")
    return Ngrams(keys, values["idf"], values["weights"], values["bias"])
