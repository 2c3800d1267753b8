"""The filters, tests and functions that chat templates have: Jinja's that published templates use, under the budget.

Those of Jinja's that could take long or make a huge value in one step are written here, measured before they run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import wraps
from json import JSONEncoder
from typing import Any, NoReturn

import jinja2
from jinja2.filters import do_indent, do_round, make_attrgetter
from jinja2.utils import Namespace

from millis.tokenizer.budget import ELEMENT, LimitError, check_format, check_join, check_method, current

_KEPT = (
    "abs capitalize count d default dictsort e escape first float items last length list lower map max min reject "
    "rejectattr reverse safe select selectattr sort string title truncate unique upper wordcount"
).split()


def filters(builtin: dict[str, Any]) -> dict[str, Any]:
    """Every filter; those whose names hold a space cannot be named in a template's source."""
    own: dict[str, Callable[..., Any]] = {
        "format": _format,
        "indent": _indent,
        "int": _int,
        "join": _join,
        "replace": _replace,
        "round": _round,
        "sum": _sum,
        "tojson": _tojson,
        "trim": _trim,
    }
    checks: dict[str, Callable[..., Any]] = {
        "limit admit": lambda value: current().admit(value),
        "limit charge": lambda value: current().charge(value),
        "limit concat": _concat,
        "limit tick": _tick,
    }
    kept = {name: builtin[name] for name in _KEPT}
    return {name: _limited(function) for name, function in (kept | own).items()} | checks


def tests(builtin: dict[str, Any]) -> dict[str, Any]:
    """Jinja's tests, which `select` runs once an element."""
    return {name: _limited(function) for name, function in builtin.items()}


def functions() -> dict[str, Callable[..., Any]]:
    """The global functions beside Jinja's `range`, `joiner` and `cycler`."""
    return {
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),  # the type itself has methods that change any dictionary
        "namespace": lambda *args, **kwargs: _Namespace(*args, **kwargs),
        "raise_exception": _raise,
        "strftime_now": _strftime_now,
    }


class _Namespace(Namespace):
    def __repr__(self) -> str:  # a namespace may hold namespaces, so its full text has no bound
        return "<namespace>"


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        current().tick()
        return current().admit(function(*args, **kwargs))

    return limited


def _tick(value: Any) -> Any:
    current().tick()
    return value


def _concat(values: list[Any]) -> str:
    limits = current()
    limits.fit(sum(map(limits.size, values)))
    return str(limits.admit("".join(map(str, values))))


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    try:
        return int(value[:1000], base) if isinstance(value, str) else int(value)
    except (TypeError, ValueError, OverflowError):
        return default


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    return do_round(value, max(-20, min(20, precision)), method)  # type: ignore[arg-type]


def _sum(values: Iterable[Any], start: float = 0) -> Any:
    return sum(values, 0 + start)


@jinja2.pass_environment
def _join(env: jinja2.Environment, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = list(values) if attribute is None else list(map(make_attrgetter(env, attribute), values))
    check_join(str(d), items)
    return str(d).join(map(str, items))


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text = str(text)
    check_method("replace", text, (old, new))
    return str(text.replace(old, new, -1 if count is None else count))


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    size = len(width) if isinstance(width, str) else width
    current().fit(len(text) + (text.count("\n") + 1) * size)
    return do_indent(text, width, first, blank)


def _trim(text: Any, chars: str | None = None) -> str:
    check_method("strip", str(text), (chars,))
    return str(text).strip(chars)


def _format(text: Any, *args: Any, **kwargs: Any) -> str:
    check_format(str(text), "%", kwargs or list(args))
    return str(text) % (kwargs or args)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    limits = current()
    limits.fit(limits.size(value) + limits.size(separators) * limits.size(value) // ELEMENT)
    if indent is not None and not 0 <= indent <= 16:
        raise LimitError("tojson takes an indent of at most 16")
    encoder = JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None:
        return encoder.encode(value)
    return "".join(limits.admit(chunk) for chunk in encoder.iterencode(value))


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(str(message)[:1000])


def _strftime_now(form: str) -> str:
    if len(form) > 100 or re.search(r"%[^A-Za-z%]*[1-9]", form):
        raise LimitError("strftime_now takes a format of at most 100 characters without widths")
    return datetime.now().strftime(form)
