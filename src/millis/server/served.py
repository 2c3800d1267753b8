"""A model that is served: its engine process, its tokenizer, its figures, and which endpoints it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from millis.models.load import read_checkpoint
from millis.server.api.errors import ApiError
from millis.server.api.job import Endpoint
from millis.server.client import EngineClient
from millis.server.metrics import Metrics
from millis.tokenizer import Recent, Tokenizer, load_tokenizer

REWRITING: frozenset[Endpoint] = frozenset(("chat", "completions", "tokenize", "detokenize"))
READING: frozenset[Endpoint] = frozenset(("embeddings", "score", "rerank", "tokenize", "detokenize"))
WRITER = "a model that writes, such as smollm2"
LANGUAGE_MODEL = "a language model, such as smollm2"
NEEDED: Mapping[Endpoint, str] = {
    "classify": f"{WRITER}, or an encoder trained by millis train --task classify",
}


class Model:
    """One model. `reads`: it is an encoder, which writes nothing; `rewrites`: an encoder-decoder model, which answers a
    text with another. `tokenizer` comes when it is loaded."""

    def __init__(
        self,
        name: str,
        path: Path,
        client: EngineClient,
        metrics: Metrics,
        *,
        reads: bool = False,
        rewrites: bool = False,
        indexed: bool = False,
    ) -> None:
        self.name = name
        self.path = path
        self.client = client
        self.metrics = metrics
        self.reads = reads
        self.rewrites = rewrites
        self.indexed = indexed  # the server has an index to answer from
        self.tokenizer: Tokenizer | None = None
        self.recent = Recent()
        client.on_stats = metrics.observe

    @property
    def ready(self) -> bool:
        """Whether it answers now."""
        return self.tokenizer is not None and self.client.ready

    @property
    def labels(self) -> tuple[str, ...]:
        """What it was trained to tell; () where it was not."""
        head = None if self.client.info is None else self.client.info.head
        return () if head is None or head.problem == "regression" else head.labels

    def answers(self, endpoint: Endpoint) -> bool:
        """Whether it does what is asked there."""
        if endpoint == "answer":
            return self.indexed  # by quotes alone where it writes nothing
        if self.rewrites:
            return endpoint in REWRITING
        return not self.reads or endpoint in READING or (endpoint == "classify" and bool(self.labels))

    def check(self, endpoint: Endpoint, path: str, others: Sequence[Model], param: str = "model") -> None:
        """ApiError 400 where it does not answer an endpoint; it says what would, and which of `others` does.

        param: the field that names it.
        """
        if self.answers(endpoint):
            return
        if endpoint == "answer":
            message = f"{path} answers from an index, and none is served here; start the server with --index FILE"
            raise ApiError(400, message, code="no_index")
        served = [other.name for other in others if other.answers(endpoint)]
        here = f"; here that is {', '.join(served[:20])}" if served else "; none is served here"
        lack = "was not trained to classify" if endpoint == "classify" else "is an encoder, which writes no text"
        if self.rewrites:
            lack = "is an encoder-decoder model, which answers a text with another"
        needed = LANGUAGE_MODEL if self.rewrites else NEEDED.get(endpoint, WRITER)
        message = f"{self.name} {lack}: {path} needs {needed}{here}"
        raise ApiError(400, message, param=param, code="unsupported_model")

    async def load(self) -> None:
        """Starts its process and reads its tokenizer. ModelError: it cannot be loaded."""
        loop = asyncio.get_running_loop()
        self.tokenizer, _ = await asyncio.gather(loop.run_in_executor(None, _tokenizer, self.path), self.client.start())


def _tokenizer(path: Path) -> Tokenizer:
    tokenizer = load_tokenizer(read_checkpoint(path))
    if tokenizer.has_chat_template:  # compiled now, not when the first request waits
        tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    return tokenizer
