"""Chat templates: Jinja as the model's file carries it, in a sandbox that bounds time and memory.

The environment is the one that published templates are written for (trim_blocks, lstrip_blocks, loop controls,
raise_exception, strftime_now, a plain tojson, generation blocks); `sandbox.py` and `budget.py` set the limits.
Everything that a template does wrong ends in a TemplateError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from millis.types import TemplateError

if TYPE_CHECKING:
    import jinja2

    from millis.tokenizer.budget import Budget

MAX_SOURCE = 48 << 10  # characters; compiling the worst template of this length takes about a second
_Result = TypeVar("_Result")


class Template:
    """A compiled chat template; `render` may be called from many threads."""

    def __init__(self, source: str) -> None:
        from millis.tokenizer.budget import Budget

        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source)} characters; {MAX_SOURCE} can be used")
        self.source = source
        self.variables: frozenset[str] = frozenset()  # names it reads that it does not set itself
        self.literals: tuple[str, ...] = ()  # strings it names in expressions
        self._template = _run(self._compile, Budget(0))

    def _compile(self) -> jinja2.Template:
        from jinja2 import meta, nodes

        from millis.tokenizer.sandbox import compile_tree, environment

        tree = environment().parse(self.source)
        self.variables = frozenset(meta.find_undeclared_variables(tree))
        constants = (node.value for node in tree.find_all(nodes.Const))
        self.literals = tuple({value for value in constants if isinstance(value, str) and value})
        return compile_tree(tree)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text of the template with `variables`, which must be plain data.

        TemplateError where the template fails, refuses, or breaks a limit of time or size.
        """
        from millis.tokenizer.budget import Budget, data_size

        budget = Budget(data_size(variables))
        text = _run(lambda: self._template.render(variables), budget)
        if len(text) > budget.limit:
            raise TemplateError(f"the chat template writes more than {budget.limit} characters")
        return text


def _run(work: Callable[[], _Result], limits: Budget) -> _Result:
    """`work()` under `limits`, with any failure turned into a TemplateError."""
    import jinja2

    from millis.tokenizer.budget import LimitError, budget

    try:
        with budget(limits):
            return work()
    except LimitError as error:
        raise TemplateError(f"the chat template was stopped: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"the chat template is malformed, line {error.lineno}: {_line(error.message)}") from None
    except jinja2.TemplateError as error:
        raise TemplateError(f"the chat template refuses the conversation: {_line(error)}") from None
    except Exception as error:  # a template can provoke any
        raise TemplateError(f"the chat template failed: {type(error).__name__}: {_line(error)}") from None


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
