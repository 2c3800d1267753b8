"""The whole of it: a source, a target, and the file that meets it, measured before it is written.

A target is a type, or a limit: of the file's size, of the time of a step, or of how much perplexity may rise. Under a
limit every matrix takes the type that the knapsack of quantize/choose.py gives it. Predicted losses only rank; what a
rise of perplexity is, the engine measures, and the prediction is corrected by what it found until the target holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from millis import _native
from millis.models.fingerprint import fingerprint
from millis.models.gguf_write import TensorOut, head_bytes
from millis.models.load import Model, build_plan, read_checkpoint
from millis.models.tensor import GgmlType, Tensor
from millis.quantize import importance, tensors
from millis.quantize.choose import Choice, Option, smallest, total_size, within_loss, within_size
from millis.quantize.export import exportable, write_export
from millis.quantize.importance import Importance
from millis.quantize.measure import Measured, mean_loss
from millis.quantize.text import Calibration, calibration
from millis.tokenizer import load_tokenizer
from millis.types import RequestError

Say = Callable[[str, int, int], None]  # stage, done, of how many
_ROUNDS = 5  # of measuring a choice and correcting the limit on predicted losses
_AIM = 0.7  # of the limit: another text may differ by what is left
_CLOSE = 1.3  # allowances nearer to one another than this give much the same file
_DEVIATIONS = 2.0  # standard errors between what was measured and what must hold
_HEADER_BYTES = 64  # of a tensor in the directory, beside its name


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One of them."""

    type: GgmlType | None = None
    max_bytes: int | None = None
    max_ms: float | None = None
    max_ppl_loss: float | None = None  # 0.01 is one percent


@dataclass(slots=True, kw_only=True)
class Report:
    """What was done: a row for each tensor, and what was measured."""

    path: Path
    file_bytes: int = 0
    source_bytes: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)


class Search:
    """Looks for the largest allowance that holds: further where it held, back where not, then between."""

    def __init__(self, allowed: float) -> None:
        self.allowed = allowed
        self._held = self._failed = 0.0  # 0: none yet

    def go_on(self, held: bool, factor: float) -> bool:
        """Takes in whether `allowed` held, and by what factor it may be wrong; False once there is little to gain."""
        if held:
            self._held = max(self._held, self.allowed)
        else:
            self._failed = min(self._failed or math.inf, self.allowed)
        if self._held and self._failed:
            self.allowed = math.sqrt(self._held * self._failed)
            return self._failed > _CLOSE * self._held
        self.allowed *= min(max(factor, 1.0), 3.0) if held else max(min(factor, 0.7), 0.3)
        return not held or factor > _CLOSE


