"""millis models: what is in the catalogue and on disk."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from millis import hub
from millis.commands import common
from millis.hub.progress import folder_bytes

EXAMPLE = "millis models --json"


def command(json: common.Json = False) -> None:
    """Lists the catalogue's models and what is on disk."""
    rows = hub.entries()
    if json:
        common.print_json([_record(row) for row in rows])
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("name", "on disk", "size", "quantisation", "languages", "kind", "licence"):
        table.add_column(title, justify="right" if title == "size" else "left", overflow="fold")
    for row in rows:
        table.add_row(row.name, row.state, *_facts(row))
    common.print_table(table)
    packed = folder_bytes(hub.home() / "packed")
    print(f"in {hub.home()}")
    if packed := folder_bytes(hub.home() / "packed"):
        print(f"packed weights beside them: {packed / 1e6:.0f} MB")


def _facts(row: hub.Stored) -> list[str]:
    entry = row.entry
    if entry is None:
        return [f"{row.size_bytes / 1e6:.0f} MB"]
    size = f"{entry.total_bytes / 1e6:.0f} MB"
    if row.state == "partial":
        size = f"{row.size_bytes / 1e6:.0f} of {size}"
    return [size, entry.quantisation, ", ".join(entry.languages), entry.kind, entry.licence]


def _record(row: hub.Stored) -> dict[str, Any]:
    record: dict[str, Any] = {} if row.entry is None else asdict(row.entry)
    for inner in ("sources", "beside"):
        record.pop(inner, None)
    return {**record, "name": row.name, "state": row.state, "path": str(row.path), "bytes_on_disk": row.size_bytes}
