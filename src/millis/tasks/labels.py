"""How a model is asked which of some labels a text is, and what its answers' probabilities say of each. Pure.

The instruction with the list of labels begins every prompt, so that its keys and values are computed once and cached;
a text then costs its own tokens and those of the labels, which are one tree (engine/tree.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Protocol

from millis.tasks import checks
from millis.tasks.ask import filled
from millis.tasks.calibration import LEAST_PROBABILITY, softmax
from millis.tasks.language import Language, language
from millis.types import RequestError

_TEMPLATE: dict[Language, str] = {
    "en": "Classify the text below as one of: {labels}.\nAnswer with the label alone.\n\n"
    "{examples}Text: {text}\n\nLabel:",
    "zh": "请将下面的文本归入以下类别之一：{labels}。\n只回答类别。\n\n{examples}文本：{text}\n\n类别：",
}
_EXAMPLE: dict[Language, str] = {"en": "Text: {text}\n\nLabel: {label}\n\n", "zh": "文本：{text}\n\n类别：{label}\n\n"}
_MULTI: dict[Language, str] = {
    "en": '{examples}Text: {text}\n\nDoes the label "{label}" fit this text? Answer yes or no.',
    "zh": "{examples}文本：{text}\n\n标签“{label}”适用于这段文本吗？请回答是或否。",
}
_YES_NO: dict[Language, tuple[str, str]] = {"en": ("Yes", "No"), "zh": ("是", "否")}
Example = tuple[str, str]  # text, label


class Tokens(Protocol):
    """What of millis.tokenizer.Tokenizer a question needs."""

    @property
    def has_chat_template(self) -> bool: ...

    def encode(self, text: str, *, add_special: bool = True) -> list[int]: ...

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]: ...


class Question:
    """Labels and how to ask for them: what stays the same from text to text.

    multi: every label by itself fits or does not, and the template holds {label}. RequestError: labels, examples or a
    template that cannot be used.
    """

    def __init__(
        self, labels: Sequence[str], examples: Sequence[Example] = (), template: str | None = None, multi: bool = False
    ) -> None:
        self.labels, self.multi = _checked(labels, 1 if multi else 2), multi
        self.language = language(" ".join(self.labels))
        self._shown = shown(self.labels)
        self._asked, self._parts = self._template(checks.pairs(examples, "examples"), template)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Question) and vars(self) == vars(other)

    def text(self, text: str) -> str:
        """What the model is asked about a text; with {label} for each in turn where a text may have several."""
        return filled(self._asked, text=text, **self._parts)

    def prompt(self, text: str, tokenizer: Tokens) -> list[int]:
        """The ids of `text(text)`, as the model's user says it."""
        return _ids(self.text(text), tokenizer)

    def answers(self, tokenizer: Tokens) -> list[list[int]]:
        """What the model would write for each label, or for yes and no; behind plain text it begins with a space."""
        space = "" if tokenizer.has_chat_template or self.language == "zh" else " "
        words = _YES_NO[self.language] if self.multi else self._shown
        return [tokenizer.encode(space + word, add_special=False) for word in words]

    def yes_or_no(self, text: str, tokenizer: Tokens) -> tuple[list[int], list[list[int]]]:
        """The common beginning of all labels' questions, and what follows it: each question, with yes and with no."""
        asked = [_ids(filled(self._asked, text=text, label=label, **self._parts), tokenizer) for label in self._shown]
        head = len(list(takewhile(lambda tokens: len(set(tokens)) == 1, zip(*asked, strict=False))))
        head = max(1, min(head, min(map(len, asked)) - 1))
        answers = self.answers(tokenizer)
        return asked[0][:head], [[*prompt[head:], *answer] for prompt in asked for answer in answers]

    def scores(self, values: Sequence[float]) -> list[float]:
        """A score in [0, 1] for each label, which sum to 1 unless `multi`. values: summed log-probabilities (nats)."""
        if self.multi:
            return [_sigmoid(yes - no) for yes, no in zip(values[::2], values[1::2], strict=True)]
        return softmax(values)

    def _template(self, examples: Sequence[Example], template: str | None) -> tuple[str, dict[str, str]]:
        """The question, and all that stands in it but the text and the label of `multi`."""
        places = ("{text}", "{label}") if self.multi else ("{text}",)
        own = checks.template(template, *places)
        asked = (_MULTI if self.multi else _TEMPLATE)[self.language] if own is None else own
        seen = ""
        for text, label in examples:
            if label not in self.labels and not self.multi:
                raise RequestError(f"an example has the label {label!r}, which is none of the labels")
            name = dict(zip(self.labels, self._shown, strict=True)).get(label, label)
            seen += filled(_EXAMPLE[self.language], text=text, label=name)
        if seen and "{examples}" not in asked:
            raise RequestError("the template must hold {examples} where examples are given")
        names = ("、" if self.language == "zh" else ", ").join(self._shown)
        return asked, {"labels": names, "examples": seen}


