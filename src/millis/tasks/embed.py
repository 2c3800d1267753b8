"""Embeddings: texts as vectors of unit length, by the mean of the model's final hidden states."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from millis.engine.engine import Engine
from millis.engine.timely import TimelyReader
from millis.tasks import checks
from millis.types import RequestError


def embed(
    engine: Engine,
    encode: Callable[[str], list[int]],
    texts: Sequence[str],
    reader: TimelyReader,
    deadline_ms: float | None = None,
) -> NDArray[np.float32]:
    """[N, D] float32, one vector of unit length a text; by `reader`, which knows what reading takes, by a deadline.

    RequestError names the text that is empty or too long. DeadlineError: as TimelyReader.read.
    """
    begin = time.perf_counter()
    ids = token_ids(encode, texts, engine.room)
    if deadline_ms is None:
        return unit_vectors(engine.embed(ids))
    return unit_vectors(reader.read(ids, head=False, arrival_s=begin, deadline_ms=deadline_ms)[0])


def token_ids(encode: Callable[[str], list[int]], texts: Sequence[str], room: int) -> list[list[int]]:
    """The ids of each text, at most `room`. RequestError names the text that is none, empty or too long."""
    if isinstance(texts, str):
        raise RequestError("texts must be a list; give [text] for a single one")
    prompts = []
    for i, text in enumerate(checks.texts(texts)[0]):
        prompts.append(encode(text))
        if not prompts[-1]:
            raise RequestError(f"text {i} has no token that this model knows; give it words of its language")
        if len(prompts[-1]) > room:
            raise RequestError(f"text {i} has {len(prompts[-1])} tokens; the context holds {room}: cut it into parts")
    if not prompts:
        raise RequestError("there is no text; give at least one")
    return prompts


def unit_vectors(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, D], each row divided by its length."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float32] = vectors / np.maximum(lengths, np.float32(1e-12))
    return unit
