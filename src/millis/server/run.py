"""The life of a server: listen, load, answer, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from millis.config import EngineConfig, ServerConfig
from millis.engine.adapters import named
from millis.models.load import is_encoder, is_seq2seq
from millis.server.app import create_app
from millis.server.auth import Keys
from millis.server.client import EngineClient
from millis.server.library import Library
from millis.server.messages import Pin
from millis.server.metrics import Metrics
from millis.server.open_files import connections
from millis.server.origins import Origins
from millis.server.protocol import protocol_for
from millis.server.served import Model
from millis.server.service import Service
from millis.server.settings import SHARED, Settings
from millis.tasks.answer import common_ids
from millis.tasks.encoder import OPTIONS
from millis.tasks.index import embedder_of
from millis.tasks.model import check_isa
from millis.tasks.seq2seq import OPTIONS as REWRITING
from millis.tokenizer import Tokenizer
from millis.types import RequestError

log = logging.getLogger("millis.server")
URGENT = -10  # nice value of the event loop's thread, whose work is short
LAST_WORDS_S = 1.0  # for answers that are cut off at the end of the drain
SWITCH_S = 0.001  # a thread that renders a long prompt gives way to the event loop so often
Files = tuple[Keys | None, str | None]  # the keys, and a text to pin
Announce = Callable[[dict[str, Any]], None]


def check(settings: Settings) -> None:
    """RequestError for what settings say wrongly, whatever the model is: an ISA, names of hosts, pages or adapters."""
    check_isa(EngineConfig(**settings.engine).isa)
    Origins.of(settings.server)
    _adapters(settings.server.adapter or [])


def read_files(config: ServerConfig) -> Files:
    """The keys and the text to pin. RequestError for files that cannot be used, and for a folder that there is not."""
    keys = None if config.api_key_file is None else Keys.read(Path(config.api_key_file))
    pin = None if config.pin is None else _pin_text(Path(config.pin))
    if config.adapter_dir is not None and not Path(config.adapter_dir).is_dir():
        raise RequestError(f"there is no folder {config.adapter_dir} of adapters; make it, or leave out --adapter-dir")
    if config.tls_cert is not None and config.tls_key is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key)
        except OSError as error:  # ssl.SSLError is one
            reason = error.strerror or error
            text = f"cannot use {config.tls_cert} with {config.tls_key}: {reason}; give PEM files"
            raise RequestError(text) from None
    return keys, pin


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the models are: the main one, larger ones that write, too, and encoders, these by their names."""

    main: Path
    larger: Mapping[str, Path]
    encoders: Mapping[str, Path]


def serve(paths: Paths, settings: Settings, files: Files, announce: Announce) -> None:
    """Serves models until SIGTERM, SIGHUP or SIGINT. `announce` is told once where, when requests are answered. files:
    see `read_files`.

    Raises ModelError (one cannot be loaded), RequestError (settings that an encoder does not have), OSError (the
    address), and in the end KeyboardInterrupt where it was SIGINT.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("millis").setLevel(logging.INFO)
    most = connections(settings.server.max_connections)
    settings = replace(settings, server=replace(settings.server, max_connections=most))
    sys.setswitchinterval(SWITCH_S)
    with contextlib.suppress(OSError, AttributeError):  # as far as the system allows: answers go out before steps go on
        os.setpriority(os.PRIO_PROCESS, 0, URGENT)
    if uvloop.run(_serve(paths, settings, files, announce)) == signal.SIGINT:
        raise KeyboardInterrupt


async def _serve(paths: Paths, settings: Settings, files: Files, announce: Announce) -> int | None:
    """The first signal that ended it, if one did."""
    config, loop = settings.server, asyncio.get_running_loop()
    keys, pin = files
    models = served_models(paths, settings)
    main = models[0]
    service = Service(config, models, keys)
    server = _Server(_uvicorn_config(service))
    service.connections = lambda: len(server.server_state.connections)
    listener = listen(config.host, config.port)

    first: int | None = None

    def stop(number: int) -> None:
        nonlocal first
        first = first or number
        if service.draining:
            if number == signal.SIGHUP:  # it comes twice, or behind SIGTERM, from shells and supervisors in no hurry
                return
            server.force_exit = True
            fail_all()
            return
        service.draining = True
        server.should_exit = True
        loop.call_later(config.drain_s, fail_all)

    def fail_all() -> None:
        for model in models:
            model.client.fail_all(*STOPPING)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            loop.add_signal_handler(number, stop, number)
    answering = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        began = loop.time()
        loading = asyncio.gather(*(model.load() for model in models))
        waited: list[asyncio.Future[Any]] = [loading, answering]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            await loading
            if config.index is not None:
                service.library = await service.in_thread(open_library, Path(config.index), models, settings.model)
                if main.tokenizer is not None and main.tokenizer.has_chat_template:
                    main.client.pin(Pin(tuple(common_ids(main.tokenizer))))
            info = main.client.info
            assert info is not None
            for model in models if pin is not None else ():
                if not (model.reads or model.rewrites):
                    assert model.tokenizer is not None and pin is not None
                    model.client.pin(Pin(tuple(_pinned_ids(model.tokenizer, pin))))
            gc.collect()
            gc.freeze()
            announce(
                {
                    "url": f"{'https' if config.tls_cert else 'http'}://{_authority(listener)}",
                    "model": main.name,
                    "larger": list(paths.larger),
                    "encoders": list(paths.encoders),
                    "pid": os.getpid(),
                    "threads": info.threads,
                    "isa": info.isa,
                    "context": info.context,
                    "ready_s": round(loop.time() - began, 3),
                }
            )
        else:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
        await answering
    finally:
        server.should_exit = server.force_exit = True
        await asyncio.gather(answering, return_exceptions=True)
        await asyncio.gather(*(model.client.close() for model in models))
        service.close()
    return first


STOPPING = ("server_stopping", "the server is stopping; ask another")


class _Server(uvicorn.Server):
    """Signals are ours: a server that was asked to end, and ended, has not failed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _uvicorn_config(service: Service) -> uvicorn.Config:
    config = service.config
    found = uvicorn.Config(
        create_app(service),
        http=protocol_for(config),
        ws="none",
        loop="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=max(1, round(config.keep_alive_s)),
        timeout_graceful_shutdown=round(config.drain_s + LAST_WORDS_S),
        ssl_certfile=config.tls_cert,
        ssl_keyfile=config.tls_key,
    )
    found.load()
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # its lines may quote what clients sent
    return found


