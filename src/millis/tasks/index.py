"""Index: documents in one file, found by their words (BM25) and their meaning (embeddings) together."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from millis.documents.bm25 import top
from millis.documents.passages import Span, passages
from millis.documents.reader import from_values
from millis.documents.store import Document, Entry, Snapshot, Store
from millis.documents.terms import is_cjk, question_terms, terms
from millis.documents.vectors import quantise
from millis.tasks import checks
from millis.types import FormatError, RequestError, brief, whole

if TYPE_CHECKING:
    from millis.tasks.encoder import Encoder

CANDIDATES = 100  # passages by words, and as many by meaning
EMBED_TOGETHER = 64  # passages


class Embedder(Protocol):
    """What makes vectors of texts: LanguageModel is one."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[N, D] float32 of unit length."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A passage that was found: document.text[span.start:span.stop].

    words: its BM25 score as a share of the sum of the question's idf, which makes scores of different questions
    comparable; cosine: between question and passage, None where meanings were not compared; score: what hits are
    ordered by.
    """

    document: Document
    span: Span
    score: float
    words: float
    cosine: float | None

    @property
    def text(self) -> str:
        return self.document.text[self.span.start : self.span.stop]


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found, best first, and how rare each of the question's terms is in these documents."""

    hits: list[Hit]
    idf: dict[str, float]
    unknown: frozenset[str]  # terms that no passage holds
    most: float  # the idf of such a term


@dataclass(frozen=True, slots=True)
class Change:
    """What a change of an index came to, in documents."""

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    deleted: int = 0


