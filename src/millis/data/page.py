"""The report of a cleaning as one HTML page: no script, no request, bars drawn as SVG, light and dark."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from html import escape
from itertools import accumulate
from typing import Any
from unicodedata import east_asian_width

ROW, BAR, NAME, SHOWN = 22, 420, 170, 24  # pixels of a chart's rows, bars and names; rows shown before "others"
COLUMNS = 21  # that NAME has room for; Chinese characters take two
STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --dim: #626a73; --ground: #fff; --line: #dfe3e8; --kept: #2b7a5d;
  --dropped: #c2543a; --box: #f6f7f9 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --dim: #9aa2ab; --ground: #15181b; --line: #333a41;
  --kept: #4fb98f; --dropped: #e88166; --box: #1e2226 } }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } p, small { color: var(--dim) }
table { border-collapse: collapse; width: 100% } td, th { padding: .3rem .6rem .3rem 0; text-align: left;
  border-bottom: 1px solid var(--line); vertical-align: top } td.n, th.n { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums }
svg { max-width: 100%; height: auto; font: 13px system-ui, sans-serif } svg text { fill: var(--ink) }
.kept { fill: var(--kept) } .dropped { fill: var(--dropped) }
details { margin: .5rem 0; background: var(--box); border-radius: 6px; padding: .5rem .8rem }
summary { cursor: pointer }
blockquote { margin: .5rem 0; padding-left: .7rem; border-left: 3px solid var(--dropped); white-space: pre-wrap;
  overflow-wrap: anywhere } blockquote.like { border-color: var(--kept) } code { overflow-wrap: anywhere }
"""


def page(report: Mapping[str, Any]) -> str:
    """The page of a report (`Report.asdict`). Everything that comes from data is escaped."""
    read, kept = report["read"], report["kept"]
    share = f"{100 * kept / read:.1f} %" if read else "none"
    parts = [
        f"<h1>{read:,} rows read, {kept:,} kept ({share})</h1>",
        f"<p>{_files(report)} · {report['changed']:,} texts made plain · {report['bad']:,} lines passed over · "
        f"{report['seconds']:.1f} s</p>",
        _rules(report),
        _chart("Languages of what was kept", report["languages"]),
        _chart("Labels of what was kept", report["labels"]),
        _lengths(report),
        _chart("Personal data that was masked", report["masked"]),
        _examples(report),
        _bad(report),
        _settings(report),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{kept:,} rows</title>'
    body = "".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>{body}</body></html>\n'


def _files(report: Mapping[str, Any]) -> str:
    names = report["inputs"]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"<code>{escape(name)}</code>" for name in names[:3]) + more


def _rules(report: Mapping[str, Any]) -> str:
    rows = [("kept", report["kept"], "", "kept")]
    rows += [
        (name, fact["rows"], f"{fact['rule']} ({fact['source']})", "dropped")
        for name, fact in report["dropped"].items()
    ]
    table = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{count:,}</td><td><small>{escape(says)}</small></td></tr>'
        for name, count, says, _ in rows
    )
    bars = _bars([(name, [(kind, count)]) for name, count, _, kind in rows])
    return f'<h2>Kept and dropped</h2>{bars}<table><tr><th>rule<th class="n">rows<th>what it says</tr>{table}</table>'


def _chart(title: str, counts: Mapping[str, int]) -> str:
    if not counts:
        return ""
    rows = sorted(counts.items(), key=lambda item: -item[1])
    shown = [(name, [("kept", count)]) for name, count in rows[:SHOWN]]
    if len(rows) > SHOWN:
        shown.append((f"{len(rows) - SHOWN} others", [("kept", sum(count for _, count in rows[SHOWN:]))]))
    return f"<h2>{title}</h2>{_bars(shown)}"


def _lengths(report: Mapping[str, Any]) -> str:
    kept, dropped = report["characters_kept"], report["characters_dropped"]
    ranges = sorted({*kept, *dropped}, key=lambda name: int(name.partition("-")[0]))
    rows = [(name, [("kept", kept.get(name, 0)), ("dropped", dropped.get(name, 0))]) for name in ranges]
    return f"<h2>Characters in a text: kept, then dropped</h2>{_bars(rows)}" if rows else ""


def _bars(rows: list[tuple[str, list[tuple[str, int]]]]) -> str:
    """Horizontal bars, one a row, their parts side by side: (name, [(class, count)])."""
    most = max((sum(count for _, count in parts) for _, parts in rows), default=0) or 1
    drawn = []
    for number, (name, parts) in enumerate(rows):
        y, x = ROW * number, float(NAME)
        drawn.append(f'<text x="{NAME - 8}" y="{y + 15}" text-anchor="end">{escape(_short(name))}</text>')
        for kind, count in parts:
            width = BAR * count / most
            drawn.append(
                f'<rect class="{kind}" x="{x:.1f}" y="{y + 3}" width="{width:.1f}" height="{ROW - 6}" rx="2"/>'
            )
            x += width
        drawn.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{" + ".join(f"{count:,}" for _, count in parts)}</text>')
    height = ROW * len(rows)
    size = f'width="{NAME + BAR + 120}" height="{height}" viewBox="0 0 {NAME + BAR + 120} {height}"'
    told = "; ".join(f"{name}: {sum(count for _, count in parts):,}" for name, parts in rows)
    return f'<svg role="img" aria-label="{escape(told)}" {size}>{"".join(drawn)}</svg>'


def _short(name: str) -> str:
    """As much of a name as a chart has room for."""
    ends = list(accumulate(2 if east_asian_width(char) in "WF" else 1 for char in name))
    return name if not ends or ends[-1] <= COLUMNS else name[: bisect_left(ends, COLUMNS)] + "…"


def _examples(report: Mapping[str, Any]) -> str:
    parts = []
    for name, shown in report["examples"].items():
        told = "".join(_example(example) for example in shown)
        count = f"{len(shown)} of {report['dropped'][name]['rows']:,}"
        parts.append(f"<details><summary>{escape(name)}: {count}</summary>{told}</details>")
    return f"<h2>Examples of what was dropped</h2>{''.join(parts)}" if parts else ""


def _example(example: Mapping[str, Any]) -> str:
    told = f"<p><code>{escape(example['where'])}</code></p><blockquote>{escape(example['text'])}</blockquote>"
    if example["like"] is not None:
        told += f"<p>{100 * example['similarity']:.0f} % like <code>{escape(example['like_where'])}</code></p>"
        told += f'<blockquote class="like">{escape(example["like"])}</blockquote>'
    return told


def _bad(report: Mapping[str, Any]) -> str:
    if not report["bad"] and not report["encodings"]:
        return ""
    lines = "".join(f"<li><code>{escape(line)}</code></li>" for line in report["bad_lines"])
    read = "".join(f"<li><code>{escape(n)}</code> is {escape(e)}</li>" for n, e in report["encodings"].items())
    return f"<h2>Lines passed over, and encodings other than UTF-8</h2><ul>{lines}{read}</ul>"


def _settings(report: Mapping[str, Any]) -> str:
    def told(value: Any) -> str:
        return ", ".join(map(str, value)) or "any" if isinstance(value, list | tuple) else str(value)

    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(told(v))}</td></tr>" for k, v in report["settings"].items())
    return f"<h2>Settings</h2><table>{rows}</table>"
