"""Chat templates: Jinja as the model's file carries it, in a sandbox that bounds time and memory.

The environment is the one that published templates are written for (trim_blocks, lstrip_blocks, loop controls,
raise_exception, strftime_now, a plain tojson, generation blocks); `sandbox.py` sets the limits. Everything that a
template does wrong ends in a TemplateError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from millis.types import TemplateError

if TYPE_CHECKING:
    import jinja2

MAX_SOURCE = 64 << 10  # characters; the longest published templates have about 20,000


class Template:
    """A compiled chat template; `render` may be called from many threads."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source)} characters; {MAX_SOURCE} can be used")
        self.source = source
        self.variables: frozenset[str] = frozenset()  # names it reads that it does not set itself
        self.literals: tuple[str, ...] = ()  # strings it names in expressions
        self._template = _guarded(self._compile, 0)

    def _compile(self) -> jinja2.Template:
        from jinja2 import meta, nodes

        from millis.tokenizer.sandbox import environment

        tree = environment().parse(self.source)
        self.variables = frozenset(meta.find_undeclared_variables(tree))
        constants = (node.value for node in tree.find_all(nodes.Const))
        self.literals = tuple({value for value in constants if isinstance(value, str) and value})
        return environment().from_string(self.source)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text of the template with `variables`, which must be plain data.

        TemplateError where the template fails, refuses, or breaks a limit of time or size.
        """
        from millis.tokenizer.sandbox import deep_size

        size = deep_size(variables)
        return _guarded(lambda: self._template.render(variables), size)


def _guarded[T](work: Callable[[], T], input_size: int) -> T:
    raise NotImplementedError
