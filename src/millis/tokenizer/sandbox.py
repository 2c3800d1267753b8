"""The Jinja environment of chat templates, in which a hostile template can waste neither time nor memory.

Jinja's sandbox guards attributes, not resources. Here every loop pass, call, filter and comparison checks a deadline,
and every value a template makes is measured: one whose full extent (a list's elements, theirs, and so on) passes a
limit ends the rendering, and so does the sum of all that was made. Operations that could make a huge value in one
step are measured before they run, and what no chat template needs (padding methods, most filters, blocks, imports) is
not there. It works in any thread, for nothing is interrupted from outside.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import cache, wraps
from json import JSONEncoder
from string import Formatter
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

TIME_LIMIT_S = 1.0
SIZE_LIMIT = 4 << 20  # characters of one value or of the output, for an empty conversation
_INPUT_FACTOR = 8  # … and this much more for every character of the conversation
_TOTAL_FACTOR = 8  # all values made together, in limits of one
_ELEMENT = 64  # what an element of a list or dictionary counts for, in characters
_INTEGER_BITS = 64
_PATTERN = 64  # longest argument of methods whose worst case is its length times the text's

_FILTERS = (
    "abs capitalize count d default dictsort e escape first float items last length list lower map max min reject "
    "rejectattr reverse safe select selectattr sort string title trim truncate unique upper wordcount"
).split()
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        "capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit islower "
        "isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex "
        "rpartition rsplit rstrip split splitlines startswith strip swapcase title upper".split()
    ),
    dict: frozenset(("get", "items", "keys", "values", "copy")),
    list: frozenset(("index", "count", "copy")),
    tuple: frozenset(("index", "count")),
    int: frozenset(),
    float: frozenset(),
}
_SLOW_METHODS = frozenset(("strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition", "rsplit"))
_WIDTH = re.compile(r"\d{4}")
_FORBIDDEN = (nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.Block)


class LimitError(Exception):
    """A template that broke a limit of time or size."""


class Budget:
    """What one rendering may still use."""

    def __init__(self, input_size: int) -> None:
        self.limit = SIZE_LIMIT + _INPUT_FACTOR * input_size
        self._left = _TOTAL_FACTOR * self.limit
        self._end = time.monotonic() + TIME_LIMIT_S
        self._sizes: dict[int, tuple[Any, int]] = {}  # containers cannot change here, so each is measured once

    def tick(self) -> None:
        """Check the deadline."""
        if time.monotonic() > self._end:
            raise LimitError(f"it ran for more than {TIME_LIMIT_S:g} s")

    def fit(self, size: int) -> None:
        """Check the size of one value before or after it is made."""
        if size > self.limit:
            raise LimitError(f"it makes a value of more than {self.limit} characters")

    def admit(self, value: Any) -> Any:
        """Measure and charge a value that was just made; returns it."""
        self.fit(self.size(value))
        return self.charge(value)

    def charge(self, value: Any) -> Any:
        """Charge a value whose full extent is known to fit, as that of a part is; returns it."""
        self.tick()
        self._left -= len(value) if isinstance(value, str) else _ELEMENT * _length(value)
        if self._left < 0:
            raise LimitError(f"it makes more than {_TOTAL_FACTOR * self.limit} characters in all")
        return value

    def size(self, value: Any) -> int:
        """An upper bound, in units of a character, of what writing or comparing the whole of `value` can take."""
        if isinstance(value, str):
            return len(value)
        if not _is_container(value):
            return _ELEMENT
        known = self._sizes.get(id(value))
        if known is None:
            parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            known = value, _ELEMENT * _length(value) + sum(map(self.size, parts))
            self._sizes[id(value)] = known
        return known[1]


def _is_container(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict, set, frozenset, type({}.keys()), type({}.values()), type({}.items())))


def _length(value: Any) -> int:
    return 1 + (len(value) if _is_container(value) else 0)


_current = threading.local()


@contextmanager
def budget(value: Budget) -> Any:
    """Let the rendering of this thread use `value`."""
    _current.budget = value
    try:
        yield
    finally:
        del _current.budget


def _budget() -> Budget:
    found: Budget = _current.budget
    return found


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = next((names for kind, names in _METHODS.items() if isinstance(obj, kind)), None)
        return super().is_safe_attribute(obj, attr, value) and (allowed is None or attr in allowed)

    def call(__self, __context: Context, __function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        limits = _budget()
        limits.tick()
        limits.fit(sum(map(limits.size, args)) + sum(map(limits.size, kwargs.values())))
        owner = getattr(__function, "__self__", None)
        if isinstance(owner, str):
            args = _check_method(__function.__name__, owner, args)
        return limits.admit(super().call(__context, __function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        limits = _budget()
        limits.tick()
        if operator == "%" and isinstance(left, str):
            _check_format(left, "%", right)
        elif operator == "*":
            _check_product(left, right)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _INTEGER_BITS:
                raise LimitError(f"it makes a number of more than {_INTEGER_BITS} bits")
        elif operator == "+":
            limits.fit(limits.size(left) + limits.size(right))
        return limits.admit(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        format_text = super().wrap_str_format(value)
        if format_text is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, "{", [*args, *kwargs.values()])
            return format_text(*args, **kwargs)

        return checked


def _check_method(name: str, text: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Measure a call of a string's method before it runs; returns the arguments to run it with."""
    limits = _budget()
    if name in _SLOW_METHODS and args and isinstance(args[0], str) and len(args[0]) > _PATTERN:
        raise LimitError(f"{name} takes at most {_PATTERN} characters")
    if name == "join" and len(args) == 1:
        items = list(args[0])
        _check_join(text, items)
        return (items,)
    if name == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        limits.fit(len(text) + text.count(args[0]) * len(args[1]))
    return args


