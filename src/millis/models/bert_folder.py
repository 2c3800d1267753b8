"""Hugging Face folders of BERT's family: names under which each keeps its weights, its settings and its head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from millis.models.checkpoint import Checkpoint
from millis.models.config import ModelConfig, Pooling
from millis.models.huggingface_config import Settings, check_activation, divide, refuse_settings
from millis.models.reader_folder import head_of, longest_text, pooling_of
from millis.models.rope import rope_table
from millis.models.safetensors import read_folder_tensors, renamed
from millis.models.tensor import Tensor
from millis.models.tensors_expected import check_config, check_tensors
from millis.types import FormatError

HIDDEN_ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh", "relu"]] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_decoder": (False,),
    "position_embedding_type": ("absolute",),
    "quantization_config": (),
    "rotary_value": (False,),
}
POOLINGS: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    prefix: str  # of the body's tensors inside a model with a head
    keys: Mapping[str, str]  # our setting → theirs
    outside: Mapping[str, str]  # their name outside layers → ours
    layer: re.Pattern[str]
    inside: Mapping[str, str]  # their name inside a layer → ours
    norm_eps: float  # where config.json leaves it out
    types: int  # likewise
    activation: Literal["tanh", "relu"] | None = "tanh"  # of the head; None: that of the layers
    padded: bool = False  # positions are counted from behind the padding token's id
    rotated: bool = False  # positions are not learned: q and k are rotated, neighbours with one another
    context: int = 512  # where config.json leaves it out


_EMBEDDINGS = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "activation": "hidden_act",
}
_LAYER = re.compile(r"encoder\.layer\.(0|[1-9][0-9]{0,3})\.(.+)\.(weight|bias)")
_INSIDE = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_BERT = _Family(
    prefix="bert.",
    keys=_KEYS,
    outside=_EMBEDDINGS | {"pooler.dense": "cls", "classifier": "cls.output"},
    layer=_LAYER,
    inside=_INSIDE,
    norm_eps=1e-12,
    types=2,
)
_ROBERTA = _Family(
    prefix="roberta.",
    keys=_KEYS,
    outside=_EMBEDDINGS | {"classifier.dense": "cls", "classifier.out_proj": "cls.output"},
    layer=_LAYER,
    inside=_INSIDE,
    norm_eps=1e-12,
    types=2,
    padded=True,
)
_DISTILBERT = _Family(
    prefix="distilbert.",
    keys={"layers": "n_layers", "hidden": "dim", "heads": "n_heads", "ffn": "hidden_dim", "activation": "activation"},
    outside=_EMBEDDINGS | {"pre_classifier": "cls", "classifier": "cls.output"},
    layer=re.compile(r"transformer\.layer\.(0|[1-9][0-9]{0,3})\.(.+)\.(weight|bias)"),
    inside={
        "attention.q_lin": "attn_q",
        "attention.k_lin": "attn_k",
        "attention.v_lin": "attn_v",
        "attention.out_lin": "attn_output",
        "sa_layer_norm": "attn_output_norm",
        "ffn.lin1": "ffn_up",
        "ffn.lin2": "ffn_down",
        "output_layer_norm": "layer_output_norm",
    },
    norm_eps=1e-12,
    types=0,
    activation="relu",
)
_ROFORMER = _Family(
    prefix="roformer.",
    keys=_KEYS,
    outside={
        "embeddings.word_embeddings": "token_embd",
        "embeddings.token_type_embeddings": "token_types",
        "embeddings.LayerNorm": "token_embd_norm",
        "classifier.dense": "cls",
        "classifier.out_proj": "cls.output",
    },
    layer=_LAYER,
    inside=_INSIDE,
    norm_eps=1e-12,
    types=2,
    activation=None,
    rotated=True,
    context=1536,
)
TYPES: Mapping[str, _Family] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": _DISTILBERT,
    "roformer": _ROFORMER,
}
# What predicts masked words or the next sentence; and a pooler beside roberta's head, which does not read it.
_PRETRAINING = re.compile(r"(cls\.(predictions|seq_relationship)|lm_head|vocab_(transform|layer_norm|projector))\..*")
_ANGLES = "encoder.embed_positions.weight"  # of roformer: sines, then cosines, which are computed here
_POOLER = re.compile(r"pooler\.dense\.(weight|bias)")


def is_kin(values: Mapping[str, Any]) -> bool:
    """Whether a config.json holding `values` is that of a family read here."""
    return isinstance(values.get("model_type"), str) and values["model_type"] in TYPES


def read(path: Path, values: Mapping[str, Any]) -> Checkpoint:
    """The encoder in a folder whose config.json holds `values`. FormatError names what is malformed or unknown."""
    kind = values["model_type"]
    family, settings = TYPES[kind], Settings(values)
    refuse_settings(settings, _NEUTRAL)
    config = _config(family, settings, path)
    tensors = renamed(read_folder_tensors(path), lambda theirs: _name(theirs, family))
    if family.rotated:
        _check_angles(tensors.pop(_ANGLES, None), config)
    if family.padded:
        tensors["position_embd.weight"] = _behind(tensors, _first_position(settings), config)
    check_tensors(config, tensors)
    if family.rotated:
        tensors = {name: _in_halves(tensor, config) for name, tensor in tensors.items()}
    return Checkpoint(path=path, config=config, tensors=tensors)


def _config(family: _Family, settings: Settings, path: Path) -> ModelConfig:
    keys = family.keys
    hidden, heads = settings.whole(keys["hidden"]), settings.whole(keys["heads"])
    layers = settings.whole(keys["layers"])
    if family.rotated and settings.whole("embedding_size", hidden) != hidden:
        raise FormatError(f"config.json: embedding_size must be hidden_size, {hidden}, in a model that Millis reads")
    check_activation(settings.get(keys["activation"]), tuple(HIDDEN_ACTIVATIONS))
    types = settings.whole("type_vocab_size", family.types)
    context = settings.whole("max_position_embeddings", family.context)
    activation = HIDDEN_ACTIVATIONS[settings.get(keys["activation"]) or "gelu"]
    config = ModelConfig(
        architecture="bert",
        name=path.resolve().name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=divide(hidden, heads),
        ffn=settings.whole(keys["ffn"]),
        vocab=settings.whole("vocab_size"),
        context=context - _first_position(settings) if family.padded else context,
        norm_eps=settings.real("layer_norm_eps", family.norm_eps),
        rotated=() if family.rotated else (False,) * layers,
        activation=activation,
        attention_bias=True,
        token_types=types if family.types else 0,
        pooling=pooling_of(path, POOLINGS),
        reads=True,
        both_ways=True,
        text_tokens=longest_text(path),
        head=head_of(settings, family.activation or activation),
    )
    check_config(config)
    return config


def _first_position(settings: Settings) -> int:
    """roberta's first token stands at the position behind the padding token's id."""
    return settings.whole("pad_token_id", 1) + 1


def _behind(tensors: Mapping[str, Tensor], first: int, config: ModelConfig) -> Tensor:
    """The table of positions from row `first` on."""
    name = "position_embd.weight"
    if name not in tensors:
        raise FormatError(f"the tensor {name!r} is missing: not a whole {config.architecture} model")
    table = tensors[name]
    if len(table.shape) != 2 or not 0 <= first < table.shape[0]:
        raise FormatError(f"the table of positions has the shape {table.shape}; its first position would be {first}")
    rows, width = table.shape
    return Tensor(name, table.type, (rows - first, width), table.data[first * width * table.type.block_bytes :])


def _check_angles(table: Tensor | None, config: ModelConfig) -> None:
    """FormatError where a file's table of rotations is not the usual one."""
    if table is None:
        return
    shape = (config.context, config.head_dim)
    if table.shape == shape:
        cosines, sines = rope_table(config.context, config.head_dim, config.rope_theta)
        if np.allclose(table.numpy(), np.concatenate((sines, cosines), axis=1), atol=1e-2):
            return
    raise FormatError(f"{_ANGLES} is not the table of sines and cosines that Millis rotates by")


