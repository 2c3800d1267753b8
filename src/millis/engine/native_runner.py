"""Runs batches on the native runtime: hands it a model's plan and weights once, then only arrays."""

from __future__ import annotations

import contextlib
import ctypes
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from millis import _native
from millis.config import EngineConfig, available_memory_bytes
from millis.engine.kvcache import pool_tokens
from millis.engine.runner import Batch, Ranked, Sampled
from millis.models.adapter import AdapterWeights
from millis.models.dequantize import check_finite
from millis.models.load import Model
from millis.models.mapped import forget
from millis.models.plan import (
    Attention,
    Convolve,
    CrossAttention,
    Embed,
    GatedMatMul,
    MatMul,
    Norm,
    Op,
    Plan,
    Pool,
    Remember,
    Select,
    SelfAttention,
)
from millis.models.tensor import Tensor
from millis.types import FormatError, ModelError, RequestError, SamplingParams, TokenLogprob, closed_error

OUTPUT_ROWS = 16  # rows of logits held at once
SMALLEST = float(np.finfo(np.float32).tiny)  # smaller shares of probability would be none to the native sampler
ALLOWED = 1e3  # on the logits of the only tokens that may be chosen


class Closed:
    """What a runner has in place of a native runtime that it gave back: any use of it is a RequestError."""

    def __getattr__(self, name: str) -> NoReturn:
        raise closed_error()


CLOSED: Any = Closed()


def trim() -> None:
    """Gives the system what the C library keeps of freed memory, tens of MB behind a model, where it is glibc."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class NativeRunner:
    """A Runner. Raises FormatError when the weights do not fit the plan or hold NaN or infinite values, ModelError when
    the machine's memory is too small for them.

    packed: where those matrices are taken from that it holds; see engine/packed.py.
    """

    page_tokens: int = _native.PAGE_TOKENS

    def __init__(self, model: Model, config: EngineConfig, packed: _native.PackedFile | None = None) -> None:
        plan = model.plan
        self.packed_bytes = 0 if packed is None else int(packed.nbytes)
        """Bytes of the packed file in use, if there is one."""
        self.vocab, self.context = plan.vocab, plan.context
        self.max_tokens, self.max_sequences = config.max_batch_tokens, config.max_sequences
        self.pages = -(-(config.cache_tokens or _cache_tokens(plan, config)) // self.page_tokens)
        if plan.head_dim % 16:
            raise ModelError(f"{model.checkpoint.path}: head_dim {plan.head_dim} is not a multiple of 16")
        try:
            self._runtime = new_runtime(plan, config, self.max_tokens, self.pages)
            check_values(plan, model.checkpoint.tensors, matrices=packed is None)  # those of the file were, before
            if packed is not None:
                self._runtime.use_packed(packed)
            fill(self._runtime, plan, model.checkpoint.tensors)
        except ValueError as error:
            raise FormatError(f"{model.checkpoint.path}: {error}") from None
        except MemoryError:
            raise ModelError(
                f"{model.checkpoint.path}: not enough memory for the weights and {self.pages * self.page_tokens} "
                "positions of KV cache; ask for a shorter context"
            ) from None

    def close(self) -> None:
        """Gives weights and KV cache back, at the end of the call that is under way."""
        self._runtime = CLOSED

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return str(self._runtime.isa)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights."""
        return int(self._runtime.weight_bytes)

    @property
    def token_bytes(self) -> int:
        """Bytes of the packed weights that a token is multiplied by: an embedding where it is the output, too."""
        return int(self._runtime.token_bytes)

    def sampler(self, params: SamplingParams, prompt: Sequence[int]) -> Any:
        for token in params.logit_bias:
            if not 0 <= token < self.vocab:
                raise RequestError(f"logit_bias names token {token}; the vocabulary has {self.vocab}")
        sampler = new_sampler(self.vocab, params, list(params.logit_bias.items()), params.logprobs)
        sampler.seen(np.asarray(prompt, np.int32))
        return sampler

    def restricted(self, params: SamplingParams, tokens: Sequence[int], allowed: frozenset[int]) -> Any:
        bias = {token: params.logit_bias.get(token, 0.0) + ALLOWED for token in allowed}
        return self.sampler(replace(params, logit_bias={**params.logit_bias, **bias}), tokens)

    def adapter(self, weights: AdapterWeights) -> Any:
        """The adapter packed for this model, `nbytes` large. FormatError: it does not fit. ModelError: no memory."""
        pack = self._runtime.adapter  # of a closed one, an error of its own
        try:
            return pack([(pair.weight, pair.a, pair.b, pair.scale) for pair in weights.pairs])
        except ValueError as error:
            raise FormatError(f"{weights.path.name}: {error}") from None
        except MemoryError:
            raise ModelError(f"not enough memory for the adapter {weights.path.name}; unload another") from None

    def step(self, batch: Batch, samplers: Sequence[Any | None]) -> Sampled:
        drafted = np.zeros(len(batch.lengths), np.int32) if batch.drafted is None else batch.drafted
        found = self._runtime.step(
            batch.tokens, batch.starts, batch.lengths, batch.tables, samplers, drafted, batch.adapters
        )
        return Sampled(
            [[token for token, _, _ in row] for row in found],
            [
                [TokenLogprob(*one[:2], tuple(one[2])) if sampler.logprobs >= 0 else None for one in row]
                if sampler is not None
                else []
                for row, sampler in zip(found, samplers, strict=True)
            ],
        )

    def propose(
        self, batch: Batch, samplers: Sequence[Any], ahead: Sequence[Sequence[int]], words: int
    ) -> list[tuple[int, float]]:
        """See DraftRunner."""
        return self._runtime.propose(batch.tokens, batch.starts, batch.lengths, batch.tables, samplers, ahead, words)

    def score(self, batch: Batch, targets: NDArray[np.int32]) -> NDArray[np.float32]:
        targets = np.asarray(targets, np.int32)
        return self._runtime.score(batch.tokens, batch.starts, batch.lengths, batch.tables, targets, batch.adapters)

    def score_best(self, batch: Batch, targets: NDArray[np.int32], count: int) -> Ranked:
        targets, count = np.asarray(targets, np.int32), min(count, self.vocab)
        return Ranked(
            *self._runtime.score_best(
                batch.tokens, batch.starts, batch.lengths, batch.tables, targets, count, batch.adapters
            )
        )

    def score_tree(self, batch: Batch, rows: NDArray[np.int32], targets: NDArray[np.int32]) -> NDArray[np.float32]:
        assert batch.parents is not None
        return self._runtime.score_tree(
            batch.tokens, batch.starts, batch.lengths, batch.tables, batch.parents, rows, targets, batch.adapters
        )

    def copy_page(self, source: int, target: int) -> None:
        self._runtime.copy_page(source, target)

    def hidden(self, batch: Batch) -> NDArray[np.float32]:
        """[T, width] the final, normed hidden states: what the output matrix reads behind every token,
        and so divided by granite's logit scale."""
        return self._runtime.hidden(batch.tokens, batch.starts, batch.lengths, batch.tables)

    def logits(self, batch: Batch, *, every: bool = False) -> NDArray[np.float32]:
        """[S, vocab] logits after each sequence's last token, or [T, vocab] after every token."""
        return self._runtime.logits(batch.tokens, batch.starts, batch.lengths, batch.tables, every, batch.adapters)


def new_runtime(plan: Plan, config: EngineConfig, max_tokens: int, pages: int) -> _native.Runtime:
    """A native runtime for a plan that writes, still without ops and weights. ValueError, MemoryError."""
    return _native.Runtime(
        threads=config.threads,
        isa=config.isa,
        max_tokens=max_tokens,
        max_outputs=min(max_tokens, OUTPUT_ROWS),
        pages=pages,
        layers=plan.layers,
        kv_heads=plan.kv_heads,
        head_dim=plan.head_dim,
        vocab=plan.vocab,
        context=plan.context,
        exact=config.precision == "exact",
        bytes=config.precision == "int8",
        screen=config.screen,
    )


def new_sampler(
    vocab: int, params: SamplingParams, bias: list[tuple[int, float]], logprobs: int | None
) -> _native.Sampler:
    """A native sampler. bias: added to the logits of ids; logprobs: how many likely ids are told, None: nothing is."""
    return _native.Sampler(
        vocab,
        temperature=params.temperature,
        top_k=min(params.top_k, vocab),
        top_p=max(params.top_p, SMALLEST),
        min_p=params.min_p,
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        bias=bias,
        seed=secrets.randbits(64) if params.seed is None else params.seed,
        logprobs=-1 if logprobs is None else logprobs,
    )


