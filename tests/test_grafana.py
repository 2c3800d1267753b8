"""The Grafana board: every figure it asks for is one that the server gives, and its panels lie beside each other."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from millis.server.metrics import Metrics
from millis.types import Timings

BOARD = Path(__file__).parent.parent / "deploy" / "grafana.json"


def board() -> Any:
    return json.loads(BOARD.read_text(encoding="utf-8"))


def given() -> dict[str, set[str]]:
    """Name of every series of a server that has answered, refused and failed → its labels."""
    metrics = Metrics("m")
    metrics.finish(Timings(prompt_tokens=1, completion_tokens=1), "stop", 0.1, 0.1)
    metrics.refuse("overloaded")
    metrics.fail("client_gone")
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_figure_of_the_board_is_given() -> None:
    series = given()
    text = [target["expr"] for panel in board()["panels"] for target in panel.get("targets", ())]
    text += [variable["query"]["query"] for variable in board()["templating"]["list"] if variable["type"] == "query"]
    asked = {name for one in text for name in re.findall(r"millis:\w+", one)}
    assert len(asked) > 20
    assert asked - series.keys() == set()
    for one in text:
        labels = {label for names in re.findall(r"by \(([^)]*)\)", one) for label in re.split(r",\s*", names)}
        for name in re.findall(r"millis:\w+", one):
            assert labels <= series[name], one


def test_every_panel_has_a_source_a_title_and_a_place_of_its_own() -> None:
    panels = board()["panels"]
    for panel in panels:
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${source}"} and panel["description"]
            assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart or above, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
