"""Figures of a load: latencies, goodput, refusals, errors, under the field names of `vllm bench serve`. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from millis.bench.serve_answer import Answer
from millis.types import RequestError

PERCENTILES = (50, 90, 99, 99.9)
LIMITS = ("ttft", "tpot", "e2el")


def limits(text: str | None) -> dict[str, float]:
    """`ttft:200,tpot:20,e2e:1000`, in milliseconds. RequestError if it is not."""
    found: dict[str, float] = {}
    for part in text.split(",") if text else []:
        name, _, value = part.strip().partition(":")
        name = {"e2e": "e2el"}.get(name, name)
        try:
            limit = float(value)
        except ValueError:
            limit = 0.0
        if name not in LIMITS or name in found or not 0 < limit < 1e9:
            raise RequestError(f"--slo is ttft:MS,tpot:MS,e2e:MS or some of them, not {text!r}")
        found[name] = limit
    return found


def good(answer: Answer, slo: dict[str, float]) -> bool:
    """Whole, in time, valid where there is a schema, within every limit. An answer of one token has no TPOT to miss."""
    if not answer.in_time or answer.valid is False:
        return False
    values = {"ttft": answer.ttft_s, "tpot": answer.tpot_s or 0.0, "e2el": answer.e2e_s}
    return all((value := values[name]) is not None and 1e3 * value <= limit for name, limit in slo.items())


def figures(
    answers: Sequence[Answer], *, duration_s: float, offered_s: float, slo: dict[str, float], detailed: bool = False
) -> dict[str, Any]:
    """One server at one load. `duration_s`: from the beginning to the last byte; `offered_s`: while requests arrived.

    `request_goodput` counts good answers over the duration, as vLLM does; `goodput` over the time in which requests
    arrived, so that a server that goes on with late answers afterwards loses nothing by it.
    """
    done = [answer for answer in answers if answer.completed]
    judged = bool(slo) or any(a.deadline_ms is not None or a.valid is not None for a in answers)
    n_good = sum(good(answer, slo) for answer in answers)
    outputs = sum(answer.output_tokens for answer in done)
    inputs = sum(answer.prompt_tokens or 0 for answer in done)
    per_s = 1 / duration_s if duration_s > 0 else 0.0
    found: dict[str, Any] = {
        "duration": duration_s,
        "num_prompts": len(answers),
        "completed": len(done),
        "failed": len(answers) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) * per_s,
        "request_goodput": n_good * per_s if judged else None,
        "output_throughput": outputs * per_s,
        "total_token_throughput": (inputs + outputs) * per_s,
        "mean_input_tokens": inputs / len(done) if done else None,
        "mean_output_tokens": outputs / len(done) if done else None,
        "max_output_tokens_per_s": _peak_tokens(done),
        "max_concurrent_requests": _peak_requests(answers),
        "offered_s": offered_s,
        "goodput": n_good / offered_s if judged and offered_s > 0 else None,
        "good": n_good if judged else None,
    }
    found |= _latencies(done)
    found |= _deadlines(answers) | _refusals(answers) | _quality(answers, done)
    lateness = [a.lateness_s for a in answers]
    found |= {f"{name}_lateness_ms": value for name, value in _spread(lateness, mean=False).items()}
    if detailed:
        found |= _detail(answers)
    return found


def _latencies(done: Sequence[Answer]) -> dict[str, Any]:
    series: dict[str, list[float]] = {
        "ttft": [a.ttft_s for a in done if a.ttft_s is not None],
        "tpot": [tpot for a in done if (tpot := a.tpot_s) is not None],
        "itl": [gap for a in done for gap in a.itl_s],
        "e2el": [a.e2e_s for a in done if a.e2e_s is not None],
    }
    found = {f"{name}_{what}_ms": value for what, values in series.items() for name, value in _spread(values).items()}
    # What lies between the server's own account and the client's: HTTP, sockets, and the load generator itself.
    added = [a.ttft_s - a.server_ttft_s - a.lateness_s for a in done if a.ttft_s and a.server_ttft_s is not None]
    if added:
        found |= {f"{name}_added_ttft_ms": value for name, value in _spread(added).items()}
    return found


def _spread(seconds: Sequence[float], mean: bool = True) -> dict[str, float | None]:
    """Milliseconds; None where there is nothing to count. Percentiles interpolate linearly, as NumPy's do."""
    names = [f"p{p:g}" for p in PERCENTILES]
    if not seconds:
        return dict.fromkeys([*(["mean", "std"] if mean else []), "median", *names, "max"])
    values = 1e3 * np.asarray(seconds, np.float64)
    found: dict[str, float | None] = {}
    if mean:
        found |= {"mean": float(values.mean()), "std": float(values.std())}
    found["median"] = float(np.median(values))
    found |= {name: float(value) for name, value in zip(names, np.percentile(values, PERCENTILES), strict=True)}
    return found | {"max": float(values.max())}


