"""millis models: what is in the catalogue and on disk."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from millis import hub
from millis.commands import common


def command(json: common.Json = False) -> None:
    """Lists the catalogue's models and what is on disk. Example: millis models --json"""
    rows = hub.entries()
    if json:
        common.print_json([_record(row) for row in rows])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("name", "on disk", "size", "parameters", "quantisation", "languages", "kind", "licence"):
        table.add_column(title)
    for row in rows:
        entry = row.entry
        facts = ["", "", "", "", ""]
        if entry is not None:
            facts = [f"{entry.parameters / 1e6:.0f} M", entry.quantisation, ", ".join(entry.languages), entry.kind, entry.licence]
        size = row.size_bytes if entry is None or row.state == "partial" else entry.size_bytes
        table.add_row(row.name, row.state, f"{size / 1e6:.0f} MB", *facts)
    Console().print(table)
    print(f"in {hub.home()}")


def _record(row: hub.Stored) -> dict[str, Any]:
    record: dict[str, Any] = {} if row.entry is None else asdict(row.entry)
    record.pop("sources", None)
    return {**record, "name": row.name, "state": row.state, "path": str(row.path), "bytes_on_disk": row.size_bytes}