def _check_join(separator: str, items: list[Any]) -> None:
    limits = _budget()
    limits.fit(len(separator) * len(items) + sum(map(limits.size, items)))


def _check_format(text: str, mark: str, values: Any) -> None:
    """Widths of up to three digits only, so that a conversion adds at most 1,000 characters to what it writes."""
    if mark == "{":
        specs = [spec or "" for _, _, spec, _ in Formatter().parse(text)]
        if any("{" in spec for spec in specs):
            raise LimitError("its format string has a field inside a field")
    else:
        specs = text.split("%")[1:]
        if any("*" in spec for spec in specs):
            raise LimitError("its format string takes a width from its arguments")
    if any(_WIDTH.search(spec) for spec in specs):
        raise LimitError("its format string has a width of more than three digits")
    limits = _budget()
    limits.fit(len(text) + text.count(mark) * (1000 + limits.size(values)))


def _check_product(left: Any, right: Any) -> None:
    limits = _budget()
    for value, times in ((left, right), (right, left)):
        if isinstance(times, int) and (isinstance(value, str) or _is_container(value)):
            limits.fit(limits.size(value) * times)
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _INTEGER_BITS:
        raise LimitError(f"it makes a number of more than {_INTEGER_BITS} bits")


class _Limiter(NodeTransformer):
    """Puts the checks into a parsed template."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if isinstance(node, _FORBIDDEN):
            raise jinja2.TemplateSyntaxError(
                f"{type(node).__name__.lower()} has no place in a chat template", node.lineno
            )
        visited: nodes.Node = super().generic_visit(node, *args, **kwargs)
        if isinstance(visited, nodes.TemplateData):
            return nodes.Const(visited.data, lineno=visited.lineno)
        if isinstance(visited, nodes.Concat):
            return _filter(nodes.List(visited.nodes, lineno=visited.lineno), "limit concat")
        if isinstance(visited, (nodes.List, nodes.Dict)) or (
            isinstance(visited, nodes.Tuple) and visited.ctx == "load"
        ):
            return _filter(visited, "limit admit")
        if isinstance(visited, (nodes.Compare, nodes.Test)):
            return _filter(visited, "limit tick")
        if isinstance(visited, nodes.Getitem) and isinstance(visited.arg, nodes.Slice):
            return _filter(visited, "limit charge")
        if isinstance(visited, (nodes.For, nodes.Macro, nodes.CallBlock)):
            visited.body.insert(0, nodes.ExprStmt(_true(visited.lineno), lineno=visited.lineno))
        if isinstance(visited, nodes.For) and visited.test is not None:
            visited.test = nodes.And(_true(visited.lineno), visited.test, lineno=visited.lineno)
        return visited


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _true(line: int) -> nodes.Expr:
    return _filter(nodes.Const(True, lineno=line), "limit tick")


class _Generation(Extension):
    """{% generation %} … {% endgeneration %} marks the answer for training; here it is only its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    def __repr__(self) -> str:  # a namespace may hold namespaces, so its full text has no bound
        return "<namespace>"