class Index:
    """An index file that is open for searches and changes; several threads and processes may share the file.

    Open one with `Index.open`. A change by another process is seen by the next search.
    """

    def __init__(self, store: Store, embedder: Callable[[], Embedder] | None) -> None:
        self.path = store.path
        self._store = store
        self._load_embedder = embedder
        self._embedder: Embedder | None = None
        self._lock = threading.RLock()
        self._snapshot: tuple[tuple[int, int], Snapshot] | None = None

    @classmethod
    def open(cls, path: str | Path, *, embedder: str | Embedder | None = "minilm", create: bool = False) -> Index:
        """Opens an index file; `create`: makes an empty one where there is none.

        embedder: a model's name, loaded when it is first needed, or an object with `embed`. None: words alone; so do
        questions in Chinese, Japanese or Korean with "minilm", which knows English only. An index keeps the kind it
        was made with. RequestError: no such file, or another embedder than it was made with. FormatError: no index.
        """
        if not isinstance(embedder, str | None) and not callable(getattr(embedder, "embed", None)):
            raise RequestError(
                f"embedder must be a model's name, an object with `embed`, or None, not {brief(embedder)}"
            )
        name = embedder if isinstance(embedder, str | None) else getattr(embedder, "name", type(embedder).__name__)
        store = Store(checks.path(path, "an index"), create=create)
        try:
            made_with = store.setting("embedder")
            if made_with is None:
                store.set("embedder", name or "")
            elif made_with == "" and embedder == "minilm":
                name = embedder = None
            elif made_with != (name or ""):
                raise RequestError(f"{path} was made with the embedder {made_with or 'none'}, not {name or 'none'}")
        except BaseException:
            store.close()
            raise
        index = cls(store, None if embedder is None else lambda: _embedder(embedder))
        index._english_only = name == "minilm"
        return index

    @classmethod
    def of(cls, documents: Iterable[Document | Mapping[str, Any] | str], *, embedder: str | Embedder | None) -> Index:
        """An index in memory, of documents as `add` takes them."""
        index = cls.open(":memory:", embedder=embedder, create=True)
        index.add(documents)
        return index

    _english_only = False

    def __len__(self) -> int:
        """How many passages there are."""
        with self._lock:
            return self._current().postings.size

    def __enter__(self) -> Index:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._store.close()

    def ids(self) -> list[str]:
        """The ids of all documents."""
        with self._lock:
            return list(self._store.documents())

    def add(
        self,
        documents: Iterable[Document | Mapping[str, Any] | str],
        *,
        delete: Iterable[str] = (),
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Change:
        """Adds documents, replaces those whose id is known and whose title or text has changed, deletes others by id.

        Documents are objects or mappings of id, title and text, or plain texts, which are always added, under ids that
        are numbers not used yet. All or nothing: until it returns, searches see the index as it was. `progress` is told
        passages embedded and passages in all.
        """
        with self._lock:
            known = self._store.documents()
            new: dict[str, Document] = {}
            first = 1 + max((int(id) for id in known if id.isdecimal() and len(id) < 19), default=0)
            for document in from_values(documents, first):
                if new.setdefault(document.id, document) != document:
                    raise RequestError(f"two documents have the id {brief(document.id)}; give each its own")
            deleted = list(dict.fromkeys(checks.strings(delete, "the ids to delete")))
            unknown = [id for id in deleted if id not in known or id in new]
            if unknown:
                raise RequestError(
                    f"cannot delete {unknown[0]!r}: the index holds no such document, or it is added; "
                    "a file's id is its path as it was given"
                )
            changed = [d for d in new.values() if known.get(d.id) != (d.title, d.text)]
            self._store.put(zip(changed, self._entries(changed, progress), strict=True), deleted)
            updated = sum(d.id in known for d in changed)
            return Change(len(changed) - updated, updated, len(new) - len(changed), len(deleted))

    def delete(self, ids: Iterable[str]) -> Change:
        """Deletes documents by id. RequestError names one that is not there, and then none is deleted."""
        return self.add([], delete=[ids] if isinstance(ids, str) else ids)

    def embed(self, question: str) -> NDArray[np.float32] | None:
        """[D] float32: a question's vector, or None where meanings are not compared."""
        if not self.compares_meanings(question):
            return None
        vector: NDArray[np.float32] = self._vectors([question])[0]
        return vector

    def compares_meanings(self, question: str) -> bool:
        """Whether a question is searched by its vector, too, and not by its words alone."""
        return self._load_embedder is not None and not (self._english_only and is_cjk(question))

    def search(self, question: str, count: int = 10) -> Found:
        """The passages that fit a question best."""
        checks.text(question, "the question")
        return self.search_with(self.embed(question), question, count)

    def search_with(self, vector: NDArray[np.float32] | None, question: str, count: int = 10) -> Found:
        """As `search`, for a question whose vector, or None, is there already."""
        count = whole("count", count, 0)
        with self._lock:
            for _ in range(10):
                try:
                    return self._search(self._current(), question, vector, count)
                except FormatError as error:
                    if "search again" not in str(error):
                        raise
                    if self._snapshot is not None and self._snapshot[0] == self._store.version():
                        raise self._store.damaged("a passage has no document") from None
            raise RequestError(f"{self.path} changes too fast to be searched; try later")

    def _search(self, now: Snapshot, question: str, vector: NDArray[np.float32] | None, count: int) -> Found:
        asked = question_terms(question)
        known = [now.terms[t] for t in asked if t in now.terms]
        most = float(np.log1p((now.postings.size + 0.5) / 0.5))  # BM25's idf of a term that no passage holds
        idf = {t: float(now.postings.idf[now.terms[t]]) if t in now.terms else most for t in asked}
        total = sum(idf.values()) or 1.0
        words = now.postings.scores(known) / np.float32(total)
        rows, _ = top(words, CANDIDATES)
        scores = words[rows]
        cosines: NDArray[np.float32] | None = None
        if vector is not None and now.postings.size:
            near, _ = now.vectors.best(vector, CANDIDATES)
            rows = np.union1d(rows, near)
            cosines = now.vectors.cosines(vector, rows)
            scores = words[rows] + cosines
        hits = []
        for i in np.argsort(-scores, kind="stable")[:count].tolist():
            document, span = self._store.passage(int(now.numbers[rows[i]]))
            cosine = None if cosines is None else float(cosines[i])
            hit = Hit(document=document, span=span, score=float(scores[i]), words=float(words[rows[i]]), cosine=cosine)
            hits.append(hit)
        return Found(hits, idf, frozenset(t for t in asked if idf[t] > most - 1e-4), most)

    def _current(self) -> Snapshot:
        """The passages as the file has them now."""
        version = self._store.version()
        if self._snapshot is None or self._snapshot[0] != version:
            self._snapshot = version, self._store.snapshot()
        return self._snapshot[1]

    def _entries(self, documents: Sequence[Document], progress: Callable[[int, int], None]) -> list[list[Entry]]:
        """The passages of documents with what they are found by."""
        spans = [(document, span) for document in documents for span in passages(document.text)]
        texts = [f"{d.title}\n{span.heading}\n{d.text[span.start : span.stop]}" for d, span in spans]
        codes = self._codes(texts, progress)
        found: dict[str, list[Entry]] = {document.id: [] for document in documents}
        for (document, span), text, code in zip(spans, texts, codes, strict=True):
            found[document.id].append(Entry(span, Counter(terms(text)), code))
        return [found[document.id] for document in documents]

    def _codes(self, texts: list[str], progress: Callable[[int, int], None]) -> Iterable[NDArray[np.int8]]:
        if self._load_embedder is None:
            return [np.empty(0, np.int8)] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # alike lengths share a step
        codes: list[NDArray[np.int8]] = [np.empty(0, np.int8)] * len(texts)
        for begin in range(0, len(order), EMBED_TOGETHER):
            some = order[begin : begin + EMBED_TOGETHER]
            for i, code in zip(some, quantise(self._vectors([texts[i] for i in some])), strict=True):
                codes[i] = code
            progress(begin + len(some), len(order))
        return codes

    def _vectors(self, texts: list[str]) -> NDArray[np.float32]:
        assert self._load_embedder is not None
        with self._lock:
            if self._embedder is None:
                self._embedder = self._load_embedder()
            return self._embedder.embed(texts)


def embedder_of(path: Path) -> str | None:
    """The name of the model that an index file was made with; None: words alone. RequestError, FormatError."""
    store = Store(path, create=False)
    try:
        return store.setting("embedder") or None
    finally:
        store.close()


def _embedder(embedder: str | Embedder) -> Embedder:
    if not isinstance(embedder, str):
        return embedder
    from millis.tasks.encoder import Encoder
    from millis.tasks.load import load

    model = load(embedder)
    return _Truncating(model) if isinstance(model, Encoder) else model


class _Truncating:
    """An encoder that reads a long passage as far as it can, for its words are found all the same."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._encoder.embed(texts, truncate=True)
