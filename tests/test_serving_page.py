"""docs/serving.md: it names every flag, path, time and figure, and none that is not there; so does the Chinese page."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from millis.server import app
from millis.server.api.endpoints import ROUTES
from millis.server.settings import known
from millis.tasks.cascade import CascadeTimings
from millis.types import Timings
from test_grafana import given

DOCS = Path(__file__).parent.parent / "docs"


def first_columns(text: str, head: str) -> set[str]:
    """The names in the first column of the table that begins with `head`."""
    rows = text.partition(f"\n| {head}\n")[2].partition("\n\n")[0].split("\n")[1:]
    assert rows, head
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_it_names_every_flag_and_no_other() -> None:
    text = (DOCS / "serving.md").read_text(encoding="utf-8")
    table = text.partition("| group | flags |")[2].partition("\n\n")[0]
    flags = {"--" + name.replace("_", "-") for name in known()}
    assert set(re.findall(r"--[a-z][a-z-]+", table)) == flags
    chinese = (DOCS / "serving.zh.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text + chinese)) <= flags | {"--help", "--config"}


def test_it_names_every_path_and_no_other() -> None:
    text = (DOCS / "serving.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(/[a-z0-9_./]*)`", text))
    given = {path for route in ROUTES.values() for path in (route.path, *route.aliases)}
    source = Path(app.__file__).read_text(encoding="utf-8")
    given |= set(re.findall(r"@app\.(?:get|post)\(\"(/[a-z0-9_/]+)\"", source)) | {"/", "/openapi.json"}
    assert named == given


def test_its_fields_are_taken() -> None:
    text = (DOCS / "serving.md").read_text(encoding="utf-8")
    taken = {name for route in ROUTES.values() for name in route.request.model_fields}
    assert first_columns(text, "field | what for |") - taken == set()


def test_it_explains_all_times_and_those_of_a_cascade() -> None:
    usual, more = ({field.name for field in fields(cls)} for cls in (Timings, CascadeTimings))
    text = (DOCS / "serving.md").read_text(encoding="utf-8")
    assert first_columns(text, "in `timings` | milliseconds |") == {name for name in usual if name.endswith("_ms")}
    assert first_columns(text, "in `timings` | |") == more - usual


def test_it_names_every_figure_and_no_other() -> None:
    series = {re.sub("_(bucket|sum|count|created)$", "", name.removeprefix("millis:")) for name in given()}
    figures = (DOCS / "serving.md").read_text(encoding="utf-8").partition("## Figures")[2]
    labels = {label for one in given().values() for label in one}
    assert set(re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+)+)", figures)) - labels == series


def test_the_chinese_page_has_the_same_parts() -> None:
    english, chinese = ((DOCS / name).read_text(encoding="utf-8") for name in ("serving.md", "serving.zh.md"))
    for pattern in (r"^##", r"^\|", r"^```", r"^- ", r"^!\["):
        assert len(re.findall(pattern, english, re.M)) == len(re.findall(pattern, chinese, re.M)), pattern
    names = r"`((?:--|/)?[a-z][a-z0-9_./-]*(?:[_/-][a-z0-9_./-]+)+)"
    assert set(re.findall(names, english)) == set(re.findall(names, chinese))
