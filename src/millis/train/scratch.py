"""millis train --shape: a model from nothing: its own byte-level BPE, a shape for the wanted size, then as lm."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import transformers as library

from millis.samples.read import Skipped, column, files_of, read_rows, text_of
from millis.tokenizer import Tokenizer
from millis.train.base import Base
from millis.train.lm import TEXT_COLUMNS, LanguageModelling, split_texts
from millis.train.settings import Settings
from millis.types import RequestError

transformers: Any = library
END = "<|endoftext|>"
_HEAD_DIM = 64
_SHORT = 256  # tokens up to which plain attention is faster than the fused kernel, backward above all
_WIDTH_PER_LAYER = 48  # hidden values a layer; it matters little (Kaplan et al., 2020)


def prepare(
    settings: Settings, skipped: Skipped, data: Sequence[Path], held: Sequence[Path], folder: Path
) -> LanguageModelling:
    """`folder` keeps the tokenizer, so that a resumed run has the very same."""
    assert settings.vocab is not None
    if not (folder / "tokenizer.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer(_texts(settings, data), settings.vocab, folder)
    tokenizer = Tokenizer.from_folder(folder)
    base = Base("from scratch", folder, tokenizer, None)
    assert settings.shape is not None and settings.parameters is not None
    config = config_of(settings.shape, settings.parameters, settings.max_tokens, tokenizer)
    attention = "eager" if settings.max_tokens <= _SHORT else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return LanguageModelling(base, settings, model, *split_texts(tokenizer, settings, skipped, data, held))


def _texts(settings: Settings, paths: Sequence[Path]) -> Iterator[str]:
    quiet = Skipped()  # what is wrong with rows is said when they are read to be trained on
    rows = list(read_rows(files_of(paths), quiet))
    name = column(rows, settings.text_column, TEXT_COLUMNS, "the text", "--text-column")
    yield from (text for row in rows if (text := text_of(row, name, quiet)) is not None)


def train_tokenizer(texts: Iterator[str], vocab: int, folder: Path) -> None:
    """Byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) of at most `vocab` tokens, as tokenizer files."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    backend.save(str(folder / "tokenizer.part"))
    (folder / "tokenizer.part").replace(folder / "tokenizer.json")


def config_of(shape: str, parameters: int, context: int, tokenizer: Tokenizer) -> Any:
    """A configuration of about `parameters` weights. RequestError where no shape comes near it."""
    vocab, end = tokenizer.vocab_size, min(tokenizer.eos)
    hidden, layers = best_shape(shape, parameters, vocab, context)
    if shape == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocab, n_positions=context, n_embd=hidden, n_layer=layers, n_head=hidden // _HEAD_DIM,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
    return transformers.LlamaConfig(
        vocab_size=vocab, max_position_embeddings=context, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // _HEAD_DIM, num_key_value_heads=hidden // _HEAD_DIM,
        intermediate_size=_ffn(hidden), tie_word_embeddings=True, bos_token_id=end, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip


def _ffn(hidden: int) -> int:
    """8/3 of the hidden size, as many weights as a plain MLP of four times (Shazeer, 2020), in whole blocks of 64."""
    return max(64, round(8 * hidden / 3 / 64) * 64)


def best_shape(shape: str, parameters: int, vocab: int, context: int) -> tuple[int, int]:
    """(hidden, layers) nearest in size to `parameters`, and among those within 5 % the one nearest the usual width."""
    found = []
    for hidden in range(_HEAD_DIM, 8193, _HEAD_DIM):
        if shape == "gpt2":
            layer, fixed = 12 * hidden**2 + 13 * hidden, (vocab + context + 2) * hidden
        else:
            layer, fixed = 4 * hidden**2 + 3 * hidden * _ffn(hidden) + 2 * hidden, (vocab + 1) * hidden
        layers = max(1, round((parameters - fixed) / layer))
        size = fixed + layers * layer
        off, odd = abs(size / parameters - 1), abs(hidden / layers / _WIDTH_PER_LAYER - 1)
        found.append((max(0.05, off), odd, hidden, layers))
    off, _, hidden, layers = min(found)
    if off > 0.5:
        raise RequestError(
            f"no model of {parameters:,} weights holds a vocabulary of {vocab}; give more, or a smaller --vocab"
        )
    return hidden, layers
