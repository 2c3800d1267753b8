"""millis serve: HTTP for programs and a page for people, in front of a model, with larger ones and encoders beside."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millis.commands import common
from millis.types import ModelError, RequestError

if TYPE_CHECKING:
    from millis.server.settings import Setting

EXAMPLE = "millis serve -m qwen2.5-0.5b --port 8000 --max-sequences 16"
CONFIG_HELP = "TOML file of settings, named as these flags with _ for -; MILLIS_SERVE_CONFIG names one, too."


def command(**flags: Any) -> None:
    """Serves a model over HTTP, as OpenAI's clients speak it.

    Every flag is also a line of the file and a variable of the environment: --key-rate 5, key_rate = 5,
    MILLIS_SERVE_KEY_RATE=5. The flag counts before the variable, the variable before the file.
    """
    from millis.server.settings import read_settings

    as_json, file = flags.pop("json"), flags.pop("config")
    with common.usage():
        settings = read_settings(flags, os.environ, file)
        encoders = names_of("encoder", settings.server.encoder or [])
        larger = names_of("larger", settings.server.larger or [])
    common.warn_of_threads(settings.engine.get("threads"))
    try:
        from millis.server.origins import is_loopback
        from millis.server.run import Paths, check, read_files, serve
    except ModuleNotFoundError as error:
        raise ModelError(f"millis serve needs {error.name}; install it with: pip install 'millis[serve]'") from None
    with common.usage():
        check(settings)
    files = read_files(settings.server)
    if settings.server.api_key_file is None and not is_loopback(settings.server.host):
        common.say("millis: warning: whoever reaches this machine may use the model; --api-key-file asks for keys")
    if settings.server.index is not None:
        from millis.tasks.index import embedder_of

        embedder = embedder_of(Path(settings.server.index))
        if embedder is not None and embedder != settings.model:
            encoders.setdefault(embedder, embedder)
    main = common.resolve(settings.model)
    if (draft := settings.engine.get("draft")) is not None:
        settings.engine["draft"] = str(common.resolve(draft))
    beside = [{name: common.resolve(model) for name, model in given.items()} for given in (larger, encoders)]
    announce = common.print_json if as_json else lambda facts: common.say(_line(facts))
    serve(Paths(main, *beside), settings, files, announce)


def names_of(setting: str, given: list[str]) -> dict[str, str]:
    """Name → model of what a flag names: a model's own name, or the last part of a path, unless NAME= says it."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, model = text.partition("=")
        if not equals:
            name, model = Path(text).resolve().name if Path(text).exists() else text, text
        if not name or not model:
            raise RequestError(f"give --{setting} as MODEL or NAME=MODEL, not {text!r:.100}")
        if name in found:
            raise RequestError(f"--{setting} names two models {name!r}; name them apart: NAME=MODEL")
        found[name] = model
    return found


def _line(facts: dict[str, Any]) -> str:
    """http://127.0.0.1:8000 · smollm2 · 2 threads, avx512 · ready in 0.8 s."""
    machine = f"{facts['threads']} threads, {facts['isa']}"
    names = " + ".join([facts["model"], *facts["larger"], *facts["encoders"]])
    return f"{facts['url']} · {names} · {machine} · ready in {facts['ready_s']:.1f} s"


def _default(setting: Setting) -> str | bool:
    """What --help shows; the flags themselves are None unless given, for a variable or the file may say more."""
    return False if setting.default is None else str(setting.default)


def _signature() -> inspect.Signature:
    """The flags: a model, every setting, and where to read more."""
    from millis.server.settings import known

    found: dict[str, Any] = {"model": common.Model}
    for setting in known().values():
        panel = "Server" if setting.part == "server" else "Engine"
        found[setting.name] = Annotated[
            setting.kind, typer.Option(help=setting.about, show_default=_default(setting), rich_help_panel=panel)
        ]
    found["config"] = Annotated[str | None, typer.Option(help=CONFIG_HELP)]
    found["json"] = common.Json
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(name, kind, default=False if name == "json" else None, annotation=annotation)
        for name, annotation in found.items()
    ]
    command.__annotations__ = dict(found)
    return inspect.Signature(parameters)


command.__signature__ = _signature()  # type: ignore[attr-defined]
