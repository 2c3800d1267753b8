"""Hugging Face folders of BERT's family: names under which each keeps its weights, settings, head and pooling.

Beside config.json and the weights, folders of sentence-transformers say how a text becomes one vector: modules.json,
the Pooling module's config.json, and sentence_bert_config.json for the longest text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from millis.models.checkpoint import Checkpoint
from millis.models.config import Head, ModelConfig
from millis.models.huggingface_config import Settings, check_activation, divide, refuse_settings
from millis.models.mapped import map_file, read_json
from millis.models.safetensors import read_folder_tensors
from millis.models.tensor import Tensor
from millis.models.tensors_expected import check_config, check_tensors
from millis.types import FormatError

_MAX_JSON_BYTES = 1 << 20
_MAX_TOKENIZER_BYTES = 16 << 20
_HIDDEN_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_decoder": (False,),
    "position_embedding_type": ("absolute",),
    "quantization_config": (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    prefix: str  # of the body's tensors inside a model with a head
    keys: Mapping[str, str]  # our setting → theirs
    outside: Mapping[str, str]  # their name outside layers → ours
    layer: re.Pattern[str]
    inside: Mapping[str, str]  # their name inside a layer → ours
    norm_eps: float  # where config.json leaves it out
    types: int  # likewise
    activation: Literal["tanh", "relu"] = "tanh"  # of the head
    padded: bool = False  # positions are counted from behind the padding token's id


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
TYPES: Mapping[str, _Family] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": _DISTILBERT,
}
# What predicts masked words or the next sentence; and a pooler beside roberta's head, which does not read it.
_PRETRAINING = re.compile(r"(cls\.(predictions|seq_relationship)|lm_head|vocab_(transform|layer_norm|projector))\..*")
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
    tensors = {}
    for theirs, tensor in read_folder_tensors(path).items():
        name = _name(theirs, family)
        if name is None:
            continue
        if name in tensors:
            raise FormatError(f"the tensor {theirs!r} appears twice, under two prefixes")
        tensors[name] = Tensor(name, tensor.type, tensor.shape, tensor.data)
    if family.padded:
        tensors["position_embd.weight"] = _behind(tensors, _first_position(settings), config)
    check_tensors(config, tensors)
    return Checkpoint(path=path, config=config, tensors=tensors)


def _config(family: _Family, settings: Settings, path: Path) -> ModelConfig:
    keys = family.keys
    hidden, heads = settings.whole(keys["hidden"]), settings.whole(keys["heads"])
    check_activation(settings.get(keys["activation"]), tuple(_HIDDEN_ACTIVATIONS))
    types = settings.whole("type_vocab_size", family.types)
    context = settings.whole("max_position_embeddings", 512)
    config = ModelConfig(
        architecture="bert",
        name=path.resolve().name,
        layers=settings.whole(keys["layers"]),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=divide(hidden, heads),
        ffn=settings.whole(keys["ffn"]),
        vocab=settings.whole("vocab_size"),
        context=context - _first_position(settings) if family.padded else context,
        norm_eps=settings.real("layer_norm_eps", family.norm_eps),
        activation=_HIDDEN_ACTIVATIONS[settings.get(keys["activation"]) or "gelu"],  # type: ignore[arg-type]
        attention_bias=True,
        token_types=types if family.types else 0,
        pooling=_pooling(path),
        text_tokens=_longest_text(path),
        head=_head(settings, family),
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


def _name(theirs: str, family: _Family) -> str | None:
    """Our name of a tensor; None for what is no part of an encoder. FormatError where it is unknown."""
    bare = theirs.removeprefix(family.prefix)
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):  # as the first BERT files have it
        bare = bare.removesuffix(old) + new if bare.endswith(old) else bare
    if _PRETRAINING.fullmatch(bare) or (family is _ROBERTA and _POOLER.fullmatch(bare)):
        return None
    if match := family.layer.fullmatch(bare):
        layer, part, kind = match.groups()
        if part in family.inside:
            return f"blk.{layer}.{family.inside[part]}.{kind}"
    part, _, kind = bare.rpartition(".")
    if part in family.outside and kind in ("weight", "bias"):
        return f"{family.outside[part]}.{kind}"
    raise FormatError(f"the tensor {theirs!r} has no place in a {family.prefix[:-1]} encoder as Millis knows it")


def _head(settings: Settings, family: _Family) -> Head | None:
    """The classifier that config.json's architecture says there is. FormatError for a head of another kind."""
    names = settings.get("architectures") or ["Model"]
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise FormatError(f"config.json: architectures must list one name, not {names!r:.80}")
    if names[0].endswith(("Model", "ForMaskedLM", "ForPreTraining")):
        return None
    if not names[0].endswith("ForSequenceClassification"):
        raise FormatError(f"config.json: {names[0]!r:.60} has a head that Millis does not run; it runs classifiers")
    labels = _labels(settings)
    return Head(labels=labels, problem=_problem(settings, len(labels)), activation=family.activation)


