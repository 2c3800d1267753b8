"""Packed files as the native reader sees them: what one holds, and that nothing of a damaged or forged one counts."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from millis import _native

KEY = bytes(range(32))
HEADER = struct.Struct("<8sIIQQ32sIIQ")  # magic, version, count, head bytes, file bytes, key, source bytes, 0, checksum
ENTRY = struct.Struct("<iiiIQ")  # format, rows, columns, name bytes, offset
F32, F16, Q4_1 = 0, 1, 3  # GGML's numbers
SHAPES = {"a": (F32, 20, 8), "bc": (Q4_1, 33, 64), "d" * 200: (F16, 16, 3)}
PAGE = 4096


def stored(type: int, rows: int, columns: int) -> np.ndarray:
    """Random bytes as a file might hold them."""
    size = rows * columns * 4 if type == F32 else rows * columns * 2 if type == F16 else rows * columns // 32 * 20
    return np.random.default_rng(rows).integers(0, 256, size, np.uint8)


def named() -> list[tuple[str, int, int, int]]:
    return [(name, *shape) for name, shape in SHAPES.items()]


def content(source: bytes = b"/a/model") -> bytes:
    """A whole packed file of SHAPES."""
    head, offsets, size = _native.packed_layout(KEY, source, named())
    data = bytearray(size)
    data[: len(head)] = head
    for (name, *shape), offset in zip(named(), offsets, strict=True):
        panels = _native.pack(name, *shape, stored(*shape), 2).tobytes()
        data[offset : offset + len(panels)] = panels
    return bytes(data)


def checksum(head: bytes) -> int:
    """FNV-1a, 64 bits, of a head whose own field counts as zero."""
    value = 0xCBF29CE484222325
    for at, byte in enumerate(head):
        value = ((value ^ (0 if 72 <= at < 80 else byte)) * 0x100000001B3) % 2**64
    return value


def sealed(data: bytes) -> bytes:
    """`data` with the checksum that its head should have, as a forger would write it."""
    size = min(HEADER.unpack_from(data)[3], len(data))
    return data[:72] + checksum(data[:size]).to_bytes(8, "little") + data[80:]


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., _native.PackedFile]:
    def open(data: bytes, key: bytes = KEY) -> _native.PackedFile:
        path = tmp_path / "file"
        path.write_bytes(data)
        return _native.PackedFile(os.fsencode(path), key)

    return open


def holds(file: _native.PackedFile) -> list[bool]:
    return [file.has(*entry) for entry in named()]


def test_a_file_is_laid_out_as_the_header_says(tmp_path: Path) -> None:
    data = content()
    magic, version, count, head_bytes, file_bytes, key, source_bytes, zero, found = HEADER.unpack_from(data)
    assert (magic, version, count, key, zero) == (b"MILLISPK", _native.PACK_VERSION, 3, KEY, 0)
    assert file_bytes == len(data) and found == checksum(data[:head_bytes])
    assert data[HEADER.size : HEADER.size + source_bytes] == b"/a/model"
    at, end = HEADER.size + 8, head_bytes
    for name, (_, rows, columns) in SHAPES.items():
        _, *shape, name_bytes, offset = ENTRY.unpack_from(data, at)
        assert (shape, data[at + ENTRY.size :][:name_bytes]) == ([rows, columns], name.encode())
        assert offset % PAGE == 0 and offset >= end
        end = offset + 1
        at += ENTRY.size + -(-name_bytes // 8) * 8
    assert at == head_bytes


def test_floats_lie_in_panels_of_sixteen_rows() -> None:
    values = np.arange(20 * 8, dtype=np.float32).reshape(20, 8)
    panels = _native.pack("a", F32, 20, 8, values.reshape(-1).view(np.uint8), 1).view(np.float32).reshape(2, 8, 16)
    np.testing.assert_array_equal(panels[0], values[:16].T)
    np.testing.assert_array_equal(panels[1, :, :4], values[16:].T)
    assert not panels[1, :, 4:].any()


def test_packing_does_not_depend_on_the_threads() -> None:
    for name, *shape in named():
        one, five = (_native.pack(name, *shape, stored(*shape), threads) for threads in (1, 5))
        np.testing.assert_array_equal(one, five)


def test_a_whole_file_holds_its_matrices_and_no_others(opened: Callable[..., _native.PackedFile]) -> None:
    file = opened(content())
    assert holds(file) == [True] * 3
    assert file.nbytes == len(content())
    for other in (("x", F32, 20, 8), ("a", F16, 20, 8), ("a", F32, 21, 8), ("a", F32, 20, 9), ("", F32, 20, 8)):
        assert not file.has(*other)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: b"", "ends inside its header"),
        (lambda data: data[:79], "ends inside its header"),
        (lambda data: b"GGUF" + data[4:], "not a packed file"),
        (lambda data: data[:8] + struct.pack("<I", _native.PACK_VERSION + 1) + data[12:], "packed by another version"),
        (lambda data: data[:-1], "not as long as it says"),
        (lambda data: data + b"\0", "not as long as it says"),
        (lambda data: data[:100] + b"?" + data[101:], "header is damaged"),
        (lambda data: data[:16] + struct.pack("<Q", 1 << 60) + data[24:], "impossible length"),
        (lambda data: sealed(data[:16] + struct.pack("<Q", 80) + data[24:]), "source is damaged"),
        (lambda data: sealed(data[:12] + struct.pack("<I", 4) + data[16:]), "names end too early"),
        (lambda data: sealed(data[:12] + struct.pack("<I", 2**32 - 1) + data[16:]), "names end too early"),
    ],
)
def test_what_is_wrong_is_said(
    change: Callable[[bytes], bytes], expected: str, opened: Callable[..., _native.PackedFile]
) -> None:
    with pytest.raises(ValueError, match=expected):
        opened(change(content()))


@pytest.mark.parametrize("field", ["format", "rows", "columns", "name bytes", "offset"])
def test_a_matrix_must_lie_inside_the_file(field: str, opened: Callable[..., _native.PackedFile]) -> None:
    """With a right checksum: sizes and offsets are checked whatever it says."""
    data = content()
    index = ["format", "rows", "columns", "name bytes", "offset"].index(field)
    bad = [2**63, len(data), len(data) - PAGE, 1, PAGE - 1] if field == "offset" else [2**31 - 1, 1 << 24]
    for value in bad:
        entry = list(ENTRY.unpack_from(data, 88))
        entry[index] = value
        with pytest.raises(ValueError, match="packed file"):
            opened(sealed(data[:88] + ENTRY.pack(*entry) + data[88 + ENTRY.size :]))
    if field in ("format", "rows", "columns"):
        for value in (-1, -(2**31)):
            entry = list(ENTRY.unpack_from(data, 88))
            entry[index] = value
            with pytest.raises(ValueError, match="outside it"):
                opened(sealed(data[:88] + ENTRY.pack(*entry) + data[88 + ENTRY.size :]))


def test_another_key_and_keys_of_another_length(opened: Callable[..., _native.PackedFile]) -> None:
    for key in (bytes(32), KEY[:31], b"", KEY + b"x"):
        with pytest.raises(ValueError, match="packed from another file"):
            opened(content(), key)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, expected in ((tmp_path / "absent", "no packed file"), (tmp_path, "not a regular file")):
        with pytest.raises(ValueError, match=expected):
            _native.PackedFile(os.fsencode(path), KEY)
    with pytest.raises(ValueError, match="not a regular file"):  # and does not wait for a writer
        _native.PackedFile(os.fsencode(tmp_path / "fifo"), KEY)


def test_the_source_can_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(b"/with \xff bytes"))
    assert _native.packed_source(os.fsencode(path)) == b"/with \xff bytes"
    path.write_bytes(content()[:-1])
    with pytest.raises(ValueError, match="not as long"):
        _native.packed_source(os.fsencode(path))


def test_layouts_that_cannot_be() -> None:
    for key, source, matrices in (
        (b"", b"", []),
        (KEY, bytes(1 << 17), []),
        (KEY, b"", [("a", F32, 0, 8)]),
        (KEY, b"", [("a", Q4_1, 1, 33)]),
        (KEY, b"", [("a", 12345, 1, 32)]),
        (KEY, b"", [("a" * 257, F32, 1, 1)]),
        (KEY, b"", [("a", F32, 1, 1), ("a", F32, 2, 2)]),
        (KEY, b"", [("a", F32, 1 << 24, (1 << 24) + 1)]),
    ):
        with pytest.raises(ValueError):
            _native.packed_layout(key, source, matrices)


def test_mutations_are_refused_or_harmless(opened: Callable[..., _native.PackedFile]) -> None:
    """Bits flipped, bytes replaced and moved, ends cut: without its checksum no change of the head is believed; with a
    forged one, whatever is accepted lies inside the file and can be read to its end."""
    data = content()
    head = HEADER.unpack_from(data)[3]
    random = np.random.default_rng(0)
    accepted = 0
    for turn in range(600):
        mutant = bytearray(data)
        for _ in range(int(random.integers(1, 4))):
            at = int(random.integers(0, head))
            kind = int(random.integers(0, 3))
            if kind == 0:
                mutant[at] ^= 1 << int(random.integers(0, 8))
            elif kind == 1:
                mutant[at : at + 4] = random.bytes(4)
            else:
                mutant[at : at + 8] = data[int(random.integers(0, head)) :][:8]
        if turn % 10 == 0:
            mutant = mutant[: int(random.integers(0, len(mutant)))]
        if len(mutant) == len(data) and bytes(mutant[:head]) == data[:head]:
            continue
        if turn % 2 and len(mutant) >= HEADER.size:
            mutant = bytearray(sealed(bytes(mutant)))
        try:
            file = opened(bytes(mutant))
        except ValueError:
            continue
        assert turn % 2, "a change of the head went unnoticed"
        accepted += 1
        for name, *shape in named():
            if file.has(name, *shape):
                runtime_over(file, name, shape)
    assert accepted > 10  # names and the source may be forged


def runtime_over(file: _native.PackedFile, name: str, shape: list[int]) -> None:
    """Reads every panel of the matrix: it embeds all of its rows."""
    type, rows, columns = shape
    sizes = {"threads": 1, "isa": "auto", "max_tokens": 64, "max_outputs": 1, "pages": 4, "layers": 1}
    runtime = _native.Runtime(**sizes, kv_heads=1, head_dim=16, vocab=rows, context=64, exact=False)
    runtime.use_packed(file)
    runtime.add_matrix(name, type, rows, columns, stored(*shape))
    for buffer, width in (("x", columns), ("s", columns), ("logits", rows)):
        runtime.add_buffer(buffer, width)
    runtime.embed("x", name, 1.0, "")
    runtime.select("s", "x")
    runtime.matmul("logits", "s", [name], [], "", "", "")
    runtime.finish()
    tokens = np.arange(rows, dtype=np.int32)
    one = np.zeros(1, np.int32)
    assert runtime.logits(tokens, one, one + rows, np.arange(2, dtype=np.int32)[None]).shape == (1, rows)
