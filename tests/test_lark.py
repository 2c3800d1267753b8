"""Lark grammars are closed wherever an answer stands: what it may lack is proposed, llguidance is the judge."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from grammars import Answers
from millis.engine.lark import continuations
from millis.types import Grammar

ARITHMETIC = """start: sum
sum: product (("+" | "-") product)*
product: factor (("*" | "/") factor)*
factor: /[0-9]+/ | "(" sum ")"
"""
JSON = r"""start: value
value: object | array | STRING | NUMBER | "true" | "null"
array: "[" [value ("," value)*] "]"
object: "{" [pair ("," pair)*] "}"
pair: STRING ":" value
STRING: /"[^"\\]*"/
NUMBER: /-?[0-9]+/
"""
TAGS = 'start: tag\ntag: "<" NAME ">" (/[^<]+/ | tag)* "</" NAME ">"\nNAME: /[a-z]+/'
THOUGHT = 'start: thought "\\nAnswer: " /[A-D]/\nthought[suffix="</think>"]: /(.|\\n)*/'
CALL = """start: thought %json {
  "type": "object", "properties": {"q": {"type": "string", "pattern": "^[a-z]+!$"}, "n": {"type": "integer"}},
  "required": ["q", "n"], "additionalProperties": false
} "\\nDONE"
thought[suffix="</think>"]: /(.|\\n)*/
"""
FORM = 'start: "Name: " /[^\\n]{1,40}/ "\\nBio: " /[^\\n]{20,200}/ "\\nTags: " tag (", " tag){2,5}\ntag: /[a-z]{3,12}/'
EITHER = 'start: yes | no\nyes: "Yes: " /[^\\n]+/ "\\n(sure)"\nno: "No: " /[^\\n]+/ "\\nSorry."'


@pytest.fixture(scope="module", params=["smollm2", "qwen2.5-0.5b", "gemma3-270m"])
def each(request: pytest.FixtureRequest, model_path: Callable[[str], Path]) -> Answers:
    return Answers(model_path(request.param))


@pytest.mark.parametrize(
    ("source", "begun", "closing"),
    [
        ('start: /[^\\n]+/ "\\nEND"', "Hello there", "\nEND"),
        (ARITHMETIC, "1+(2*((3", ")))"),
        (JSON, '{"a":[1,{"b":"xy', '"}]}'),
        (TAGS, "<b>x<b>y<c>", "</a></a></a>"),
        (THOUGHT, "It's \"so", "</think>\nAnswer: A"),
        (CALL, 'Its "[', '</think>{"q": "a!", "n": 0}\nDONE'),
        (CALL, 'Its " so</think>{"q": "me', '!", "n": 0}\nDONE'),
        (FORM, "Name: Ann\nBio: born", "a" * 16 + "\nTags: aaa, aaa, aaa"),
        (EITHER, "Yes: ", "a\n(sure)"),
        (EITHER, "No: never", "\nSorry."),
        ('start: "a" b "c"\n%import common.INT -> b', "a1", "c"),
        ('start: /[a-z]+/ "end"', "abc", "end"),
        ('start: /[a-z]+/ "end"\n%ignore " "', "abc", " end"),
        ('start: word "end"\nword: /[a-z]+/\n%ignore /[ \\t]+/', "abc", " end"),
        ('start: "select" n ("," n)* "from" n\nn: /[a-z]+/\n%import common.WS\n%ignore WS', "select a , b", " froma"),
        ('start: /[a-z]+/ "end" "ing"i? "."', "abce", "nd."),
        ('start: /[^{]*/ "CALL {}"', "Well, CALL ", "{}"),
        ('start: ("- " /[^\\n]+/ ", " /[^\\n]+/ "\\n")+ "." // /a/ "b"', "- x, y\n- z", ", a\n."),
    ],
)
def test_what_is_begun_is_closed(source: str, begun: str, closing: str, each: Answers) -> None:
    matcher = each.compiler.compile(Grammar("lark", source))
    each.accept(matcher, begun)
    assert each.closed(matcher) == closing


@pytest.mark.parametrize("source", [ARITHMETIC, JSON, TAGS, THOUGHT, CALL, FORM, EITHER], ids=lambda text: text[:20])
def test_wherever_random_tokens_lead_an_answer_is_closed(source: str, each: Answers) -> None:
    taken_s = []
    for seed in range(10):
        for steps in (0, 2, 5, 15, 40):
            matcher = each.compiler.compile(Grammar("lark", source))
            each.wander(matcher, steps, seed)
            begun = time.thread_time()
            closing = matcher.closing()
            taken_s.append(time.thread_time() - begun)
            assert closing is not None
            for token in closing:
                matcher.accept(token)
            assert matcher.accepting
    assert sorted(taken_s)[len(taken_s) // 2] < 0.005


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ('start: "a".."c" "x"i N? ["q"] /a\\/b/ -> alias  // "no"\n%import common.INT -> N', {"xa/b", "axa/b", "/b"}),
        ('start: (a | "bb")~2..3 "."\na: "(" start ")"', {"bb.", "bbbb.", ").", "bbbb.)."}),
        ('!start: x{3}\n?x[suffix="!"]: /[0-9]*/\n', {"!", "!!!"}),
        ('start: a\na: "x" b\nb: "y" a', set()),
        ("start: %json nothing", set()),
        ('start: "\\x41\\u0042"', {"AB", "B"}),
    ],
)
def test_what_a_grammar_may_lack(source: str, texts: set[str]) -> None:
    found = continuations(source, lambda schema: "{}", 100)
    assert texts <= set(found) and sorted(found, key=len) == found
    assert texts or not found


def test_hostile_grammars_cost_little() -> None:
    begun = time.thread_time()
    for source in (
        "start: " + "(" * 50_000,
        "start: " + "a " * 50_000 + '\na: "x"',
        "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(5_000)) + '\na5000: "x"',
        "\n".join(f"a{i}: a{i - 1}" for i in range(5_000)) + '\nstart: a9 "x"',
        "start: " + " | ".join(f'"w{i}"' for i in range(6_000)),
        "start: " + "(" * 9_000 + '"x"' + ")~9" * 9_000,
    ):
        assert sum(map(len, continuations(source, lambda schema: "{}", 100))) < 1_000_000
    assert time.thread_time() - begun < 10