def _deadlines(answers: Sequence[Answer]) -> dict[str, Any]:
    """Shares of the admitted that came whole and in time: from their arrival, and from when they were really sent."""
    admitted = [a for a in answers if a.admitted]
    found: dict[str, Any] = {
        "admitted": len(admitted),
        "landed": sum(a.completed and a.finish_reason == "deadline" for a in answers),
        "finish_reasons": dict(Counter(a.finish_reason or "none" for a in answers if a.completed)),
    }
    due = [a for a in admitted if a.deadline_ms is not None]
    in_time = sum(a.in_time for a in due)
    from_send = sum(a.completed and _e2e_from_send_ms(a) <= (a.deadline_ms or 0) for a in due)
    late = [_late_ms(a) / 1e3 for a in due if a.completed and not a.in_time]
    found |= {
        "admitted_in_time": in_time / len(due) if due else None,
        "admitted_in_time_from_send": from_send / len(due) if due else None,
        "admitted_missed": len(due) - in_time,
        "max_late_ms": 1e3 * max(late) if late else None,
    }
    return found


def _e2e_from_send_ms(answer: Answer) -> float:
    return 1e3 * ((answer.e2e_s or 0.0) - answer.lateness_s)


def _late_ms(answer: Answer) -> float:
    return 1e3 * (answer.e2e_s or 0.0) - (answer.deadline_ms or 0.0)


def _refusals(answers: Sequence[Answer]) -> dict[str, Any]:
    """How many by code, and how soon after they were sent: a refusal is the server's own doing."""
    refused = [a for a in answers if a.refused is not None]
    soon = [a.e2e_s - a.lateness_s for a in refused if a.e2e_s is not None]
    found: dict[str, Any] = {"refused": len(refused), "refused_by_code": dict(Counter(a.refused for a in refused))}
    return found | {f"{name}_refused_ms": value for name, value in _spread(soon, mean=False).items()}


def _quality(answers: Sequence[Answer], done: Sequence[Answer]) -> dict[str, Any]:
    checked = [a.valid for a in answers if a.valid is not None]
    cached = [a.cached_tokens for a in done if a.cached_tokens is not None]
    return {
        "errors_by_kind": dict(Counter(a.error for a in answers if a.error is not None and a.refused is None)),
        "schema_checked": len(checked),
        "schema_valid": sum(checked),
        "without_usage": sum(not a.counted for a in done),
        "total_cached_tokens": sum(cached) if cached else None,
    }


def _peak_requests(answers: Iterable[Answer]) -> int:
    """Most requests under way at once; one that ends as another begins is not counted with it."""
    changes = [(a.start_s, 1) for a in answers if a.e2e_s is not None]
    changes += [(a.start_s + a.e2e_s, -1) for a in answers if a.e2e_s is not None]
    now = peak = 0
    for _, change in sorted(changes):
        now += change
        peak = max(peak, now)
    return peak


def _peak_tokens(done: Sequence[Answer]) -> float:
    """Most events with content in one whole second since the first arrival."""
    if not done:
        return 0.0
    begin = min(a.start_s for a in done)
    seconds: Counter[int] = Counter()
    for a in done:
        when = a.start_s + (a.ttft_s or 0.0)
        for gap in (0.0, *a.itl_s):
            when += gap
            seconds[int(when - begin)] += 1
    return float(max(seconds.values()))


def _detail(answers: Sequence[Answer]) -> dict[str, Any]:
    """One entry a request, in order of arrival. Seconds, as in vLLM's file; 0 where there is no value."""
    return {
        "input_lens": [a.prompt_tokens or 0 for a in answers],
        "output_lens": [a.output_tokens for a in answers],
        "ttfts": [a.ttft_s or 0.0 for a in answers],
        "itls": [a.itl_s for a in answers],
        "latencies": [a.e2e_s or 0.0 for a in answers],
        "start_times": [a.start_s for a in answers],
        "queue_times": [a.lateness_s for a in answers],
        "generated_texts": [a.text for a in answers],
        "errors": [a.error or a.refused or "" for a in answers],
        "deadlines_ms": [a.deadline_ms for a in answers],
        "statuses": [a.status for a in answers],
        "finish_reasons_each": [a.finish_reason for a in answers],
    }
