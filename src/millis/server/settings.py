"""What `millis serve` is told: flags before environment (MILLIS_SERVE_PORT=8000) before a TOML file before defaults.

All three know the same names: the fields of ServerConfig and EngineConfig, and `model`. Any other is an error.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from millis.config import EngineConfig, ServerConfig
from millis.types import RequestError

PREFIX = "MILLIS_SERVE_"
DEFAULT_MODEL = "smollm2"


# What differs from EngineConfig's defaults where many ask at once: they begin alike, wait for no long step,
# and pauses of the machine are covered before one was seen.
SHARED: dict[str, Any] = {"prefix_cache": True, "max_step_ms": 100.0, "delivery_ms": 5.0}


@dataclass(frozen=True, slots=True)
class Settings:
    """All that a server is started with. `engine`: only what was chosen; the rest are EngineConfig's defaults."""

    model: str
    server: ServerConfig
    engine: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """One name, its type, what its docstring says, and its default in a server."""

    name: str
    kind: Any
    about: str
    part: Literal["server", "engine"]
    default: Any


def known() -> dict[str, Setting]:
    """Every setting by its name."""
    found = {}
    parts: tuple[tuple[type[Any], Literal["server", "engine"]], ...] = (
        (ServerConfig, "server"),
        (EngineConfig, "engine"),
    )
    for cls, part in parts:
        hints, about = get_type_hints(cls), _docstrings(cls)
        for field in fields(cls):
            default = SHARED.get(field.name, None if field.default is MISSING else field.default)
            found[field.name] = Setting(field.name, hints[field.name], about[field.name], part, default)
    return found


def read_settings(flags: Mapping[str, Any], environment: Mapping[str, str], file: str | None = None) -> Settings:
    """Brings all three together. `flags`: None is not given. RequestError names what is unknown or malformed."""
    settings = known()
    environment = {name: value for name, value in environment.items() if name.startswith(PREFIX)}
    file = file or environment.pop(f"{PREFIX}CONFIG", None)
    values: dict[str, Any] = {}
    if file is not None:
        values |= _from_file(Path(file), settings)
    values |= _from_environment(environment, settings)
    values |= {name: value for name, value in flags.items() if value is not None and value != []}
    model = values.pop("model", DEFAULT_MODEL)
    if not isinstance(model, str) or not model:
        raise RequestError(f"model must be a model's name, not {model!r}")
    for name, value in SHARED.items():
        values.setdefault(name, value)
    engine = {name: value for name, value in values.items() if settings[name].part == "engine"}
    EngineConfig(**engine)  # refuses what is out of range before anything is started
    server = ServerConfig(**{name: value for name, value in values.items() if settings[name].part == "server"})
    return Settings(model, server, engine)


def _from_file(path: Path, settings: Mapping[str, Setting]) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RequestError(f"cannot read the settings in {path}: {error.strerror}") from None
    except ValueError as error:
        raise RequestError(f"{path} is not TOML: {error}") from None
    for name in values:
        if name != "model" and name not in settings:
            raise RequestError(f"{path}: unknown setting {name!r}{_meant(name, settings)}")
    return values


def _from_environment(environment: Mapping[str, str], settings: Mapping[str, Setting]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for variable, text in environment.items():
        name = variable.removeprefix(PREFIX).lower()
        if name == "model":
            found[name] = text
        elif name not in settings or variable != PREFIX + name.upper():
            raise RequestError(f"unknown setting {variable} in the environment{_meant(name, settings)}")
        else:
            found[name] = _parsed(variable, text, settings[name].kind)
    return found


def _parsed(variable: str, text: str, kind: Any) -> Any:
    kinds = [one for one in get_args(kind) or (kind,) if one is not NoneType]
    if get_origin(kind) is Literal or str in kinds:
        return text
    if list[str] in kinds:
        return text.split(",")
    try:
        if bool in kinds:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return int(text) if int in kinds else float(text)
    except (KeyError, ValueError):
        what = "true or false" if bool in kinds else "a whole number" if int in kinds else "a number"
        raise RequestError(f"{variable} must be {what}, not {text!r}") from None


def _meant(name: str, settings: Mapping[str, Setting]) -> str:
    close = difflib.get_close_matches(name, ["model", *settings], 1)
    return f"; did you mean {close[0]!r}?" if close else "; millis serve --help lists them"


def _docstrings(cls: type[Any]) -> dict[str, str]:
    """The string behind each field of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found
