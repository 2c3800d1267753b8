"""Answers of a grammar, from the engine on a fake model up to real models: always of the form that was asked for."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import millis
from fake import VOCAB, FakeRunner, next_token
from grammars import TEXT, WHOLE, record, validate
from millis.engine.engine import Engine
from millis.engine.grammar import GrammarCompiler
from millis.engine.request import Request
from millis.engine.runner import Batch, Sampled
from millis.engine.speculate import Speculator
from millis.tasks.model import LanguageModel
from millis.types import DeadlineError, Grammar, GrammarError, RequestError, SamplingParams

END = VOCAB - 2


class Characters:
    """A vocabulary of the printable ASCII characters, an end token and a control token."""

    eos, bos, vocab_size, control = frozenset({END}), None, VOCAB, frozenset({END, VOCAB - 1})

    def token_bytes(self, token: int) -> bytes:
        return bytes([32 + token]) if token < 95 else b"<end>"

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return [ord(character) - 32 for character in text]


def text_of(request: Request) -> str:
    return "".join(chr(32 + token) for token in request.output)


class MaskedSampler:
    def __init__(self) -> None:
        self.mask: np.ndarray | None = None
        self.committed: list[int] = []
        self._there = threading.Event()
        self._there.set()

    def expect_mask(self) -> None:
        self._there.clear()

    def set_mask(self, mask: np.ndarray | None) -> None:
        self.mask = mask
        self._there.set()

    def commit(self, tokens: np.ndarray) -> None:
        self.committed += tokens.tolist()

    def choose(self, wanted: int) -> int:
        """The wanted token, or the next one that is allowed."""
        assert self._there.wait(60)
        if self.mask is None:
            return wanted
        bits = np.unpackbits(self.mask.view(np.uint8), bitorder="little")[:VOCAB]
        return int(next(t for t in [*range(wanted, VOCAB), *range(wanted)] if bits[t]))


class MaskedRunner(FakeRunner):
    def sampler(self, params: SamplingParams, prompt: Sequence[int]) -> Any:
        return MaskedSampler()

    def step(self, batch: Batch, samplers: Sequence[Any | None]) -> Sampled:
        self.batches.append([int(n) for n in batch.lengths])
        if self.on_step:
            self.on_step()
        sequences = zip(self._sequences(batch), samplers, strict=True)
        tokens = [[sampler.choose(self.say(sequence))] if sampler else [] for sequence, sampler in sequences]
        return Sampled(tokens, [[None] * len(one) for one in tokens])


COMPILER = GrammarCompiler(Characters())


def engine(clock: Any = None, speculator: Speculator | None = None, **sizes: int) -> Engine:
    runner = MaskedRunner(**sizes)
    extra = {} if clock is None else {"clock": clock}
    return Engine(runner, Characters.eos, speculator=speculator, grammars=COMPILER.compile, **extra)


def grammar(schema: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


def run(e: Engine, *requests: Request) -> None:
    while any(request.finish_reason is None for request in requests):
        e.step()
    e.scheduler.check_integrity()


def tokens_of(request: Request) -> list[int]:
    return [event.token for event in request.inbox if event.token is not None]


SCHEMA = record(name={"enum": ["Ann", "Annabel", "Bob"]}, ages={"type": "array", "items": WHOLE, "maxItems": 3})


# The engine


def test_forced_tokens_take_no_step_and_change_no_answer() -> None:
    e = engine()
    jumping = e.submit([5, 6], SamplingParams(grammar=grammar(SCHEMA), max_tokens=100))
    asked = e.submit([5, 6], SamplingParams(grammar=grammar(SCHEMA), max_tokens=100, logprobs=0))
    assert tokens_of(jumping) == Characters().encode('{"name": "') and not tokens_of(asked)
    run(e, jumping, asked)
    assert jumping.output == asked.output == tokens_of(jumping) == tokens_of(asked)
    assert jumping.finish_reason == asked.finish_reason == "stop"
    validate(text_of(jumping), SCHEMA)
    assert jumping.timings.steps < asked.timings.steps == len(asked.output)
    assert jumping.timings.completion_tokens == len(jumping.output)


def test_forced_tokens_that_were_cached_count_as_no_part_of_the_prompt() -> None:
    e = Engine(MaskedRunner(), Characters.eos, grammars=COMPILER.compile, prefix_cache=True)
    for cached in (0, 2):
        request = e.submit([5, 6], SamplingParams(grammar=grammar(SCHEMA), max_tokens=100))
        run(e, request)
        assert (request.timings.cached_tokens, request.timings.prompt_tokens) == (cached, 2)


def test_forced_tokens_are_committed_in_their_order() -> None:
    e = engine()
    request = e.submit([5, 6], SamplingParams(grammar=grammar(record(a={"const": 12})), max_tokens=100))
    assert request.finish_reason == "stop" and text_of(request) == '{"a": 12}', "nothing is left to the model"
    assert request.sampler.committed == request.output
    assert e.runner.batches == [] and not e.scheduler.waiting


def test_pages_of_forced_tokens_hold_the_answer() -> None:
    """The fake model reads what lies in the pages: a token not computed there would change what it says."""
    e = engine(max_tokens=5)
    wide = record(**{"a_long_name_that_is_forced": {"type": "boolean"}, "another_long_name": {"type": "boolean"}})
    request = e.submit([1, 2, 3], SamplingParams(grammar=grammar(wide), max_tokens=100))
    run(e, request)
    text = text_of(request)
    validate(text, wide)
    first, second = re.findall("true|false", text)
    for word, before in ((first, text.index(first)), (second, text.rindex(second))):
        said = next_token([1, 2, 3, *Characters().encode(text[:before])])
        want = min((ord(c) - 32 for c in "tf"), key=lambda token: (token - said) % VOCAB)
        assert word[0] == chr(32 + want)


def test_requests_with_and_without_a_grammar_share_steps() -> None:
    e = engine(max_sequences=4)
    schemas = [
        SCHEMA,
        record(a=TEXT, b=WHOLE),
        {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 5},
        None,
    ] * 2
    alone = []
    for i, schema in enumerate(schemas):
        one = engine()
        params = SamplingParams(grammar=schema and grammar(schema), max_tokens=40)
        alone.append(one.submit([i, i + 1], params))
        run(one, alone[-1])
    together = [
        e.submit([i, i + 1], SamplingParams(grammar=schema and grammar(schema), max_tokens=40))
        for i, schema in enumerate(schemas)
    ]
    run(e, *together)
    assert [r.output for r in together] == [r.output for r in alone]
    for request, schema in zip(together, schemas, strict=True):
        if request.finish_reason == "stop" and schema is not None:
            validate(text_of(request), schema)


def test_a_preempted_request_goes_on_where_it_was() -> None:
    schema = record(a={"type": "string", "minLength": 20, "maxLength": 24}, b={"type": "string", "maxLength": 9})
    want = engine().submit([1], SamplingParams(grammar=grammar(schema), max_tokens=60))
    crowd = engine(pages=18, max_sequences=4)
    requests = [crowd.submit([1], SamplingParams(grammar=grammar(schema), max_tokens=60)) for _ in range(4)]
    alone = engine()
    want = alone.submit([1], SamplingParams(grammar=grammar(schema), max_tokens=60))
    run(alone, want)
    run(crowd, *requests)
    assert {tuple(request.output) for request in requests} == {tuple(want.output)}


def test_the_limit_counts_forced_tokens() -> None:
    for limit in (1, 4, 10, 11, 12):
        e = engine()
        request = e.submit([5], SamplingParams(grammar=grammar(SCHEMA), max_tokens=limit))
        run(e, request)
        assert len(request.output) == limit and request.finish_reason == "length"
        assert [event.finish_reason for event in request.inbox] == [None] * (limit - 1) + ["length"]


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 9, 14, 20])
def test_a_deadline_closes_the_answer_wherever_it_is(steps: int) -> None:
    now = [0.0]
    e = engine(clock=lambda: now[0])
    schema = record(text={"type": "string", "minLength": 8}, tags={"type": "array", "items": record(x=WHOLE)})
    request = e.submit([5], SamplingParams(grammar=grammar(schema), max_tokens=500), deadline_s=10.0)
    for _ in range(steps):
        e.step()
    now[0] = 11.0
    e.step()
    assert request.finish_reason == "deadline"
    validate(text_of(request), schema)
    assert tokens_of(request) == request.output
    e.scheduler.check_integrity()


def test_a_grammar_that_meets_a_limit_ends_its_request_alone() -> None:
    e = engine()
    many = Grammar("lark", 'start: "~" | /[a-z]{2}/ (' + " | ".join(f'"w{i}"' for i in range(6_000)) + ")")
    broken = e.submit([5], SamplingParams(grammar=many, max_tokens=50))
    well = e.submit([5], SamplingParams(grammar=grammar(SCHEMA), max_tokens=100))
    run(e, broken, well)
    assert isinstance(broken.error, GrammarError) and broken.finish_reason == "cancelled"
    with pytest.raises(GrammarError):
        list(e.events(broken))
    validate(text_of(well), SCHEMA)


def test_an_end_that_was_chosen_without_a_mask_ends_no_answer() -> None:
    """Where a grammar is given up the sampler has no mask, and the model may choose to end, whatever is missing."""

    class GivenUp:
        stopped = False

        def mask(self) -> Any:
            raise GrammarError("too many states")

        def forced(self) -> list[int]:
            return []

    e = engine()
    e.grammars = lambda grammar: GivenUp()  # type: ignore[assignment, return-value]
    e.runner.say = lambda tokens: END
    broken = e.submit([5], SamplingParams(grammar=grammar(SCHEMA), max_tokens=50))
    run(e, broken)
    assert isinstance(broken.error, GrammarError) and broken.finish_reason == "cancelled"


def test_no_drafts_where_there_is_a_grammar() -> None:
    e = engine(speculator=Speculator(lambda: 0.0), clock=lambda: 0.0)
    e.runner.say = lambda tokens: 65  # always "a": the text repeats itself
    request = e.submit([65] * 20, SamplingParams(grammar=grammar(TEXT), max_tokens=60))
    run(e, request)
    assert request.timings.drafted_tokens == 0
    assert set(text_of(request)[1:]) == {"a"}


def test_bad_grammars_are_refused_before_they_are_queued() -> None:
    e = engine()
    with pytest.raises(GrammarError, match="uniqueItems"):
        e.submit([5], SamplingParams(grammar=grammar({"uniqueItems": True})))
    with pytest.raises(GrammarError, match="without grammars"):
        Engine(FakeRunner(), frozenset()).submit([5], SamplingParams(grammar=grammar({})))
    with pytest.raises(RequestError, match="ignore_eos"):
        SamplingParams(grammar=grammar({}), ignore_eos=True)
    assert not e.scheduler.waiting


# Real models


def short(characters: int) -> dict[str, Any]:
    return {"type": "string", "maxLength": characters}


def whole(least: int, most: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most}


SURE = {"type": "number", "minimum": 0, "maximum": 1}
BOOKS = {"type": "array", "items": record(title=short(40)), "minItems": 2, "maxItems": 2}
OPTIONAL = {**record(code={"type": "string", "minLength": 5, "maxLength": 5}, note=short(20)), "required": ["code"]}
NODE = record(v=whole(0, 9), child={"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]})
QUESTIONS: list[tuple[str, Any]] = [
    ("Invent a person.", record(name=TEXT, age=whole(0, 120))),
    ("Is this a good review? I loved every minute!", record(label={"enum": ["positive", "negative"]}, sure=SURE)),
    ("Name two books.", record(books=BOOKS)),
    ("When did the first man land on the moon?", record(date={"type": "string", "pattern": "^\\d{4}-\\d{2}-\\d{2}$"})),
    ("What is the postal code of Berlin?", OPTIONAL),
    ("用一个词回答：天空是什么颜色？", record(**{"颜色": {"enum": ["红色", "蓝色", "绿色"]}})),
    ("A tree with one child.", {"$ref": "#/$defs/n", "$defs": {"n": NODE}}),
]


@pytest.fixture(scope="module", params=["smollm2", "qwen2.5-0.5b"])
def lm(request: pytest.FixtureRequest, model_path: Callable[[str], Path]) -> LanguageModel:
    return millis.load(model_path(request.param), threads=2, context=1024)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize(("question", "schema"), QUESTIONS, ids=lambda value: ascii(value)[:30])
def test_answers_are_of_their_schema(question: str, schema: Any, temperature: float, lm: LanguageModel) -> None:
    messages = [{"role": "user", "content": question}]
    out = lm.chat(messages, schema=schema, max_tokens=120, temperature=temperature, seed=5)
    if out.finish_reason == "stop":
        validate(out.text, schema)
    else:
        assert out.finish_reason == "length" and len(out.tokens) == 120
    assert out.tokens == lm.chat(messages, schema=schema, max_tokens=120, temperature=temperature, seed=5).tokens


def test_the_text_is_the_same_with_and_without_jumps(lm: LanguageModel) -> None:
    for temperature in (0.0, 0.8):
        asked = {"schema": QUESTIONS[0][1], "temperature": temperature, "seed": 11, "frequency_penalty": 0.3}
        messages = [{"role": "user", "content": QUESTIONS[0][0]}]
        jumped = lm.chat(messages, **asked)
        stepped = lm.chat(messages, logprobs=0, **asked)
        assert jumped.tokens == stepped.tokens and jumped.text == stepped.text
        assert jumped.timings.steps < stepped.timings.steps
        assert stepped.logprobs is not None and len(stepped.logprobs) == len(stepped.tokens)


def test_bias_and_penalties_never_leave_the_grammar(lm: LanguageModel) -> None:
    schema = QUESTIONS[1][1]
    banned = {token: -float("inf") for token in lm.tokenizer.encode('"positive"{}: ,', add_special=False)}
    for params in ({"logit_bias": banned}, {"presence_penalty": 2.0, "repetition_penalty": 5.0}, {"logprobs": 3}):
        out = lm.chat([{"role": "user", "content": QUESTIONS[1][0]}], schema=schema, max_tokens=200, **params)
        if out.finish_reason == "stop":
            validate(out.text, schema)


def test_other_forms(lm: LanguageModel) -> None:
    prompt = [{"role": "user", "content": "Is water wet? Yes or no."}]
    out = lm.chat(prompt, grammar=Grammar("choice", '["yes", "no", "I do not know"]'))
    assert out.text in ("yes", "no", "I do not know") and out.finish_reason == "stop"
    out = lm.chat(prompt, grammar=Grammar("regex", r"[A-Z]{3}-\d{4}"), temperature=1.0, seed=1)
    assert re.fullmatch(r"[A-Z]{3}-\d{4}", out.text)
    out = lm.chat(prompt, grammar=Grammar("lark", 'start: "answer: " ("yes" | "no") "."'))
    assert out.text in ("answer: yes.", "answer: no.")
    out = lm.chat(prompt, grammar=Grammar("json_object", ""), max_tokens=60)
    assert out.text.startswith("{") and (out.finish_reason == "length" or isinstance(json.loads(out.text), dict))


def test_a_late_answer_is_closed(lm: LanguageModel) -> None:
    """However far it came: long before the text it asks for is written."""
    schema = record(story={"type": "string", "minLength": 4000}, moral=TEXT)
    asked = [{"role": "user", "content": "Tell a story."}]
    for deadline_ms in (1500, 4000, 12_000):
        try:
            out = lm.chat(asked, schema=schema, max_tokens=5000, deadline_ms=deadline_ms)
            break
        except DeadlineError:  # a busy machine
            continue
    assert out.finish_reason == "deadline"
    validate(out.text, schema)


def test_schemas_as_python_has_them(lm: LanguageModel) -> None:
    with pytest.raises(GrammarError, match="JSON"):
        lm.generate("a", schema={"enum": [object()]})
    with pytest.raises(GrammarError, match="not JSON"):
        lm.generate("a", schema="{")
    with pytest.raises(RequestError, match="exclude each other"):
        lm.generate("a", schema={}, grammar=Grammar("json_object", ""))
    assert lm.generate("The answer: ", schema=json.dumps({"const": 42})).text == "42"