def _in_halves(tensor: Tensor, config: ModelConfig) -> Tensor:
    """Rows (or biases) of q and k in the order 0, 2, … 1, 3, … of each head: halves of it rotate together."""
    if not re.fullmatch(r"blk\.\d+\.attn_[qk]\.(weight|bias)", tensor.name):
        return tensor
    rows = tensor.data.reshape(config.heads, config.head_dim // 2, 2, -1)
    return replace(tensor, data=np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1))


def _name(theirs: str, family: _Family) -> str | None:
    """Our name of a tensor; None for what is no part of an encoder. FormatError where it is unknown."""
    bare = theirs.removeprefix(family.prefix)
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):  # as the first BERT files have it
        bare = bare.removesuffix(old) + new if bare.endswith(old) else bare
    if _PRETRAINING.fullmatch(bare) or (family is _ROBERTA and _POOLER.fullmatch(bare)):
        return None
    if family.rotated and bare == _ANGLES:
        return bare
    if match := family.layer.fullmatch(bare):
        layer, part, kind = match.groups()
        if part in family.inside:
            return f"blk.{layer}.{family.inside[part]}.{kind}"
    part, _, kind = bare.rpartition(".")
    if part in family.outside and kind in ("weight", "bias"):
        return f"{family.outside[part]}.{kind}"
    raise FormatError(f"the tensor {theirs!r} has no place in a {family.prefix[:-1]} encoder as Millis knows it")
