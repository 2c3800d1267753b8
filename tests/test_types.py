"""The shared nouns: what sampling parameters accept, what they refuse by name, and what timings report."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import millis.bench.process
import millis.server.api.errors  # noqa: F401  so that their errors are known
from millis.types import (
    Completion,
    DeadlineError,
    FormatError,
    MillisError,
    ModelError,
    OverloadError,
    PullError,
    RequestError,
    SamplingParams,
    TemplateError,
    Timings,
    brief,
    no_thread,
)

GOOD: list[dict[str, Any]] = [
    {},
    {"max_tokens": 1},
    {"max_tokens": 10**9},
    {"temperature": 0},
    {"temperature": 100.0},
    {"top_k": 0},
    {"top_k": 10**6},
    {"top_p": 1e-6},
    {"top_p": 1},
    {"min_p": 0.0},
    {"min_p": 1.0},
    {"repetition_penalty": 0.01},
    {"presence_penalty": -2},
    {"frequency_penalty": 2.0},
    {"logit_bias": {0: -math.inf, 5: 100}},
    {"seed": 0},
    {"seed": 2**64 - 1},
    {"stop": "end"},
    {"stop": ["a", "b"]},
    {"ignore_eos": True},
    {"logprobs": 0},
    {"logprobs": 64},
]

BAD: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 1.5),
    ("max_tokens", True),
    ("max_tokens", "5"),
    ("max_tokens", None),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "hot"),
    ("temperature", 10**400),
    ("temperature", True),
    ("temperature", np.True_),
    ("temperature", 1j),
    ("max_tokens", np.True_),
    ("max_tokens", np.float64(2)),
    ("max_tokens", -(10**5000)),
    ("logit_bias", {0: 10**400}),
    ("logit_bias", {0: -(10**400)}),
    ("top_k", -1),
    ("top_k", 1.5),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 2),
    ("repetition_penalty", 0),
    ("repetition_penalty", math.inf),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("logit_bias", {0: math.nan}),
    ("logit_bias", {0: math.inf}),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {-1: 1}),
    ("logit_bias", [1]),
    ("seed", -1),
    ("seed", 2**64),
    ("seed", "x"),
    ("seed", 1.0),
    ("stop", ""),
    ("stop", [""]),
    ("stop", [5]),
    ("stop", 5),
    ("ignore_eos", "no"),
    ("ignore_eos", 1),
    ("logprobs", -1),
    ("logprobs", 65),
    ("logprobs", True),
]


@pytest.mark.parametrize("params", GOOD, ids=str)
def test_accepted(params: dict[str, Any]) -> None:
    made = SamplingParams(**params)
    for name, value in params.items():
        assert getattr(made, name) == ((value,) if name == "stop" and isinstance(value, str) else value)


@pytest.mark.parametrize(("name", "value"), BAD, ids=brief)
def test_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as refused:
        SamplingParams(**{name: value})
    assert "\n" not in str(refused.value)


def test_the_defaults_are_greedy_and_frozen() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0, 0, 1, 0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1, 0, 0)
    assert not params.logit_bias and not params.stop and not params.ignore_eos and params.seed is None
    with pytest.raises(AttributeError):
        params.temperature = 1.0  # type: ignore[misc]


def test_numpys_numbers_become_pythons() -> None:
    given: dict[str, Any] = {"max_tokens": np.int64(2), "seed": np.uint64(2**64 - 1), "top_k": np.int8(3)}
    given |= {"temperature": np.float32(0.5), "min_p": np.float64(0), "logit_bias": {np.int64(5): np.float32(1)}}
    made = SamplingParams(**given)
    for name, value in given.items():
        assert getattr(made, name) == value and type(getattr(made, name)) in (int, float, dict)
    assert [(type(token), type(bias)) for token, bias in made.logit_bias.items()] == [(int, float)]


def kinds(kind: type[MillisError] = MillisError) -> Iterator[type[MillisError]]:
    yield kind
    for one in kind.__subclasses__():
        yield from kinds(one)


@pytest.mark.parametrize("kind", list(dict.fromkeys(kinds())))
def test_errors_can_be_pickled_and_copied(kind: type[MillisError]) -> None:
    more: dict[str, Any] = {}
    if issubclass(kind, DeadlineError):
        more = {"predicted_ms": 5.0, "retry_after_s": 0.5}
    elif issubclass(kind, OverloadError):
        more = {"retry_after_s": 0.5}
    first: list[Any] = [400] if kind.__name__ == "ApiError" else []
    error = kind(*first, "what and why", **more)
    again = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in (*again, copy.copy(error), copy.deepcopy(error)):
        assert type(other) is kind and str(other) == str(error) and vars(other) == vars(error)


def test_errors_form_one_tree() -> None:
    for kind in (ModelError, RequestError, TemplateError):
        assert issubclass(kind, MillisError)
    for kind in (FormatError, PullError):
        assert issubclass(kind, ModelError)
    assert issubclass(RequestError, ValueError)
    assert not issubclass(ModelError, ValueError)


def test_speed_counts_the_tokens_after_the_first() -> None:
    assert Timings(completion_tokens=11, decode_ms=100.0).tokens_per_second == pytest.approx(100)
    assert Timings(completion_tokens=1, decode_ms=0.0).tokens_per_second == 0
    assert Timings().tokens_per_second == 0


def test_a_deadline_is_reported_only_where_there_was_one() -> None:
    assert "deadline_ms" not in Timings().asdict() and "slack_ms" not in Timings().asdict()
    with_deadline = Timings(deadline_ms=50.0, slack_ms=-1.0).asdict()
    assert (with_deadline["deadline_ms"], with_deadline["slack_ms"]) == (50.0, -1.0)
    counts = {"prompt_tokens", "cached_tokens", "completion_tokens", "drafted_tokens", "accepted_tokens", "steps"}
    assert counts | {"queue_ms", "tokenize_ms", "prefill_ms", "first_token_ms", "decode_ms", "total_ms"} <= set(
        with_deadline
    )


def test_a_completion_prints_as_its_text() -> None:
    out = Completion(text="hello", tokens=[1, 2], finish_reason="stop", timings=Timings())
    assert str(out) == "hello"
    assert out.logprobs is None


def test_only_a_thread_that_is_refused_is_told_of() -> None:
    assert "ulimit -u" in str(no_thread(RuntimeError("can't start new thread")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        no_thread(RuntimeError("a fault of ours"))
