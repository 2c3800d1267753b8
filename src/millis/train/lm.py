"""millis train --task lm: next-token training on packed texts, and what chats share with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millis.samples.read import Skipped, column, files_of, read_rows, text_of
from millis.tokenizer import Tokenizer
from millis.train.base import Base, check_positions
from millis.train.batches import Micro, Step, divided, epoch_steps, micro_batches, split
from millis.train.loop import autocast
from millis.train.lora import add_adapter, merge_adapter, write_adapter
from millis.train.settings import Settings
from millis.train.speed import matmul_flops
from millis.train.vocabulary_loss import vocabulary_loss
from millis.types import RequestError

IGNORED = -100  # a target that counts for nothing, as torch.nn.functional.cross_entropy has it
TEXT_COLUMNS = ("text", "content", "document", "sentence")


@dataclass(frozen=True, slots=True)
class Tokens:
    """`targets[i]` is the token after `ids[i]`, or IGNORED."""

    ids: list[int]
    targets: list[int]

    @classmethod
    def of(cls, tokens: Sequence[int], counted: Sequence[bool] | None = None) -> Tokens:
        """All tokens but the last predict the next; only those that are `counted` are learned."""
        targets = [t if counted is None or counted[i] else IGNORED for i, t in enumerate(tokens)]
        return cls(list(tokens[:-1]), targets[1:])

    @property
    def counted(self) -> int:
        return sum(t != IGNORED for t in self.targets)


class LanguageModelling:
    """The job. `model`: causal, all of it or an adapter in it to be trained."""

    def __init__(
        self, base: Base, settings: Settings, model: Any, train: Sequence[Tokens], held: Sequence[Tokens]
    ) -> None:
        self.model, self._base, self._settings, self._train, self._held = model, base, settings, train, held
        self._lengths = [len(sample.ids) for sample in train]
        self._weights = [sample.counted for sample in train]
        check_positions(model, max(len(sample.ids) for sample in [*train, *held]))
        self.peak_flops = matmul_flops(settings.bf16)
        if settings.finetune == "lora":
            add_adapter(model, settings.rank, settings.alpha)
        self._before = self._perplexity() if held and settings.shape is None else None

    def epoch(self, number: int) -> list[Step]:
        s = self._settings
        return epoch_steps(self._lengths, s.batch, s.micro_tokens, s.seed, number)

    def loss(self, micro: Micro) -> Tensor:
        return self._loss([self._train[i] for i in micro])

    def weight(self, micro: Micro) -> float:
        return float(sum(self._weights[i] for i in micro))

    def tokens(self, micro: Micro) -> int:
        return sum(self._lengths[i] for i in micro)

    def rate_of(self, name: str) -> float:
        return 1.0

    def flops_a_token(self) -> float:
        """Floating-point operations that training on one token takes: 6 a weight (Kaplan et al., 2020), 4 where the
        weights stay as they are; and attention's, over half of the sequence on average."""
        config = self.model.config
        weights = sum(p.numel() for n, p in self.model.named_parameters() if "lora_" not in n)
        if not config.tie_word_embeddings:
            weights -= self.model.get_input_embeddings().weight.numel()  # looked up, not multiplied
        length = sum(n * n for n in self._lengths) / sum(self._lengths)
        attention = 2 * 2 * config.num_hidden_layers * config.hidden_size * length / 2
        factor = 4 if self._settings.finetune == "lora" else 6
        return float(factor * weights + 3 * attention)

    def evaluate(self) -> dict[str, float]:
        """Perplexity of what was held out, before (of a model that was there before) and after."""
        if not self._held:
            return {}
        found = {} if self._before is None else {"perplexity_before": self._before}
        return found | {"perplexity": self._perplexity()}

    def export(self, folder: Path) -> list[str]:
        """A Hugging Face folder; with LoRA it is the merged model, and adapter/ holds the adapter in peft's format."""
        written = []
        if self._settings.finetune == "lora":
            write_adapter(self.model, folder / "adapter", self._base.name, self._settings.alpha)
            written.append("adapter in peft's format (adapter/)")
            merge_adapter(self.model)
        self.model.save_pretrained(folder)
        self._base.write_beside(folder)
        return [*written, "Hugging Face folder"]

    def _loss(self, samples: Sequence[Tokens]) -> Tensor:
        """Only where something is learned is the large output matrix worth its work."""
        ids, targets = self._batch(samples)
        learned = targets != IGNORED
        output = self.model.get_output_embeddings()
        return vocabulary_loss(
            self._states(self.model, ids)[learned], output.weight, targets[learned], self._settings.bf16
        )

    def _batch(self, samples: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        """ids and targets [samples, longest]. Padding comes last, where no token attends to it and none is learned."""
        longest = max(len(sample.ids) for sample in samples)
        ids = torch.zeros((len(samples), longest), dtype=torch.long)
        targets = torch.full((len(samples), longest), IGNORED, dtype=torch.long)
        for row, sample in enumerate(samples):
            ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
            targets[row, : len(sample.ids)] = torch.tensor(sample.targets)
        return ids, targets

    def _states(self, model: Any, ids: Tensor) -> Tensor:
        """[samples, longest, hidden]: what the output matrix is multiplied with. Granite divides the logits."""
        body = getattr(model, model.base_model_prefix)
        states: Tensor = body(ids, use_cache=False).last_hidden_state
        return states / getattr(model.config, "logits_scaling", 1.0)

    def _logits(self, model: Any, ids: Tensor, learned: Tensor) -> Tensor:
        """[counted, vocab]"""
        logits: Tensor = model.get_output_embeddings()(self._states(model, ids)[learned])
        return logits

    def _perplexity(self) -> float:
        self.model.eval()
        total, count = 0.0, 0
        lengths = [len(sample.ids) for sample in self._held]
        with torch.inference_mode(), autocast(self._settings.bf16):
            for micro in micro_batches(range(len(self._held)), lengths, self._settings.micro_tokens):
                samples = [self._held[i] for i in micro]
                counted = sum(sample.counted for sample in samples)
                total, count = total + self._loss(samples).item() * counted, count + counted
        self.model.train()
        return math.exp(min(700.0, total / count))


def packed(documents: Iterable[Sequence[int]], length: int) -> list[Tokens]:
    """Documents end to end, cut into sequences of `length` that predict every token but the first of all."""
    tokens = [token for document in documents for token in document]
    cuts = range(0, max(1, len(tokens) - 1), length)
    return [Tokens.of(tokens[start : start + length + 1]) for start in cuts if len(tokens) - start >= 2]


def documents(tokenizer: Tokenizer, settings: Settings, skipped: Skipped, paths: Sequence[Path]) -> list[list[int]]:
    """The texts of `paths` as ids, each as the model expects a text to begin, and ended by its end token."""
    rows = list(read_rows(files_of(paths), skipped))
    name = column(rows, settings.text_column, TEXT_COLUMNS, "the text", "--text-column", skipped)
    end = min(tokenizer.eos, default=None)
    found = []
    for row in rows:
        if (text := text_of(row, name, skipped)) is not None:
            ids = tokenizer.encode(text)
            if not ids:
                skipped.add(row.file, row.line, "no token")
                continue
            found.append(ids if end is None or ids[-1] == end else [*ids, end])
    if not found:
        raise RequestError(f"no usable text in {', '.join(map(str, paths))}: {skipped.summary()}")
    return found


def split_texts(
    tokenizer: Tokenizer, settings: Settings, skipped: Skipped, data: Sequence[Path], held: Sequence[Path]
) -> tuple[list[Tokens], list[Tokens]]:
    """Sequences to train on and to evaluate on: other files, a share, or none.

    The share is of texts, copies together; where there are too few texts for that, of their sequences.
    """
    texts, length = documents(tokenizer, settings, skipped, data), settings.max_tokens
    if held:
        return packed(texts, length), packed(documents(tokenizer, settings, skipped, held), length)
    kept, out = split([tuple(text) for text in texts], settings.eval_split, settings.seed)
    if kept and out:
        return packed([texts[i] for i in kept], length), packed([texts[i] for i in out], length)
    train = packed(texts, length)
    if not train:
        raise RequestError("a single token is all there is to train on; give more text")
    return divided(train, [tuple(sample.ids) for sample in train], settings.eval_split, settings.seed)


def prepare(
    base: Base, settings: Settings, skipped: Skipped, data: Sequence[Path], held: Sequence[Path]
) -> LanguageModelling:
    """Reads the data and makes the job."""
    return LanguageModelling(base, settings, base.causal(), *split_texts(base.tokenizer, settings, skipped, data, held))