class Quantizer:
    """One source on its way to one file. Raises RequestError where a target cannot be met."""

    def __init__(self, source: Path, threads: int, say: Say = lambda stage, done, total: None) -> None:
        self.checkpoint, self._metadata = exportable(read_checkpoint(source))
        self._threads, self._say = threads, say
        self._matrices = {tensor.name: tensor for tensor in tensors.matrices(self.checkpoint)}
        self._others = tensors.others(self.checkpoint)
        self._importance: Mapping[str, Importance] = {}
        self._text: Calibration | None = None
        self._encoded: dict[tuple[str, GgmlType], tuple[Tensor, float]] = {}

    def calibrate(self, text: str, learn: int, measure: int, kept: Path | None = None) -> None:
        """Learns what errors cost from `learn` windows of `text`; `kept`: a file that may know already, or will."""
        context = self.checkpoint.config.context
        self._text = calibration(text, load_tokenizer(self.checkpoint), learn, measure, context)
        windows = self._text.learn
        digest = importance.digest(fingerprint(self.checkpoint.path), windows)
        found = None if kept is None else importance.load(kept, digest)
        if found is None:
            done = iter(range(1, len(windows) + 1))
            model = Model(self.checkpoint, build_plan(self.checkpoint, max(map(len, windows))))
            self._say("importance", 0, len(windows))
            found = importance.measure(model, windows, lambda: self._say("importance", next(done), len(windows)))
            if kept is not None:
                importance.save(kept, found, digest)
        self._importance = found

    def write(self, path: Path, target: Target) -> Report:
        """Chooses, measures where a text was given, and writes."""
        report = Report(path=path, source_bytes=sum(t.nbytes for t in self.checkpoint.tensors.values()))
        types = self._chosen(target, report)
        out = [TensorOut.of(tensor) for tensor in self._others]
        out += [self._out(tensor, types[name], report) for name, tensor in self._matrices.items()]
        order = {name: at for at, name in enumerate(self.checkpoint.tensors)}
        out.sort(key=lambda tensor: order[tensor.name])
        done = iter(range(1, len(out) + 1))
        report.file_bytes = write_export(
            path, self._metadata, out, lambda tensor: self._say("writing", next(done), len(out))
        )
        return report

    def _chosen(self, target: Target, report: Report) -> dict[str, GgmlType]:
        if target.type is not None:
            return {name: tensors.fitting(tensor, target.type) for name, tensor in self._matrices.items()}
        if self._text is None:
            raise RequestError("a limit needs a calibration text, to know what errors cost")
        options = self._options()
        if target.max_bytes is not None:
            choice = within_size(options, target.max_bytes - self._fixed_bytes())
            if choice is None:
                least = (self._fixed_bytes() + sum(o.size for o in smallest(options).values())) / 1e6
                raise RequestError(f"even the smallest types take {least:.3f} MB, more than {target.max_bytes / 1e6:g}")
        elif target.max_ms is not None:
            choice = self._within_ms(options, target.max_ms, report)
        else:
            assert target.max_ppl_loss is not None
            choice = self._within_perplexity(options, math.log1p(target.max_ppl_loss), report)
        report.measured["predicted_loss"] = sum(option.loss for option in choice.values())
        return {name: option.type for name, option in choice.items()}

    def _options(self) -> dict[str, list[Option]]:
        found = {}
        for at, (name, tensor) in enumerate(self._matrices.items()):
            self._say("types", at, len(self._matrices))
            found[name] = tensors.options(tensor, self._cost_of(tensor), self._threads)
        return found

    def _cost_of(self, tensor: Tensor) -> Importance:
        return self._importance.get(tensor.name) or tensors.uniform(tensor)

    def _fixed_bytes(self) -> int:
        """Of the file, whatever the types: key-values, directory, what is not quantised."""
        every = [TensorOut.of(tensor) for tensor in self.checkpoint.tensors.values()]
        padding = 32 * len(every)
        return head_bytes(self._metadata, every) + sum(t.nbytes for t in self._others) + padding

    def _encode(self, name: str, type: GgmlType) -> tuple[Tensor, float]:
        key = name, type
        if key not in self._encoded:
            tensor = self._matrices[name]
            self._encoded[key] = tensors.encode(tensor, type, self._cost_of(tensor), self._threads)
        return self._encoded[key]

    def _out(self, tensor: Tensor, type: GgmlType, report: Report) -> TensorOut:
        def produce() -> Any:
            made, loss = self._encode(tensor.name, type)
            self._encoded.pop((tensor.name, type))
            error = tensors.relative_error(tensor, made)
            row = {"name": tensor.name, "from": tensor.type.name, "type": type.name, "bytes": made.nbytes}
            row |= {"shape": list(tensor.shape), "relative_error": error}
            report.rows.append(row | ({"loss_nats": loss} if self._importance else {}))
            return made.data

        return TensorOut(tensor.name, type, tensor.shape, produce)

    def _within_ms(self, options: dict[str, list[Option]], limit_ms: float, report: Report) -> Choice:
        """A step takes what it takes to read the weights, and what the source's takes beyond that."""
        read = {name: [replace(o, size=self._read(name, o.type)) for o in found] for name, found in options.items()}
        total = sum(self._read(name, tensor.type) for name, tensor in self._matrices.items())
        bandwidth = float(_native.read_bandwidth(max(64, int(total) >> 20), self._threads)) * 1e6  # bytes a millisecond
        self._say("timing", 0, 1)
        source_ms = Measured(self.checkpoint, {}, 64, self._threads).step_ms()
        beyond = max(0.0, source_ms - total / bandwidth)
        choice = within_size(read, (limit_ms - beyond) * bandwidth)
        if choice is None:
            fastest = sum(min(o.size for o in found) for found in read.values()) / bandwidth + beyond
            raise RequestError(f"even the smallest types take {fastest:.2f} ms a token here, more than {limit_ms:g}")
        predicted = sum(option.size for option in choice.values()) / bandwidth + beyond
        report.measured |= {"source_ms": source_ms, "predicted_ms": predicted}
        report.measured["measured_ms"] = Measured(self.checkpoint, self._made(choice), 64, self._threads).step_ms()
        return choice

    def _read(self, name: str, type: GgmlType) -> float:
        """Bytes read for a token: none to speak of where rows are only looked up."""
        looked_up = name == "token_embd.weight" and "output.weight" in self._matrices
        return 0.0 if looked_up else float(tensors.read_bytes(self._matrices[name], type))

    def _made(self, choice: Choice) -> dict[str, Tensor]:
        made = {}
        for at, (name, option) in enumerate(choice.items()):
            self._say("quantizing", at, len(choice))
            made[name], _ = self._encode(name, option.type)
        wanted = {(name, option.type) for name, option in choice.items()}
        self._encoded = {key: value for key, value in self._encoded.items() if key in wanted}
        return made

    def _within_perplexity(self, options: dict[str, list[Option]], limit: float, report: Report) -> Choice:
        """The smallest choice found whose measured rise, doubt of a sample included, is at most `limit` nats."""
        source = self._losses({})
        search, best = Search(_AIM * limit), None
        for _ in range(_ROUNDS):
            choice = within_loss(options, search.allowed)
            if choice is None:
                break
            rise = self._losses(self._made(choice)) - source
            mean, doubt = float(rise.mean()), _DEVIATIONS * float(rise.std(ddof=1)) / math.sqrt(len(rise))
            holds = mean + doubt <= limit
            if holds and (best is None or total_size(choice) < total_size(best)):
                best = choice
                report.measured |= {
                    "source_perplexity": math.exp(source.mean()),
                    "perplexity_loss": math.expm1(mean),
                    "perplexity_loss_at_most": math.expm1(mean + doubt),
                }
            if not search.go_on(holds, _AIM * limit / max(mean + doubt, 0.1 * limit)):
                break
        if best is None:
            raise RequestError(f"no choice of types keeps the rise within {100 * math.expm1(limit):.3g} % on this text")
        return best

    def _losses(self, made: dict[str, Tensor]) -> Any:
        assert self._text is not None
        windows = self._text.measure
        measured = Measured(self.checkpoint, made, max(map(len, windows)), self._threads)
        losses = []
        for at, window in enumerate(windows):
            self._say("perplexity", at, len(windows))
            losses.append(mean_loss(measured.log_likelihood, [window])[0])
        return np.array(losses)
