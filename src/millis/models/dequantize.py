"""GGML's storage types → float32, in NumPy.

A tensor is a row of blocks of equal size; each function below turns blocks [n] of one type into values
[n, block_values]. Layouts and formulas: the GGML specification of quantised blocks (ggml-common.h, `block_*`).
Bits beside one another in a byte hold values far apart: `_unpack` undoes that for every type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millis.models.tensor import GgmlType, Tensor
from millis.types import FormatError

Blocks = NDArray[Any]  # [n], structured: one record a block
Values = NDArray[np.float32]  # [n, block_values]

_SCALES = ("d", "m", "dmin")  # of blocks, the float16 ones
_CHUNK_VALUES = 1 << 18  # a chunk's temporaries stay within the last-level cache, and memory near that of the result


def dequantize(data: NDArray[np.uint8], type: GgmlType) -> NDArray[np.float32]:
    """The values of `data` [bytes] as float32 [bytes / block_bytes · block_values]; always a copy.

    Raises FormatError where `data` is not a whole number of blocks.
    """
    if data.nbytes % type.block_bytes:
        raise FormatError(f"{data.nbytes} bytes are not a whole number of {type.name} blocks of {type.block_bytes}")
    dtype, values = _TYPES[type]
    blocks = np.frombuffer(np.ascontiguousarray(data), dtype=dtype)
    out = np.empty((len(blocks), type.block_values), dtype=np.float32)
    step = _CHUNK_VALUES // type.block_values
    with np.errstate(over="ignore", invalid="ignore"):  # a scale may be infinite: so is the value then
        for start in range(0, len(blocks), step):
            out[start : start + step] = values(blocks[start : start + step])
    return out.reshape(-1)


def check_finite(tensor: Tensor) -> None:
    """ValueError, which names the tensor, where a value is NaN or infinite. Of blocks, only the scales are read."""
    dtype, _ = _TYPES[tensor.type]
    blocks = np.frombuffer(tensor.data, dtype)
    floats = [blocks] if dtype.names is None else [blocks[name] for name in _SCALES if name in dtype.names]
    finite = _finite_bf16 if tensor.type is GgmlType.BF16 else np.isfinite
    for start in range(0, len(blocks), _CHUNK_VALUES):
        if not all(finite(one[start : start + _CHUNK_VALUES]).all() for one in floats):
            raise ValueError(f"{tensor.name} holds NaN or infinite values; fetch the file again or convert it anew")


def _finite_bf16(values: NDArray[np.uint16]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (values & 0x7F80) != 0x7F80
    return found


def _unpack(packed: NDArray[np.uint8], bits: int, stride: int) -> NDArray[np.uint8]:
    """[n, bytes] → [n, bytes · 8 / bits]: each run of `stride` bytes gives its lowest `bits` first, then the next."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, stride) >> shifts
    return (runs & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def _column(scales: NDArray[Any]) -> Values:
    """[n] float16 → [n, 1] float32."""
    return scales.astype(np.float32)[:, None]


def _plain(blocks: Blocks) -> Values:
    return blocks.astype(np.float32)[:, None]


def _bf16(blocks: Blocks) -> Values:
    return (blocks.astype(np.uint32) << np.uint32(16)).view(np.float32)[:, None]


def _q4_0(blocks: Blocks) -> Values:
    return _column(blocks["d"]) * (_unpack(blocks["qs"], 4, 16).astype(np.float32) - np.float32(8))


def _q4_1(blocks: Blocks) -> Values:
    return _column(blocks["d"]) * _unpack(blocks["qs"], 4, 16).astype(np.float32) + _column(blocks["m"])


def _five_bits(blocks: Blocks) -> Values:
    fifth = _unpack(blocks["qh"], 1, 1)
    return (_unpack(blocks["qs"], 4, 16) | fifth << np.uint8(4)).astype(np.float32)


def _q5_0(blocks: Blocks) -> Values:
    return _column(blocks["d"]) * (_five_bits(blocks) - np.float32(16))


def _q5_1(blocks: Blocks) -> Values:
    return _column(blocks["d"]) * _five_bits(blocks) + _column(blocks["m"])


def _q8_0(blocks: Blocks) -> Values:
    return _column(blocks["d"]) * blocks["qs"].astype(np.float32)


def _scaled(quants: Values, scales: Values, offsets: Values | None = None) -> Values:
    """Super-block values: quants [n, 256] · scales [n, groups] (− offsets [n, groups]), group by group."""
    groups = quants.reshape(*scales.shape, -1) * scales[:, :, None]
    if offsets is not None:
        groups -= offsets[:, :, None]
    return groups.reshape(len(quants), -1)


def _q2_k(blocks: Blocks) -> Values:
    scales = _column(blocks["d"]) * (blocks["scales"] & 15).astype(np.float32)
    offsets = _column(blocks["dmin"]) * (blocks["scales"] >> 4).astype(np.float32)
    return _scaled(_unpack(blocks["qs"], 2, 32).astype(np.float32), scales, offsets)


def _q3_k(blocks: Blocks) -> Values:
    low, high = _unpack(blocks["scales"][:, :8], 4, 8), _unpack(blocks["scales"][:, 8:], 2, 4)
    scales = _column(blocks["d"]) * ((low | high << np.uint8(4)).astype(np.float32) - np.float32(32))
    third = _unpack(blocks["hmask"], 1, 32)  # a set bit stands for "four is not taken away"
    quants = (_unpack(blocks["qs"], 2, 32) | third << np.uint8(2)).astype(np.float32) - np.float32(4)
    return _scaled(quants, scales)


def _scales_and_offsets(blocks: Blocks) -> tuple[Values, Values]:
    """Q4_K and Q5_K: eight 6-bit scales and eight 6-bit offsets in 12 bytes, → [n, 8] each."""
    first, second, rest = (blocks["scales"][:, i : i + 4] for i in (0, 4, 8))
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 2 & 48)], axis=1)
    offsets = np.concatenate([second & 63, (rest >> 4) | (second >> 2 & 48)], axis=1)
    return _column(blocks["d"]) * scales.astype(np.float32), _column(blocks["dmin"]) * offsets.astype(np.float32)


