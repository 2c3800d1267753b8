"""The command `millis`: a table of subcommands, each imported only when it runs."""

from __future__ import annotations

import sys
from importlib import import_module

from millis.types import MillisError

COMMANDS = {  # verb → module in millis.commands
    "run": "run",
    "chat": "chat",
    "pull": "pull",
    "models": "models",
    "doctor": "doctor",
    "evaluate": "evaluate",
    "bench": "bench",
}


def main(arguments: list[str] | None = None) -> None:
    """Runs one command and ends the process: 0 done, 1 failed, 2 used wrongly, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _app(arguments)(arguments, prog_name="millis", standalone_mode=True)
    except MillisError as error:
        print(f"millis: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _app(arguments: list[str]):  # type: ignore[no-untyped-def]
    import typer

    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Real-time language models on the machine you have.",
    )
    app.callback(invoke_without_command=True)(_version)
    wanted = [arguments[0]] if arguments and arguments[0] in COMMANDS else list(COMMANDS)
    for verb in wanted:
        module = import_module(f"millis.commands.{COMMANDS[verb]}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=verb)
        else:
            app.command(verb)(module.command)
    return app


def _version(version: bool = False) -> None:
    """Real-time language models on the machine you have."""
    if version:
        from millis import __version__

        print(f"millis {__version__}")


if __name__ == "__main__":
    main()