def chosen(
    scores: Mapping[str, float], several: bool, abstain: float | None, complete: bool = True
) -> tuple[str | None, list[str]]:
    """(the best label, all that score enough), from `abstain` on; where a text may have `several`, from one half.

    complete: all was scored. Of `several` labels a question that was cut short asks nothing, and none is named.
    """
    if several and not complete:
        return None, []
    least = (0.5 if several else 0.0) if abstain is None else abstain
    best = max(scores, key=scores.__getitem__)
    enough = [name for name, score in scores.items() if score >= least]
    return best if best in enough else None, enough


def exclusive(values: Sequence[float], answers: Sequence[Sequence[int]]) -> list[float]:
    """Log-probabilities (nats) of answers that begin so → of those that are so, and not a longer one of `answers`.

    Otherwise no label could win against one that it begins with: `card arrival` is never likelier than `card`.
    """
    places = {tuple(ids): i for i, ids in enumerate(answers)}
    taken = [0.0] * len(answers)  # of each answer's probability, the share of longer ones
    for value, ids in zip(values, answers, strict=True):
        begun = next((at for n in range(len(ids) - 1, 0, -1) if (at := places.get(tuple(ids[:n]))) is not None), None)
        if begun is not None and value > -math.inf:
            taken[begun] += math.exp(value - values[begun])
    return [
        value + math.log(max(1 - share, LEAST_PROBABILITY)) if share else value
        for value, share in zip(values, taken, strict=True)
    ]


def check_labelled(samples: Sequence[Example], labels: Sequence[str]) -> None:
    """RequestError: a text has a label that is none of `labels`."""
    for _, label in samples:
        if label not in labels:
            raise RequestError(f"a labelled text has the label {label!r}, which is none of the labels")


def shown(labels: Sequence[str]) -> list[str]:
    """Labels as the model sees them: identifiers such as card_arrival are words to it, unless two became the same."""
    words = [" ".join(label.replace("_", " ").split()) for label in labels]
    return words if len(set(words)) == len(labels) and all(words) else list(labels)


def _ids(text: str, tokenizer: Tokens) -> list[int]:
    if not tokenizer.has_chat_template:
        return tokenizer.encode(text)
    return tokenizer.encode_chat([{"role": "user", "content": text}])


def _checked(labels: Sequence[str], least: int) -> list[str]:
    found = checks.strings(labels, "labels")
    if not all(label.strip() for label in found):
        raise RequestError("labels must be a list of non-empty texts")
    if len(found) < least:
        raise RequestError(f"at least {least} labels are needed, not {len(found)}")
    if len(set(found)) < len(found):
        raise RequestError("a label is given twice")
    if len({label.strip() for label in found}) < len(found):
        raise RequestError("two labels differ only in the white space around them; make them differ, or give one")
    return found


def _sigmoid(x: float) -> float:
    if math.isnan(x):  # neither answer was scored
        return 0.5
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
