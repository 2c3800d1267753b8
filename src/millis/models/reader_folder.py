"""What Hugging Face folders say of a model that reads: its labels, how a text becomes one vector, the longest text.

Beside config.json and the weights, folders of sentence-transformers say how a text becomes one vector: modules.json,
the Pooling module's config.json, and sentence_bert_config.json for the longest text. A decoder reads, and writes
nothing, where its folder holds no output matrix: its body alone, or under a classifier's head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from millis.models.config import Head, ModelConfig, Pooling
from millis.models.huggingface_config import Settings
from millis.models.mapped import map_file, read_json
from millis.models.safetensors import read_folder_tensors
from millis.models.tensor import GgmlType, Tensor
from millis.models.tensors_expected import MOST_LABELS, check_config
from millis.types import FormatError

_MAX_JSON_BYTES = 1 << 20
_MAX_TOKENIZER_BYTES = 16 << 20
DECODERS = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3_text": "Gemma3Text",
    "granite": "Granite", "granitemoehybrid": "GraniteMoeHybrid", "smollm3": "SmolLM3", "ernie4_5": "Ernie4_5",
    "gpt2": "GPT2", "phi3": "Phi3", "gemma": "Gemma", "exaone4": "Exaone4",
    "hunyuan_v1_dense": "HunYuanDenseV1", "olmo2": "Olmo2", "olmo3": "Olmo3",
}  # fmt: skip
_POOLINGS: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}


def is_decoder(values: Mapping[str, Any]) -> bool:
    """Whether a config.json holding `values` is that of a decoder that reads and writes nothing."""
    kind = values.get("model_type")
    stem = DECODERS.get(kind) if isinstance(kind, str) else None
    return stem is not None and values.get("architectures") in ([f"{stem}Model"], [f"{stem}ForSequenceClassification"])


def decoder(config: ModelConfig, values: Mapping[str, Any], path: Path) -> ModelConfig:
    """`config` of such a decoder, with what its folder says of reading. FormatError names what is malformed."""
    config = replace(
        config,
        reads=True,
        pooling=pooling_of(path, _POOLINGS, ("Dense",) if config.both_ways else ()),
        text_tokens=longest_text(path),
        head=head_of(Settings(values)),
    )
    if config.both_ways and (config.head or config.pooling != "mean"):
        raise FormatError("of models that look both ways Millis makes embeddings: the mean of their states, no labels")
    check_config(config)
    return config


def dense_of(path: Path, hidden: int) -> Tensor | None:
    """The product [outputs, hidden] of the Dense modules in modules.json: without bias and activation they are one."""
    found: NDArray[np.float32] | None = None
    for module in _modules(path / "modules.json") if (path / "modules.json").is_file() else []:
        if str(module.get("type")).rpartition(".")[2] != "Dense":
            continue
        folder = _beside(path, module.get("path"))
        settings = Settings(read_json(folder / "config.json", _MAX_JSON_BYTES))
        if settings.truth("bias", True) or not str(settings.get("activation_function")).endswith(".Identity"):
            raise FormatError(f"{folder.name}: Millis runs Dense modules without bias and activation only")
        weight = read_folder_tensors(folder).get("linear.weight")
        inputs = hidden if found is None else len(found)
        if weight is None or len(weight.shape) != 2 or weight.shape[1] != inputs:
            raise FormatError(f"{folder.name}: linear.weight must be a matrix of {inputs} columns")
        found = weight.numpy() if found is None else weight.numpy() @ found
    if found is None:
        return None
    return Tensor("dense.weight", GgmlType.F32, found.shape, np.ascontiguousarray(found).reshape(-1).view(np.uint8))


def head_of(settings: Settings, activation: Literal["tanh", "relu", "gelu", "gelu_tanh"] = "tanh") -> Head | None:
    """The classifier that config.json's architecture says there is. FormatError for a head of another kind."""
    names = settings.get("architectures") or ["Model"]
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise FormatError(f"config.json: architectures must list one name, not {names!r:.80}")
    if names[0].endswith(("Model", "ForMaskedLM", "ForPreTraining")):
        return None
    if not names[0].endswith("ForSequenceClassification"):
        raise FormatError(f"config.json: {names[0]!r:.60} has a head that Millis does not run; it runs classifiers")
    labels = _labels(settings)
    return Head(labels=labels, problem=_problem(settings, len(labels)), activation=activation)


def _labels(settings: Settings) -> tuple[str, ...]:
    """Their names in the order of the logits; LABEL_0, LABEL_1 where config.json names none, as transformers has it."""
    found = settings.get("id2label")
    count = settings.whole("num_labels", len(found) if isinstance(found, dict) else 2)
    if not 1 <= count <= MOST_LABELS:
        raise FormatError(f"config.json: a head must tell 1 to {MOST_LABELS} labels apart, not {count}")
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


def pooling_of(path: Path, modes: Mapping[str, Pooling], others: tuple[str, ...] = ()) -> Pooling:
    """What modules.json asks for, the mean where there is none. FormatError for what is not among `modes`.

    others: kinds of modules that are read elsewhere.
    """
    file = path / "modules.json"
    if not file.is_file():
        return "mean"
    folder = None
    for module in _modules(file):
        kind = str(module.get("type")).rpartition(".")[2]
        if kind == "Pooling":
            folder = module.get("path")
        elif kind not in ("Transformer", "Normalize", *others):
            raise FormatError(f"modules.json: Millis does not run the module {kind!r:.40}")
    if folder is None:
        return "mean"
    values = read_json(_beside(path, folder) / "config.json", _MAX_JSON_BYTES)
    chosen = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in modes:
        raise FormatError(f"the pooling {' with '.join(chosen) or 'none'} is not one of {', '.join(modes)}")
    return modes[chosen[0]]


def _beside(path: Path, folder: Any) -> Path:
    if not isinstance(folder, str) or Path(folder).name != folder:
        raise FormatError(f"modules.json: the path {folder!r:.60} must name a folder beside it")
    return path / folder


def _modules(file: Path) -> list[dict[str, Any]]:
    data = map_file(file)
    try:
        found = json.loads(data[:_MAX_JSON_BYTES].tobytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file.name} is not valid JSON: {error}") from None
    if not isinstance(found, list) or not all(isinstance(module, dict) for module in found):
        raise FormatError(f"{file.name} must be a list of objects")
    return found


def longest_text(path: Path) -> int | None:
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
