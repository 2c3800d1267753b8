"""Schemas and patterns before they are compiled: what is refused is named, and hostile ones cost nothing."""

from __future__ import annotations

import json
import re
from datetime import date, datetime, time
from typing import Any

import pytest

from millis.engine import schema as limits
from millis.engine.schema import (
    check_choice,
    check_lark,
    check_pattern,
    check_schema,
    closed,
    expanded,
    of_a_type,
    patterns_of,
)
from millis.types import GrammarError


def nested(depth: int) -> str:
    return '{"items": ' * depth + "{}" + "}" * depth


def test_a_schema_comes_back_as_it_was() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "T", "type": "object",
        "properties": {"foo": {"enum": [1, "a", None]}, "pattern": {"pattern": "^a+$", "minLength": 2}},
        "required": ["foo"], "additionalProperties": False, "$defs": {"unknown": {"anyOf": [True, {"const": 3}]}},
    }  # fmt: skip
    assert check_schema(json.dumps(schema)) == schema
    assert check_schema("true") == {}
    assert patterns_of(schema) == ["^a+$"]
    form = {"type": "string", "format": "date-time"}
    assert patterns_of({"properties": {"format": form}}) == [check_schema(json.dumps(form))["pattern"]]


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"uniqueItems": True}, "schema.uniqueItems"),
        ({"properties": {"a": {"not": {}}}}, "schema.properties.a.not"),
        ({"anyOf": [{}, {"if": {}}]}, r"schema.anyOf\[1\].if"),
        ({"items": {"maxItem": 3}}, "schema.items.maxItem"),
        ({"x-guidance": {"lenient": True}}, "x-guidance"), ({"items": {"x-guidance": {}}}, "x-guidance"),
        ({"propertyNames": {"minLength": -3}}, "schema.propertyNames"), ({"propertyNames": {"format": "ipv4"}}, "N"),
        ({"propertyNames": {"maxLength": 3, "pattern": "a"}}, "N"), ({"propertyNames": {"maxLength": "3"}}, "Names"),
        ({"items": {"items": [{"type": "null"}]}}, "schema.items.items is a list.*prefixItems"),
        ({"propertyNames": False}, "propertyNames"),
        ({"propertyNames": {"enum": [1]}}, "propertyNames"), ({"propertyNames": {"$ref": "#/$defs/n"}}, "Names"),
        ({"propertyNames": {"$ref": "#/$defs/n", "maxLength": 3}, "$defs": {"n": {"enum": ["abcd"]}}}, "Names"),
        ({"propertyNames": {"enum": ["a"]}, "properties": {"b": {}}}, "propertyNames"),
        ({"properties": []}, "properties must be an object"),
        ({"anyOf": {}}, "anyOf must be a list"),
        ({"items": 3}, "items must be a schema"),
        ({"minLength": -1}, "minLength"), ({"maxItems": 1.5}, "maxItems"), ({"minItems": True}, "minItems"),
        ({"maxLength": 10**7}, "maxLength"), ({"minimum": 1e300}, "minimum"), ({"maximum": "3"}, "maximum"),
        ({"minProperties": 2}, "minProperties"),
        ({"multipleOf": 0}, "multipleOf"), ({"multipleOf": 1234567}, "multipleOf"),
        ({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}, "multipleOf"),
        ({"multipleOf": 1e-13}, "decimals"), ({"pattern": 3}, "pattern"),
        ([1], "must be a JSON object"), (False, "must be a JSON object"), ("x", "must be a JSON object"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(schema: Any, word: str) -> None:
    with pytest.raises(GrammarError, match=word):
        check_schema(json.dumps(schema))


def test_what_says_nothing_of_values_is_taken() -> None:
    spoken = {
        "nullable": True, "discriminator": {"propertyName": "k"}, "$anchor": "a", "x-order": 1, "example": 3,
        "contentEncoding": "base64", "contentMediaType": "image/png", "contentSchema": {"foo": 1}, "externalDocs": {},
    }  # fmt: skip
    assert check_schema(json.dumps({"type": "string", **spoken})) == {"type": "string", **spoken}
    assert check_schema('{"properties": {"x": {"format": "cuid", "uniqueItems": false}}}') == {"properties": {"x": {}}}
    assert check_schema('{"format": "ipv4", "propertyNames": {"type": "string"}}') == {"format": "ipv4"}


def test_names_that_are_listed_become_a_pattern() -> None:
    for names in ({"enum": ["a", "b.c"]}, {"$ref": "#/$defs/n"}, {"$ref": "#/$defs/n%20a"}):
        schema = {"propertyNames": names, "additionalProperties": {"type": "integer"}}
        listed = {"type": "string", "title": "N", "enum": ["a", "b.c"]}
        schema["$defs"] = defs = {"n": listed, "n a": listed}
        assert check_schema(json.dumps(schema)) == {
            "patternProperties": {r"^(a|b\.c)$": {"type": "integer"}}, "additionalProperties": False, "$defs": defs,
        }  # fmt: skip
    assert check_schema('{"propertyNames": {"const": "a"}}')["patternProperties"] == {"^(a)$": True}


def test_a_pattern_of_names_becomes_one_of_properties() -> None:
    schema = {"propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": {"type": "integer"}}
    patterns = {"^[a-z]+$": {"type": "integer"}}
    assert check_schema(json.dumps(schema)) == {"patternProperties": patterns, "additionalProperties": False}


@pytest.mark.parametrize(
    ("names", "good", "bad"),
    [
        ({"maxLength": 3}, ["", "a\nb", "東京都"], ["abcd"]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab"], ["a", "abcd"]),
        ({"minLength": 2}, ["abcdef"], ["a"]),
        ({"format": "date"}, ["2024-02-29"], ["2023-02-29", "x"]),
        ({"format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567", "x"]),
    ],
)
def test_lengths_and_formats_of_names_become_patterns(names: Any, good: list[str], bad: list[str]) -> None:
    found = check_schema(json.dumps({"propertyNames": names, "additionalProperties": {"type": "null"}}))
    ((pattern, value),) = found["patternProperties"].items()
    assert value == {"type": "null"} and found["additionalProperties"] is False and "propertyNames" not in found
    assert all(re.search(pattern, name) for name in good) and not any(re.search(pattern, name) for name in bad)


def kind(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"const": name}, **more}, "required": ["kind"]}


