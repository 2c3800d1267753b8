"""Matchers over real vocabularies: what masks allow, what is forced, how answers close; judged by jsonschema and re."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grammars import TEXT, WHOLE, Answers, allowed, record, validate
from millis.engine import grammar as module
from millis.engine.closing import FUEL, Fuel
from millis.engine.grammar import GrammarCompiler
from millis.types import Grammar, GrammarError

VOCABULARIES = ["smollm2", "qwen2.5-0.5b", "gemma3-270m"]


@pytest.fixture(scope="module", params=VOCABULARIES)
def each(request: pytest.FixtureRequest, model_path: Callable[[str], Path]) -> Answers:
    return Answers(model_path(request.param))


@pytest.fixture(scope="module")
def answers(model_path: Callable[[str], Path]) -> Answers:
    return Answers(model_path("smollm2"))


# Masks


def test_a_mask_has_a_bit_for_every_token_that_may_follow(each: Answers) -> None:
    matcher = each.schema({"enum": ["alpha", "beta", 17]})
    assert matcher.mask().shape == (-(-each.tokenizer.vocab_size // 32),)
    texts = {each.tokenizer.token_bytes(int(token)).decode() for token in allowed(matcher)}
    assert {'"', "1"} <= texts
    assert all(any(whole.startswith(text) for whole in ('"alpha"', '"beta"', "17")) for text in texts)


def test_control_tokens_are_allowed_where_the_answer_may_end_and_nowhere_else(each: Answers) -> None:
    ends = each.tokenizer.eos
    matcher = each.compiler.compile(Grammar("regex", ".*"))
    assert set(allowed(matcher)) & each.tokenizer.control <= ends and set(allowed(matcher)) & ends
    matcher = each.schema(record(a=TEXT))
    for seed in range(30):
        assert bool(set(allowed(matcher)) & each.tokenizer.control) == matcher.accepting
        each.wander(matcher, 1, seed)


def test_a_token_that_is_not_allowed_is_an_error(answers: Answers) -> None:
    matcher = answers.schema(record(a=TEXT))
    with pytest.raises(GrammarError, match="grammar"):
        answers.accept(matcher, "Sure!")
    with pytest.raises(GrammarError):
        matcher.mask()


def test_an_end_token_ends(answers: Answers) -> None:
    matcher = answers.compiler.compile(Grammar("regex", "a+"))
    answers.accept(matcher, "aa")
    assert matcher.accepting and not matcher.stopped
    matcher.accept(min(answers.tokenizer.eos))
    assert matcher.stopped and matcher.forced() == [] and matcher.closing() == []


def test_a_copy_goes_its_own_way(answers: Answers) -> None:
    first = answers.schema({"enum": ["ab", "cd"]})
    answers.accept(first, '"')
    second = first.copy()
    answers.accept(first, "ab")
    answers.accept(second, "cd")
    assert (answers.closed(first), answers.closed(second)) == ('"', '"')


def test_answers_have_no_whitespace_to_run_away_in(each: Answers) -> None:
    matcher = each.schema({"type": "object"})
    tokens = each.wander(matcher, 5, seed=1)
    assert each.text(tokens).startswith("{")
    matcher = each.schema(record(a=TEXT, b=WHOLE))
    each.accept(matcher, '{"a": "x", ')
    with pytest.raises(GrammarError):
        each.accept(matcher, "  ")


# Forced tokens


def test_what_is_forced_is_tokenized_as_the_tokenizer_does(each: Answers) -> None:
    matcher = each.schema(record(name=TEXT, age=WHOLE))
    forced = matcher.forced()
    assert each.text(forced).startswith('{"name') and len(forced) <= 4
    whole = each.tokenizer.encode('{"name": "Ann", "age": 3}', add_special=False)
    assert whole[: len(forced)] == forced


def test_nothing_is_forced_where_there_is_a_choice(answers: Answers) -> None:
    matcher = answers.schema(record(name=TEXT))
    answers.accept(matcher, '{"name": "')
    assert matcher.forced() == []


# Closings

SCHEMAS: list[tuple[Any, str]] = [
    (record(name=TEXT, age=WHOLE), ""),
    (record(name=TEXT, age=WHOLE), '{"name": "Jo'),
    (record(name=TEXT), '{"name": "tab \\'),
    (record(name=TEXT), '{"name": "uni \\u00'),
    (record(c={"enum": ["alpha", "alps", "beta", 3, None, {"x": [1]}]}), '{"c": "al'),
    (record(c={"enum": ["alpha", "alps", "beta", 3, None, {"x": [1]}]}), '{"c": {"x'),
    (record(d={"type": "string", "pattern": "^\\d{4}-\\d{2}-\\d{2}$"}), '{"d": "202'),
    (record(d={"type": "string", "pattern": "ab#"}), '{"d": "x'),
    (record(d={"type": "string", "pattern": '"'}), '{"d": "x'),
    (record(d={"type": "string", "pattern": "a{400}"}), '{"d": "baaa'),
    (record(d={"type": "string", "pattern": "(?:a|b|c){300}"}), ""),
    (record(d={"type": "string", "pattern": "^a|b$"}), '{"d": "xyz'),
    (record(d={"type": "string", "pattern": "(?:^|,)a"}), '{"d": "xyz'),
    (record(d={"type": "string", "pattern": "^[a-z]+@[a-z]+\\.(com|org)$"}), '{"d": "me'),
    (record(d={"type": "string", "pattern": "^v\\d+\\.\\d+\\.\\d+(-[0-9A-Za-z.-]+)?$"}), '{"d": "v'),
    (record(d={"type": "string", "pattern": "^([a-z]{1,10} ){3,80}end$"}), ""),
    (record(d={"type": "string", "pattern": "^([a-z]{1,10} ){3,80}end$"}), '{"d": "once up'),
    (record(d={"type": "string", "minLength": 120}), '{"d": "short'),
    (record(d={"type": "string", "minLength": 3, "maxLength": 3}), ""),
    (record(d={"type": "string", "format": "date-time"}), ""),
    (record(d={"type": "string", "format": "uuid"}), '{"d": "12'),
    (record(d={"type": "string", "format": "date-time"}, u={"type": "string", "format": "uuid"}), ""),
    (record(a={"type": "array", "items": record(x={"type": "number", "minimum": 9}), "minItems": 3}), '{"a": [{"x": 1'),
    (record(a={"type": "array", "prefixItems": [TEXT, WHOLE], "items": False, "minItems": 2}), ""),
    (record(m={"type": "integer", "multipleOf": 7, "minimum": 8, "maximum": 700}), ""),
    (record(p={"type": "number", "exclusiveMinimum": 0.5, "maximum": 0.75}), ""),
    (record(n={"type": "integer", "minimum": -5, "maximum": -3}), '{"n": -'),
    ({"type": "object"}, '{"a": {"b": [1, "c'),
    ({"type": "object", "minProperties": 1, "maxProperties": 3}, ""),
    ({"type": "object", "patternProperties": {"^x_": WHOLE}, "additionalProperties": False, "minProperties": 1}, "{"),
    (record(a={"anyOf": [record(kind={"const": "a"}, x=TEXT), record(kind={"const": "b"}, y=WHOLE)]}), '{"a": {"'),
    ({"$ref": "#/$defs/n", "$defs": {"n": record(v=WHOLE, n={"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]})}},
     '{"v": 1, "n": {"v": 2, "'),
    (record(**{f"p{i}": TEXT for i in range(60)}), '{"p0": "'),
    ({"type": "object", "propertyNames": {"enum": ["a.b", "c"]}, "additionalProperties": WHOLE, "required": ["c"]},
     "{"),
    (record(d={"type": "string", "format": "cuid", "contentEncoding": "base64", "nullable": True}), '{"d": '),
    (record(**{"名前": {"type": "string", "enum": ["東京", "大阪"]}}), '{"名前": "東'),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 4, "maxItems": 4}, "[tr"),
    ({"type": ["string", "null"]}, "nu"),
    ({"$ref": "#/$defs/列 [a]", "$defs": {"列 [a]": record(
        v=WHOLE, next={"oneOf": [{"$ref": "#/$defs/列 [a]"}, {"type": "null"}]})}}, '{"v": 1, "next": {"'),
    (True, "[[[{"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "begun"), SCHEMAS, ids=lambda value: f"{value!s:.40}")
def test_any_beginning_closes_to_a_valid_answer(schema: Any, begun: str, each: Answers) -> None:
    matcher = each.schema(schema)
    each.accept(matcher, begun)
    before = matcher.copy()
    validate(begun + each.closed(matcher), schema)
    assert before.closing() == before.closing(), "a closing leaves its matcher as it was"


def test_a_closing_is_short(answers: Answers) -> None:
    for schema, begun, whole in [
        (record(name=TEXT, age=WHOLE), '{"name": "Jo', '{"name": "Jo", "age": 0}'),
        (record(a={"type": "array", "items": WHOLE}), '{"a": [1, 2', '{"a": [1, 2]}'),
        (record(d={"type": "string", "minLength": 9}), '{"d": "1234', '{"d": "1234     "}'),
        ({"type": "object"}, '{"a": {"b": [1, "c', '{"a": {"b": [1, "c"]}}'),
        (record(c={"enum": ["alpha", "alps"]}), '{"c": "alp', '{"c": "alps"}'),
    ]:
        matcher = answers.schema(schema)
        answers.accept(matcher, begun)
        found = begun + answers.closed(matcher)
        validate(found, schema)
        assert len(found) <= len(whole) + 2, found


@pytest.mark.parametrize(
    ("kind", "source", "begun", "pattern"),
    [
        ("regex", r"[a-z]+@[a-z]+\.com", "jo", r"jo@?[a-z]+@?[a-z]*\.com"),
        ("regex", "^(ab)*c$", "abab", "abab(ab)*c"),
        ("regex", r"\d{3}-\d{4}", "12", r"12\d-\d{4}"),
        ("regex", r"v\d+\.\d+\.\d+(-[0-9a-z.-]+)?", "v51", r"v51\.\d+\.\d+"),
        ("regex", r"[\w.]+@[\w.]+\.(com|org|cn)", "some.body", r"some\.body@[\w.]+\.(com|org|cn)"),
        ("regex", r"(- [^\n]+\n){3,10}", "- Fly", r"- Fly\n(- [^\n]+\n){2}"),
        ("regex", r"(\w+, ){5,20}\w+\.", "one, tw", r"one, tw(, \w+){4,}\."),
        ("regex", r"<think>(.|\n)*</think>\n\{.*\}", "<think>Well,\n", r"<think>Well,\n</think>\n\{\}"),
        ("regex", r"```python\n(.|\n)*\n```", "```python\nprint(1)", r"```python\nprint\(1\)\n```"),
        ("choice", '["positive", "negative", "neutral/x [y]\\n"]', "neu", r"neutral/x \[y\]\n"),
        ("choice", '["a+b", "a.b", "ünï 漢字"]', "ün", "ünï 漢字"),
        ("lark", 'start: "a" b+\nb: "x" | "y" start "z"', "ay", "aya.*z"),
        ("lark", 'start: "<call>" %json {"type": "object"} "</call>"', '<call>{"a": "', r"<call>\{\"a\": .*\}</call>"),
        ("lark", 'start: t %json {"const": {"a": 1}}\nt[suffix="\\n"]: /.*/', 'say "', r'say "\n\{"a": 1\}'),
        ("lark", "start: /(.|\\n)*zebra#crossing/", "a zeb", "a zebr?(zeb)?ra#crossing"),
    ],
)
def test_other_kinds_close_too(kind: Any, source: str, begun: str, pattern: str, each: Answers) -> None:
    matcher = each.compiler.compile(Grammar(kind, source))
    each.accept(matcher, begun)
    assert re.fullmatch(pattern, begun + each.closed(matcher))


def test_a_closing_that_is_not_found_is_none(answers: Answers) -> None:
    source = 'start: free "CALL {}"\nfree: /[^{]*/'  # the pattern takes CALL, too
    matcher = answers.compiler.compile(Grammar("lark", source))
    answers.accept(matcher, "Well, CALL ")
    assert matcher.closing() is None


def names() -> st.SearchStrategy[str]:
    return st.text(st.sampled_from('abXY _-"\\/é漢😀'), min_size=1, max_size=6)


def leaves() -> st.SearchStrategy[Any]:
    spans = st.tuples(st.integers(-500, 500), st.integers(0, 500))
    return st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, TEXT, WHOLE, {"type": "number"}, {"type": "object"}]),
        spans.map(lambda s: {"type": "integer", "minimum": s[0], "maximum": s[0] + s[1]}),
        spans.map(lambda s: {"type": "number", "minimum": s[0] / 8, "maximum": s[0] / 8 + s[1]}),
        st.tuples(st.integers(0, 30), st.integers(0, 30)).map(
            lambda s: {"type": "string", "minLength": s[0], "maxLength": s[0] + s[1]}
        ),
        st.sampled_from(
            ["^[a-f]{2,5}$", "^\\d+(\\.\\d\\d)?$", "x", "^(yes|no|maybe)$", "[0-9]{3}", '^[^"\\\\]*;$']
        ).map(lambda pattern: {"type": "string", "pattern": pattern}),
        st.lists(names() | st.integers(-99, 99) | st.none() | st.booleans(), min_size=1, max_size=5).map(
            lambda values: {"enum": values}
        ),
        names().map(lambda value: {"const": value}),
    )


@st.composite
def objects(draw: st.DrawFn, children: st.SearchStrategy[Any]) -> Any:
    properties = draw(st.dictionaries(names(), children, max_size=4))
    required = [name for name in properties if draw(st.booleans())]
    extra = draw(st.sampled_from([{"additionalProperties": False}, {}, {"additionalProperties": WHOLE}]))
    return {"type": "object", "properties": properties, "required": required, **extra}


def branches(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arrays = st.tuples(children, st.integers(0, 3), st.integers(0, 3)).map(
        lambda s: {"type": "array", "items": s[0], "minItems": s[1], "maxItems": s[1] + s[2]}
    )
    return objects(children) | arrays | st.lists(children, min_size=1, max_size=3).map(lambda s: {"anyOf": s})


def test_a_pattern_behind_a_name_that_is_chosen_is_closed(answers: Answers) -> None:
    """Whatever property a text begins with, the closing finds what a later one needs."""
    for first, pattern in (("X", "x"), ("adult", "[0-9]{3}"), ("a", "^[a-f]{2,5}$")):
        properties = {"age": {"const": first}, "code": {"type": "string", "pattern": pattern}}
        schema = {"type": "object", "properties": properties, "required": ["code"], "additionalProperties": False}
        validate(answers.text(answers.schema(schema).closing() or []), schema)


@pytest.mark.parametrize("begun", ["", '{"d": "', '{"d": "0', '{"d": "2023-02-2', '{"d": "20'])
def test_a_date_is_closed_to_one_that_there_is(begun: str, answers: Answers) -> None:
    matcher = answers.schema(record(d={"type": "string", "format": "date"}))
    answers.accept(matcher, begun)
    date.fromisoformat(json.loads(begun + answers.closed(matcher))["d"])


def test_a_string_is_closed_behind_half_a_character(answers: Answers) -> None:
    schema = {"type": "array", "items": {"type": "string", "pattern": "[0-9]{3}"}, "minItems": 1}
    for half in ("é".encode()[:1], "字".encode()[:2], b"\\", b"\\u00"):
        matcher = answers.schema(schema)
        begun = answers.compiler._closer.spelled(b'["' + half)  # type: ignore[union-attr]
        for token in begun:
            matcher.accept(token)
        validate(answers.text([*begun, *(matcher.closing() or [])]), schema)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=st.recursive(leaves(), branches, max_leaves=8), steps=st.integers(0, 60), seed=st.integers(0, 2**32))
def test_wherever_random_tokens_lead_the_closing_is_valid(schema: Any, steps: int, seed: int, answers: Answers) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    matcher = answers.schema(schema)
    tokens = answers.wander(matcher, steps, seed)
    closing = matcher.closing()
    assert closing is not None
    validate(answers.text([*tokens, *closing]), schema)


# What is refused

HOSTILE: list[tuple[str, str]] = [
    ("json_schema", '{"items": ' * 5_000 + "{}" + "}" * 5_000),
    ("json_schema", "[" * 100_000),
    ("json_schema", json.dumps({"enum": [f"value {i}" for i in range(5_000)]})),
    ("json_schema", json.dumps({"type": "string", "pattern": "((a{0,100}){0,100}){0,100}"})),
    ("json_schema", json.dumps({"type": "string", "pattern": "(?<=a)b"})),
    ("json_schema", json.dumps({"type": "integer", "multipleOf": 1234567})),
    ("json_schema", json.dumps({"$ref": "#/$defs/missing"})),
    ("json_schema", json.dumps({"$ref": "https://example.invalid/schema.json"})),
    ("json_schema", json.dumps({"$ref": "file:///etc/passwd"})),
    ("json_schema", json.dumps({"enum": []})),
    ("json_schema", json.dumps({"type": "string", "minLength": 5, "maxLength": 3})),
    ("json_schema", json.dumps({"type": "nonsense"})),
    ("json_schema", json.dumps({"type": "array", "uniqueItems": True})),
    ("json_schema", json.dumps(record(a={"$ref": "#"}))),
    ("json_object", "{}"),
    ("regex", "(" * 2_000 + ")" * 2_000),
    ("regex", "(a{1000}){1000}"),
    ("regex", "a\ud800"),
    ("regex", "["),
    ("regex", r"(a)\1"),
    ("choice", "[]"),
    ("lark", "start: " + "(" * 5_000 + '"a"' + ")" * 5_000),
    ("lark", "start: start"),
    ("lark", "start: missing"),
    ("lark", "\x00\x01"),
    ("nonsense", ""),
]


@pytest.mark.parametrize(("kind", "source"), HOSTILE, ids=lambda value: ascii(value)[:50])
def test_hostile_grammars_end_in_a_grammar_error(kind: Any, source: str, answers: Answers) -> None:
    with pytest.raises(GrammarError) as error:
        answers.compiler.compile(Grammar(kind, source))
    assert 10 < len(str(error.value)) < 400 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        ("regex", "(", "unclosed group in ("),
        ("json_schema", json.dumps(record(a={"type": "string", "pattern": "x(?!y)"})), "in x(?!y)"),
        ("regex", "a\n(", "unclosed group"),
        ("json_schema", json.dumps({"$ref": "#"}), "does a rule or a $ref lead to nothing but itself?"),
        ("lark", "start: missing", 'unknown name: "missing"'),
        ("lark", 'start: WORD "end"\nWORD: /[a-z]+/', "right behind it, or end it by lazy or suffix"),
        ("regex", "^(.{1,100},){40}$", "^(.{1,100},){40}$ may go on in too many ways at once"),
        ("json_schema", json.dumps(record(a={"type": "string", "pattern": "^(.{1,100},){40}$"})), "over 100,000 steps"),
        ("json_schema", json.dumps({"type": "string", "pattern": "a{1500}"}), "a{1500} may go on"),
        (
            "json_schema",
            json.dumps({"anyOf": [{"type": "string", "pattern": p} for p in ("b", "^(.{1,99},){40}$")]}),
            "^(.{1,99},){40}$ may",
        ),
        ("json_schema", json.dumps({"type": "integer", "multipleOf": 7919, "minimum": 10**9}), "make it simpler"),
        ("json_schema", json.dumps(record(a={"type": "string", "minLength": 100_000})), "takes too long to compile"),
    ],
)
def test_errors_say_what_is_wrong(kind: Any, source: str, reason: str, answers: Answers) -> None:
    with pytest.raises(GrammarError) as error:
        answers.compiler.compile(Grammar(kind, source))
    assert reason in str(error.value)


def test_what_a_compilation_costs_is_bounded_however_many_patterns_it_has(answers: Answers) -> None:
    slow = record(**{f"p{i}": {"type": "string", "pattern": f".*b.{{{12 + i}}}b{i}"} for i in range(40)})
    tried = 0

    class Counting(Fuel):
        def burn(self, amount: int) -> None:
            nonlocal tried
            tried += amount
            super().burn(amount)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(GrammarError, match="takes too long"):
        patch.setattr(module, "Fuel", Counting)
        answers.schema(slow)
    assert FUEL < tried < 2 * FUEL


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "(.*a){20}"), ("regex", "[ab]*a[ab]{200}"), ("regex", "(?:a|b|ab|ba|aa)*c{1000}"),
        ("regex", "(a|a)*(a|a)*(a|a)*b"), ("lark", 'start: e\ne: e e | e e e | "a" | '),
        ("lark", "start: " + " | ".join(f'"w{i}"' for i in range(6_000))),
    ],
)  # fmt: skip
def test_exponential_grammars_are_matched_or_given_up(kind: Any, source: str, answers: Answers) -> None:
    """Automata, no backtracking: the work of a mask is bounded, and where the bound is met, an error says so."""
    try:
        answers.wander(answers.compiler.compile(Grammar(kind, source)), 200, seed=3)
    except GrammarError as error:
        assert "grammar cannot be used" in str(error)


# The compiler


def test_compiled_grammars_are_kept_up_to_a_number(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(answers.tokenizer)
    compiled: list[str] = []
    real = module._source
    monkeypatch.setattr(
        module, "_source", lambda grammar, native: compiled.append(grammar.source) or real(grammar, native)
    )
    monkeypatch.setattr(module, "CACHED", 2)
    for source, kept in (("a", False), ("b", False), ("a", True), ("c", False), ("a", True), ("b", False)):
        assert compiler.ready(Grammar("regex", source)) == kept
        compiler.compile(Grammar("regex", source))
    assert compiled == ["a", "b", "c", "b"] and compiler.compiled == 4


def test_a_grammar_that_was_given_up_is_compiled_anew(answers: Answers) -> None:
    """Its states are shared by all its matchers: an answer that used them up would leave none for the next."""
    wide = Grammar("regex", ".*a.{200}b")

    def steps() -> int:
        matcher, count = answers.compiler.compile(wide), 0
        with pytest.raises(GrammarError, match="too many states"):
            while answers.wander(matcher, 1, count):
                count += 1
        assert not matcher.stopped, "it is not whole, and must not pass for it"
        return count

    assert steps() == steps() > 0 and not answers.compiler.ready(wide)


@pytest.mark.parametrize("bound", ["minLength", "maxLength"])
def test_a_long_string_of_bounded_length_outlives_its_lexer(
    bound: str, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its characters takes states of the lexer: where they are used up, the answer goes on with a new one."""
    monkeypatch.setitem(module.LIMITS, "max_lexer_states", 10_000)
    compiler = GrammarCompiler(answers.tokenizer)
    schema = record(story={"type": "string", bound: 3_000}, moral=TEXT)
    matcher = compiler.compile(Grammar("json_schema", json.dumps(schema)))
    story = "A fox of 27 years jumped over – well, nearly – the dog; 'twas late. 前方三百米。 " * 40
    first = matcher._compiled
    tokens = answers.tokenizer.encode(json.dumps({"story": story[:2_999]}, ensure_ascii=False)[:-2], add_special=False)
    for token in tokens:
        assert matcher.mask()[token // 32] >> token % 32 & 1
        matcher.accept(token)
    assert matcher._compiled is not first and compiler.compiled == 2
    twin = matcher.copy()
    for each in (matcher, twin):
        validate(answers.text([*tokens, *(each.closing() or [])]), schema)


@pytest.mark.parametrize("states", [50_000, 10_000])
def test_a_long_answer_of_a_pattern_outlives_its_lexer(
    states: int, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.LIMITS, "max_lexer_states", states)
    matcher = GrammarCompiler(answers.tokenizer).compile(Grammar("regex", ".{10,4000}"))
    first = matcher._compiled
    story = ("A fox of 27 years jumped over – well, nearly – the dog; 'twas late. 前方三百米。 " * 60)[:3_999]
    for token in answers.tokenizer.encode(story, add_special=False):
        assert matcher.mask()[token // 32] >> token % 32 & 1
        matcher.accept(token)
    assert matcher.accepting and (matcher._compiled is first) == (states == 50_000)
    answers.accept(matcher, "!")
    assert matcher.stopped


def test_a_closing_goes_on_where_another_answer_used_the_states_up(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.LIMITS, "max_lexer_states", 5_000)
    compiler = GrammarCompiler(answers.tokenizer)
    schema = record(story={"type": "string", "minLength": 2_000})
    late, greedy = (compiler.compile(Grammar("json_schema", json.dumps(schema))) for _ in range(2))
    text = '{"story": "' + "It said: Why? It was late. " * 50
    answers.accept(late, text)
    greedy._renewed = 0  # none for it
    with pytest.raises(GrammarError, match="too many states"):
        for token in answers.tokenizer.encode(text, add_special=False)[: module.RENEWAL]:
            greedy.mask()
            greedy.accept(token)
    closing = late.closing()
    assert closing is not None
    validate(text + answers.text(closing), schema)


def test_matchers_of_one_grammar_are_apart_in_many_threads(answers: Answers) -> None:
    schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 5}

    def one(seed: int) -> str:
        matcher = answers.schema(schema)
        tokens = answers.wander(matcher, 20, seed)
        return answers.text([*tokens, *(matcher.closing() or [])])

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(one, range(24)))
    assert together == [one(seed) for seed in range(24)]
    for text in together:
        validate(text, schema)


def test_without_the_library_the_extra_is_named(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match=r"millis\[serve\]"):
        GrammarCompiler(answers.tokenizer).compile(Grammar("json_object", ""))


def test_masks_are_those_of_the_whole_vocabulary(answers: Answers) -> None:
    """A mask against the definition: a token is allowed where a fresh matcher accepts it."""
    matcher = answers.schema(record(a={"type": "integer", "minimum": 0}))
    answers.accept(matcher, '{"a": 4')
    mask = set(allowed(matcher).tolist())
    for token in np.random.default_rng(5).integers(0, answers.tokenizer.vocab_size, 300).tolist() + list(mask)[:50]:
        twin = matcher.copy()
        try:
            twin.accept(token)
            accepted = True
        except GrammarError:
            accepted = False
        assert accepted == (token in mask), answers.tokenizer.token_bytes(token)
