"""Copies and near copies of texts seen before, found in memory that does not grow with what was seen.

Near copies: MinHash signatures (Broder, 1997) over shingles, in bands (Leskovec et al., Mining of Massive Datasets,
section 3.4). A text's shingles are runs of three words, or of five characters where it is Chinese or short. What was
seen lies in a temporary SQLite file, of which only a cache is in memory.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millis.data.quality import HAN, WORD
from millis.samples.read import normal
from millis.types import DataError

PERMUTATIONS = 128  # the estimate of a similarity s has standard deviation sqrt(s(1-s)/128): 0.035 at 0.8
RECALL = 0.9  # of pairs that are just similar enough; more similar ones are missed far less often
SEED = 20
BAND_TEXTS = 16  # that are compared, of those that agree in a band: of a form filled in a million times, all do
CACHE_KIB = 65_536
WORDS_APIECE, CHARS_APIECE = 3, 5
SHORT_WORDS = 8  # below this many words, runs of three are too few to compare


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, rows of each): the fewest bands that compare two texts of similarity `threshold` with a chance of RECALL.

    The chance is 1-(1-s^r)^b. Texts that are less similar are compared as well now and then, which costs time only.
    """
    for rows in (32, 16, 8, 4, 2):
        if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= RECALL:
            return PERMUTATIONS // rows, rows
    return PERMUTATIONS, 1


def shingles(text: str) -> list[str]:
    """What two texts are compared by; never empty for a text with a character that is not white space."""
    plain = normal(text)
    words = WORD.findall(plain)
    if len(words) < SHORT_WORDS or 2 * len(HAN.findall(plain)) > len(words):
        dense = plain.replace(" ", "")
        return list({dense[at : at + CHARS_APIECE] for at in range(max(1, len(dense) - CHARS_APIECE + 1))})
    return list({" ".join(words[at : at + WORDS_APIECE]) for at in range(len(words) - WORDS_APIECE + 1)})


def signature(text: str) -> NDArray[np.uint32]:
    """[PERMUTATIONS] u32: the share of equal entries of two estimates the Jaccard index of their shingles."""
    try:
        from rensa import RMinHash
    except ImportError:
        raise DataError("finding near copies needs a library; run: pip install 'millis[data]'") from None
    sketch: Any = RMinHash(num_perm=PERMUTATIONS, seed=SEED)
    sketch.update(shingles(text))
    return np.array(sketch.digest(), np.uint32)


@dataclass(frozen=True, slots=True)
class Known:
    """A text that was seen: its number, where it stood, its label, how it begins, and how similar it is.

    `counted`: what a report counted it as, should it be taken back: values of JSON by name.
    """

    number: int
    where: str
    label: str | None
    text: str
    similarity: float = 1.0
    counted: dict[str, Any] = field(default_factory=dict)


class Seen:
    """Texts seen before, in a temporary file; to be used as a context manager.

    Raises DataError for the threshold, and where the body ends because the file cannot be written.
    """

    def __init__(self, threshold: float = 0.8) -> None:
        if not 0.3 <= threshold <= 1:
            raise DataError(f"the similarity of near copies must lie in [0.3, 1], not {threshold}")
        self.threshold = threshold
        self.bands, self.rows = bands_for(threshold)
        self._folder = tempfile.TemporaryDirectory(prefix="millis-seen-", ignore_cleanup_errors=True)
        self._base = sqlite3.connect(Path(self._folder.name) / "seen.db", isolation_level=None)
        for line in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", f"cache_size=-{CACHE_KIB}"):
            self._base.execute(f"PRAGMA {line}")
        self._base.execute("CREATE TABLE exact (hash INTEGER PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        self._base.execute("CREATE TABLE band (hash INTEGER, number INTEGER, PRIMARY KEY (hash, number)) WITHOUT ROWID")
        self._base.execute("CREATE TABLE sketch (number INTEGER PRIMARY KEY, entries BLOB)")
        self._base.execute("CREATE TABLE known (number INTEGER PRIMARY KEY, facts BLOB)")
        self._base.execute("BEGIN")

    def __enter__(self) -> Seen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._base.close()
        self._folder.cleanup()
        if isinstance(error, sqlite3.Error):
            raise DataError(
                f"what copies are found by does not go to {Path(self._folder.name).parent} ({error}); "
                "free some space there, or name another folder in TMPDIR"
            ) from error

    def exact(self, text: str) -> Known | None:
        """The text that equals this one once both are normalised."""
        row = self._base.execute("SELECT number FROM exact WHERE hash = ?", (_exact_key(text),)).fetchone()
        return None if row is None else self._known(row[0], 1.0)

    def near(self, entries: NDArray[np.uint32]) -> Known | None:
        """The most similar text to one of this signature, where it reaches the threshold; of equals, the first."""
        keys = self._keys(entries)
        marks = ",".join("?" * len(keys))
        found = self._base.execute(f"SELECT DISTINCT number FROM band WHERE hash IN ({marks})", keys).fetchall()
        similarity, number = max(((self._similarity(entries, n), -n) for (n,) in found), default=(0.0, 0))
        return self._known(-number, similarity) if similarity >= self.threshold else None

    def keep(self, known: Known, text: str, entries: NDArray[np.uint32] | None = None) -> None:
        """Remembers a text; without a signature, only exact copies of it will be found."""
        number, key = known.number, _exact_key(text)
        self._base.execute("INSERT OR IGNORE INTO exact VALUES (?, ?)", (key, number))
        facts = json.dumps([known.where, known.label, known.text, known.counted], ensure_ascii=False)
        self._base.execute("INSERT INTO known VALUES (?, ?)", (number, facts.encode("utf-8", "surrogatepass")))
        if entries is not None:
            rows = ((key, number, key, BAND_TEXTS) for key in self._keys(entries))
            self._base.executemany(
                "INSERT INTO band SELECT ?, ? WHERE (SELECT COUNT(*) FROM band WHERE hash = ?) < ?", rows
            )
            self._base.execute("INSERT INTO sketch VALUES (?, ?)", (number, entries.tobytes()))

    def _keys(self, entries: NDArray[np.uint32]) -> list[int]:
        """One hash for each band of a signature."""
        parts = entries.reshape(self.bands, self.rows)
        return [_hash(b"%d:" % band + part.tobytes()) for band, part in enumerate(parts)]

    def _similarity(self, entries: NDArray[np.uint32], number: int) -> float:
        (blob,) = self._base.execute("SELECT entries FROM sketch WHERE number = ?", (number,)).fetchone()
        return float(np.mean(np.frombuffer(blob, np.uint32) == entries))

    def _known(self, number: int, similarity: float) -> Known:
        (facts,) = self._base.execute("SELECT facts FROM known WHERE number = ?", (number,)).fetchone()
        where, label, text, counted = json.loads(facts.decode("utf-8", "surrogatepass"))
        return Known(number, where, label, text, similarity, counted)


def _exact_key(text: str) -> int:
    return _hash(normal(text).encode("utf-8", "surrogatepass"))


def _hash(data: bytes) -> int:
    """63 bits: among a thousand million texts, one pair is taken for copies with a chance of 5 %."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1
