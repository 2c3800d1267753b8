"""millis train --task embed: texts that belong together get near vectors; the batch's others are the negatives.

InfoNCE (van den Oord et al., 2018) on the cosine of mean-pooled final states, as `millis embed` computes them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from millis.samples.read import Skipped, files_of, read_rows, text_of
from millis.train.base import Base, check_positions, layers_of
from millis.train.batches import Micro, Step, divided, epoch_steps, micro_batches
from millis.train.loop import autocast
from millis.train.settings import Settings
from millis.train.texts import encode_cut, padded
from millis.types import RequestError

_COLUMNS = (("query", "positive"), ("anchor", "positive"), ("question", "answer"), ("text_a", "text_b"))
_BESIDE = ("modules.json", "config_sentence_transformers.json")


@dataclass(frozen=True, slots=True)
class Pair:
    """Ids of two texts that belong together."""

    left: list[int]
    right: list[int]


class Embed:
    """The job."""

    def __init__(self, base: Base, settings: Settings, train: Sequence[Pair], held: Sequence[Pair]) -> None:
        self._base, self._settings, self._train, self._held = base, settings, train, held
        self._pad = base.pad
        self.model = base.encoder()
        check_positions(self.model, max(len(ids) for pair in [*train, *held] for ids in (pair.left, pair.right)))
        stack = layers_of(self.model)
        self._depths = {id(p): len(stack) - 1 - i for i, layer in enumerate(stack) for p in layer.parameters()}
        self._parameters = dict(self.model.named_parameters())
        self._before = self.recall()

    def epoch(self, number: int) -> list[Step]:
        """Whole batches, drawn at random: every other text of a batch is a negative. A last batch of one has none."""
        s, ones = self._settings, [1] * len(self._train)
        return [step for step in epoch_steps(ones, s.batch, s.batch, s.seed, number) if len(step[0]) > 1]

    def loss(self, micro: Micro) -> Tensor:
        pairs = [self._train[i] for i in micro]
        left, right = (self._vectors([getattr(pair, side) for pair in pairs]) for side in ("left", "right"))
        likeness = left @ right.T / self._settings.temperature  # [batch, batch]
        same = torch.tensor([[a.right == b.right and a is not b for b in pairs] for a in pairs])
        likeness = likeness.masked_fill(same, float("-inf"))  # the very same text is no negative
        return nn.functional.cross_entropy(likeness, torch.arange(len(pairs)))

    def weight(self, micro: Micro) -> float:
        return float(len(micro))

    def tokens(self, micro: Micro) -> int:
        return sum(len(self._train[i].left) + len(self._train[i].right) for i in micro)

    def rate_of(self, name: str) -> float:
        return self._settings.layer_decay ** self._depths.get(id(self._parameters[name]), 0)

    def evaluate(self) -> dict[str, float]:
        """How often the right text is the nearest of all that were held out, before and after."""
        if not self._held:
            return {}
        return {"recall_at_1_before": self._before, "recall_at_1": self.recall()}

    def recall(self) -> float:
        """Share of held-out left texts whose nearest right text is their own, or the same text again."""
        if not self._held:
            return float("nan")
        left, right = (self._encoded([getattr(pair, side) for pair in self._held]) for side in ("left", "right"))
        nearest = (left @ right.T).argmax(-1).tolist()
        hits = sum(self._held[n].right == pair.right for n, pair in zip(nearest, self._held, strict=True))
        return float(hits / len(self._held))

    def export(self, folder: Path) -> list[str]:
        """A Hugging Face folder, with the files by which sentence-transformers knows how vectors are made of states."""
        self.model.save_pretrained(folder)
        self._base.write_beside(folder)
        for name in _BESIDE:
            if (self._base.path / name).is_file():
                shutil.copyfile(self._base.path / name, folder / name)
        longest = {"max_seq_length": self._settings.max_tokens, "do_lower_case": False}
        (folder / "sentence_bert_config.json").write_text(json.dumps(longest), encoding="utf-8")
        pooling = {"word_embedding_dimension": self.model.config.hidden_size, "pooling_mode_mean_tokens": True}
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=2), encoding="utf-8")
        return ["Hugging Face folder"]

    def _vectors(self, samples: Sequence[Sequence[int]]) -> Tensor:
        """[samples, hidden] float32, unit length."""
        ids, mask = padded(samples, self._pad)
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        mean = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.normalize(mean, dim=-1)

    def _encoded(self, samples: Sequence[Sequence[int]]) -> Tensor:
        self.model.eval()
        out = torch.empty(len(samples), self.model.config.hidden_size)
        lengths = [len(ids) for ids in samples]
        with torch.inference_mode(), autocast(self._settings.bf16):
            for micro in micro_batches(range(len(samples)), lengths, self._settings.micro_tokens):
                out[micro] = self._vectors([samples[i] for i in micro])
        self.model.train()
        return out


def prepare(base: Base, settings: Settings, skipped: Skipped, data: Sequence[Path], held: Sequence[Path]) -> Embed:
    """Reads the data and makes the job."""
    train = read_pairs(base, settings, skipped, data)
    if held:
        other = read_pairs(base, settings, skipped, held)
    else:
        keys = [tuple(pair.left) for pair in train]
        train, other = divided(train, keys, settings.eval_split, settings.seed)
    if len(train) < 2:
        raise RequestError("contrastive training needs two pairs or more: each is told from the others")
    return Embed(base, settings, train, other)


def read_pairs(base: Base, settings: Settings, skipped: Skipped, paths: Sequence[Path]) -> list[Pair]:
    """The pairs of every usable row. RequestError where the columns are none we know."""
    rows = list(read_rows(files_of(paths), skipped))
    if not rows:
        why = f": {skipped.summary()}" if skipped.count else ""
        raise RequestError(f"no usable row in {', '.join(map(str, paths))}{why}")
    names = next((pair for pair in _COLUMNS if set(pair) <= rows[0].fields.keys()), None)
    if names is None:
        known = "; ".join(f"{left}, {right}" for left, right in _COLUMNS)
        raise RequestError(f"{rows[0].file} holds no pairs: it has {', '.join(rows[0].fields)}, not one of: {known}")
    found = []
    for row in rows:
        left = text_of(row, names[0], skipped)
        right = text_of(row, names[1], skipped) if left is not None else None
        if left is not None and right is not None:
            cut = [encode_cut(base.tokenizer, text, settings.max_tokens) or [base.pad] for text in (left, right)]
            found.append(Pair(*cut))
    if not found:
        raise RequestError(f"no usable row in {', '.join(map(str, paths))}: {skipped.summary()}")
    return found
