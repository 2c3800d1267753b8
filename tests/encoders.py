"""Tiny random encoders of every family and decoders that read, with a tokenizer, in folders that transformers wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ModernBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    RoFormerConfig,
    RoFormerForSequenceClassification,
    RoFormerModel,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

torch.set_num_threads(1)

VOCAB, CONTEXT = 120, 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": CONTEXT,
}
PADDED = SIZES | {"max_position_embeddings": CONTEXT + 2, "pad_token_id": 1, "type_vocab_size": 1}
DISTIL = {
    "vocab_size": VOCAB,
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 96,
    "max_position_embeddings": CONTEXT,
}
MODERN = SIZES | {
    "num_hidden_layers": 4,
    "local_attention": 12,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
}
FAMILIES: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {  # configuration, body, classifier, sizes
    "bert": (BertConfig, BertModel, BertForSequenceClassification, SIZES),
    "roberta": (RobertaConfig, RobertaModel, RobertaForSequenceClassification, PADDED),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel, XLMRobertaForSequenceClassification, PADDED),
    "distilbert": (DistilBertConfig, DistilBertModel, DistilBertForSequenceClassification, DISTIL),
    "roformer": (RoFormerConfig, RoFormerModel, RoFormerForSequenceClassification, SIZES),
    "modernbert": (ModernBertConfig, ModernBertModel, ModernBertForSequenceClassification, MODERN),
}
LABELS = {0: "card", 1: "loan", 2: "parcel", 3: "other"}
WORDS = "where is my parcel card loan the a lost new late please help ##s ##ed ##ing ? . , ! 1 2 3".split()


def tiny(family: str, head: bool = True, **changes: Any) -> Any:
    """A random model in float32, its norms and biases random as well, so that no part of it is without effect."""
    config_class, body, classifier, sizes = FAMILIES[family]
    labels = {"id2label": LABELS, "label2id": {label: i for i, label in LABELS.items()}} if head else {}
    torch.manual_seed(0)
    model = (classifier if head else body)(config_class(**{**sizes, **labels, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue  # roformer's sines and cosines
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm.weight" in name.lower() else 0.0, 0.3)
            elif "embeddings" not in name:
                parameter.normal_(0, 0.15 if "Wqkv" in name else 0.3)  # four layers: attention that still sees several
            else:
                parameter.normal_(0, 1)
    return model


DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2},
    "Qwen2": {"num_key_value_heads": 2},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "Gemma": {"num_key_value_heads": 2, "head_dim": 16},
    "Gemma3Text": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 24},
    "SmolLM3": {"num_key_value_heads": 2, "no_rope_layers": [0] + [1] * 7},
    "Exaone4": {"num_key_value_heads": 2, "sliding_window": 8},
    "HunYuanDenseV1": {"num_key_value_heads": 2, "head_dim": 16},
    "Olmo2": {"num_key_value_heads": 2},
    "Olmo3": {"num_key_value_heads": 2, "sliding_window": 8},
    "GPT2": {},
}
BODIES: dict[str, dict[str, Any]] = {  # of which transformers has no classifier
    "Granite": {"num_key_value_heads": 2, "residual_multiplier": 0.3, "logits_scaling": 8.0},
    "Ernie4_5": {"num_key_value_heads": 2, "head_dim": 32},
}


def decoder(stem: str, head: bool = True, **changes: Any) -> Any:
    """A random decoder without an output matrix: its body, or that under a classifier's head."""
    labels = {"id2label": LABELS, "label2id": {label: i for i, label in LABELS.items()}} if head else {}
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(
        **{**SIZES, **(DECODERS | BODIES)[stem], **special, **labels, **changes}
    )
    model = getattr(transformers, stem + ("ForSequenceClassification" if head else "Model"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1, 0.3)
    return model


def save(model: Any, folder: Path) -> Path:
    """The model, and a WordPiece tokenizer of 120 entries, as a fine-tuning run leaves them."""
    model.save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    tokens = list(dict.fromkeys(tokens))[:VOCAB]
    made = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    return folder


def hidden(model: Any, ids: list[int], types: list[int] | None = None) -> np.ndarray:
    """[T, width] the body's final hidden states."""
    return _run(getattr(model, model.base_model_prefix, model), ids, types).last_hidden_state[0].numpy()


def logits(model: Any, ids: list[int], types: list[int] | None = None) -> np.ndarray:
    """[labels] what the classifier says."""
    return _run(model, ids, types).logits[0].numpy()


def _run(model: Any, ids: list[int], types: list[int] | None) -> Any:
    more = {} if types is None else {"token_type_ids": torch.tensor([types])}
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), **more)


def random_ids(count: int, seed: int = 0) -> list[int]:
    """None of them roberta's padding, which it gives another position."""
    return [int(token) for token in np.random.default_rng(seed + count).integers(2, VOCAB, count)]
