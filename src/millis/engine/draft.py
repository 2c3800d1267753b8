"""A draft model: a small model of the same vocabulary that says what a large one will probably choose.

It has keys and values of its own. Which of them still belong to a request's tokens is found by comparing; those of
rejected drafts are overwritten.

A large part of what a small model reads for a token is its output matrix. Byte-level BPE numbers tokens as they were
merged, the frequent ones first, so a draft looks at the first third of a large vocabulary alone as long as the text
does without the rest (Zhao et al., 2025, choose such words by counting).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import numpy as np

from millis.engine.kvcache import PageAllocator
from millis.engine.request import Request
from millis.engine.runner import Batch, DraftRunner

LARGE_VOCABULARY = 1 << 16
RECENT, RARE = 64, 4  # of so many tokens behind each other so many may be others than frequent ones


@dataclass(slots=True)
class Followed:
    """tokens[i] has its keys in `pages` at position i; the first `sure` are the request's own."""

    pages: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    sure: int = 0


class DraftModel:
    """Follows requests and drafts for several of them in one forward."""

    def __init__(self, runner: DraftRunner, control: Set[int] = frozenset()) -> None:
        self.runner = runner
        self._control = control  # tokens that are no text
        self._frequent = runner.vocab // 48 * 16 if runner.vocab >= LARGE_VOCABULARY else runner.vocab
        self.allocator = PageAllocator(runner.pages)
        self._followed: dict[int, Followed] = {}  # by id of the request, which lives until `forget`

    def behind(self, request: Request) -> int:
        """Tokens that have to be computed before the first draft; drops what the request did not keep."""
        followed = self._followed.setdefault(id(request), Followed())
        tokens, sure = followed.tokens, followed.sure
        most = min(len(tokens), len(request.tokens) - 1)  # the last token always runs, to be followed by a draft
        while sure < most and tokens[sure] == request.tokens[sure]:
            sure += 1
        del tokens[sure:]
        followed.sure = sure
        return len(request.tokens) - sure

    def reserve(self, request: Request, length: int) -> bool:
        """Whether sequences of `length` tokens fit; takes the pages they need."""
        followed = self._followed.setdefault(id(request), Followed())
        need = -(-length // self.runner.page_tokens) - len(followed.pages)
        pages = self.allocator.take(max(0, need)) if length <= self.runner.context else None
        if pages is None:
            return False
        followed.pages += pages
        return True

    def draft(self, requests: Sequence[Request], ahead: Sequence[list[int]]) -> list[tuple[int, float]]:
        """For each request the next token behind `ahead`, and its probability to this model. Pages must be there."""
        todo = []
        for request, drafts in zip(requests, ahead, strict=True):
            followed = self._followed[id(request)]
            todo.append((followed, [*request.tokens, *drafts][len(followed.tokens) :]))
        room = max(1, self.runner.max_tokens // len(todo))
        for followed, tokens in todo:
            while len(tokens) > room:  # a prompt, in pieces
                part = tokens[: min(self.runner.max_tokens, len(tokens) - 1)]
                self.runner.step(self._batch([(followed, part)]), [None])
                followed.tokens += part
                del tokens[: len(part)]
        words = max(map(self._words, requests))
        chosen = self.runner.propose(self._batch(todo), [r.sampler for r in requests], ahead, words)
        for followed, tokens in todo:
            followed.tokens += tokens
        return chosen

    def _words(self, request: Request) -> int:
        """How many of the vocabulary's first tokens the text needs."""
        rare = sum(t >= self._frequent and t not in self._control for t in request.tokens[-RECENT:])
        return self._frequent if rare <= RARE else self.runner.vocab

    def forget(self, request: Request) -> None:
        """Gives the pages of a request back."""
        followed = self._followed.pop(id(request), None)
        if followed is not None:
            self.allocator.give(followed.pages)

    def check_integrity(self) -> None:
        """Asserts that no page is lost."""
        self.allocator.check_integrity([followed.pages for followed in self._followed.values()])

    @staticmethod
    def _batch(todo: Sequence[tuple[Followed, list[int]]]) -> Batch:
        tables = np.full((len(todo), max(len(followed.pages) for followed, _ in todo)), -1, np.int32)
        for row, (followed, _) in enumerate(todo):
            tables[row, : len(followed.pages)] = followed.pages
        return Batch(
            np.asarray([token for _, tokens in todo for token in tokens], np.int32),
            np.asarray([len(followed.tokens) for followed, _ in todo], np.int32),
            np.asarray([len(tokens) for _, tokens in todo], np.int32),
            tables,
        )
