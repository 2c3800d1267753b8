"""The model a run starts from: a GGUF file or a Hugging Face folder, as a transformers model with its tokenizer."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers as library
from torch import nn

from millis.models.checkpoint import Checkpoint
from millis.models.gguf import read_gguf
from millis.models.load import is_encoder, is_seq2seq
from millis.models.mapped import read_json
from millis.models.transformers_model import transformers_model
from millis.tokenizer import Tokenizer
from millis.tokenizer.to_folder import write_tokenizer
from millis.types import FormatError, ModelError, RequestError

transformers: Any = library
_MAX_JSON_BYTES = 16 << 20
# What stands beside a model and is as true of the trained one.
_BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt",
    "added_tokens.json", "chat_template.jinja", "tokenizer.model",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Base:
    """`checkpoint`: what a GGUF file holds; None for a folder."""

    name: str  # as the user said it
    path: Path
    tokenizer: Tokenizer
    checkpoint: Checkpoint | None

    @classmethod
    def open(cls, name: str, path: Path) -> Base:
        """Reads what lies at `path`. ModelError and FormatError as the readers raise them."""
        if path.is_dir():
            return cls(name, path, Tokenizer.from_folder(path), None)
        checkpoint = read_gguf(path)
        with TemporaryDirectory() as folder:  # a tokenizer that cannot be written in the end is refused before the work
            write_tokenizer(checkpoint.metadata, Path(folder))
        tokenizer = Tokenizer.from_gguf(checkpoint.metadata).for_model(checkpoint.config.vocab)
        return cls(name, path, tokenizer, checkpoint)

    def causal(self) -> Any:
        """A causal language model in float32. RequestError: the model is of another kind."""
        if is_encoder(self.path) or is_seq2seq(self.path):
            kind = "an encoder, which writes no text" if is_encoder(self.path) else "an encoder-decoder model"
            raise RequestError(f"{self.name} is {kind}; language models are trained here: give one, such as smollm2")
        if self.checkpoint is None:
            return self._pretrained(transformers.AutoModelForCausalLM)
        model = transformers_model(self.checkpoint, "sdpa")
        named = {"bos_token_id": self.tokenizer.bos, "eos_token_id": sorted(self.tokenizer.eos) or None}
        model.config.update(named | {"pad_token_id": self.pad})
        model.generation_config = transformers.GenerationConfig(**named, pad_token_id=self.pad)
        return model

    def encoder(self) -> Any:
        """The body that turns tokens into hidden states, without a head."""
        if self.checkpoint is not None:
            return self.causal().model
        return self._pretrained(transformers.AutoModel)

    def classifier(self, labels: list[str], layers: int | None = None, dropout: float | None = None) -> Any:
        """With a new head for `labels`; `layers`: only so many of the body's, from the first on."""
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        if self.checkpoint is None:
            kind = transformers.AutoModelForSequenceClassification
            # Eager attention is faster than the fused kernel on texts as short as these.
            model = self._pretrained(kind, "eager", num_labels=len(labels), ignore_mismatched_sizes=True)
        else:
            body = self.encoder()
            body.config.num_labels = len(labels)
            try:
                with torch.device("meta"):
                    model = transformers.AutoModelForSequenceClassification.from_config(body.config)
            except ValueError:
                kind = body.config.model_type
                raise ModelError(
                    f"{self.name}: transformers has no classifier of the type {kind}; give another model"
                ) from None
            setattr(model, model.base_model_prefix, body)
            model.score = nn.Linear(body.config.hidden_size, len(labels), bias=False)
            nn.init.normal_(model.score.weight, std=body.config.initializer_range)
        model.config.update(names | {"problem_type": "single_label_classification"})
        if hasattr(model, "score") or model.config.pad_token_id is None:
            model.config.pad_token_id = self.pad  # a decoder's head looks behind the last token that is another one
        if layers is not None:
            keep_layers(model, range(layers))
        if dropout is not None:
            set_dropout(model, dropout)
        return model

    @property
    def pad(self) -> int:
        """A token that no text holds: what shorter samples of a batch are filled up with."""
        around = set(self.tokenizer.encode("a"))
        others = sorted(self.tokenizer.control - around)
        named = [token for token in others if b"pad" in self.tokenizer.token_bytes(token).lower()]
        if not others:
            raise ModelError(f"{self.name}: its tokenizer has no control token to pad batches with")
        return (named or others)[0]

    @property
    def mask(self) -> int | None:
        """The token that stands for a hidden one, as BERT has it; None where there is none."""
        named = [t for t in self.tokenizer.control if b"mask" in self.tokenizer.token_bytes(t).lower()]
        return min(named, default=None)

    def write_beside(self, folder: Path, longest: int | None = None) -> None:
        """The tokenizer's files, into `folder`. longest: tokens of a text that the model has seen, where it saw no more
        of any: readers of the folder then cut texts where training did."""
        if self.checkpoint is not None:
            write_tokenizer(self.checkpoint.metadata, folder)
        else:
            for name in _BESIDE:
                if (self.path / name).is_file():
                    shutil.copyfile(self.path / name, folder / name)
        if longest is not None:
            file = folder / "tokenizer_config.json"
            values = read_json(file, _MAX_JSON_BYTES) if file.is_file() else {}
            file.write_text(json.dumps(dict(values) | {"model_max_length": longest}, indent=2), encoding="utf-8")

    def _pretrained(self, kind: Any, attention: str = "sdpa", **more: Any) -> Any:
        """A folder's model: weights from safetensors only, and no code of the folder's is run."""
        try:
            return kind.from_pretrained(
                self.path,
                dtype=torch.float32,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                **more,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise FormatError(f"{self.path}: transformers cannot read it: {str(error).splitlines()[0][:200]}") from None


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The model's stack of layers: the one list of modules that config.num_hidden_layers counts."""
    count = model.config.num_hidden_layers  # type: ignore[union-attr]
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not stacks:
        raise ModelError(f"{type(model).__name__} has no list of {count} layers")
    return stacks[0]


def check_positions(model: nn.Module, longest: int) -> None:
    """RequestError: the model has learned positions, and fewer than the longest sample's tokens."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in ("position_embeddings", "wpe"):
            before = 0 if module.padding_idx is None else module.padding_idx + 1  # roberta's positions begin behind it
            most = module.num_embeddings - before
            if longest > most:
                raise RequestError(
                    f"a sample has {longest} tokens, and the model takes at most {most}; give --max-tokens {most}"
                )


def keep_layers(model: Any, kept: Any) -> None:
    """Drops all layers but `kept`, numbers in order. RequestError where there is no such layer."""
    stack: Any = layers_of(model)
    kept = list(kept)
    if not kept or max(kept) >= len(stack):
        raise RequestError(f"--layers must lie in [1, {len(stack)}] for this model, not {len(kept)}")
    layers = [stack[i] for i in kept]
    lists = {key: getattr(model.config, key, None) for key in ("layer_types", "no_rope_layers")}  # by layer
    del stack[:]
    stack.extend(layers)
    for number, layer in enumerate(stack):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    for key, values in lists.items():
        if values is not None:
            setattr(model.config, key, [values[i] for i in kept])
    model.config.num_hidden_layers = len(layers)


def freeze_layers(model: Any, count: int) -> None:
    """The embedding and the first `count` layers are not trained. RequestError where nothing of the stack is left."""
    stack = layers_of(model)
    if not 0 <= count < len(stack):
        raise RequestError(f"--freeze-layers must lie in [0, {len(stack) - 1}] for this model, not {count}")
    if not count:
        return
    frozen = {id(p) for layer in stack[:count] for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in frozen or "embed" in name:
            parameter.requires_grad_(False)


def set_dropout(model: nn.Module, share: float) -> None:
    """Dropout of activations; that of attention's weights stays off, for it would cost attention its fast kernel."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0 if "attention.self" in name or "attn" in name else share
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