def _q4_k(blocks: Blocks) -> Values:
    return _scaled(_unpack(blocks["qs"], 4, 32).astype(np.float32), *_scales_and_offsets(blocks))


def _q5_k(blocks: Blocks) -> Values:
    quants = _unpack(blocks["qs"], 4, 32) | _unpack(blocks["qh"], 1, 32) << np.uint8(4)
    return _scaled(quants.astype(np.float32), *_scales_and_offsets(blocks))


def _q6_k(blocks: Blocks) -> Values:
    quants = _unpack(blocks["ql"], 4, 64) | _unpack(blocks["qh"], 2, 32) << np.uint8(4)
    scales = _column(blocks["d"]) * blocks["scales"].astype(np.float32)
    return _scaled(quants.astype(np.float32) - np.float32(32), scales)


# Of IQ4_NL and IQ4_XS, closer together about zero, where most weights lie.
_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _iq4_nl(blocks: Blocks) -> Values:
    return _column(blocks["d"]) * _LEVELS[_unpack(blocks["qs"], 4, 16)]


def _iq4_xs(blocks: Blocks) -> Values:
    low, high = _unpack(blocks["low"], 4, 1), _unpack(blocks["high"], 2, 1)
    scales = _column(blocks["d"]) * ((low | high << np.uint8(4)).astype(np.float32) - np.float32(32))
    return _scaled(_LEVELS[_unpack(blocks["qs"], 4, 16)], scales)


def _record(*fields: str) -> np.dtype[Any]:
    """A block's layout, in order, from "name type" or "name type count" (little-endian)."""
    parts = [field.split() for field in fields]
    return np.dtype([(name, kind) if not count else (name, kind, (int(count[0]),)) for name, kind, *count in parts])


_TYPES: dict[GgmlType, tuple[np.dtype[Any], Callable[[Blocks], Values]]] = {
    GgmlType.F32: (np.dtype("<f4"), _plain),
    GgmlType.F16: (np.dtype("<f2"), _plain),
    GgmlType.BF16: (np.dtype("<u2"), _bf16),
    GgmlType.Q4_0: (_record("d <f2", "qs u1 16"), _q4_0),
    GgmlType.Q4_1: (_record("d <f2", "m <f2", "qs u1 16"), _q4_1),
    GgmlType.Q5_0: (_record("d <f2", "qh u1 4", "qs u1 16"), _q5_0),
    GgmlType.Q5_1: (_record("d <f2", "m <f2", "qh u1 4", "qs u1 16"), _q5_1),
    GgmlType.Q8_0: (_record("d <f2", "qs i1 32"), _q8_0),
    GgmlType.Q2_K: (_record("scales u1 16", "qs u1 64", "d <f2", "dmin <f2"), _q2_k),
    GgmlType.Q3_K: (_record("hmask u1 32", "qs u1 64", "scales u1 12", "d <f2"), _q3_k),
    GgmlType.Q4_K: (_record("d <f2", "dmin <f2", "scales u1 12", "qs u1 128"), _q4_k),
    GgmlType.Q5_K: (_record("d <f2", "dmin <f2", "scales u1 12", "qh u1 32", "qs u1 128"), _q5_k),
    GgmlType.Q6_K: (_record("ql u1 128", "qh u1 64", "scales i1 16", "d <f2"), _q6_k),
    GgmlType.IQ4_NL: (_record("d <f2", "qs u1 16"), _iq4_nl),
    GgmlType.IQ4_XS: (_record("d <f2", "high u1 2", "low u1 4", "qs u1 128"), _iq4_xs),
}
