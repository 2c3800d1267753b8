"""The command `millis`: a table of verbs, each imported only when it runs, and what the shell is told in the end.

Exit codes: 0 done, 1 failed, 2 used wrongly, 130 interrupted. Used wrongly is what the options say before any model is
loaded. An error is one line on standard error that begins with `millis: `; the text of an answer is all that goes to
standard output.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from millis.types import MillisError, no_thread

COMMANDS = (  # each a module in millis.commands
    *("run", "chat", "classify", "embed", "extract", "translate", "summarize", "moderate", "index", "answer"),
    *("serve", "pull", "models", "doctor", "train", "distil", "quantize", "evaluate", "data", "bench"),
)
GROUPS = ("data", "bench")  # whose verbs are a second word
FAILED, MISUSED, INTERRUPTED = 1, 2, 130


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs one command and ends the process with its exit code."""
    _replace_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to end
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    if (unread := next((one for one in arguments if _unreadable(one)), None)) is not None:
        text = ascii(os.fsencode(unread))[2:-1]
        return _fail(f"the argument '{text:.100}' is not UTF-8 text; convert it, or set the terminal to UTF-8", MISUSED)
    try:
        code = _app(arguments)(arguments, prog_name="millis", standalone_mode=False)
        sys.stdout.flush()
        return code or 0
    except MillisError as error:
        return _fail(str(error), FAILED)
    except typer.TyperException as error:
        return _fail(_misuse(error), MISUSED)
    except (KeyboardInterrupt, _Interrupted, typer.Abort):
        return _fail("interrupted", INTERRUPTED)
    except MemoryError:
        return _fail("not enough memory; free some, or use a smaller model or a shorter context", FAILED)
    except RuntimeError as error:
        return _fail(str(no_thread(error)), FAILED)
    except BrokenPipeError:  # the reader of our output has gone, and knows it
        _discard_output()
        return FAILED
    except OSError as error:
        _discard_output()
        where = f"{error.filename}: " if error.filename is not None else "cannot write the output: "
        return _fail(f"{where}{error.strerror or error}", FAILED)


def _unreadable(argument: str) -> bool:
    """Whether an argument is bytes that are no text, and no file is called so either."""
    return any("\udc80" <= one <= "\udcff" for one in argument) and not os.path.lexists(argument)


def _app(arguments: list[str]) -> typer.Typer:
    """The verb that is asked for; all of them where the list of verbs matters."""
    app = typer.Typer(
        cls=_Verbs,
        add_completion=False,
        rich_markup_mode="rich" if _lists_verbs(arguments) else None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Real-time language models on the machine you have.",
        epilog='Example: millis run "Give me three tips for a good night\'s sleep."',
    )
    app.callback(invoke_without_command=True)(_without_verb)
    for verb in arguments[:1] if arguments[:1] and arguments[0] in COMMANDS else COMMANDS:
        module = import_module(f"millis.commands.{verb}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=verb)
        else:
            app.command(verb, epilog=f"Example: {module.EXAMPLE}")(module.command)
    return app


def _lists_verbs(arguments: list[str]) -> bool:
    """Whether --help would list verbs, of which plain help cuts what they do; tables would cut long options' names."""
    verbs = arguments[:2] if arguments[:1] and arguments[0] in GROUPS else arguments[:1]
    return len(verbs) == 0 or verbs[-1].startswith("-")


class _Interrupted(Exception):
    """Ctrl-C, as it leaves a verb: of a KeyboardInterrupt Typer makes an exit code, and nobody is told."""


class _Verbs(TyperGroup):
    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _interrupts():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _interrupts():
            return super().invoke(ctx)


@contextmanager
def _interrupts() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise _Interrupted from None


def _without_verb(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from millis import __version__

        print(f"millis {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(MISUSED)


def _misuse(error: typer.TyperException) -> str:
    """What was used wrongly, and which help to read, in one line."""
    text = " ".join(error.format_message().split()).rstrip(".?")
    context = getattr(error, "ctx", None)
    return f"{text[:1].lower()}{text[1:]}; see: {context.command_path if context else 'millis'} --help"


def _fail(text: str, code: int) -> int:
    print(f"millis: {text}", file=sys.stderr)
    return code


def _replace_closed_streams() -> None:
    """In place of standard streams that were closed: no input, an output that cannot be written, a mute error stream.

    Else the next file opened would get their numbers, and hear what is written to them.
    """
    for name, mode, access in (("stdin", "r", os.O_RDONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, access), mode, encoding="utf-8"))


def _discard_output() -> None:
    """Forgets what could not be written, so that Python does not try again, and complain, when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
