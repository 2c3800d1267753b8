"""/docs: the paths and their bodies as a page of its own, from /openapi.json. No script, nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
summary { cursor: pointer; padding: .3rem 0 }
summary code { font-weight: 600 }
table { border-collapse: collapse; margin: .5rem 0 1rem; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8884 }
pre { overflow-x: auto; padding: .6rem; background: #8881 }
"""


def docs_page(schema: Mapping[str, Any]) -> str:
    """The page of an OpenAPI document."""
    title = f"{schema['info']['title']} {schema['info']['version']}"
    named = schema["components"]["schemas"]
    paths = [_path(path, method, one, named) for path, both in schema["paths"].items() for method, one in both.items()]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<title>{escape(title)}</title><link rel="stylesheet" href="/docs/style.css"><h1>{escape(title)}</h1>'
        f'<p>As a document for programs: <a href="/openapi.json">/openapi.json</a>. Fields that are not listed are '
        f"refused by name.</p>{''.join(paths)}</html>"
    )


def _path(path: str, method: str, one: Mapping[str, Any], named: Mapping[str, Any]) -> str:
    content = one.get("requestBody", {}).get("content", {}).get("application/json", {})
    body = content.get("schema")
    fields = "" if body is None else _fields(named[_kind(body)])
    summary = escape(one.get("summary", ""))
    return f"<details><summary><code>{method.upper()} {escape(path)}</code> {summary}</summary>{fields}</details>"


def _fields(body: Mapping[str, Any]) -> str:
    needed = set(body.get("required", ()))
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code>{' *' if name in needed else ''}<td>{escape(_kind(field))}"
        f"<td>{escape(field.get('description', ''))}"
        for name, field in body.get("properties", {}).items()
    )
    whole = escape(json.dumps(body, indent=1, ensure_ascii=False))
    return (
        f"<table><tr><th>field (* needed)<th>type<th>{rows}</table>"
        f"<details><summary>JSON schema</summary><pre>{whole}</pre></details>"
    )


def _kind(field: Mapping[str, Any]) -> str:
    """A type in a few words."""
    if "enum" in field or "const" in field:
        return " | ".join(json.dumps(value) for value in field.get("enum", [field.get("const")]))
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    for several in ("anyOf", "oneOf"):
        if several in field:
            kinds = dict.fromkeys(_kind(one) for one in field[several] if one.get("type") != "null")
            return " | ".join(kinds)
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    ranges = [f"{sign} {field[name]:g}" for name, sign in RANGES if isinstance(field.get(name), (int, float))]
    return " ".join([str(field.get("type", "any")), *ranges])


RANGES = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
