"""How long a step of so many rows takes on this machine, learned from the steps that ran. Pure: times are handed in."""

from __future__ import annotations

UP, DOWN = 0.15, 0.3  # weight of a new measurement that is slower or faster than expected
FRESH = 256  # measurements after which one counts no more: it may stem from a busy moment or a shorter context
MOST = 1.5  # a measurement counts as at most so many times what was expected: pauses of the machine are not the step's
ROW = 0.06  # what a further row is thought to cost, in steps of the fewest rows, before any is measured
FADE = 0.7  # of what a row costs is still believed when the figure behind it has been forgotten


class StepCosts:
    """rows → milliseconds, measured where such steps ran, a straight line between and beyond."""

    def __init__(self) -> None:
        self._ms: dict[int, float] = {}
        self._measured: dict[int, int] = {}  # when, in measurements
        self._once: dict[int, float] = {}  # figures of a single measurement, as it was
        self._now = 0
        self._row = ROW

    @property
    def reach(self) -> int:
        """Rows that a step may have without going far beyond what was measured."""
        return 2 * max(self._ms, default=0) + 1

    def known(self, rows: int) -> bool:
        """Whether a step of so many rows was measured lately."""
        return rows in self._ms

    def add(self, rows: int, ms: float) -> None:
        """Takes in one measured step."""
        expected = self.ms(rows)
        if rows in self._once:  # a pause spoils one of two: it would keep such steps from being tried again
            self._ms[rows] = min(ms, self._once.pop(rows))
        elif rows in self._ms:
            ms = min(ms, MOST * expected)
            self._ms[rows] = expected + (UP if ms > expected else DOWN) * (ms - expected)
        else:
            self._once[rows] = ms
            self._ms[rows] = min(ms, MOST * expected) if self._ms else ms
        self._now += 1
        self._measured[rows] = self._now
        fewest, most = min(self._ms), max(self._ms)
        if most > fewest:
            self._row = max(0.0, self._ms[most] / self._ms[fewest] - 1) / (most - fewest)
        for old in [n for n, when in self._measured.items() if self._now - when >= FRESH]:
            del self._ms[old], self._measured[old]
            self._once.pop(old, None)
            self._row = ROW + FADE * max(0.0, self._row - ROW)

    def ms(self, rows: int) -> float:
        """What a step of so many rows is expected to take; 0 as long as none was measured."""
        if rows in self._ms or not self._ms:
            return self._ms.get(rows, 0.0)
        below = max((n for n in self._ms if n < rows), default=None)
        above = min((n for n in self._ms if n > rows), default=None)
        if below is None:
            assert above is not None
            return self._ms[above] / (1 + self._row * (above - rows))
        if above is None:
            return self._ms[below] + self._ms[min(self._ms)] * self._row * (rows - below)
        share = (rows - below) / (above - below)
        return self._ms[below] + share * (self._ms[above] - self._ms[below])
