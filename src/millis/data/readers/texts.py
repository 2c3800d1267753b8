"""Plain text: people-daily, manpages-zh, fortunes-zh, austen, wikitext2; and the arrivals of azure-conv."""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections.abc import Iterator
from datetime import datetime

from millis.data.readers import rdata, roff
from millis.data.readers.labelled import Members, Rows

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
HEADING = re.compile(r"^ = [^=].* = \n", re.M)  # of an article; sections have more equals signs
NOVELS = {
    "sensesensibility": "Sense and Sensibility",
    "prideprejudice": "Pride and Prejudice",
    "mansfieldpark": "Mansfield Park",
    "emma": "Emma",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
}


def people_daily(members: Members) -> Rows:
    """Words are followed by a slash and their part of speech, and parted by two spaces."""
    (data,) = members.values()
    lines = (line for line in data.decode("utf-8").splitlines() if line.strip())
    for number, line in enumerate(lines, 1):
        text = "".join(word.rpartition("/")[0] for word in line.split())
        yield "all", {"id": f"199801-{number}", "text": text}


def manpages(members: Members) -> Rows:
    """A page that is only a link to another (.so) is none."""
    for path, data in members.items():
        name, _, section = path.rpartition("/")[2].removesuffix(".gz").rpartition(".")
        if text := roff.plain(gzip.decompress(data).decode("utf-8")):
            yield "all", {"id": f"{name}.{section}", "title": f"{name}({section})", "text": text}


def fortunes(members: Members) -> Rows:
    """Colours are taken out; a line with % alone parts two sayings."""
    for path, data in members.items():
        sayings = ESCAPE.sub("", data.decode("utf-8")).split("\n%\n")
        for number, saying in enumerate((s.strip("\n% ") for s in sayings), 1):
            if saying:
                yield "all", {"id": f"{path.rpartition('/')[2]}-{number}", "text": saying}


def austen(members: Members) -> Rows:
    index = next(data for path, data in members.items() if path.endswith(".rdx"))
    base = next(data for path, data in members.items() if path.endswith(".rdb"))
    lines = rdata.strings(index, base)
    for name, title in NOVELS.items():
        for number, text in enumerate(_paragraphs(lines[name]), 1):
            yield "all", {"id": f"{name}-{number}", "title": title, "text": text}


def _paragraphs(lines: list[str]) -> Iterator[str]:
    """Lines of a book joined to paragraphs, which empty lines part."""
    held: list[str] = []
    for line in [*lines, ""]:
        if text := line.strip():
            held.append(text)
        elif held:
            yield " ".join(held)
            held = []


def wikitext2(members: Members) -> Rows:
    (data,) = members.values()
    text = data.decode("utf-8")
    starts = [match.start() for match in HEADING.finditer(text)]
    for start, end in zip([0, *starts[1:]], [*starts[1:], len(text)], strict=True):
        article = text[start:end]
        yield "all", {"title": article.strip().partition("\n")[0].strip("= "), "text": article}


def azure(members: Members) -> Rows:
    """Seconds since the first arrival."""
    (data,) = members.values()
    first: datetime | None = None
    for line in csv.DictReader(io.StringIO(data.decode("utf-8"), newline="")):
        time = datetime.fromisoformat(line["TIMESTAMP"][:26])
        first = first or time
        counts = {"prompt_tokens": int(line["ContextTokens"]), "completion_tokens": int(line["GeneratedTokens"])}
        yield "all", {"arrival_s": round((time - first).total_seconds(), 6), **counts}