@pytest.mark.parametrize(
    ("branches", "apart"),
    [
        ([{"$ref": "#/$defs/node"}, {"type": "null"}], True),
        ([kind("a"), kind("b", next={"$ref": "#/$defs/node"}), {"$ref": "#/$defs/node"}], True),
        ([{"enum": ["a", "b"]}, {"const": "c"}, {"type": "integer"}], False),  # an enum names no type
        ([{"type": "string", "enum": ["a", "b"]}, {"type": "string", "const": "c"}, {"type": "integer"}], True),
        ([{"type": "integer"}, {"type": "number"}], False),
        ([{"type": ["string", "null"]}, {"type": "null"}], False),
        ([{"enum": ["a", 1]}, {"const": "b"}], False),
        ([kind("a"), kind("a")], False),
        ([kind("a"), {**kind("b"), "required": []}], False),
        ([{"properties": {"kind": {"const": "a"}}, "required": ["kind"]}, kind("b")], False),
        ([{"$ref": "#/$defs/missing"}, {"type": "null"}], False),
        ([{"$ref": 3}, {"required": 3, "properties": [], "type": {}}, True], False),
    ],
)
def test_a_oneof_of_branches_that_are_plainly_apart_is_an_anyof(branches: list[Any], apart: bool) -> None:
    schema = {"oneOf": branches, "$defs": {"node": kind("node")}}
    try:
        found = check_schema(json.dumps(schema))
    except GrammarError:
        assert not apart
    else:
        assert ("anyOf" in found, "oneOf" in found) == (apart, not apart)


def test_references_are_written_as_uris() -> None:
    assert check_schema('{"$ref": "#/$defs/列 [a]%20"}') == {"$ref": "#/$defs/%E5%88%97%20%5Ba%5D%20"}


@pytest.mark.parametrize("value", ["123456789012345678", "[1, -9007199254740993]", '[{"id": [9007199254740993]}]'])
def test_whole_numbers_that_would_be_rounded_are_refused(value: str) -> None:
    with pytest.raises(GrammarError, match="beyond 2\\^53"):
        check_schema(f'{{"{"enum" if value.startswith("[") else "const"}": {value}}}')


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ("date", "0001-01-01 2024-02-29 2000-02-29 1999-12-31", "0000-01-01 2023-02-29 1900-02-29 2024-04-31 2024-1-1"),
        ("time", "00:00:00Z 23:59:59.123456+08:00", "24:00:00Z 23:59:60Z 10:00Z 10:00:00"),
        ("date-time", "2024-02-29T10:00:00Z", "2024-02-29t10:00:00z 2024-02-30T10:00:00Z 2024-02-29"),
    ],
)
def test_dates_and_times_are_those_that_python_reads(form: str, good: str, bad: str) -> None:
    pattern = check_schema(json.dumps({"format": form}))["pattern"]
    reader = {"date": date, "time": time, "date-time": datetime}[form]
    for text in good.split():
        assert re.search(pattern, text) and reader.fromisoformat(text)
    assert not any(re.search(pattern, text) for text in bad.split())
    assert check_schema(json.dumps({"format": form, "pattern": "^2"}))["pattern"] == "^2"