@cache
def environment() -> jinja2.Environment:
    """The one environment; it holds no state of a rendering."""
    env = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        finalize=_finalize,
        optimized=False,  # nothing is evaluated before its budget exists
        cache_size=0,
    )
    builtin: dict[str, Callable[..., Any]] = env.filters
    env.filters = {name: _limited(builtin[name]) for name in _FILTERS}
    own: dict[str, Callable[..., Any]] = {
        "int": _int,
        "round": _round,
        "sum": _sum,
        "join": _join,
        "replace": _replace,
        "indent": _indent,
    }
    env.filters |= {name: _limited(function) for name, function in own.items()}
    env.filters |= {"tojson": _limited(_tojson), "format": _limited(_format)}
    env.filters |= {"limit concat": _concat, "limit tick": _tick}
    env.filters |= {"limit admit": lambda value: _budget().admit(value)}
    env.filters |= {"limit charge": lambda value: _budget().charge(value)}
    del env.globals["lipsum"]
    env.globals |= {
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": lambda *args, **kwargs: _Namespace(*args, **kwargs),
        "raise_exception": _raise,
        "strftime_now": _strftime_now,
    }
    return env


def compile_tree(tree: nodes.Template) -> jinja2.Template:
    """A parsed template with the checks put in, ready to render under a budget; changes `tree`."""
    env = environment()
    limited = _Limiter().visit(tree)
    limited.set_environment(env)
    return jinja2.Template.from_code(env, env.compile(limited), env.make_globals(None))


@jinja2.pass_context  # so that Jinja does not write constants at compile time
def _finalize(context: Context, value: Any) -> str:
    if isinstance(value, str):
        return str(_budget().admit(value))
    _budget().fit(_budget().size(value))
    return str(_budget().admit(str(value)))


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        _budget().tick()
        return _budget().admit(function(*args, **kwargs))

    return limited


def _tick(value: Any) -> Any:
    _budget().tick()
    return value


def _concat(values: list[Any]) -> str:
    limits = _budget()
    limits.fit(sum(map(limits.size, values)))
    return str(limits.admit("".join(map(str, values))))


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    try:
        return int(value[:1000], base) if isinstance(value, str) else int(value)
    except (TypeError, ValueError, OverflowError):
        return default


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    from jinja2.filters import do_round

    return do_round(value, max(-20, min(20, precision)), method)  # type: ignore[arg-type]


def _sum(values: Iterable[Any], start: float = 0) -> Any:
    return sum(values, 0 + start)


@jinja2.pass_environment
def _join(env: jinja2.Environment, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    from jinja2.filters import make_attrgetter

    items = list(values) if attribute is None else list(map(make_attrgetter(env, attribute), values))
    _check_join(str(d), items)
    return str(d).join(map(str, items))


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text = str(text)
    _check_method("replace", text, (old, new))
    return str(text.replace(old, new, -1 if count is None else count))


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    from jinja2.filters import do_indent

    size = len(width) if isinstance(width, str) else width
    _budget().fit(len(text) + (text.count("\n") + 1) * size)
    return do_indent(text, width, first, blank)


def _format(text: Any, *args: Any, **kwargs: Any) -> str:
    _check_format(str(text), "%", kwargs or list(args))
    return str(text) % (kwargs or args)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    limits = _budget()
    limits.fit(limits.size(value) + limits.size(separators) * limits.size(value) // _ELEMENT)
    if indent is not None and not 0 <= indent <= 16:
        raise LimitError("tojson takes an indent of at most 16")
    encoder = JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None:
        return encoder.encode(value)
    return "".join(limits.admit(chunk) for chunk in encoder.iterencode(value))


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(str(message)[:1000])


def _strftime_now(form: str) -> str:
    if len(form) > 100 or any(character.isdigit() for character in form):
        raise LimitError("strftime_now takes a format of at most 100 characters without widths")
    return datetime.now().strftime(form)


def data_size(variables: Mapping[str, Any]) -> int:
    """The characters in a template's variables, which must be plain data."""
    return Budget(0).size(dict(variables))