def served_models(paths: Paths, settings: Settings) -> list[Model]:
    """The main model, larger ones, then the encoders. RequestError: a setting that an encoder does not have, a name
    given twice, a model of the other kind."""
    config, path = settings.server, paths.main
    reads, rewrites = is_encoder(path), is_seq2seq(path)
    name = config.served_name or settings.model
    if reads:
        _check_chosen(settings, "an encoder", OPTIONS)
        client = EngineClient(str(path), _some(settings.engine, OPTIONS), worker=READER)
    elif rewrites:
        _check_chosen(settings, "an encoder-decoder model", REWRITING)
        client = EngineClient(str(path), _some(settings.engine, REWRITING), worker=REWRITER)
    else:
        client = EngineClient(str(path), settings.engine, _adapters(config.adapter or []))
    indexed = config.index is not None
    found = [Model(name, path, client, Metrics(name), reads=reads, rewrites=rewrites, indexed=indexed)]

    def add(other: str, folder: Path, client: EngineClient, reads: bool) -> None:
        if any(other == model.name for model in found):
            raise RequestError(f"two models are called {other!r}; name one apart: NAME={other}")
        found.append(Model(other, folder, client, Metrics(other, found[0].metrics), reads=reads, indexed=indexed))

    writing = {key: value for key, value in settings.engine.items() if key != "draft"}  # of the main one's vocabulary
    for other, folder in paths.larger.items():
        if is_encoder(folder):
            raise RequestError(f"{other} is an encoder, which writes no text; --encoder {other} serves it")
        if is_seq2seq(folder):
            raise RequestError(f"{other} is an encoder-decoder model, which is served alone; give it as -m")
        add(other, folder, EngineClient(str(folder), writing), False)
    reading = {key: value for key, value in _some(settings.engine, OPTIONS).items() if key != "context"}
    for other, folder in paths.encoders.items():
        if not is_encoder(folder):
            raise RequestError(f"{other} is no encoder; --encoder is for models that read, such as minilm")
        add(other, folder, EngineClient(str(folder), reading, worker=READER), True)
    return found


def open_library(path: Path, models: Sequence[Model], main: str) -> Library:
    """The index, with the model among those served that it was made with. main: what the first was asked for as."""
    name = embedder_of(path)
    known = {model.name: model for model in models} | {main: models[0]}
    if name is not None and name not in known:
        raise RequestError(f"{path} was made with {name}, which is not served; give --encoder {name}")
    return Library(path, None if name is None else known[name], name)


READER = "millis.server.encoder_worker"
REWRITER = "millis.server.seq2seq_worker"


def _some(engine: Mapping[str, Any], options: Sequence[str]) -> dict[str, Any]:
    """Of the engine's settings, those of a process that has these options."""
    found = {name: value for name, value in engine.items() if name in options}
    return {**found, "max_waiting": EngineConfig(**engine).max_waiting}


def _check_chosen(settings: Settings, kind: str, options: Sequence[str]) -> None:
    """RequestError for what was chosen and a model of this kind does not have."""
    chosen = [name for name, value in settings.engine.items() if SHARED.get(name) != value]
    chosen += [name for name in ("adapter", "adapter_dir", "larger", "pin") if getattr(settings.server, name)]
    for name in chosen:
        if name not in (*options, "max_waiting", "delivery_ms"):
            flag = "--" + name.replace("_", "-")
            raise RequestError(f"{settings.model} is {kind}, for which {flag} means nothing; leave it out")


def _adapters(given: list[str]) -> dict[str, str]:
    """Name → path of the adapters that a server is started with. RequestError."""
    found: dict[str, str] = {}
    for text in given:
        name, path = named(text)
        if name in found:
            raise RequestError(f"two adapters are called {name!r}; name them apart: NAME=PATH")
        found[name] = str(Path(path).resolve())
    return found


def _pin_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RequestError(f"cannot read the text to pin in {path}: {reason}") from None


def _pinned_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids that every conversation with this system prompt begins with."""
    if not tokenizer.has_chat_template:
        return tokenizer.encode(text)
    chats = [
        tokenizer.encode_chat([{"role": "system", "content": text}, {"role": "user", "content": question}])
        for question in ("A", "4")
    ]
    same = next((i for i, (a, b) in enumerate(zip(*chats, strict=False)) if a != b), min(map(len, chats)))
    return chats[0][:same]


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. OSError names address and port."""
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise OSError(
            error.errno, f"cannot listen there: {error.strerror}; give another --port or --host", f"{host}:{port}"
        ) from None
    return listener


def _authority(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
