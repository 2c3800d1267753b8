"""millis distil: a student learns what a teacher of the same vocabulary thinks of every next token.

The loss is the divergence of the student's distribution from the teacher's (Hinton et al., 2015) over the teacher's
`top_k` likeliest tokens and one class for all others, which keeps the whole mass and spares most of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as library
from torch import Tensor, nn

from millis.samples.read import Skipped
from millis.train.base import Base, check_positions, keep_layers, layers_of
from millis.train.lm import IGNORED, LanguageModelling, Tokens, split_texts
from millis.train.scratch import config_of
from millis.train.settings import Settings, amount
from millis.types import RequestError

transformers: Any = library
_LEAST = 1e-9  # of a probability whose logarithm is taken


class Distil(LanguageModelling):
    """The job: next-token training towards the teacher's distributions, and perhaps a share towards the text itself."""

    def __init__(
        self,
        base: Base,
        settings: Settings,
        student: Any,
        teacher: Any,
        train: Sequence[Tokens],
        held: Sequence[Tokens],
    ) -> None:
        check_positions(teacher, max(len(sample.ids) for sample in [*train, *held]))
        self._teacher = teacher.eval().requires_grad_(False)
        if settings.bf16:
            self._teacher.to(torch.bfloat16)
        super().__init__(base, settings, student, train, held)

    def loss(self, micro: Sequence[int]) -> Tensor:
        ids, targets = self._batch([self._train[i] for i in micro])
        learned = targets != IGNORED
        with torch.no_grad():
            wanted = self._logits(self._teacher, ids, learned)
        got = self._logits(self.model, ids, learned)
        s = self._settings
        loss = soft_loss(got.float(), wanted.float(), s.top_k, s.soft_temperature)
        if s.hard:
            loss = (1 - s.hard) * loss + s.hard * nn.functional.cross_entropy(got.float(), targets[learned])
        return loss

    def flops_a_token(self) -> float:
        """The teacher's forward pass too."""
        return super().flops_a_token() + 2.0 * sum(int(p.numel()) for p in self._teacher.parameters())

    def evaluate(self) -> dict[str, float]:
        """Perplexities of teacher and student on what was held out, and how often they would choose the same token."""
        if not self._held:
            return {}
        student, self.model = self.model, self._teacher
        teacher = self._perplexity()
        self.model = student
        self._teacher.eval()
        return super().evaluate() | {"teacher_perplexity": teacher, "agreement": self._agreement()}

    def _agreement(self) -> float:
        """The share of held-out positions at which both find the same token likeliest."""
        self.model.eval()
        same = count = 0
        with torch.inference_mode():
            for sample in self._held:
                ids, targets = self._batch([sample])
                learned = targets != IGNORED
                ours, theirs = (self._logits(m, ids, learned).argmax(-1) for m in (self.model, self._teacher))
                same, count = same + int((ours == theirs).sum()), count + len(ours)
        self.model.train()
        return same / count


def soft_loss(got: Tensor, wanted: Tensor, top_k: int, temperature: float) -> Tensor:
    """Mean divergence of `got` from `wanted`, logits [n, vocab], both softened; times temperature², as in the paper."""
    ours = nn.functional.log_softmax(got / temperature, -1)
    theirs = nn.functional.softmax(wanted / temperature, -1)
    best, places = theirs.topk(min(top_k, theirs.shape[-1]), -1)
    chosen = ours.gather(-1, places)
    rest_theirs = (1 - best.sum(-1)).clamp_min(0)
    rest_ours = (1 - chosen.exp().sum(-1)).clamp_min(_LEAST)
    inside = (best * (best.clamp_min(_LEAST).log() - chosen)).sum(-1)
    outside = rest_theirs * (rest_theirs.clamp_min(_LEAST).log() - rest_ours.log())
    return (inside + outside).mean() * temperature**2


def derived(spec: str) -> tuple[str, int] | None:
    """("layers", N) or (shape, weights) of a student made from its teacher, layers=N or llama:15M; None of a model.

    RequestError: it begins as these do, and has no such number.
    """
    kind, _, value = spec.replace("=", ":").partition(":")
    if kind not in ("layers", "llama", "gpt2") or Path(spec).exists():
        return None
    if kind == "layers" and not value.isdecimal():
        raise RequestError(f"--student {spec}: say how many of the teacher's layers, as layers=10")
    return kind, int(value) if kind == "layers" else amount(value)


def same_vocabulary(teacher: Base, student: Base) -> bool:
    """Whether every id stands for the same token in both."""
    return teacher.tokenizer.same_ids(student.tokenizer)


def student_of(teacher: Base, spec: str, settings: Settings, open_base: Callable[[str], Base]) -> tuple[Base, Any]:
    """What `spec` names: `layers=N` of the teacher's, evenly spread; `llama:15M`, a new model with the teacher's
    vocabulary; otherwise a model, which must have that vocabulary. RequestError for what is none of these."""
    kind, number = derived(spec) or (None, 0)
    if kind == "layers":
        model = teacher.causal()
        count = len(layers_of(model))
        if not 1 <= number <= count:
            raise RequestError(f"--student layers={number}: the teacher has {count} layers")
        keep_layers(model, spread(layer_kinds(model.config, count), number))
        return teacher, model
    if kind is not None:
        config = config_of(kind, number, settings.max_tokens, teacher.tokenizer)
        return teacher, transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    student = open_base(spec)
    if not same_vocabulary(teacher, student):
        raise RequestError(f"{spec} and {teacher.name} have different vocabularies; let the teacher write: --write")
    return student, student.causal()


def layer_kinds(config: Any, count: int) -> list[str]:
    """Of each layer's attention: to all or to a window, rotated or not."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * count
    rotated = getattr(config, "no_rope_layers", None) or [1] * count  # smollm3's
    return [f"{kind} {turns}" for kind, turns in zip(kinds, rotated, strict=False)]


def spread(kinds: Sequence[str], wanted: int) -> list[int]:
    """`wanted` of the layers, evenly spread, each of the kind of its new place. `kinds`: of attention, by layer.

    So gemma3's sixth layer still attends to all and the five before it to a window, and smollm3's fourth is not
    rotated, as a GGUF file takes for granted.
    """
    chosen: list[int] = []
    for i in range(wanted):
        place = round(i * (len(kinds) - 1) / max(1, wanted - 1))
        free = [n for n, kind in enumerate(kinds) if kind == kinds[i] and n not in chosen]
        chosen.append(min(free, key=lambda n: (abs(n - place), -n)))
    return chosen


def prepare(
    settings: Settings,
    skipped: Skipped,
    data: Sequence[Path],
    held: Sequence[Path],
    open_base: Callable[[str], Base],
) -> LanguageModelling:
    """Reads models and data and makes the job."""
    assert settings.model is not None and settings.student is not None
    teacher = open_base(settings.model)
    thinking = teacher.causal()  # refuses a teacher of another kind
    base, student = student_of(teacher, settings.student, settings, open_base)
    train, other = split_texts(teacher.tokenizer, settings, skipped, data, held)
    return Distil(base, settings, student, thinking, train, other)
