"""A named tensor as it lies in a file: GGML type, shape and raw bytes, not yet converted."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class GgmlType(IntEnum):
    """Storage types we read, numbered as in the GGUF specification."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 20
    IQ4_XS = 23
    BF16 = 30

    @property
    def block_values(self) -> int:
        """Values stored together in one block."""
        return _BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return _BLOCKS[self][1]


_BLOCKS = {
    GgmlType.F32: (1, 4),
    GgmlType.F16: (1, 2),
    GgmlType.BF16: (1, 2),
    GgmlType.Q4_0: (32, 18),
    GgmlType.Q4_1: (32, 20),
    GgmlType.Q5_0: (32, 22),
    GgmlType.Q5_1: (32, 24),
    GgmlType.Q8_0: (32, 34),
    GgmlType.Q2_K: (256, 84),
    GgmlType.Q3_K: (256, 110),
    GgmlType.Q4_K: (256, 144),
    GgmlType.Q5_K: (256, 176),
    GgmlType.Q6_K: (256, 210),
    GgmlType.IQ4_NL: (32, 18),
    GgmlType.IQ4_XS: (256, 136),
}


CONVOLUTION = "shortconv.conv.weight"  # ends the names of kernels of convolutions, which GGUF files hold in float32


@dataclass(frozen=True, slots=True)
class Tensor:
    """One weight. `shape` is outermost first, as NumPy writes it: a matrix is (rows = outputs, columns = inputs)."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    data: NDArray[np.uint8]  # [bytes], usually a view into the mapped file

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def numpy(self) -> NDArray[np.float32]:
        """The values, dequantised to float32 (a copy) in `shape`."""
        from millis.models.dequantize import dequantize

        return dequantize(self.data, self.type).reshape(self.shape)

    @classmethod
    def from_numpy(cls, name: str, values: NDArray[np.float32]) -> Tensor:
        """A float32 tensor holding `values`."""
        values = np.ascontiguousarray(values, dtype=np.float32)
        return cls(name, GgmlType.F32, values.shape, values.reshape(-1).view(np.uint8))
