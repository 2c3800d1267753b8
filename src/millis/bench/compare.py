"""The whole comparison: prepares every engine, loads it, measures in turns, and puts it all into one report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millis import _native
from millis.bench import forms
from millis.bench.engine import OURS, measure, report
from millis.bench.peers import INSTALL, LOADS, PEERS, WorkerEngine, interpreter, worker_engine
from millis.bench.process import WorkerError
from millis.models.config import ModelConfig
from millis.models.load import read_checkpoint
from millis.types import ModelError, RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured, and how. Lengths in tokens."""

    peers: Sequence[str]
    threads: int
    prompts: Sequence[int]
    depths: Sequence[int]
    new_tokens: int = 32
    rounds: int = 5
    loads: Sequence[str] = LOADS
    timeout_s: float = 600.0  # of one load, or one run
    installed: Path = Path("build/peers")  # a virtual environment a peer
    kept: Path  # for models in other engines' forms

    def context(self, config: ModelConfig) -> int:
        """The longest sequence. RequestError where the model cannot hold it."""
        longest = max(max(self.prompts, default=0) + 1, max(self.depths, default=0) + self.new_tokens)
        if longest + 1 > config.context:
            raise RequestError(
                f"{longest} tokens are measured, and this model was made for {config.context}: "
                "give shorter --prompts and --depths"
            )
        return min(longest + 64, config.context)


def compare(path: Path, settings: Settings, tell: Callable[[str], None], advance: Callable[[], None]) -> dict[str, Any]:
    """The report. ModelError when Millis itself cannot be measured; a peer's failure stands in the report."""
    config = read_checkpoint(path).config  # and the file let go: what is mapped stays cached
    context = settings.context(config)
    failed: dict[str, str] = {}
    engines: list[WorkerEngine] = []
    try:
        for name in (OURS, *settings.peers):
            tell(f"preparing {name}")
            with _reported(name, failed):
                engines.append(engine := _prepared(name, path, context, settings))
                engine.load(settings.loads[:-1], _telling(tell, name))
                engine.close()  # what it has mapped would stay cached for the next one's cold load
        for engine in engines:
            if engine.name not in failed:
                with _reported(engine.name, failed):
                    engine.load(settings.loads[-1:], _telling(tell, engine.name))
        ours = engines[0]
        ready = [engine for engine in engines if engine.name not in failed]
        token_bytes = int(ours.facts["token_bytes"])
        tell("measuring")
        measured = measure(
            ready,
            prompts=settings.prompts,
            depths=settings.depths,
            vocab=config.vocab,
            new_tokens=settings.new_tokens,
            rounds=settings.rounds,
            read=lambda: _native.read_bandwidth(max(64, token_bytes >> 20), settings.threads),
            advance=advance,
        )
        loads = [_loaded(engine) for engine in ready]
    finally:
        for engine in engines:
            engine.close()
    measured.failed |= failed
    result = report(measured, token_bytes, lambda tokens: cache_bytes(config, tokens))
    asked = {"threads": settings.threads, "prompts": list(settings.prompts), "depths": list(settings.depths)}
    return {**asked, "rounds": settings.rounds, "isa": ours.facts["isa"], **result, "loads": loads}


def cache_bytes(config: ModelConfig, tokens: int) -> int:
    """What attention reads for one new token after `tokens` others: keys and values of 16 bits, inside the windows."""
    windows = config.windows or (0,) * (config.layers - sum(config.convolved))
    positions = sum(min(tokens, window) if window else tokens for window in windows)
    return positions * config.kv_heads * config.head_dim * 2 * 2


@contextmanager
def _reported(name: str, failed: dict[str, str]) -> Iterator[None]:
    """A peer's failure becomes a line of the report; without Millis itself there is nothing to compare with."""
    try:
        yield
    except (WorkerError, ModelError) as error:
        if name == OURS:
            raise ModelError(f"millis cannot be measured: {error}") from None
        failed[name] = str(error)


def _telling(tell: Callable[[str], None], name: str) -> Callable[[str], None]:
    return lambda kind: tell(f"loading {name} ({kind})")


def _prepared(name: str, path: Path, context: int, settings: Settings) -> WorkerEngine:
    """WorkerError: not installed, or no way to the form it reads."""
    python, model = Path(sys.executable), path
    if name in PEERS:
        found = interpreter(name, settings.installed)
        if found is None:
            raise WorkerError(f"not installed; {INSTALL.format(name=name)}")
        python, model = found, forms.prepare(PEERS[name].form, path, found, settings.kept)
    spec = {"model": str(model), "threads": settings.threads, "context": context}
    return worker_engine(name, python, spec, settings.timeout_s)


def _loaded(engine: WorkerEngine) -> dict[str, Any]:
    return {
        "engine": engine.name,
        "version": engine.version,
        "import_ms": engine.import_ms,
        "load_ms": engine.load_ms,
        "kept_in_cache": engine.kept_in_cache,
        **engine.memory_mb(),
    }
