"""The load tool's figures on answers made by hand, and its reading of events: closed forms, vLLM's names."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load_server import delta, event, stream, usage
from millis.bench.serve_answer import Answer, events, read
from millis.bench.serve_report import figures, good, limits
from millis.bench.serve_wire import Exchange
from millis.types import RequestError

# What `vllm bench serve --save-detailed` writes for the percentiles 50, 90, 99 and 99.9 of ttft, tpot, itl and e2el.
VLLM = (
    """duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput
output_throughput total_token_throughput input_lens output_lens ttfts itls latencies start_times queue_times
generated_texts errors max_output_tokens_per_s max_concurrent_requests""".split()
    + [
        f"{what}_{name}_ms"
        for name in ("ttft", "tpot", "itl", "e2el")
        for what in ("mean", "median", "std", "p50", "p90", "p99", "p99.9")
    ]
)


def done(start_s: float, ttft_ms: float, gaps_ms: list[float], deadline_ms: float | None = None) -> Answer:
    """An answer whose last token is its last byte."""
    return Answer(
        deadline_ms=deadline_ms,
        start_s=start_s,
        status=200,
        ttft_s=ttft_ms / 1e3,
        itl_s=[gap / 1e3 for gap in gaps_ms],
        e2e_s=(ttft_ms + sum(gaps_ms)) / 1e3,
        output_tokens=1 + len(gaps_ms),
        counted=True,
        prompt_tokens=50,
        finish_reason="length",
    )


def refused(start_s: float, e2e_ms: float, lateness_ms: float = 0.0) -> Answer:
    return Answer(500.0, start_s, lateness_ms / 1e3, 503, None, "deadline_unmeetable", e2e_s=e2e_ms / 1e3)


def test_every_name_of_vllm_is_there() -> None:
    found = figures([done(0, 10, [1])], duration_s=1, offered_s=1, slo={}, detailed=True)
    assert not set(VLLM) - set(found)
    json.dumps(found, allow_nan=False)


def test_figures_in_closed_form() -> None:
    answers = [
        done(0.0, 10, [2, 4], 500),  # E2E 16, TPOT 3
        done(0.5, 30, [5, 7], 500),  # E2E 42, TPOT 6
        done(0.51, 800, [6], 500),  # late: E2E 806, TPOT 6
        refused(1.0, 3.0, 1.0),
        refused(1.0, 5.0, 1.0),
        Answer(500.0, 1.5, 0.0, 200, "disconnected", e2e_s=0.1, ttft_s=0.05, output_tokens=4),
        Answer(500.0, 1.5, 0.0, None, "timeout", e2e_s=30.0),
    ]
    found = figures(answers, duration_s=4.0, offered_s=2.0, slo={"ttft": 20.0})
    assert (found["num_prompts"], found["completed"], found["failed"]) == (7, 3, 4)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (150, 8)
    assert (found["request_throughput"], found["output_throughput"]) == (3 / 4, 2.0)
    assert found["total_token_throughput"] == 158 / 4
    assert (found["good"], found["request_goodput"], found["goodput"]) == (1, 1 / 4, 1 / 2)  # 30 ms is beyond the limit
    assert found["mean_ttft_ms"] == pytest.approx(280) and found["median_ttft_ms"] == pytest.approx(30)
    assert found["p99_ttft_ms"] == pytest.approx(30 + 0.98 * 770)
    assert found["mean_tpot_ms"] == pytest.approx(5) and found["std_tpot_ms"] == pytest.approx(2**0.5)
    assert found["mean_itl_ms"] == pytest.approx((2 + 4 + 5 + 7 + 6) / 5)
    assert found["p50_e2el_ms"] == pytest.approx(42) and found["max_e2el_ms"] == pytest.approx(806)
    assert (found["refused"], found["refused_by_code"]) == (2, {"deadline_unmeetable": 2})
    assert found["p50_refused_ms"] == pytest.approx(3.0)  # from when they were sent: 2 and 4
    assert found["errors_by_kind"] == {"disconnected": 1, "timeout": 1}
    assert (found["admitted"], found["admitted_in_time"], found["admitted_missed"]) == (4, 1 / 2, 2)
    assert found["max_late_ms"] == pytest.approx(306)
    assert found["max_concurrent_requests"] == 3  # at 1.0 the late one and both refusals


def test_a_late_generator_is_told_from_a_late_server() -> None:
    late = done(0.0, 400, [101], 500)
    late.lateness_s = 0.002
    found = figures([late], duration_s=1, offered_s=1, slo={})
    assert (found["admitted_in_time"], found["admitted_in_time_from_send"], found["good"]) == (0, 1, 0)
    assert found["p99_lateness_ms"] == pytest.approx(2)


def test_what_lies_between_the_servers_account_and_ours() -> None:
    answer = done(0.0, 12, [1])
    answer.server_ttft_s, answer.lateness_s = 0.010, 0.0005
    assert figures([answer], duration_s=1, offered_s=1, slo={})["p50_added_ttft_ms"] == pytest.approx(1.5)


def test_without_anything_to_judge_by_there_is_no_goodput_and_nothing_is_no_zero() -> None:
    found = figures([Answer(status=500, error="http 500", e2e_s=0.1)], duration_s=1, offered_s=1, slo={})
    names = ("goodput", "request_goodput", "good", "p99_ttft_ms", "mean_itl_ms", "admitted_in_time", "max_late_ms")
    assert [found[name] for name in names] == [None] * len(names)


def test_the_peaks() -> None:
    """Three begin at 0, 0.1 and 0.2 s and end at 0.1, 0.4 and 0.3 s; of the tokens, four come in the second second."""
    answers = [done(0.0, 100, []), done(0.1, 100, [200]), done(0.2, 50, [50])]
    assert figures(answers, duration_s=1, offered_s=1, slo={})["max_concurrent_requests"] == 2
    answers = [done(0.0, 1100, [300, 300]), done(0.9, 50, [50, 100])]
    assert figures(answers, duration_s=2, offered_s=1, slo={})["max_output_tokens_per_s"] == 5


@pytest.mark.parametrize(
    ("slo", "is_good"),
    [
        ({}, True),
        ({"ttft": 10.0, "tpot": 3.0, "e2el": 16.0}, True),
        ({"ttft": 9.99}, False),
        ({"tpot": 2.99}, False),
        ({"e2el": 15.99}, False),
    ],
)
def test_good_is_within_every_limit(slo: dict[str, float], is_good: bool) -> None:
    answer = done(0.0, 10, [2, 4])
    assert good(answer, {name: limit + 1e-9 for name, limit in slo.items()}) is is_good
    answer.valid = False
    assert not good(answer, {})


def test_one_token_has_no_tpot() -> None:
    assert done(0.0, 10, []).tpot_s is None
    assert good(done(0.0, 10, []), {"tpot": 0.001})


def test_limits() -> None:
    assert limits("ttft:200, tpot:20,e2e:1000") == {"ttft": 200, "tpot": 20, "e2el": 1000}
    assert limits(None) == {}
    for wrong in ("ttft", "ttft:x", "ttft:-1", "itl:5", "ttft:1,ttft:2", "e2e:nan", "e2e:inf"):
        with pytest.raises(RequestError, match="--slo"):
            limits(wrong)


def reading(*values: object) -> Answer:
    body = b"".join(event(value) for value in (*values, b"[DONE]"))
    return read(Exchange(b"", 0.0, 0.0, 200, [(1.0, body)], 1.0), Answer())


def test_what_counts_as_a_token() -> None:
    thought = {"choices": [{"delta": {"reasoning_content": "Hm"}}]}
    call = {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}}]}
    plain = {"choices": [{"text": "One", "finish_reason": None}]}  # of /v1/completions
    nothing = {"choices": [{"delta": {"role": "assistant", "content": None}}]}
    found = reading(nothing, delta(""), thought, call, plain, delta(" two"), delta("", "deadline"))
    assert (found.output_tokens, found.counted, found.text) == (4, False, "One two")
    assert found.finish_reason == "deadline" and found.completed


def test_usage_and_timings_are_the_servers_word() -> None:
    last = usage(9, 40) | {"timings": {"first_token_ms": 12.5, "total_ms": "x"}}
    last["usage"] |= {"prompt_tokens_details": {"cached_tokens": 8}}  # type: ignore[operator]
    found = reading(delta("One", "length"), last)
    assert (found.prompt_tokens, found.cached_tokens, found.output_tokens, found.counted) == (9, 8, 40, True)
    assert (found.server_ttft_s, found.server_e2e_s) == (0.0125, None)
    lies = reading(delta("One", "length"), {"usage": {"prompt_tokens": -1, "completion_tokens": 1e9}, "choices": []})
    assert (lies.prompt_tokens, lies.output_tokens, lies.counted) == (None, 1, False)


DATA = st.binary(max_size=12).filter(lambda data: not set(data) & set(b"\r\n"))
LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])


@given(st.lists(st.lists(DATA, min_size=1, max_size=3), max_size=5), LINE_ENDS, st.data())
def test_events_are_the_same_at_any_split(written: list[list[bytes]], end: bytes, data: st.DataObject) -> None:
    body = b"\xef\xbb\xbf: hello" + end + end + b"id: 7" + end + end
    ends = []
    for lines in written:
        body += b"event: x" + end + b"".join(b"data: " + line + end for line in lines) + end
        ends.append(len(body))
    body += b"data: never ended"
    marks = sorted(data.draw(st.sets(st.integers(0, len(body)), max_size=10)))
    pieces = [(float(b), body[a:b]) for a, b in zip([0, *marks], [*marks, len(body)], strict=True)]
    found = list(events(pieces))
    assert [value for _, value in found] == [b"\n".join(lines) for lines in written]
    for (when, _), due in zip(found, ends, strict=True):  # \r\n: a blank line is known for one at its \r
        first = next(end for end, _ in pieces if end >= due)
        early = next(at for at, _ in pieces if at >= due - 1)
        assert when in (first, early if end == b"\r\n" else first)


def test_a_stream_as_the_helper_writes_it_is_a_stream() -> None:
    """The helper of these tests against a parser that is not ours."""
    import httptools

    class Body:
        data, complete = b"", False

        def on_body(self, data: bytes) -> None:
            self.data += data

        def on_message_complete(self) -> None:
            self.complete = True

    body = Body()
    httptools.HttpResponseParser(body).feed_data(stream(delta("One")))
    assert body.complete and body.data.endswith(b"data: [DONE]\n\n")
