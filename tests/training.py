"""Tiny models and data to train on: a BERT folder, a GGUF file with a chat template, labelled texts."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel

import gguf_files
import tokenizer_tiny
from millis import cli
from millis.models.transformers_model import torch_module

torch.set_num_threads(1)
torch_module()  # quiets transformers

WORDS = {"cold": ["snow", "ice", "frost", "winter"], "warm": ["sun", "beach", "summer", "heat"]}
COMMON = ["the", "is", "and", "we", "like", "today", "with", "very"]


def bert_folder(path: Path) -> Path:
    """A random BERT of two layers, whose tokenizer knows WORDS and COMMON."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *COMMON, *WORDS["cold"], *WORDS["warm"], "unused", "never"]
    tokenizer = Tokenizer(WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(pieces[:4])
    path.mkdir(parents=True)
    tokenizer.save(str(path / "tokenizer.json"))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **special}))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(path)
    return path


def modernbert_folder(path: Path) -> Path:
    """The same of three layers of ModernBERT, the first of which sees all of a text."""
    bert_folder(path)
    vocabulary = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        local_attention=8,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
        cls_token_id=2,
        sep_token_id=3,
    )
    ModernBertModel(config).save_pretrained(path)
    return path


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label): a text of common words and two words of its label's."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        label = draw.choice(list(WORDS))
        words = draw.choices(COMMON, k=draw.randint(2, 12)) + draw.choices(WORDS[label], k=2)
        draw.shuffle(words)
        found.append((" ".join(words), label))
    return found


def labelled_csv(path: Path, count: int = 120, seed: int = 0) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "category"), *sentences(count, seed)])
    return path


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_gguf(path: Path, architecture: str = "llama", context: int = 256) -> Path:
    """A random model with a chat template; its tokens are bytes and a few merges."""
    tokenizer = tokenizer_tiny.bpe()
    size = len(tokenizer["tokenizer.ggml.tokens"])
    keys = tokenizer | {".context_length": context, "tokenizer.ggml.scores": gguf_files.DROP}
    gguf_files.write_tiny(path, architecture, keys, {"token_embd.weight": (size, gguf_files.HIDDEN)})
    return path


def spm_gguf(path: Path) -> Path:
    """A random gemma3 model with a SentencePiece tokenizer: bytes, a few pieces, a space before every text."""
    tokenizer = tokenizer_tiny.spm()
    size = len(tokenizer["tokenizer.ggml.tokens"])
    gguf_files.write_tiny(path, "gemma3", tokenizer, {"token_embd.weight": (size, gguf_files.HIDDEN)})
    return path


def command(*arguments: str | Path) -> int:
    """`millis ARGUMENTS` in this process, where PyTorch is there already; its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, arguments)])
    return int(ended.value.code or 0)


def loaded(folder: Path, kind: Any) -> Any:
    """The folder's model as transformers reads it."""
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
