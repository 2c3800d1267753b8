"""GGUF files that lie: each fault has its own error, and none costs more memory than twice the file."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gguf_files import write_tiny
from millis.models.gguf import parse_gguf, read_gguf
from millis.models.tensor import GgmlType
from millis.types import FormatError

U8, I8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 1, 4, 6, 7, 8, 9, 10
HUGE = (2**31, 2**32 - 1, 2**61, 2**62, 2**63, 2**64 - 1)


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def many(kind: int, count: int, values: bytes = b"") -> bytes:
    """The value of an array."""
    return struct.pack("<IQ", kind, count) + values


def tensor(
    name: bytes = b"t", dims: tuple[int, ...] = (8,), type: int = 0, offset: int = 0, rank: int | None = None
) -> bytes:
    rank = len(dims) if rank is None else rank
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", rank, *dims, type, offset)


def build(
    *tensors: bytes,
    pairs: tuple[bytes, ...] = (),
    body: bytes = bytes(32),
    magic: bytes = b"GGUF",
    version: bytes = b"\x03\0\0\0",
    tensor_count: int | None = None,
    key_count: int | None = None,
    alignment: int = 32,
) -> NDArray[np.uint8]:
    """A file field by field; each may be made to lie."""
    counts = (len(tensors) if tensor_count is None else tensor_count, len(pairs) if key_count is None else key_count)
    head = magic + version + struct.pack("<QQ", *counts) + b"".join(pairs) + b"".join(tensors)
    return np.frombuffer(head + bytes(-len(head) % alignment) + body, np.uint8)


def test_the_builder_builds_a_valid_file() -> None:
    metadata, tensors = parse_gguf(build(tensor(dims=(4, 2)), pairs=(pair(b"k", U32, struct.pack("<I", 7)),)))
    assert metadata == {"k": 7} and tensors["t"].shape == (2, 4) and tensors["t"].numpy().tolist() == [[0.0] * 4] * 2


def test_alignment_is_honoured() -> None:
    eight = pair(b"general.alignment", U32, struct.pack("<I", 8))
    body = np.arange(4, dtype=np.float32).tobytes()
    entries = tensor(b"a", (2,)), tensor(b"b", (2,), offset=8)
    _, tensors = parse_gguf(build(*entries, pairs=(eight,), body=body, alignment=8))
    assert tensors["a"].numpy().tolist() == [0, 1] and tensors["b"].numpy().tolist() == [2, 3]


def keys(*pairs: bytes, **fields: Any) -> NDArray[np.uint8]:
    return build(tensor(), pairs=pairs, **fields)


ATTACKS: dict[str, tuple[NDArray[np.uint8], str]] = {
    "nothing": (np.zeros(0, np.uint8), "not a GGUF file \\(starts with b''\\)"),
    "three bytes": (np.frombuffer(b"GGU", np.uint8), "not a GGUF file"),
    "a text": (np.frombuffer(b"# A model card, not a model", np.uint8), "starts with b'# A model card, "),
    "a pointer of git LFS": (np.frombuffer(b"version https://git-lfs", np.uint8), "starts with b'version https://'"),
    "only the magic": (np.frombuffer(b"GGUF", np.uint8), "ends inside the version, at byte 4; pull it again"),
    "no counts": (np.frombuffer(b"GGUF\x03\0\0\0\1\0", np.uint8), "ends inside the tensor count"),
    "magic in lower case": (build(tensor(), magic=b"gguf"), "not a GGUF file"),
    "version 0": (build(tensor(), version=bytes(4)), "GGUF version 0; Millis reads versions 2 and 3"),
    "version 1": (build(tensor(), version=b"\1\0\0\0"), "GGUF version 1"),
    "version 4": (build(tensor(), version=b"\4\0\0\0"), "GGUF version 4"),
    "version 3 big-endian": (build(tensor(), version=b"\0\0\0\3"), "a big-endian GGUF file"),
    "no tensors": (build(), "holds no tensors"),
    "one more tensor than there is": (build(tensor(), tensor_count=2), "tensor '' has 0 dimensions"),
    "one more key than there is": (keys(key_count=1), "tensor '' has 0 dimensions"),
    "a key that is not UTF-8": (keys(pair(b"\xff", U32, bytes(4))), "key 0 is not UTF-8"),
    "a key longer than allowed": (keys(pair(b"k" * 65536, U32, bytes(4))), "key 0 is 65536 bytes long, beyond"),
    "a key twice": (keys(*[pair(b"k", U32, bytes(4))] * 2), "the key 'k' appears twice"),
    "a value type undefined": (keys(pair(b"k", 13, bytes(8))), "'k' has the value type 13"),
    "a value type of all ones": (keys(pair(b"k", 2**32 - 1, bytes(8))), "'k' has the value type 4294967295"),
    "a truth value of 2": (keys(pair(b"k", BOOL, b"\2")), "neither 0 nor 1"),
    "a list of truth values with a 2": (keys(pair(b"k", ARRAY, many(BOOL, 3, b"\0\1\2"))), "neither 0 nor 1"),
    "a string that is not UTF-8": (keys(pair(b"k", STRING, text(b"\xc3("))), "the value of 'k' is not UTF-8"),
    "a list of lists": (keys(pair(b"k", ARRAY, many(ARRAY, 1, many(U8, 0)))), "'k' is an array of arrays"),
    "a list of an undefined type": (keys(pair(b"k", ARRAY, many(77, 0))), "'k' has the value type 77"),
    "alignment 0": (keys(pair(b"general.alignment", U32, bytes(4))), "must be a power of two, not 0"),
    "alignment 48": (keys(pair(b"general.alignment", U32, b"\x30\0\0\0")), "must be a power of two, not 48"),
    "alignment negative": (keys(pair(b"general.alignment", I8, b"\xe0")), "must be a power of two, not -32"),
    "alignment a float": (keys(pair(b"general.alignment", F32, struct.pack("<f", 32))), "power of two, not 32.0"),
    "alignment a truth value": (keys(pair(b"general.alignment", BOOL, b"\1")), "power of two, not True"),
    "alignment a list": (keys(pair(b"general.alignment", ARRAY, many(U8, 2, b"\x20\x20"))), "power of two, not array"),
    "a tensor twice": (build(tensor(), tensor(offset=32), body=bytes(64)), "the tensor 't' appears twice"),
    "a name longer than allowed": (build(tensor(b"n" * 257)), "the name of tensor 0 is 257 bytes long"),
    "a name that is not UTF-8": (build(tensor(b"\xfe")), "the name of tensor 0 is not UTF-8"),
    "no dimension": (build(tensor(dims=()), body=bytes(64)), "tensor 't' has 0 dimensions; 1 to 4"),
    "five dimensions": (build(tensor(dims=(1,) * 5)), "tensor 't' has 5 dimensions"),
    "a rank of all ones": (build(tensor(rank=2**32 - 1)), "tensor 't' has 4294967295 dimensions"),
    "a dimension of 0": (build(tensor(dims=(8, 0))), "impossible shape \\(0, 8\\)"),
    "a product beyond 64 bits": (build(tensor(dims=(2**32, 2**32))), "impossible shape"),
    "a dimension of 2^63": (build(tensor(dims=(2**63,))), "impossible shape"),
    "four large dimensions": (build(tensor(dims=(2**63,) * 4)), "impossible shape"),
    "a type that is not read": (build(tensor(type=17)), "tensor 't' is stored as IQ2_XS; Millis reads F32, F16, Q4_0"),
    "a type of integers": (build(tensor(type=26)), "tensor 't' is stored as I32"),
    "a type unknown": (build(tensor(type=999)), "tensor 't' has the type number 999"),
    "rows of half a block": (build(tensor(dims=(48,), type=GgmlType.Q4_0)), "48 values, not a multiple of Q4_0's 32"),
    "rows of half a super-block": (build(tensor(dims=(128, 2), type=GgmlType.Q4_K)), "multiple of Q4_K's 256"),
    "an offset out of alignment": (build(tensor(offset=4), body=bytes(64)), "lies at 4, not a multiple of 32"),
    "an offset past the end": (build(tensor(offset=64)), "the file ends 64 bytes early, inside or before tensor 't'"),
    "an offset of 2^63": (build(tensor(offset=2**63)), "the file ends 9223372036854775808 bytes early"),
    "an offset that wraps round": (build(tensor(offset=2**64 - 32)), "bytes early"),
    "a tensor cut short": (build(tensor(), body=bytes(31)), "the file ends 1 bytes early, .* pull it again"),
    "no data": (build(tensor(), body=b""), "the file ends 32 bytes early"),
    "overlap": (build(tensor(b"a", (16,)), tensor(b"b", offset=32), body=bytes(64)), "tensors 'a' and 'b' overlap"),
    "the same bytes twice": (build(tensor(b"a"), tensor(b"b")), "tensors 'a' and 'b' overlap"),
    "enclosed": (
        build(tensor(b"a", (64,)), tensor(b"b", offset=64), tensor(b"c", offset=256), body=bytes(288)),
        "tensors 'a' and 'b' overlap",
    ),
}  # fmt: skip
for size in HUGE:
    ATTACKS |= {
        f"{size} tensors": (build(tensor(), tensor_count=size), f"claims {size} tensors, more than the file can hold"),
        f"{size} keys": (keys(key_count=size), f"claims {size} key-values, more than it can hold"),
        f"a key of {size} bytes": (keys(text(b"k", size)), f"key 0 is {size} bytes long, beyond"),
        f"a string of {size} bytes": (keys(pair(b"k", STRING, text(b"", size))), f"the value of 'k' is {size} bytes"),
        f"{size} numbers": (keys(pair(b"k", ARRAY, many(U64, size))), f"ends inside the {size} numbers of 'k'"),
        f"{size} bytes": (keys(pair(b"k", ARRAY, many(U8, size))), f"ends inside the {size} numbers of 'k'"),
        f"{size} strings": (keys(pair(b"k", ARRAY, many(STRING, size))), f"ends inside the {size} strings of 'k'"),
        f"a token of {size} bytes": (
            keys(pair(b"k", ARRAY, many(STRING, 2, text(b"a") + text(b"", size)))),
            "ends inside string [12] of 'k'",
        ),
        f"a tensor name of {size} bytes": (build(text(b"t", size) + bytes(40)), f"tensor 0 is {size} bytes long"),
    }


@contextmanager
def bounded(limit_bytes: int) -> Iterator[None]:
    """The block allocates at most `limit_bytes` at any time."""
    tracemalloc.start()
    try:
        yield
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes <= limit_bytes


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name: str) -> None:
    data, message = ATTACKS[name]
    with pytest.raises(FormatError, match=message) as caught, bounded(2 * data.nbytes + 500_000):
        parse_gguf(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "notes.gguf").write_text("A text, called a model.")
    with pytest.raises(FormatError, match="^notes.gguf: not a GGUF file \\(starts with b'A text, called "):
        read_gguf(tmp_path / "notes.gguf")


def test_a_token_that_is_not_utf8_is_refused_when_read() -> None:
    metadata, _ = parse_gguf(keys(pair(b"k", ARRAY, many(STRING, 2, text(b"good") + text(b"\xff")))))
    assert metadata["k"][0] == "good"
    with pytest.raises(FormatError, match="a string of 'k' is not UTF-8, at byte"):
        list(metadata["k"])


@pytest.mark.parametrize("length", [0, 1, 2, 40])
def test_memory_of_many_strings(length: int) -> None:
    """What is cheap to claim is cheap to hold: an empty string is eight bytes in the file."""
    strings = text(b"x" * length) * (1 << 18)
    data = keys(pair(b"k", ARRAY, many(STRING, 1 << 18, strings)))
    with bounded(2 * data.nbytes):
        metadata, _ = parse_gguf(data)
    assert len(metadata["k"]) == 1 << 18 and metadata["k"][-1] == "x" * length


def test_memory_of_wide_text() -> None:
    """One character beyond the basic plane makes Python hold four bytes for every other one."""
    wide = "🂡".encode() + b"x" * (1 << 20)
    pairs = [pair(b"k%d" % index, STRING, text(wide)) for index in range(80)]
    with pytest.raises(FormatError, match="beyond what Millis reads"):
        parse_gguf(keys(*pairs))


def test_memory_of_many_numbers() -> None:
    count = 1 << 24
    data = keys(*[pair(b"k%d" % kind, ARRAY, many(kind, count, bytes(count))) for kind in (U8, BOOL)])
    with bounded(100_000):
        metadata, _ = parse_gguf(data)
    assert [len(value) for value in metadata.values()] == [count, count]


def tiny_bytes(folder: Path) -> NDArray[np.uint8]:
    write_tiny(folder / "tiny.gguf", "gemma3")
    return np.fromfile(folder / "tiny.gguf", np.uint8)


def data_start(data: NDArray[np.uint8]) -> int:
    _, tensors = parse_gguf(data)
    return min(tensor.data.__array_interface__["data"][0] for tensor in tensors.values()) - data.ctypes.data


def mutate(data: NDArray[np.uint8], header_bytes: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One to four changes to the header, each of a random kind."""
    data = data.copy()
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, min(header_bytes, len(data) - 8)))
        match rng.integers(0, 6):
            case 0:
                data[at] ^= 1 << rng.integers(0, 8)
            case 1:
                data[at : at + 8] = np.frombuffer(struct.pack("<Q", HUGE[rng.integers(0, len(HUGE))]), np.uint8)
            case 2:
                data[at : at + 4] = np.frombuffer(struct.pack("<I", int(rng.integers(0, 40))), np.uint8)
            case 3:
                data = data[: max(int(rng.integers(0, len(data))), 16)]
            case 4:
                data[at : at + 8] = data[int(rng.integers(0, len(data) - 8)) :][:8]
            case 5:
                data = np.delete(data, slice(at, at + int(rng.integers(1, 9))))
    return data


@pytest.mark.parametrize("seed", range(30))
def test_mutations(tmp_path: Path, seed: int) -> None:
    """Ten files a seed: each is refused, or is a checkpoint whose every value can be read."""
    original = tiny_bytes(tmp_path)
    start, rng = data_start(original), np.random.default_rng(seed)
    for _ in range(10):
        data = mutate(original, start, rng)
        data.tofile(tmp_path / "mutated.gguf")
        with bounded(2 * data.nbytes + 500_000):
            try:
                checkpoint = read_gguf(tmp_path / "mutated.gguf")
            except FormatError as error:
                assert "\n" not in str(error)
                continue
        assert set(checkpoint.tensors) >= {"token_embd.weight", "output_norm.weight"}
        assert all(tensor.numpy().shape == tensor.shape for tensor in checkpoint.tensors.values())


def test_every_truncation_of_the_header_is_noticed(tmp_path: Path) -> None:
    data = tiny_bytes(tmp_path)
    for size in range(data_start(data)):
        with pytest.raises(FormatError):
            parse_gguf(data[:size])


def test_every_truncation_of_the_data_says_how_much_is_missing(tmp_path: Path) -> None:
    data = tiny_bytes(tmp_path)
    _, tensors = parse_gguf(data)
    last = max(tensor.data.__array_interface__["data"][0] + tensor.nbytes for tensor in tensors.values())
    end = last - data.ctypes.data
    for missing in (1, 7, 1000, end - data_start(data)):
        with pytest.raises(FormatError, match=f"the file ends {missing} bytes early"):
            parse_gguf(data[: end - missing])
