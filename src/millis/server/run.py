"""The life of a server: listen, load, answer, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import uvicorn

from millis.config import ServerConfig
from millis.models.load import read_checkpoint
from millis.server.app import Service, create_app
from millis.server.client import EngineClient
from millis.server.protocol import protocol_for
from millis.tokenizer import Tokenizer, load_tokenizer
from millis.types import ModelError

log = logging.getLogger("millis.server")
GRACE_S = 1.0  # for the last words of answers that are cut off at the end of the drain


def serve(
    path: Path, model: str, config: ServerConfig, options: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    """Serves the model at `path`, called `model`, until SIGTERM or SIGINT. Raises ModelError, OSError."""
    import uvloop

    uvloop.run(_serve(path, model, config, options, say))


async def _serve(
    path: Path, model: str, config: ServerConfig, options: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    loop = asyncio.get_running_loop()
    client = EngineClient(str(path), options)
    service = Service(config, client, config.served_name or model)
    listener = listen(config.host, config.port)
    settings = uvicorn.Config(
        create_app(service),
        http=protocol_for(config),
        ws="none",
        loop="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(config.keep_alive_s),
        timeout_graceful_shutdown=int(config.drain_s + GRACE_S),
        ssl_certfile=config.tls_cert,
        ssl_keyfile=config.tls_key,
    )
    server = _Server(settings)

    def stop() -> None:
        if server.should_exit:
            server.force_exit = True
            return
        service.draining = True
        server.should_exit = True
        loop.call_later(config.drain_s, client.fail_all, "server_stopping", "the server is stopping; ask another")

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    answering = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        info, service.tokenizer = await asyncio.gather(client.start(), loop.run_in_executor(None, _tokenizer, path))
        url = f"{'https' if config.tls_cert else 'http'}://{_authority(listener)}"
        say(f"millis: {service.model} at {url} · {info.threads} threads, {info.isa} · loaded in {info.load_s:.2f} s")
        await answering
    finally:
        server.should_exit = True
        await asyncio.gather(answering, return_exceptions=True)
        await client.close()


class _Server(uvicorn.Server):
    """Signals are ours: a server that was asked to end, and ended, has not failed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(read_checkpoint(path))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. OSError names address and port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from None
    return listener


def _authority(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
