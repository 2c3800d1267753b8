"""millis train --task classify: a body with a new head, on texts with one label each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from millis.models import reader_folder
from millis.models.load import ENCODERS
from millis.models.ngrams import TOKENS, Ngrams
from millis.samples.labelled import read_labelled
from millis.samples.read import Row, Skipped, normal
from millis.train import ngrams
from millis.train.base import Base, check_positions, freeze_layers, layers_of
from millis.train.batches import Micro, Step, divided, epoch_steps, micro_batches
from millis.train.loop import autocast
from millis.train.rows import UsedRows
from millis.train.settings import Settings
from millis.train.texts import encode_cut, padded
from millis.types import RequestError

_LATENCY_SAMPLES = 100
_PLACES = 16  # a text is kept for as many lengths of a sample, where samples are taken from all over it


@dataclass(slots=True)
class Labelled:
    """Texts as ids, each with the number of its label."""

    ids: list[list[int]]
    labels: list[int]


class Classify:
    """The job. `labels` in the order of their numbers; the body is `base`'s, perhaps with fewer layers."""

    def __init__(self, base: Base, settings: Settings, labels: list[str], train: Labelled, held: Labelled) -> None:
        self._settings, self.labels, self._train, self._held = settings, labels, train, held
        self._lengths = [min(len(ids), settings.max_tokens) for ids in train.ids]
        self._edges = tuple(map(len, base.tokenizer.around))
        self._base, self._pad = base, base.pad
        self.model = base.classifier(labels, settings.layers, settings.dropout)
        check_positions(self.model, max(len(self._piece(ids)) for ids in [*train.ids, *held.ids]))
        kind = self.model.config.model_type
        self._runs = kind in ENCODERS or kind in reader_folder.DECODERS
        self._adds = self._runs if settings.ngrams is None else settings.ngrams
        if self._adds and not self._runs:
            raise RequestError(f"--ngrams goes with a model that Millis runs, not with one of the type {kind}")
        self._mask = base.mask if settings.token_dropout else None
        self._around = set(base.tokenizer.encode(""))  # what belongs around every text is never masked
        read = [*(train.ids if settings.elsewhere else map(self._piece, train.ids)), *map(self._piece, held.ids)]
        used = {token for ids in read for token in ids} | {self._pad, *_set(self._mask)}
        self._rows = UsedRows(self.model, used)
        self._depths = _depths(self.model)
        freeze_layers(self.model, settings.freeze_layers)

    def epoch(self, number: int) -> list[Step]:
        s = self._settings
        return epoch_steps(self._lengths, s.batch, s.micro_tokens, s.seed, number)

    def loss(self, micro: Micro) -> Tensor:
        logits = self._logits([self._masked(self._sample(self._train.ids[i])) for i in micro])
        targets = torch.tensor([self._train.labels[i] for i in micro])
        return nn.functional.cross_entropy(logits, targets, label_smoothing=self._settings.label_smoothing)

    def weight(self, micro: Micro) -> float:
        return float(len(micro))

    def tokens(self, micro: Micro) -> int:
        return sum(self._lengths[i] for i in micro)

    def rate_of(self, name: str) -> float:
        """Deeper layers hold what is general, and move less (Howard and Ruder, 2018); the new head moves most."""
        if name.startswith(("classifier", "score")):
            return self._settings.head_lr
        return self._settings.layer_decay ** self._depths.get(name, 0)

    def evaluate(self) -> dict[str, float]:
        """Accuracy, macro F1 and milliseconds a text (one at a time) on what was held out; {} where nothing was."""
        held = self._held
        if not held.ids:
            return {}
        samples = [self._piece(ids) for ids in held.ids]
        logits, found = self._all_logits(samples), {}
        if self._adds:
            alone = scores(held.labels, logits.argmax(-1).tolist(), len(self.labels))
            found["without_ngrams"] = alone["accuracy"]
            logits += torch.tensor(np.stack([self.ngrams.logits(ids) for ids in held.ids]))
        found = scores(held.labels, logits.argmax(-1).tolist(), len(self.labels)) | found
        return found | {"latency_ms": self._latency_ms(samples)}

    @cached_property
    def ngrams(self) -> Ngrams:
        """Fitted to the training texts when first asked for."""
        return ngrams.fit(self._train.ids, self._train.labels, len(self.labels))

    def export(self, folder: Path) -> list[str]:
        """The folder that transformers and Millis read."""
        self._rows.restore()
        self.model.save_pretrained(folder)
        self._base.write_beside(folder, self._settings.max_tokens)
        if not self._runs:
            return [f"Hugging Face folder, for transformers: Millis runs no {self.model.config.model_type} models"]
        if not self._adds:
            return ["Hugging Face folder"]
        ngrams.write(self.ngrams, folder)
        return ["Hugging Face folder", f"{len(self.ngrams.keys):,} n-grams, which only Millis reads"]

    def _sample(self, ids: list[int]) -> list[int]:
        """A text of at most `max_tokens`: its beginning, or as many tokens from another place of it."""
        elsewhere, spare = self._settings.elsewhere, len(ids) - self._settings.max_tokens
        if spare > 0 and elsewhere and torch.rand(()) < elsewhere:
            return self._piece(ids, int(torch.randint(spare + 1, ())))
        return self._piece(ids)

    def _piece(self, ids: list[int], start: int = 0) -> list[int]:
        """What the network reads of a text from there on."""
        if len(ids) <= self._settings.max_tokens:
            return ids
        before, after = self._edges
        stop = start + self._settings.max_tokens - after
        return ids[:before] + ids[before + start : stop] + ids[len(ids) - after :]

    def _masked(self, ids: list[int]) -> list[int]:
        """Some tokens hidden, other ones each time: the label must follow from what is left."""
        mask = self._mask
        if mask is None:
            return ids
        hidden = (torch.rand(len(ids)) < self._settings.token_dropout).tolist()
        pairs = zip(ids, hidden, strict=True)
        return [mask if hide and token not in self._around else token for token, hide in pairs]

    def _logits(self, samples: Sequence[Sequence[int]]) -> Tensor:
        ids, mask = padded(samples, self._pad)
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits.float()

    def _all_logits(self, samples: Sequence[Sequence[int]]) -> Tensor:
        """[samples, labels]"""
        self.model.eval()
        lengths, found = [len(ids) for ids in samples], torch.zeros(len(samples), len(self.labels))
        with torch.inference_mode(), autocast(self._settings.bf16):
            for micro in micro_batches(range(len(samples)), lengths, self._settings.micro_tokens):
                found[list(micro)] = self._logits([samples[i] for i in micro])
        self.model.train()
        return found

    def _latency_ms(self, samples: Sequence[Sequence[int]]) -> float:
        """The median over some texts, in PyTorch."""
        self.model.eval()
        times = []
        every = max(1, len(samples) // _LATENCY_SAMPLES)
        with torch.inference_mode(), autocast(self._settings.bf16):
            for ids in samples[::every][:_LATENCY_SAMPLES]:
                begin = time.perf_counter()
                self._logits([ids])
                times.append(1e3 * (time.perf_counter() - begin))
        self.model.train()
        return statistics.median(times)


def scores(truth: Sequence[int], guesses: Sequence[int], classes: int) -> dict[str, float]:
    """Accuracy, and F1 of each class averaged; with two classes also the F1 of the second."""
    pairs = list(zip(truth, guesses, strict=True))
    f1 = []
    for label in range(classes):
        hit = sum(t == g == label for t, g in pairs)
        named = sum(t == label for t, _ in pairs) + sum(g == label for _, g in pairs)
        f1.append(2 * hit / named if named else float("nan"))
    present = [value for value in f1 if value == value]
    found = {"accuracy": sum(t == g for t, g in pairs) / len(pairs), "macro_f1": sum(present) / len(present)}
    if classes == 2 and f1[1] == f1[1]:
        found["f1"] = f1[1]
    return found


def _set(token: int | None) -> set[int]:
    return set() if token is None else {token}


def _depths(model: Any) -> dict[str, int]:
    """Parameter → how many layers lie between it and the head; an embedding lies below them all."""
    stack = layers_of(model)
    numbers = {id(p): len(stack) - 1 - i for i, layer in enumerate(stack) for p in layer.parameters()}
    return {name: numbers.get(id(p), len(stack) if "embed" in name else 0) for name, p in model.named_parameters()}


def prepare(base: Base, settings: Settings, skipped: Skipped, data: Sequence[Path], held: Sequence[Path]) -> Classify:
    """Reads the data and makes the job. RequestError where there are fewer than two labels."""
    columns = settings.text_column, settings.label_column
    rows = read_labelled(data, skipped, *columns)
    labels = sorted({label for _, _, label in rows})
    if len(labels) < 2:
        raise RequestError(f"all rows have the label {labels[0]!r:.60}; a classifier needs two or more")
    if held:
        train, other = rows, read_labelled(held, skipped, *columns, known=labels)
    else:
        keys = [normal(text) for _, text, _ in rows]
        train, other = divided(rows, keys, settings.eval_split, settings.seed)
    limit, places = settings.max_tokens, _PLACES if settings.elsewhere else 1
    whole = 0 if settings.ngrams is False else TOKENS
    parts = ((train, max(limit * places, whole)), (other, max(limit, whole)))
    return Classify(base, settings, labels, *(_encoded(base, rows, labels, longest) for rows, longest in parts))


def _encoded(base: Base, rows: Sequence[tuple[Row, str, str]], labels: list[str], longest: int) -> Labelled:
    number = {label: i for i, label in enumerate(labels)}
    # A text of which the vocabulary has nothing is still one that a model may be asked about.
    ids = [encode_cut(base.tokenizer, text, longest) or [base.pad] for _, text, _ in rows]
    return Labelled(ids, [number[label] for _, _, label in rows])
