"""docs/serving.md: it names every flag, and no flag, path or figure that is not there."""

from __future__ import annotations

import re
from pathlib import Path

from millis.server.api.endpoints import ROUTES
from millis.server.settings import known
from test_grafana import given

DOCS = Path(__file__).parent.parent / "docs"


def test_it_names_every_flag_and_no_other() -> None:
    text = (DOCS / "serving.md").read_text(encoding="utf-8")
    table = text.partition("| group | flags |")[2].partition("\n\n")[0]
    flags = {"--" + name.replace("_", "-") for name in known()}
    assert set(re.findall(r"--[a-z][a-z-]+", table)) == flags
    chinese = (DOCS / "serving.zh.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text + chinese)) <= flags | {"--help", "--config"}


def test_it_names_every_endpoint() -> None:
    text = (DOCS / "serving.md").read_text(encoding="utf-8")
    assert [route.path for route in ROUTES.values() if f"`{route.path}`" not in text] == []


def test_its_figures_are_given() -> None:
    series = {re.sub("_(bucket|sum|count|created)$", "", name) for name in given()}
    figures = (DOCS / "serving.md").read_text(encoding="utf-8").partition("## Figures")[2]
    named = {name for name in re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+)+)", figures)}
    assert len(named) > 15
    assert {f"millis:{name}" for name in named} - series == set()