def _cache_tokens(plan: Plan, config: EngineConfig) -> int:
    """The size of the KV cache where none is asked for."""
    if not config.prefix_cache:
        return plan.context
    position_bytes = plan.layers * plan.kv_heads * 2 * plan.head_dim * (4 if config.precision == "exact" else 2)
    return pool_tokens(plan.context, config.max_sequences, position_bytes, available_memory_bytes())


def check_values(plan: Plan, tensors: Mapping[str, Tensor], *, matrices: bool = True) -> None:
    """ValueError, which names the weight, where one holds NaN or infinite values; `matrices`: in those, too."""
    held = set() if matrices else set(plan.matrices(tensors))
    for name in plan.weights():
        if name not in held:
            check_finite(tensors[name])


def fill(runtime: Any, plan: Plan, tensors: Any) -> None:
    """Gives a runtime the plan and its weights. ValueError where they do not fit."""
    for name, width in plan.widths.items():
        runtime.add_buffer(name, width)
    scales = {op.weight: np.float32(op.scale) for op in plan.ops if isinstance(op, Norm)}
    matrices = set(plan.matrices(tensors))
    for name in plan.weights():
        tensor: Tensor = tensors[name]
        if name not in matrices:
            values = tensor.numpy() * scales.get(name, np.float32(1))
            runtime.add_vector(name, np.ascontiguousarray(values.T).reshape(-1))  # tap by tap, of a convolution
            forget(tensor.data)  # each touch of a file may map 2 MB of it
        else:
            rows, columns = tensor.shape
            runtime.add_matrix(name, int(tensor.type), rows, columns, tensor.data)
    for name, table in plan.ropes.items():
        runtime.add_vector(name, np.ascontiguousarray(table, np.float32).reshape(-1))
    for name, table in plan.biases.items():
        padded = np.pad(table, ((0, 0), (0, 1 + _native.BIAS_SLACK)))
        runtime.add_vector(name, np.ascontiguousarray(padded, np.float32).reshape(-1))
    for op in plan.source:
        _add(runtime, op)
    if plan.source:
        runtime.end_source()
    for op in plan.ops:
        _add(runtime, op)
    runtime.finish()
    for tensor in tensors.values():  # the runtime has what it needs; the model's files need take no memory beside it
        forget(tensor.data)


def _add(runtime: Any, op: Op) -> None:
    """Tells the runtime one op; "" stands for an absent name there."""
    match op:
        case Embed():
            runtime.embed(op.out, op.weight, op.scale, op.positions or "", op.types or "")
        case Norm():
            runtime.norm(
                op.out, op.x, op.weight, op.bias or "", op.eps, op.kind == "layer", op.residual or "",
                *(op.columns or ()),
            )  # fmt: skip
        case MatMul():
            runtime.matmul(op.out, op.x, op.weights, op.biases, op.activation or "", op.residual or "", "")
        case GatedMatMul():
            runtime.matmul(op.out, op.x, [op.up], [], op.activation, "", op.gate)
        case Attention():
            runtime.attention(
                op.out, op.qkv, op.layer, op.heads, op.scale, op.rope or "", op.rope_style == "interleaved",
                op.window, op.q_norm or "", op.k_norm or "", op.norm_eps, op.bias or "", op.norm_rotated,
            )  # fmt: skip
        case Convolve():
            runtime.convolve(op.out, op.bcx, op.weight, op.layer, op.taps)
        case SelfAttention():
            runtime.attend_all(
                op.out, op.qkv, op.heads, op.kv_heads, op.head_dim, op.scale, op.bias or "", op.rope or "", op.window,
                op.q_norm or "", op.k_norm or "", op.norm_eps,
            )  # fmt: skip
        case Remember():
            runtime.remember(op.kv, op.layer)
        case CrossAttention():
            runtime.cross_attention(op.out, op.q, op.layer, op.heads, op.scale)
        case Select():
            runtime.select(op.out, op.x)
        case Pool():
            runtime.pool(op.out, op.x, op.kind == "mean")