def _labels(settings: Settings) -> tuple[str, ...]:
    """Their names in the order of the logits; LABEL_0, LABEL_1 where config.json names none, as transformers has it."""
    found = settings.get("id2label")
    count = settings.whole("num_labels", len(found) if isinstance(found, dict) else 2)
    if found is None:
        return tuple(f"LABEL_{index}" for index in range(count))
    if not isinstance(found, dict) or sorted(found) != sorted(str(index) for index in range(count)):
        raise FormatError(f"config.json: id2label must name the labels 0 to {count - 1}, each once")
    labels = tuple(found[str(index)] for index in range(count))
    if not all(isinstance(label, str) and label for label in labels) or len(set(labels)) != count:
        raise FormatError("config.json: id2label must give each label a name of its own")
    return labels


def _problem(settings: Settings, labels: int) -> Literal["single_label", "multi_label", "regression"]:
    kinds: dict[str, Literal["single_label", "multi_label", "regression"]] = {
        "single_label_classification": "single_label",
        "multi_label_classification": "multi_label",
        "regression": "regression",
    }
    kind = settings.get("problem_type")
    if kind is None:
        return "regression" if labels == 1 else "single_label"
    if kind not in kinds:
        raise FormatError(f"config.json: the problem_type {kind!r:.40} is not one of {', '.join(kinds)}")
    return kinds[kind]


def _pooling(path: Path) -> Literal["mean", "first"]:
    """What modules.json asks for, the mean where there is none. FormatError for what Millis does not compute."""
    file = path / "modules.json"
    if not file.is_file():
        return "mean"
    folder = None
    for module in _modules(file):
        kind = str(module.get("type")).rpartition(".")[2]
        if kind == "Pooling":
            folder = module.get("path")
        elif kind not in ("Transformer", "Normalize"):
            raise FormatError(f"modules.json: Millis does not run the module {kind!r:.40}")
    if folder is None:
        return "mean"
    if not isinstance(folder, str) or Path(folder).name != folder:
        raise FormatError(f"modules.json: the path {folder!r:.60} must name a folder beside it")
    return _pooling_mode(read_json(path / folder / "config.json", _MAX_JSON_BYTES))


def _modules(file: Path) -> list[dict[str, Any]]:
    data = map_file(file)
    try:
        found = json.loads(data[:_MAX_JSON_BYTES].tobytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file.name} is not valid JSON: {error}") from None
    if not isinstance(found, list) or not all(isinstance(module, dict) for module in found):
        raise FormatError(f"{file.name} must be a list of objects")
    return found


def _pooling_mode(values: Mapping[str, Any]) -> Literal["mean", "first"]:
    modes: dict[str, Literal["mean", "first"]] = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "first",
    }
    chosen = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in modes:
        raise FormatError(f"the pooling {' with '.join(chosen) or 'none'} is not one of {', '.join(modes)}")
    return modes[chosen[0]]


def _longest_text(path: Path) -> int | None:
    """What the folder says of the longest text: sentence-transformers' file, or else the tokenizer's.

    There an absurdly large number means that nothing is known, and is no limit beside the context.
    """
    file, name = path / "sentence_bert_config.json", "max_seq_length"
    if not file.is_file():
        file, name = path / "tokenizer_config.json", "model_max_length"
    if not file.is_file():
        return None
    found = read_json(file, _MAX_TOKENIZER_BYTES).get(name)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if found is not None and (type(found) is not int or found < 1):
        raise FormatError(f"{file.name}: {name} must be a positive number, not {found!r:.40}")
    return found