def test_objects_are_closed_unless_they_say_otherwise() -> None:
    inner = {"properties": {"properties": {"type": "string"}}}
    schema = {
        "properties": {"a": {"items": inner}, "b": {"properties": {}, "additionalProperties": True}},
        "$defs": {"d": {"anyOf": [inner, {"type": "object"}]}}, "default": {"properties": {}},
    }  # fmt: skip
    shut = {**inner, "additionalProperties": False}
    assert closed(schema) == {
        "properties": {"a": {"items": shut}, "b": {"properties": {}, "additionalProperties": True}},
        "$defs": {"d": {"anyOf": [shut, {"type": "object"}]}}, "default": {"properties": {}},
        "additionalProperties": False,
    }  # fmt: skip
    assert "additionalProperties" not in schema and "additionalProperties" not in inner
    for joined in ({"allOf": [inner, inner]}, {"items": {**inner, "anyOf": [inner, {}]}}, {**inner, "$ref": "#"}):
        assert closed(joined) == joined
    deep = json.loads(nested(500))
    assert closed(deep) is deep
    assert of_a_type({"type": "array", "uniqueItems": True, "items": inner}) == {"type": "array", "items": shut}


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("{", "not JSON"), ("", "not JSON"), ("{'a': 1}", "not JSON"), ('{"minimum": NaN}', "NaN"),
        ('{"type": "null", "type": "object"}', "stands twice"), ('{"const": "\ud800"}', "surrogate"),
        ('{"minimum": ' + "9" * 5000 + "}", "not JSON|minimum"),
        (nested(limits.MAX_DEPTH + 1), "levels deep"), (nested(10_000), "levels deep"), ("[" * 100_000, "levels deep"),
        ('"' + "a" * limits.MAX_BYTES + '"', "bytes"),
        (json.dumps({"enum": list(range(limits.MAX_VALUES + 1))}), "enum values"),
        (json.dumps({"anyOf": [{"properties": {f"p{i}": {} for i in range(400)}} for _ in range(3)]}), "properties"),
        (json.dumps({"pattern": "a" * (limits.MAX_PATTERN + 1)}), "characters"),
        (json.dumps({"pattern": "a{1000000}"}), "repetitions"),
        (json.dumps({"patternProperties": {"((a{0,100}){0,100}){0,100}": {}}}), "repetitions"),
    ],
)  # fmt: skip
def test_limits_and_malformed_texts(source: str, word: str) -> None:
    with pytest.raises(GrammarError, match=word):
        check_schema(source)


@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        ("abc", 3), ("a{5}", 5), ("(ab){3}c", 7), ("a{2,7}b{3}", 10), ("((a{2}){3}){4}", 24), (r"\{9\}", 3),
        ("[a-z{}]{4}", 4), (r"[\]{9}]{2}", 2), (r"\p{Lu}{3}", 3), ("a{0}", 1), ("(((", 0), (")))a", 4), ("a{3,}", 3),
    ],
)  # fmt: skip
def test_repetitions_are_written_out(pattern: str, length: int) -> None:
    assert expanded(pattern) == length


def test_long_hostile_patterns_are_looked_at_once() -> None:
    for part in ("[", "(", "\\", "{", "a{9}", '"', "/", "<", "~1..", "%json ", "[x"):
        source = "start: " + part * (limits.MAX_BYTES // len(part.encode()) - 10)
        try:
            check_lark(source)
        except GrammarError:
            pass
    for part in ("[", "(", "a{9}", "(a{9}"):
        expanded(part * limits.MAX_PATTERN)


def test_choices() -> None:
    assert check_choice('["a", "b c"]') == ["a", "b c"]
    for wrong in ("[]", '"a"', '["a", ""]', "[1]", "{}", "nonsense", json.dumps([str(i) for i in range(3000)])):
        with pytest.raises(GrammarError, match="choice"):
            check_choice(wrong)


def test_lark_grammars() -> None:
    plain = 'start: "a" /x{3}/ B  // "c\n# [temperature=1]: <|im_end|> %llguidance\nB: "<b>" | "\\"%json"\n'
    assert check_lark(plain) == plain
    assert check_lark('start: before "b"\nbefore[suffix="<c>"]: /.*/').startswith("start")
    checked = check_lark('start: %json {"type": "string"} "x"\n')
    assert checked.startswith('start: %json {"type": "string", "x-guidance"') and checked.endswith(' "x"\n')
    for wrong, word in (
        ('start: %json {"foo": 1}', "schema.foo"), ("start: %json {", "%json"), ("start: %json nope", "%json"),
        ('start: %json {"x-guidance": {"lenient": true}}', "x-guidance"), ("start: " + "%json " + nested(99), "deep"),
        ("%llguidance {}\nstart: A", "llguidance"), ('start: %regex {"a": 1}', "%regex"), ("a[temperature=1]: B", "te"),
        ("start: <|im_end|>", "im_end"), ('start: "a"~1000000', "repetition"), ('start: "a"{5,100000}', "repetition"),
        ("start: /(a{1000}){1000}/", "written out"),
    ):  # fmt: skip
        with pytest.raises(GrammarError, match=word):
            check_lark(wrong)


def test_patterns_must_be_texts() -> None:
    with pytest.raises(GrammarError, match="where"):
        check_pattern(3, "where")  # type: ignore[arg-type]
