"""millis pull: fetch a model."""

from __future__ import annotations

from typing import Annotated

import typer

from millis import hub
from millis.commands import common
from millis.hub.bar import Bar

EXAMPLE = "millis pull qwen2.5-0.5b"


def command(
    name: Annotated[str, typer.Argument(help="Catalogue name, or a hub repository as owner/name.")],
    accept_terms: Annotated[bool, typer.Option("--accept-terms", help="Agree to the model's terms.")] = False,
    json: common.Json = False,
) -> None:
    """Fetches a model into the cache; safe to repeat, resumes where it stopped."""
    from millis.tasks.readable import check_readable

    with Bar() as bar:
        path = hub.pull(name, bar, (lambda entry: True) if accept_terms else common.ask_terms, check_readable)
    if json:
        common.print_json({"name": name, "path": str(path)})
    else:
        print(path)
