"""The Jinja environment of chat templates, in which a hostile template can waste neither time nor memory.

Jinja's sandbox guards attributes, not resources. Here every loop pass, call, filter and comparison checks a deadline,
and every value a template makes is measured (`budget.py` says how). What no chat template needs is not there: padding
methods, most filters, blocks, imports. It works in any thread, for nothing is interrupted from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from millis.tokenizer.budget import INTEGER_BITS, LimitError, check_format, check_method, check_product, current
from millis.tokenizer.filters import filters, functions, tests

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
_FORBIDDEN = (nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.Block)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = next((names for kind, names in _METHODS.items() if isinstance(obj, kind)), None)
        return super().is_safe_attribute(obj, attr, value) and (allowed is None or attr in allowed)

    def call(__self, __context: Context, __function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        limits = current()
        limits.tick()
        limits.fit(sum(map(limits.size, args)) + sum(map(limits.size, kwargs.values())))
        owner = getattr(__function, "__self__", None)
        if isinstance(owner, str):
            args = check_method(__function.__name__, owner, args, kwargs.values())
        return limits.admit(super().call(__context, __function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        limits = current()
        limits.tick()
        if operator == "%" and isinstance(left, str):
            check_format(left, "%", right)
        elif operator == "*":
            check_product(left, right)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > INTEGER_BITS:
                raise LimitError(f"it makes a number of more than {INTEGER_BITS} bits")
        elif operator == "+":
            limits.fit(limits.size(left) + limits.size(right))
        return limits.admit(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        format_text = super().wrap_str_format(value)
        if format_text is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            check_format(value.__self__, "{", [*args, *kwargs.values()])
            return format_text(*args, **kwargs)

        return checked


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
    env.filters = filters(env.filters)
    env.tests = tests(env.tests)
    del env.globals["lipsum"]
    env.globals |= functions()
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
        return str(current().admit(value))
    current().fit(current().size(value))
    return str(current().admit(str(value)))
