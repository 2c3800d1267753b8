"""What refused prompts have in common. Computed while nobody asks for anything, it leaves the next of them time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from millis.engine.request import Request

KEPT = 8  # prompts that were refused lately
LEAST, LONGEST = 16, 8192  # tokens of a beginning that is worth it, and at most
PIECE = 64  # tokens that are compared at once


class Missed:
    """The latest prompts that not even an idle engine computes in time, and the beginning that two of them share.

    A question with its labels, a schema, a system prompt: where every prompt is refused, none of it is ever cached.
    """

    def __init__(self) -> None:
        self.wanted: tuple[Request, int] | None = None  # the first so many tokens of this one's prompt
        self._latest: deque[Request] = deque(maxlen=KEPT)

    def note(self, request: Request) -> None:
        """Takes in a refused request; `cached` says how much of its prompt is cached already."""
        if request.adapter is not None or not request.caches:  # an adapter's memory must be free when nobody computes
            return
        alike = [other for other in self._latest if other.salt == request.salt]
        shared = max((_shared(request.tokens, other.tokens) for other in alike), default=0)
        if shared >= request.cached + LEAST:
            self.wanted = request, shared
        self._latest.append(request)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    longest, at = min(len(one), len(other), LONGEST), 0
    while at + PIECE <= longest and one[at : at + PIECE] == other[at : at + PIECE]:
        at += PIECE
    while at < longest and one[at] == other[at]:
        at += 1
    return at
