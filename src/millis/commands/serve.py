"""millis serve: HTTP for programs and a page for people, in front of one model."""

from __future__ import annotations

from typing import Annotated

import typer

from millis.commands import common

EXAMPLE = "millis serve -m smollm2 --port 8000"


def command(
    model: common.Model = "smollm2",
    host: Annotated[str, typer.Option(help="Address")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port")] = 8000,
    threads: common.Threads = None,
) -> None:
    """Serves a model over HTTP."""
    from millis.config import ServerConfig
    from millis.server.run import serve

    config = ServerConfig(host=host, port=port)
    path = common.resolve(model)
    serve(path, model, config, {"threads": threads}, common.say)
