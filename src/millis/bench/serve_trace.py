"""Load: when requests arrive, how long they are, and what deadlines they have. Pure; the same seed, the same load."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, get_args

from millis.types import RequestError

Trace = Literal["poisson", "closed", "burst", "azure"]
TRACES: tuple[str, ...] = get_args(Trace)
MAX_REQUESTS = 1_000_000
MAX_RATE = 100_000.0  # requests a second
ROW_LIMIT = 2_000_000  # of a trace file
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class Planned:
    """A request to come."""

    arrival_s: float  # from the beginning; 0 for all of a closed loop
    output_tokens: int
    input_tokens: int | None = None  # None: as many words as the settings say
    deadline_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a trace file."""

    arrival_s: float
    input_tokens: int
    output_tokens: int


def poisson(rate: float, seed: str) -> Iterator[float]:
    """Arrivals with exponential gaps, `rate` a second. They never end."""
    rng = random.Random(seed)
    now = 0.0
    while True:
        now += rng.expovariate(rate)
        yield now


def bursts(rate: float, size: int) -> Iterator[float]:
    """`size` arrivals at once, evenly, so that there are `rate` a second in the mean."""
    i = 0
    while True:
        yield (i // size) * size / rate
        i += 1


def read_azure(path: Path) -> list[Row]:
    """A trace of the Azure public dataset of LLM inference (Patel et al., 2024, Splitwise), by arrival.

    RequestError names the line that cannot be read.
    """
    rows: list[Row] = []
    first: datetime | None = None
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            head = tuple(next(reader, []))
            if head != AZURE_COLUMNS:
                raise RequestError(f"{path}: the first line must be {','.join(AZURE_COLUMNS)}, as in Azure's traces")
            for line in reader:
                if len(rows) == ROW_LIMIT:
                    raise RequestError(f"{path} has more than {ROW_LIMIT:,} lines; cut it")
                when = _time(line[0])
                first = first or when
                rows.append(Row((when - first).total_seconds(), int(line[1]), int(line[2])))
                if rows[-1].input_tokens < 1 or rows[-1].output_tokens < 1:
                    raise ValueError
        except RequestError:  # a ValueError, too
            raise
        except (ValueError, IndexError, TypeError, csv.Error):
            where = f"{path}, line {reader.line_num}"
            raise RequestError(f"{where}: a time and two positive counts must stand there") from None
    if len(rows) < 2:
        raise RequestError(f"{path} has fewer than two requests")
    rows.sort(key=lambda row: row.arrival_s)
    return [Row(row.arrival_s - rows[0].arrival_s, row.input_tokens, row.output_tokens) for row in rows]


def _time(text: str) -> datetime:
    """`2023-11-16 18:15:46.6805900`, also with a zone; digits beyond the microsecond are dropped."""
    whole, _, fraction = text.strip().partition(".")
    digits = fraction[: len(fraction) - len(fraction.lstrip("0123456789"))]
    zone = fraction[len(digits) :].replace("Z", "+00:00")
    return datetime.fromisoformat(f"{whole}.{digits[:6]:0<6}{zone}" if digits else whole + zone)


def deadlines(text: str | None, seed: str) -> Iterator[float | None]:
    """`500`: always; `300-5000`: log-uniform, whole milliseconds; None: none. RequestError if it is neither."""
    if text is None:
        while True:
            yield None
    low, high = span(text)
    rng = random.Random(seed)
    while True:
        yield low if low == high else float(round(math.exp(rng.uniform(math.log(low), math.log(high)))))


def span(text: str) -> tuple[float, float]:
    """The ends of `500` or `300-5000`, in milliseconds."""
    try:
        ends = [float(part) for part in text.split("-")]
    except ValueError:
        ends = []
    if len(ends) not in (1, 2) or not all(1 <= end <= 1e7 for end in ends) or ends != sorted(ends):
        raise RequestError(f"a deadline is 500 or 300-5000, in milliseconds, not {text!r}")
    return ends[0], ends[-1]


def rates(text: str, capacity: float | None) -> list[float]:
    """`2,4` and, with a capacity, `0.5x,1x`: requests a second. RequestError if it is neither."""
    found = []
    for part in text.split(","):
        number, times, after = part.strip().partition("x")
        if times and capacity is None:
            raise RequestError(f"--rate {part.strip()} needs --capacity: the requests a second that 1x stands for")
        try:
            rate = float(number) * (capacity if times and capacity is not None else 1.0)
        except ValueError:
            rate = 0.0
        if after or not 1e-3 <= rate <= MAX_RATE:
            raise RequestError(f"--rate is a list such as 2,4,8 or 0.5x,1x (requests a second), not {text!r}")
        found.append(rate)
    return found


def plan(
    trace: Trace,
    *,
    rate: float | None,
    requests: int,
    duration_s: float,
    output_tokens: int,
    deadline: str | None,
    seed: str,
    burst: int = 16,
    rows: list[Row] | None = None,
    speed: float = 1.0,
    max_input: int = 1024,
    max_output: int = 128,
) -> tuple[list[Planned], float]:
    """At most `requests`, none that would arrive after `duration_s`, and the seconds in which they arrive (0: closed).

    A trace file is replayed from its first line, `speed` times as fast, or so fast that the requests taken come at
    `rate` a second in the mean; lengths are capped.
    """
    lengths: list[tuple[int | None, int]] = [(None, output_tokens)] * requests
    times: Iterator[float]
    if trace == "azure":
        taken = (rows or [])[:requests]
        native = (len(taken) - 1) / (taken[-1].arrival_s or 1e-3) if len(taken) > 1 else 1.0  # requests a second
        factor = speed if rate is None else rate / native
        rate = native * factor
        times = (row.arrival_s / factor for row in taken)
        lengths = [(min(row.input_tokens, max_input), min(row.output_tokens, max_output)) for row in taken]
    elif trace == "closed":
        times = iter([0.0] * requests)
    else:
        assert rate is not None
        times = poisson(rate, f"{seed} arrivals") if trace == "poisson" else bursts(rate, burst)
    found = []
    due = deadlines(deadline, f"{seed} deadlines")
    for (inputs, outputs), arrival, deadline_ms in zip(lengths, times, due, strict=False):
        if arrival > duration_s:
            break
        found.append(Planned(arrival, outputs, inputs, deadline_ms))
    if trace == "poisson":
        return found, found[-1].arrival_s if found else 0.0
    return found, len(found) / rate if rate else 0.0
