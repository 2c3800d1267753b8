"""Encoder: a loaded model that reads texts, as Python programs use it: vectors, and labels if trained for some.

Models of BERT's family read so, and decoders whose folder is what training for embeddings or labels left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, overload

import numpy as np
from numpy.typing import NDArray

from millis import hub
from millis.engine.decoder_reader import DecoderReader
from millis.engine.encoder_runner import EncoderRunner, Reader
from millis.engine.reading import Reading
from millis.engine.timely import TimelyReader
from millis.models.config import Head
from millis.models.load import is_encoder, load_model
from millis.models.ngrams import read_ngrams
from millis.tasks import checks
from millis.tasks.embed import token_ids, unit_vectors
from millis.tasks.model import Loaded, config_of, no_collection
from millis.tasks.readable import check_readable
from millis.tokenizer import Tokenizer, load_tokenizer, shortened
from millis.types import Classification, ModelError, RequestError, Timings, whole

OPTIONS = ("threads", "isa", "precision", "context", "max_batch_tokens")


class Encoder(Loaded):
    """A model that reads texts and writes none. Calls from several threads take turns; `close()` gives its memory back.

    name, progress, agree: as for LanguageModel. Options: those of EngineConfig that say how texts are read; `context`
    is the longest text in tokens. Raises ModelError (not found, not readable, no encoder), RequestError (a bad option).
    """

    def __init__(
        self,
        name: str | Path,
        *,
        progress: hub.Progress | None = None,
        agree: Callable[[hub.Entry], bool] | None = None,
        **options: Any,
    ) -> None:
        self.config = config_of("an encoder", OPTIONS, options)
        self.path: Path = hub.resolve(str(name), progress, agree, check_readable)
        if not is_encoder(self.path):
            raise ModelError(f"{name} is no encoder; millis.load or millis.LanguageModel loads it")
        with no_collection():
            self.model = load_model(self.path, self.config.context)
            self.tokenizer: Tokenizer = load_tokenizer(self.model.checkpoint)
            self._around = self.tokenizer.around
            config = self.model.checkpoint.config
            self._head, ngrams = config.head, None
            if self._head is not None:
                ngrams = read_ngrams(self.path, config.vocab, len(self._head.labels))
            suffix = self._around[1]
            self.runner: Reader
            if config.both_ways:
                end = suffix[0] if self.relates and config.token_types > 1 and suffix else None
                self.runner = EncoderRunner(self.model, self.config, ngrams, len(suffix), end)
            else:
                self.runner = DecoderReader(self.model, self.config, ngrams, len(suffix))
        self._timely = TimelyReader(
            self.runner.embeddings,
            self.runner.logits,
            context=self.runner.context,
            max_tokens=self.runner.max_tokens,
        )

    def _close(self) -> None:
        self.runner.close()

    @property
    def labels(self) -> tuple[str, ...]:
        """What `classify` tells apart, in the order of `logits`; empty where the model has no head."""
        return () if self._head is None else self._head.labels

    @property
    def relates(self) -> bool:
        """Whether it was trained to say how well one text fits another: a cross-encoder, whose head has one number."""
        config = self.model.checkpoint.config
        return config.both_ways and config.head is not None and len(config.head.labels) == 1

    def relevance(
        self, query: str, documents: Sequence[str], *, truncate: bool = False, deadline_ms: float | None = None
    ) -> NDArray[np.float32]:
        """[N] float32 in (0, 1), how well each document fits the query, which a cross-encoder reads together (Nogueira
        and Cho, 2019): the sigmoid of its logit. RequestError: the model is none, or as `embed`; the rest as there."""
        if not self.relates:
            raise RequestError(f"{self.path.name} was not trained to relate two texts; compare the vectors of .embed")
        self._prepare(deadline_ms)
        begin = time.perf_counter()
        asked, *texts = (
            self.tokenizer.encode(text, add_special=False)
            for text in (checks.text(query, "the query"), *checks.strings(documents, "documents"))
        )
        room = self.runner.context
        pairs = [self.tokenizer.pair(asked, text, room if truncate else None) for text in texts]
        for i, pair in enumerate(pairs):
            if len(pair) > room:
                raise RequestError(f"document {i} and the query have {len(pair)} tokens; {self.path.name} reads {room}")
        return sigmoid(self._read(pairs, True, begin, deadline_ms)[0][:, 0])

    def embed(
        self, texts: Sequence[str], *, truncate: bool = False, deadline_ms: float | None = None
    ) -> NDArray[np.float32]:
        """[N, D] float32, one vector of unit length a text, pooled as the model's files say: the mean unless they do.

        truncate: a text longer than the context is read as far as that goes. RequestError names the text that is empty
        or, unless truncate, too long.

        `deadline_ms` counts from the call and is that of all texts. DeadlineError: they cannot be read by then, which
        is said before any is; or it took longer than predicted. The first call with a deadline measures beforehand.
        """
        self._prepare(deadline_ms)
        begin = time.perf_counter()
        ids = self._ids(texts, truncate, self.runner.context)
        return unit_vectors(self._read(ids, False, begin, deadline_ms)[0])

    def logits(self, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.float32]:
        """[N, labels] float32, what the head says of each text before it is made a score. RequestError as `embed`.

        Where training left n-grams beside the head, a text may have as many tokens as they look at; the network reads
        those at the beginning.
        """
        self._trained()
        return self.runner.logits(self._ids(texts, truncate, self.runner.reads))

    @overload
    def classify(  # type: ignore[overload-overlap]
        self, text: str, *, top: int | None = None, truncate: bool = False, deadline_ms: float | None = None
    ) -> Classification: ...
    @overload
    def classify(
        self, text: Sequence[str], *, top: int | None = None, truncate: bool = False, deadline_ms: float | None = None
    ) -> list[Classification]: ...
    def classify(
        self,
        text: str | Sequence[str],
        *,
        top: int | None = None,
        truncate: bool = False,
        deadline_ms: float | None = None,
    ) -> Classification | list[Classification]:
        """The label of a text, or those of a list, whose timings are those of the whole call.

        Scores are the softmax of the logits; where a text may have several labels, the sigmoid of each. top: how many
        scores are wanted, all unless given. RequestError where the model was not trained to classify, or as `embed`;
        `deadline_ms` and DeadlineError, too.
        """
        head = self._trained()
        if head.problem == "regression":
            raise RequestError("this model gives a number and no label; use .logits")
        top = None if top is None else whole("top", top, 1)
        self._prepare(deadline_ms)
        begin = time.perf_counter()
        ids = self._ids([text] if isinstance(text, str) else text, truncate, self.runner.reads)
        encoded = time.perf_counter()
        logits, reading = self._read(ids, True, begin, deadline_ms)
        scores = sigmoid(logits) if head.problem == "multi_label" else softmax(logits)
        end = time.perf_counter()
        first = encoded if reading is None or reading.begin_s is None else reading.begin_s
        total_ms = 1000 * (end - begin)
        timings = Timings(
            queue_ms=1000 * (first - encoded),
            tokenize_ms=1000 * (encoded - begin),
            prefill_ms=1000 * (end - first),
            total_ms=total_ms,
            prompt_tokens=sum(map(len, ids)),
            steps=1 if reading is None else reading.steps,
            deadline_ms=None if deadline_ms is None else float(deadline_ms),
            slack_ms=None if deadline_ms is None else deadline_ms - total_ms,
        )
        found = [_classification(head.labels, row, top, timings) for row in scores]
        return found[0] if isinstance(text, str) else found

    def prepare_deadlines(self, deadline_ms: float = 1.0) -> None:
        """Measures what reading takes here, unless that was done. RequestError: no time that a deadline can be."""
        self._prepare(deadline_ms)

    def _prepare(self, deadline_ms: float | None) -> None:
        if checks.deadline(deadline_ms) is not None:
            self._timely.prepare(quick=False)

    def _read(
        self, ids: list[list[int]], head: bool, begin: float, deadline_ms: float | None
    ) -> tuple[NDArray[np.float32], Reading | None]:
        """[N, width or labels] of texts that came at `begin`, and with a deadline how they were read."""
        if deadline_ms is None:
            return (self.runner.logits if head else self.runner.embeddings)(ids), None
        return self._timely.read(ids, head=head, arrival_s=begin, deadline_ms=deadline_ms)

    def _trained(self) -> Head:
        if self._head is None:
            raise RequestError(
                f"{self.path.name} was not trained to classify; give it a head with `millis train`, or use .embed"
            )
        return self._head

    def _ids(self, texts: Sequence[str], truncate: bool, room: int) -> list[list[int]]:
        def cut(text: str) -> list[int]:
            return shortened(self.tokenizer.encode(text), room, self._around[1])

        return token_ids(cut if truncate else self.tokenizer.encode, texts, room)

    def generate(self, *args: object, **options: object) -> NoReturn:
        """Always a RequestError, as are `stream`, `chat`, `chat_stream` and `score`: an encoder writes nothing."""
        raise RequestError(
            f"{self.path.name} is an encoder, which writes no text; load a model that does, such as smollm2"
        )

    stream = chat = chat_stream = score = generate


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, labels] of rows that sum to 1."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores: NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
    return scores


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, labels], each in [0, 1]."""
    scores: NDArray[np.float32] = 0.5 * (1 + np.tanh(0.5 * logits))
    return scores


def _classification(
    labels: Sequence[str], row: NDArray[np.float32], top: int | None, timings: Timings
) -> Classification:
    order = (-row).argsort(kind="stable").tolist()
    values = row.tolist()
    scores: Mapping[str, float] = {labels[i]: values[i] for i in order[:top]}
    return Classification(label=labels[order[0]], scores=scores, timings=timings)
