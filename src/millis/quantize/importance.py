"""What an error in each weight costs: by column from what the products are fed, by row from the loss's gradients.

An error Δ in W changes y = x · Wᵀ by x · Δᵀ, and the model's distribution by about ½ Σ_o Σ_c E[g_o²] E[x_c²] Δ_oc²
nats a token, if inputs, gradients and errors are independent: the diagonal of K-FAC (Martens and Grosse, 2015). Column
means are what others call an importance matrix; row means tell tensors and layers apart.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millis.files import whole
from millis.models.load import Model
from millis.quantize.gradients import Floats, Gradients
from millis.types import FormatError

_VERSION = 1
_FLOOR = 1e-3  # of a mean: a column that was never fed in the sample is not free


@dataclass(frozen=True, slots=True)
class Importance:
    """Of one matrix. `embedding`: what a squared error costs where rows are looked up; 0 where they are not."""

    columns: Floats  # [inputs] mean squared input
    rows: Floats  # [outputs] mean squared gradient, nats² per unit of output
    embedding: float = 0.0

    def cost(self, errors: NDArray[np.float64]) -> float:
        """Nats a token, for each row's squared error weighted by `columns` [outputs]."""
        looked_up = self.embedding * float(errors.sum()) / max(float(self.columns.sum()), 1e-30)
        return 0.5 * (float(np.sum(self.rows * errors)) + looked_up)

    def sample(self, count: int) -> NDArray[np.int64]:
        """[count] rows, some perhaps twice: as often as they are costly, evenly where none is."""
        total = np.cumsum(self.rows, dtype=np.float64)
        if total[-1] <= 0:
            return np.arange(count) * len(total) // count
        found: NDArray[np.int64] = np.searchsorted(total, (np.arange(count) + 0.5) / count * total[-1]).astype(np.int64)
        return found

    def cost_of_sample(self, errors: NDArray[np.float64]) -> float:
        """What `cost` of all rows should be, from the errors of those of `sample`."""
        mean, rows = float(errors.mean()), len(self.rows)
        looked_up = self.embedding * mean * rows / max(float(self.columns.sum()), 1e-30)
        return 0.5 * (float(self.rows.sum(dtype=np.float64)) * mean + looked_up)


class _Means:
    """Sums of squares over all tokens."""

    def __init__(self) -> None:
        self.columns: dict[str, NDArray[np.float64]] = {}
        self.rows: dict[str, NDArray[np.float64]] = {}
        self.embeddings: dict[str, float] = {}

    def product(self, name: str, x: Floats, gradient: Floats) -> None:
        for sums, values in ((self.columns, x), (self.rows, gradient)):
            sums[name] = sums.get(name, 0) + np.einsum("ti,ti->i", values, values).astype(np.float64)

    def embedding(self, name: str, gradient: Floats) -> None:
        self.embeddings[name] = self.embeddings.get(name, 0) + float(np.sum(gradient.astype(np.float64) ** 2))


def measure(
    model: Model, windows: Sequence[Sequence[int]], advance: Callable[[], None] = lambda: None
) -> dict[str, Importance]:
    """Name → importance of every matrix that the plan multiplies by, or looks up rows of, over `windows` of ids."""
    means, rng = _Means(), np.random.default_rng(0)
    gradients = Gradients(model.plan, model.checkpoint.tensors, means)
    for window in windows:
        gradients.run(window, rng)
        advance()
    tokens = sum(map(len, windows))
    found = {}
    for name, columns in means.columns.items():
        looked_up = means.embeddings.get(name, 0.0) / tokens / len(means.rows[name])
        found[name] = Importance(_floored(columns / tokens), (means.rows[name] / tokens).astype(np.float32), looked_up)
    for name, total in means.embeddings.items():
        if name not in found:
            rows, width = model.checkpoint.tensors[name].shape
            found[name] = Importance(np.ones(width, np.float32), np.zeros(rows, np.float32), total / tokens / rows)
    return found


def _floored(columns: NDArray[np.float64]) -> Floats:
    mean = float(columns.mean())
    out: Floats = np.maximum(columns, _FLOOR * mean if mean > 0 else 1.0).astype(np.float32)
    return out


def digest(model: bytes, windows: Sequence[Sequence[int]]) -> str:
    """What an importance was measured on: the model's fingerprint and the ids."""
    text = b"".join(np.asarray(window, np.int32).tobytes() + b";" for window in windows)
    return blake2b(model + text, digest_size=16).hexdigest()


def save(path: Path, importance: dict[str, Importance], key: str) -> None:
    """Writes all of it to `path`, whole or not at all. `key`: what it was measured on."""
    arrays: dict[str, Any] = {"version": np.array(_VERSION), "key": np.array(key)}
    for name, found in importance.items():
        arrays |= {f"{name}/columns": found.columns, f"{name}/rows": found.rows, f"{name}/embedding": found.embedding}
    with whole(path) as file:
        np.savez(file, **arrays)


def load(path: Path, key: str) -> dict[str, Importance] | None:
    """What `save` wrote under the same key; None: no such file, or another key's. FormatError: damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            if int(arrays["version"]) != _VERSION or str(arrays["key"]) != key:
                return None
            names = [name.removesuffix("/columns") for name in arrays.files if name.endswith("/columns")]
            return {
                name: Importance(arrays[f"{name}/columns"], arrays[f"{name}/rows"], float(arrays[f"{name}/embedding"]))
                for name in names
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise FormatError(f"{path} is no importance matrix of Millis; give another name for it") from None
