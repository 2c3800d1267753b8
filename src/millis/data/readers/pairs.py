"""Sentences in two languages: hsk and libreoffice-help."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from millis.data.readers.labelled import Members, Rows
from millis.types import DataError

HAN = re.compile(r"[\u3400-\u9fff]")
LATIN = re.compile(r"[A-Za-z]")


def hsk(members: Members) -> Rows:
    (data,) = members.values()
    for row in json.loads(data):
        pair = {"id": row["id"], "source": row["chinese"].strip(), "target": row["translation"]["en"].strip()}
        yield "all", {**pair, "level": row["hsk_level"], "topic": row["topic"]}


def libreoffice(members: Members) -> Rows:
    """Paragraphs that stand under one id on the same page of both languages; a pair counts once."""
    chinese, english = _pages(members, "/zh-CN/"), _pages(members, "/en-US/")
    seen = set()
    for page in sorted(chinese.keys() & english.keys()):
        other = dict(_paragraphs(english[page]))
        for name, source in _paragraphs(chinese[page]):
            pair = (source, other.get(name, ""))
            if pair not in seen and HAN.search(source) and LATIN.search(pair[1]) and not HAN.search(pair[1]):
                seen.add(pair)
                yield "all", {"id": f"{page}#{name}", "source": source, "target": pair[1]}


def _pages(members: Members, folder: str) -> dict[str, bytes]:
    return {path.partition(f"{folder}text/")[2]: data for path, data in members.items() if folder in path}


def _paragraphs(page: bytes) -> Iterator[tuple[str, str]]:
    """(id, text) of the headings and paragraphs of a help page that have an id; white space is one space."""
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError:
        raise DataError("the help's pages are HTML; to read them: pip install 'millis[data]'") from None
    for node in LexborHTMLParser(page.decode("utf-8")).css("#DisplayArea [id^=par_], #DisplayArea [id^=hd_]"):
        if text := " ".join(node.text().split()):
            yield node.attributes["id"] or "", text
