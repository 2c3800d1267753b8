"""Tiny random encoder-decoder models in folders that transformers wrote."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from transformers import (
    MarianConfig,
    MarianMTModel,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

torch.set_num_threads(1)

VOCAB, CONTEXT = 128, 96
T5 = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "n_positions": CONTEXT,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
MARIAN = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": CONTEXT,
    "activation_function": "swish",
    "scale_embedding": True,
    "pad_token_id": VOCAB - 1,
    "decoder_start_token_id": VOCAB - 1,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "t5": (T5Config, T5ForConditionalGeneration, T5),
    "t5-gated": (
        T5Config,
        T5ForConditionalGeneration,
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_heads": 2},
    ),
    "mt5": (MT5Config, MT5ForConditionalGeneration, T5 | {"feed_forward_proj": "gated-gelu"}),
    "marian": (MarianConfig, MarianMTModel, MARIAN),
}


def tiny(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in float32, its norms and biases random as well, so that no part of it is without effect."""
    config_class, model_class, sizes = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**sizes, **changes})).eval()
    if family == "t5-gated":
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(model.config.vocab_size, model.config.d_model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" in name:
                continue
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.3)
            elif "shared" in name or "embed" in name:
                parameter.normal_(0, 0.3)  # so that an answer does not repeat its last token
            elif "relative_attention_bias" in name or "lm_head" in name:
                parameter.normal_(0, 1)
            else:
                parameter.normal_(0, 0.25 if family == "marian" else 0.1)
        if family == "marian":
            model.final_logits_bias.normal_(0, 1)
    return model


def save(model: Any, folder: Path) -> Path:
    """The model's folder, without a tokenizer."""
    model.save_pretrained(folder)
    return folder


def logits(model: Any, source: list[int], target: list[int]) -> np.ndarray:
    """[T, vocab] what transformers makes of `target` behind `source`."""
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor([source]),
            attention_mask=torch.ones(1, len(source), dtype=torch.long),
            decoder_input_ids=torch.tensor([target]),
        )
    return out.logits[0].numpy()


def random_ids(count: int, seed: int = 0) -> list[int]:
    """None of them special in any of the families."""
    return [int(token) for token in np.random.default_rng(seed + count).integers(3, VOCAB - 1, count)]


LINES = (
    "Where is my parcel? The card is lost and I want a new one.",
    "Translate the text: the house is wonderful, and so is the garden behind it.",
    "A bank lends money to those who pay it back with interest, month after month.",
    "今天天气很好，我们去公园。你想喝茶还是咖啡？银行在学校的旁边。",
    "Studies show that owning a dog is good for you; summarize what they say.",
)


def spm(lines: Sequence[str], **options: Any) -> bytes:
    """A SentencePiece model of the kind unigram that was trained on `lines`."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="unigram",
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return out.getvalue()


@functools.cache
def _t5_spm() -> bytes:
    return spm(LINES * 20, vocab_size=VOCAB - 10, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@functools.cache
def _marian_spm() -> bytes:
    return spm(LINES * 20, vocab_size=VOCAB - 8)


def add_tokenizer(folder: Path, family: str, codes: tuple[str, ...] = ()) -> Path:
    """The tokenizer files that published checkpoints have: spiece.model, or source.spm, target.spm and vocab.json."""
    if family != "marian":
        (folder / "spiece.model").write_bytes(_t5_spm())
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 10}')
        return folder
    model = sentencepiece.SentencePieceProcessor(model_proto=_marian_spm())
    pieces = [piece for i in range(model.vocab_size()) if not model.is_control(i) and not model.is_unknown(i)
              for piece in [model.id_to_piece(i)]]  # fmt: skip
    tokens = ["</s>", "<unk>", *codes, *reversed(pieces)][: VOCAB - 1]
    tokens += [f"spare{i}" for i in range(VOCAB - 1 - len(tokens))]
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(_marian_spm())
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate([*tokens, "<pad>"])}))
    names = {"tokenizer_class": "MarianTokenizer", "source_lang": "zh", "target_lang": "en"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder
