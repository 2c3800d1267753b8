"""Which encoding a text file is in: UTF-8 unless its bytes say otherwise, and then by name."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from millis.types import DataError

SAMPLE_BYTES = 1 << 18
MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
# What text of this century is in, where it is not UTF-8; fewer guesses, fewer wrong ones.
OTHERS = ["gb18030", "big5", "shift_jis", "euc_jp", "euc_kr", "cp1252", "cp1250", "cp1251", "koi8_r"]
WIDE = ("utf-16-le", "utf-16-be")
COMMON = re.compile(r"[\t\r\n\x20-\x7e\xa0-\u04ff\u2010-\u2027\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7af\uff01-\uff5e]")
# Last lead byte of the characters that each standard puts first, by use; behind them stand the rare ones.
COMMON_LEADS = {"gb18030": 0xD7, "big5": 0xC6, "euc_kr": 0xC8, "euc_jp": 0xCF}
BAD_LINES = 0.1  # above this share of lines that are not UTF-8, the file is not


def encoding_of(path: Path, sample: bytes, remedy: str = "name its encoding with --encoding") -> str:
    """The name of the encoding of a file that begins with `sample`. Raises DataError with the remedy: no text.

    A file is UTF-8 where all of the sample is, or all but a few lines: those are reported when they are read. Zero
    bytes make it UTF-16 without a mark, but for a few in UTF-8; for the rest, charset-normalizer weighs how well each
    encoding reads as text.
    """
    for mark, name in MARKS:
        if sample.startswith(mark):
            return name
    cut = len(sample) >= SAMPLE_BYTES
    *lines, last = sample.split(b"\n")
    bad = sum(not is_utf8(line) for line in lines) + (not is_utf8(last, cut))
    if b"\0" in sample and (bad or 10 * sample.count(0) > len(sample)):
        return _wide(path, sample, remedy)
    if bad <= BAD_LINES * sum(not line.isascii() for line in (*lines, last)):
        return "utf-8"
    return _guess(path, _whole(sample) if cut else sample, remedy)


def text_lines(file: IO[bytes], encoding: str, most_bytes: int) -> Iterator[bytes | str | None]:
    """The lines of a file; None for a longer one. Where a line end is several bytes, lines come decoded."""
    if encoding.startswith(("utf-16", "utf-32")):
        text = io.TextIOWrapper(file, encoding, errors="replace", newline="\n")
        try:
            yield from iter(lambda: text.readline(most_bytes), "")
        finally:
            text.detach()  # the file is closed by who opened it
        return
    while line := file.readline(most_bytes):
        if len(line) < most_bytes or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(most_bytes)) and not rest.endswith(b"\n"):
            pass
        yield None


def is_utf8(line: bytes, cut: bool = False) -> bool:
    """Whether these bytes are UTF-8; where they were cut, the last character may be a part of one."""
    try:
        codecs.utf_8_decode(line, "strict", not cut)
    except UnicodeDecodeError:
        return False
    return True


def _wide(path: Path, sample: bytes, remedy: str) -> str:
    """UTF-16 without a mark: the order of bytes in which nearly all of it reads as common characters."""
    shares = {name: _common(sample[: len(sample) // 2 * 2].decode(name, "replace")) for name in WIDE}
    best = max(WIDE, key=lambda name: shares[name])
    if shares[best] > 0.9:
        return best
    raise DataError(f"{path} is not text: it holds zero bytes; if it is, {remedy}")


def _common(text: str) -> float:
    """The share of ASCII but controls, other Latin, Greek and Cyrillic letters, kana, Han, and their punctuation."""
    return len(COMMON.findall(text)) / max(1, len(text))


def _whole(sample: bytes) -> bytes:
    """A sample without the half of a character at its end, where characters are of two bytes."""
    decoder = codecs.getincrementaldecoder("gb18030")("replace")  # the others part bytes as it does
    decoder.decode(sample)
    return sample.removesuffix(decoder.getstate()[0])


def _guess(path: Path, sample: bytes, remedy: str) -> str:
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        raise DataError(f"{path} is not UTF-8; to find out what it is: pip install 'millis[data]'") from None
    best = from_bytes(sample, cp_isolation=OTHERS, threshold=0.5).best()
    if best is None:
        at = _first_bad(sample)
        raise DataError(
            f"{path} is not UTF-8 (byte {at} is 0x{sample[at]:02x}) nor another encoding that reads as text; {remedy}"
        )
    name = str(best.encoding)
    if name in COMMON_LEADS:  # a few Chinese words read as Korean, too, but as words that nobody writes
        name = min((name, "gb18030"), key=lambda name: _rare(sample, name))
    return name.replace("_", "-")


def _rare(sample: bytes, encoding: str) -> float:
    """The share of rare characters among those beyond ASCII; 1 for what is not of this encoding."""
    try:
        text = sample.decode(encoding)
    except UnicodeDecodeError:
        return 1.0
    leads = [char.encode(encoding)[0] for char in text if not char.isascii()]
    return sum(not 0xA1 <= lead <= COMMON_LEADS[encoding] for lead in leads) / max(1, len(leads))


def _first_bad(sample: bytes) -> int:
    try:
        sample.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return 0
