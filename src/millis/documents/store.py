"""an index as it lies on disk: one SQLite file with documents, their passages, terms and vectors.

Every change is one transaction: it is there wholly or not at all, whatever ends the process. Several processes may
read and write one file; SQLite makes them take turns.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from millis.documents.bm25 import Postings
from millis.documents.passages import Span
from millis.documents.vectors import Vectors
from millis.types import FormatError, RequestError

APPLICATION = 0x4D4C4958  # "MLIX" in the file's header
VERSION = 1
WAIT_S = 30  # for another process's transaction
MOST_COUNTED = 255  # repeats of a term in one passage

_SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE documents (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, title TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE passages (number INTEGER PRIMARY KEY, document INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
    start INTEGER NOT NULL, stop INTEGER NOT NULL, heading TEXT NOT NULL, terms BLOB NOT NULL, vector BLOB NOT NULL);
CREATE INDEX passages_of ON passages (document);
CREATE TABLE terms (number INTEGER PRIMARY KEY, term TEXT NOT NULL UNIQUE);
"""


@dataclass(frozen=True, slots=True)
class Document:
    """A text that questions are answered from."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A passage on its way into the file. terms: term → how often; vector: [D] int8, empty without an embedder."""

    span: Span
    terms: dict[str, int]
    vector: NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All passages as they were at one moment, ready to be searched. Rows run from 0."""

    numbers: NDArray[np.int64]  # [N] passages.number
    documents: NDArray[np.int64]  # [N] documents.number
    postings: Postings
    vectors: Vectors
    terms: dict[str, int]


class Store:
    """An open index file. Not for several threads at once: whoever shares one locks around it."""

    def __init__(self, path: Path, *, create: bool) -> None:
        self.path = path
        self._numbers: dict[str, int] = {}  # of terms, within a transaction
        self._closed = False
        if not path.exists() and not create:
            raise RequestError(f"there is no index {path}; make one with: millis index DOCUMENTS --index {path}")
        try:
            self._db = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
        except sqlite3.OperationalError as error:
            raise RequestError(f"cannot open {path}: {error}") from None
        try:
            with self._errors():
                self._db.execute("PRAGMA foreign_keys = ON")
                self._db.execute("PRAGMA trusted_schema = OFF")
                self._check(create)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._closed = True
        self._db.close()

    def version(self) -> tuple[int, int]:
        """Differs from what it was as soon as this or another process has changed the file."""
        with self._errors():
            return self._db.execute("PRAGMA data_version").fetchone()[0], self._db.total_changes

    def setting(self, name: str) -> str | None:
        with self._errors():
            row = self._db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def set(self, name: str, value: str) -> None:
        with self._errors():
            self._db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))

    def documents(self) -> dict[str, tuple[str, str]]:
        """id → title and text."""
        with self._errors():
            rows = self._db.execute("SELECT id, title, text FROM documents").fetchall()
        if not all(isinstance(value, str) for row in rows for value in row):
            raise self.damaged("a document is no text")
        return {id: (title, text) for id, title, text in rows}

    def put(self, entries: Iterable[tuple[Document, list[Entry]]], deleted: Iterable[str] = ()) -> None:
        """Adds documents with their passages, or replaces those of their ids, and deletes others, all or none."""
        with self._errors(), self._transaction():
            self._numbers.clear()  # of a transaction that was rolled back, perhaps
            self._db.executemany("DELETE FROM documents WHERE id = ?", ((id,) for id in deleted))
            for document, passages in entries:
                self._db.execute("DELETE FROM documents WHERE id = ?", (document.id,))
                row = (document.id, document.title, document.text)
                number = self._db.execute("INSERT INTO documents (id, title, text) VALUES (?, ?, ?)", row).lastrowid
                self._db.executemany(
                    "INSERT INTO passages (document, start, stop, heading, terms, vector) VALUES (?, ?, ?, ?, ?, ?)",
                    [
                        (number, e.span.start, e.span.stop, e.span.heading, self._packed(e.terms), e.vector.tobytes())
                        for e in passages
                    ],
                )

    def passage(self, number: int) -> tuple[Document, Span]:
        """The document of a passage, and where in it the passage lies."""
        with self._errors():
            row = self._db.execute(
                "SELECT id, title, text, start, stop, heading FROM passages JOIN documents "
                "ON document = documents.number WHERE passages.number = ?",
                (number,),
            ).fetchone()
        if row is None:
            raise FormatError(f"{self.path}: passage {number} is gone; search again")
        id, title, text, start, stop, heading = row
        if not (all(isinstance(v, str) for v in (id, title, text, heading)) and 0 <= start < stop <= len(text)):
            raise self.damaged(f"passage {number} lies outside its document")
        return Document(id, title, text), Span(start, stop, heading)

    def snapshot(self) -> Snapshot:
        """Everything that a search looks at."""
        with self._errors(), self._transaction("DEFERRED"):
            terms = dict(self._db.execute("SELECT term, number FROM terms"))
            rows = self._db.execute("SELECT number, document, terms, vector FROM passages ORDER BY number").fetchall()
        numbers, documents, packed, vectors = zip(*rows, strict=True) if rows else ((), (), (), ())
        try:
            pairs = np.frombuffer(b"".join(packed), np.uint32).astype(np.int64)
            codes = np.frombuffer(b"".join(vectors), np.int8).reshape(len(rows), len(vectors[0]) if rows else 0)
            row = np.repeat(np.arange(len(rows)), [len(blob) // 4 for blob in packed]) if rows else pairs
            term, vocabulary = pairs >> 8, max(terms.values(), default=0) + 1
            if len(term) and term.max() >= vocabulary or len(row) != len(term):
                raise ValueError("terms without a name")
            postings = Postings(term, row, pairs & MOST_COUNTED, vocabulary, len(rows))
        except (ValueError, TypeError) as error:
            raise self.damaged(str(error)) from None
        return Snapshot(np.array(numbers, np.int64), np.array(documents, np.int64), postings, Vectors(codes), terms)

    def _packed(self, terms: dict[str, int]) -> bytes:
        """uint32 a term: its number in the upper 24 bits, its count in the lower 8."""
        numbers = [self._number(term) << 8 | min(count, MOST_COUNTED) for term, count in terms.items()]
        return np.array(numbers, np.uint32).tobytes()

    def _number(self, term: str) -> int:
        if term not in self._numbers:
            row = self._db.execute("SELECT number FROM terms WHERE term = ?", (term,)).fetchone()
            number = row[0] if row else self._db.execute("INSERT INTO terms (term) VALUES (?)", (term,)).lastrowid
            assert number is not None
            self._numbers[term] = int(number)
        return self._numbers[term]

    def _check(self, create: bool) -> None:
        """That the file is one of ours, or empty and may become one."""
        if self._is_ours():
            return
        if not create:
            raise self._foreign()
        with self._transaction():  # in which no other process makes an index here
            if self._is_ours():
                return
            if self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise self._foreign()
            for statement in _SCHEMA.strip().split(";\n"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA application_id = {APPLICATION}")
            self._db.execute(f"PRAGMA user_version = {VERSION}")

    def _is_ours(self) -> bool:
        application = self._db.execute("PRAGMA application_id").fetchone()[0]
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if application == APPLICATION and version != VERSION:
            raise FormatError(f"{self.path} is an index of version {version}, this is for {VERSION}: index anew")
        return bool(application == APPLICATION)

    def _foreign(self) -> FormatError:
        return FormatError(f"{self.path} is not an index that millis has made; give another path to --index")

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        self._db.execute(f"BEGIN {kind}")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """SQLite's complaints as ours."""
        if self._closed:
            raise RequestError(f"the index is closed; open {self.path} again")
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise RequestError(
                    f"{self.path} has been written by another process for {WAIT_S} s; try later"
                ) from None
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)  # of text that is not UTF-8 there is none
            if code == sqlite3.SQLITE_FULL:
                raise RequestError(f"no space is left for {self.path}; make room, or give another place") from None
            if code == sqlite3.SQLITE_ERROR:
                raise self.damaged(str(error)) from None
            raise FormatError(f"{self.path}: {error}") from None
        except UnicodeDecodeError:  # of what SQLite complains of
            raise self.damaged("its tables are not described in UTF-8") from None
        except sqlite3.DatabaseError as error:
            if "not a database" in str(error):
                raise self._foreign() from None
            raise self.damaged(str(error)) from None

    def damaged(self, what: str) -> FormatError:
        """What is raised of a file whose contents cannot be: `what` says which."""
        return FormatError(f"{self.path} is not an index, or is damaged ({what}); delete it and index anew")
