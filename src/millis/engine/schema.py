"""What may be asked of a schema or a pattern, checked before it is compiled. Pure: text in, a checked schema out.

A keyword that would not be enforced is refused by its name; what would take long to compile, by the limit it exceeds.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import combinations
from typing import Any

from millis.types import GrammarError

MAX_BYTES = 131_072  # of any grammar's source
MAX_DEPTH = 64  # of nested objects and lists in a schema's text
MAX_PATTERN = 2_048  # characters of a regular expression
MAX_EXPANDED = 5_000  # characters of a regular expression once its repetitions are written out
MAX_PROPERTIES = 1_000  # of all objects of a schema together
MAX_VALUES = 2_000  # of all enums of a schema together, or of a choice
MAX_COUNT = 1_000_000  # of characters, items or properties that a schema may name
MAX_MULTIPLE = 10_000  # the least common multiple of a schema's multipleOf, in units of its last decimal
MAX_EXACT = 2**53  # of whole numbers that are written as they are
MAX_BRANCHES = 50  # of a oneOf, to be compared with each other
MAX_BOUND = 10**18  # of a number's minimum and maximum

# As json.dumps writes, so as models have read it most often. No other whitespace: small models lose themselves in it.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Keywords that say nothing of which values fit. `nullable` (OpenAPI 3.0) would let in null, which is then not written.
ANNOTATIONS = frozenset(
    "title description default examples $schema $id $anchor $comment deprecated readOnly writeOnly contentEncoding "
    "contentMediaType contentSchema discriminator example externalDocs nullable xml".split()
)
# Formats that llguidance enforces. Others are annotations, too: JSON Schema lets anybody invent one.
FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid uri".split())
# Of dates and times, what the standard libraries of most languages read: no year 0, no 30 February, no 60th second.
_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR = "(?:[0-9]{2}(?:[2468][048]|0[48]|[13579][26])|(?:[2468][048]|0[48]|[13579][26])00)"
_DAY = (
    "(?:(?:1[02]|0[13578])-(?:0[1-9]|[12][0-9]|3[01])|(?:11|0[469])-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"(?:{_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_HOUR = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = f"{_HOUR}:[0-5][0-9](?:\\.[0-9]{{1,6}})?(?:Z|[+-]{_HOUR})"
_FORMAT_PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
_PATTERNS = {**_FORMAT_PATTERNS, "uuid": "^[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"}
_ONE = frozenset(("items", "additionalProperties"))  # keywords that hold a schema
_MANY = frozenset(("anyOf", "oneOf", "allOf", "prefixItems"))  # a list of schemas
_NAMED = frozenset(("properties", "patternProperties", "$defs", "definitions"))  # schemas by name
_NAMERS = frozenset(("properties", "patternProperties"))
_COUNTS = frozenset(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"))
_BOUNDS = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"))
_PLAIN = frozenset(("type", "required", "format", "$ref"))  # checked where they are compiled


@dataclass(slots=True)
class _Sums:
    properties: int = 0
    values: int = 0
    multiples: list[Decimal] = field(default_factory=list)


def check_size(source: str, what: str) -> None:
    """GrammarError where the source is not text, not valid Unicode, or too long."""
    if not isinstance(source, str):
        raise GrammarError(f"the {what} must be a text, not {type(source).__name__}")
    try:
        size = len(source.encode())
    except UnicodeEncodeError:
        raise GrammarError(f"the {what} holds a lone surrogate; send valid Unicode") from None
    _limit(f"the {what}", size, MAX_BYTES, "bytes")


def read_json(source: str, what: str) -> Any:
    """The value of a JSON text; GrammarError where it is malformed, says a name twice, or is nested too deeply."""
    check_size(source, what)
    try:
        value = _DECODER.decode(source)
    except RecursionError:
        raise GrammarError(f"the {what} is nested more than {MAX_DEPTH} levels deep; make it flatter") from None
    except ValueError as error:
        if isinstance(error, GrammarError):
            raise
        raise GrammarError(f"the {what} is not JSON: {error}") from None
    if _depth(value) > MAX_DEPTH:
        raise GrammarError(f"the {what} is nested more than {MAX_DEPTH} levels deep; make it flatter")
    return value


def check_schema(source: str) -> dict[str, Any]:
    """The schema, where everything in it can be enforced and has a bearable size. GrammarError names what has not."""
    return check_value(read_json(source, "schema"))


def check_value(schema: Any) -> dict[str, Any]:
    """As check_schema, for a schema that is a value already, in which keywords may be rewritten."""
    if schema is True:
        return {}
    if _depth(schema) > MAX_DEPTH:
        raise GrammarError(f"the schema is nested more than {MAX_DEPTH} levels deep; make it flatter")
    if not isinstance(schema, dict):
        raise GrammarError(f"a schema must be a JSON object, not {json.dumps(schema):.40}")
    for part in _parts(schema):
        _simplify(part, schema)
    sums = _Sums()
    _walk(schema, "schema", sums)
    _limit("the schema", sums.properties, MAX_PROPERTIES, "properties")
    _limit("the schema", sums.values, MAX_VALUES, "enum values")
    _check_multiples(sums.multiples)
    return schema


def closed(schema: Any) -> Any:
    """A schema whose objects hold the properties that they name and no others, unless they say so.

    It stays as it is where it joins schemas (allOf, or properties beside anyOf, oneOf or $ref): each would forbid what
    the other names.
    """
    if _depth(schema) > MAX_DEPTH or any(_joins(part) for part in _parts(schema)):
        return schema
    copied = copy.deepcopy(schema)
    for part in _parts(copied):
        if "properties" in part and "patternProperties" not in part:
            part.setdefault("additionalProperties", False)
    return copied


def of_a_type(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema that pydantic gives for a type: closed, and without uniqueItems, as it makes a set of what comes."""
    found: dict[str, Any] = closed(schema)
    for part in _parts(found):
        part.pop("uniqueItems", None)
    return found


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all those in it."""
    if not isinstance(schema, dict):
        return
    yield schema
    for key, value in schema.items():
        held = [value] if key in _ONE else value if key in _MANY else ()
        if key in _NAMED and isinstance(value, dict):
            held = value.values()
        for part in held if isinstance(held, Iterable) else ():
            yield from _parts(part)


def _joins(part: dict[str, Any]) -> bool:
    joined = part.get("allOf", ())
    beside = "properties" in part and not part.keys().isdisjoint(("anyOf", "oneOf", "$ref"))
    return beside or not isinstance(joined, Sequence) or len(joined) > 1


def _simplify(part: dict[str, Any], root: dict[str, Any]) -> None:
    """Takes out what allows every value, and says in patternProperties which names propertyNames lists."""
    name = part.get("format")
    if isinstance(name, str) and name not in FORMATS:
        del part["format"]
    elif name in _FORMAT_PATTERNS:
        part.setdefault("pattern", _FORMAT_PATTERNS[name])
    if isinstance(ref := part.get("$ref"), str):
        part["$ref"] = _NOT_OF_URIS.sub(lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), ref)
    branches = part.get("oneOf")
    if isinstance(branches, list) and len(branches) <= MAX_BRANCHES and "anyOf" not in part:
        if all(_disjoint(one, other, root) for one, other in combinations(branches, 2)):
            part["anyOf"] = part.pop("oneOf")
    if part.get("uniqueItems") is False:
        del part["uniqueItems"]
    names = _referred(part.get("propertyNames"), root)
    if not isinstance(names, dict) or names.get("type", "string") != "string":
        return
    said = list(names.keys() - ANNOTATIONS - {"type"})
    if not said:
        del part["propertyNames"]
    elif said in (["enum"], ["const"]) and part.keys().isdisjoint(_NAMERS):
        texts = names["enum"] if said == ["enum"] else [names["const"]]
        if isinstance(texts, list) and all(isinstance(one, str) for one in texts):
            _name_by(part, f"^({any_of(texts)})$")
    elif (pattern := _pattern_of_names(names, said)) and part.keys().isdisjoint(_NAMERS):
        _name_by(part, pattern)


def _pattern_of_names(names: dict[str, Any], said: list[str]) -> str | None:
    """The pattern of names that a propertyNames of these keywords allows; None where there is none."""
    if said == ["pattern"]:
        return names["pattern"] if isinstance(names["pattern"], str) else None
    if said == ["format"] and isinstance(names["format"], str):
        return _PATTERNS.get(names["format"])
    least, most = names.get("minLength", 0), names.get("maxLength", "")
    if set(said) <= {"minLength", "maxLength"} and type(least) is int and (most == "" or type(most) is int):
        return f"^(?s:.{{{least},{most}}})$" if least >= 0 and (most == "" or most >= least) else None
    return None


def _name_by(part: dict[str, Any], pattern: str) -> None:
    del part["propertyNames"]
    part["patternProperties"] = {pattern: part.get("additionalProperties", True)}
    part["additionalProperties"] = False


def _disjoint(one: Any, other: Any, root: dict[str, Any], levels: int = 4) -> bool:
    """Whether it is plain that no value fits both: by their types, values, or those of a property that both require."""
    one, other = _referred(one, root), _referred(other, root)
    if not isinstance(one, dict) or not isinstance(other, dict) or not levels:
        return False
    types, others = _types(one), _types(other)
    if types and others and not types & others:
        return True
    values, other_values = _texts(one), _texts(other)
    if values and other_values and not values & other_values:
        return True
    if types != {"object"} or others != {"object"}:
        return False
    required, properties = _shared(one, other, "required", list), _shared(one, other, "properties", dict)
    return any(
        _disjoint(one["properties"][name], other["properties"][name], root, levels - 1)
        for name in required
        if isinstance(name, str) and name in properties
    )


def _shared(one: dict[str, Any], other: dict[str, Any], key: str, kind: type[list[Any]] | type[dict[str, Any]]) -> Any:
    """The names that both hold under a keyword."""
    held, others = one.get(key), other.get(key)
    return [name for name in held if name in others] if isinstance(held, kind) and isinstance(others, kind) else []


def _referred(schema: Any, root: dict[str, Any]) -> Any:
    """What a $ref that stands alone refers to in the schema's own definitions; else the schema itself."""
    if isinstance(schema, dict) and not schema.keys() - ANNOTATIONS - {"$ref"} and isinstance(schema.get("$ref"), str):
        _, _, path = _decoded(schema["$ref"]).partition("#/")
        where, _, name = path.partition("/")
        named = root.get(where) if where in ("$defs", "definitions") and schema["$ref"].startswith("#") else None
        return named.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(named, dict) else None
    return schema


def _decoded(uri: str) -> str:
    return re.sub(rb"%([0-9A-Fa-f]{2})", lambda found: bytes([int(found[1], 16)]), uri.encode()).decode(
        errors="replace"
    )


_NOT_OF_URIS = re.compile(r"[^A-Za-z0-9%!#$&'()*+,/:;=?@~._-]")


def _types(schema: dict[str, Any]) -> set[str]:
    """The types that a schema names; none where it does not say. A whole number is a number."""
    found = schema.get("type")
    names = found if isinstance(found, list) else [found]
    return {"number" if name == "integer" else name for name in names if isinstance(name, str)}


def _texts(schema: dict[str, Any]) -> set[str]:
    """The values of a schema that allows certain texts only; none where it allows others."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return set(values) if isinstance(values, list) and all(isinstance(value, str) for value in values) else set()


def any_of(texts: Sequence[str]) -> str:
    """A pattern of exactly these texts."""
    return "|".join(re.sub(r"[\\.+*?()|\[\]{}^$/&~#-]", r"\\\g<0>", text) for text in texts)


def patterns_of(schema: Any) -> list[str]:
    """The patterns of strings anywhere in a checked schema, those of formats among them, each once."""
    if not isinstance(schema, (dict, list)):
        return []
    said = schema if isinstance(schema, dict) else {}
    written = (said.get("pattern"), _PATTERNS.get(said["format"]) if isinstance(said.get("format"), str) else None)
    found = [pattern for pattern in written if isinstance(pattern, str)]
    for item in schema.values() if isinstance(schema, dict) else schema:
        found += patterns_of(item)
    return list(dict.fromkeys(found))


def check_choice(source: str) -> list[str]:
    """The texts of a choice."""
    texts = read_json(source, "choice")
    if not isinstance(texts, list) or not texts or any(not isinstance(text, str) or not text for text in texts):
        raise GrammarError("a choice must be a JSON list of texts, none of them empty")
    _limit("the choice", len(texts), MAX_VALUES, "texts")
    return texts


def check_pattern(pattern: str, where: str) -> None:
    """GrammarError where a regular expression is too long, or would be with its repetitions written out."""
    if not isinstance(pattern, str):
        raise GrammarError(f"{where} must be a text, not {json.dumps(pattern):.40}")
    _limit(where, len(pattern), MAX_PATTERN, "characters")
    _limit(where, expanded(pattern), MAX_EXPANDED, "characters with its repetitions written out")


def check_lark(source: str, check: Callable[[dict[str, Any]], None] | None = None) -> str:
    """The Lark grammar with every schema in it as check_schema has it. GrammarError where it is too large, or asks for
    what the engine would not do, or where `check` raises it for a schema; it names that one's rule.

    A pattern becomes one terminal with the texts and patterns behind it: by itself it would take what it can of them.
    """
    check_size(source, "grammar")
    whole, rules, at = "", "", 0  # `rules`: without texts, patterns, comments and schemas
    joined, name = list[str](), "JOINED"
    while name in source:
        name += "_"
    while found := _LARK.search(source, at):
        rules += source[at : found.start()] + '""'
        whole += source[at : found.start()]
        at = found.end()
        behind = _BEHIND.match(source, at) if found["pattern"] and "%ignore" not in source else None
        at = behind.end() if behind else at
        for part in _LARK.finditer(source, found.start(), at):
            if part["pattern"]:
                check_pattern(part["pattern"], "a pattern of the grammar")
        if found["json"]:
            try:
                schema, at = _schema_at(source, at)
                if check is not None:
                    check(schema)
            except GrammarError as error:
                error.rule = ([None] + _RULE.findall(rules))[-1]
                raise
            whole += f"%json {json.dumps({**schema, 'x-guidance': JSON_STYLE})}"
        elif behind:
            whole += f"{name}{len(joined)}"
            joined.append(f"\n{name}{len(joined)}: {found[0]}{behind[0]}")
        else:
            whole += found[0]
    _check_rules(rules + source[at:])
    return whole + source[at:] + "".join(joined)


_RULE = re.compile(r"^\s*([A-Za-z_]\w*)[^:\n]*:", re.MULTILINE)


def _schema_at(source: str, at: int) -> tuple[dict[str, Any], int]:
    """The schema that begins there, checked, and where it ends."""
    try:
        schema, end = _DECODER.raw_decode(source, at)
    except RecursionError:
        raise GrammarError(f"a schema is nested more than {MAX_DEPTH} levels deep; make it flatter") from None
    except ValueError as error:
        raise error if isinstance(error, GrammarError) else GrammarError(f"%json: {error}") from None
    if isinstance(schema, dict) and schema.get("x-guidance") == JSON_STYLE:
        del schema["x-guidance"]
    return check_value(schema), end


def _check_rules(rules: str) -> None:
    for word in ("%llguidance", "%regex"):
        if word in rules:
            raise GrammarError(f"{word} is not supported in a Lark grammar; use rules, terminals and %json only")
    for attributes in re.findall(r"\[([^\[\]\n]*)\]\s*:", rules):
        for name in re.findall(r"[a-z_]+", attributes):
            if name not in ("suffix", "stop", "lazy", "max_tokens"):
                raise GrammarError(f"the attribute {name:.40} is not supported in a Lark grammar; leave it out")
    if found := re.search(r"<[^<>\n]{1,80}>", rules):
        raise GrammarError(f"{found[0]:.40} is not supported in a Lark grammar: write texts, no special tokens")
    for bounds in re.findall(r"\{\s*(\d+)(?:\s*,\s*(\d+))?\s*\}|~\s*(\d+)(?:\s*\.\.\s*(\d+))?", rules):
        most = max(int(number[:9]) for number in bounds if number)
        _limit("a repetition of the grammar", most, MAX_EXPANDED, "times")


# The flags of a pattern, and what stands behind it: no operator belongs to any of that, as ? would.
_BEHIND = re.compile(r"""[a-z]*+(?:\s*+(?:"(?:[^"\\\n]|\\.)*+"|/(?:[^/\\\n]|\\.)++/)[a-z]*+(?!\s*(?:[?*+~{]|\.\.)))+""")
# Schemas, texts, patterns and comments of a Lark grammar. Each takes what is unfinished, too: nothing is tried twice.
_LARK = re.compile(r"""(?P<json>%json\s*)|"(?:[^"\\\n]|\\.)*"?|(?://|\#)[^\n]*|/(?P<pattern>(?:[^/\\\n]|\\.)+)/?""")


def expanded(pattern: str) -> int:
    """About how many characters a regular expression has once x{n,m} is written as m times x."""
    open_groups: list[int] = []  # characters before each group that is open
    total, last = 0, 0  # up to the last atom; the last atom
    for part in _PARTS.finditer(pattern):
        text = part.group()
        if text == "(":
            open_groups.append(total + last)
            total, last = 0, 0
        elif text == ")" and open_groups:
            total, last = open_groups.pop(), total + last
        elif part["low"]:
            last *= max(1, int(part["low"][:9]), int((part["high"] or "0")[:9]))
        else:
            total, last = total + last, 1
    return sum(open_groups) + total + last


_PARTS = re.compile(r"\{(?P<low>\d+)(?:,(?P<high>\d*))?\}|\\[pP]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)


def _walk(schema: Any, path: str, sums: _Sums) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise GrammarError(f"{path} must be a schema (an object, true or false), not {json.dumps(schema):.40}")
    for key, value in schema.items():
        where = f"{path}.{key:.40}"
        if key == "items" and isinstance(value, list):
            raise GrammarError(f"{where} is a list, as in drafts before 2020-12; call it prefixItems")
        if key in _ONE:
            _walk(value, where, sums)
        elif key in _MANY:
            for i, item in enumerate(_typed(value, list, where)):
                _walk(item, f"{where}[{i}]", sums)
        elif key in _NAMED:
            for name, item in _typed(value, dict, where).items():
                if key == "patternProperties":
                    check_pattern(name, f"{where}: a name")
                sums.properties += key in ("properties", "patternProperties")
                _walk(item, f"{where}.{name:.40}", sums)
        elif key not in ANNOTATIONS and (not key.startswith("x-") or key == "x-guidance"):
            _leaf(key, value, where, sums)


def _leaf(key: str, value: Any, where: str, sums: _Sums) -> None:
    if key in ("enum", "const"):
        sums.values += len(_typed(value, list, where)) if key == "enum" else 0
        _check_exact(value, where)
    elif key == "pattern":
        check_pattern(value, where)
    elif key in _COUNTS:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
            raise GrammarError(f"{where} must be a whole number in [0, {MAX_COUNT}], not {json.dumps(value):.40}")
        if key == "minProperties" and value > 1:
            raise GrammarError(f"{where} above 1 cannot be enforced, as a name may repeat; use required")
    elif key in _BOUNDS:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_BOUND:
            raise GrammarError(f"{where} must be a number in [-1e18, 1e18], not {json.dumps(value):.40}")
    elif key == "multipleOf":
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_BOUND:
            raise GrammarError(f"{where} must be a number above 0, not {json.dumps(value):.40}")
        sums.multiples.append(Decimal(str(value)))
    elif key not in _PLAIN:
        raise GrammarError(f"{where}: the keyword is not supported and would be ignored; leave it out")


def _check_exact(value: Any, where: str) -> None:
    """GrammarError for a whole number that would be written rounded."""
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
        if isinstance(item, (dict, list)):
            _check_exact(item, where)
        elif isinstance(item, int) and abs(item) > MAX_EXACT:
            raise GrammarError(f"{where}: {item} is beyond 2^53 and would be rounded; make it a text")


def _check_multiples(multiples: list[Decimal]) -> None:
    """Each becomes an automaton of that many states; two of them that meet, one of as many as their common multiple."""
    if not multiples:
        return
    unit = min(int(one.as_tuple().exponent) for one in multiples)
    if unit < -12:
        raise GrammarError("multipleOf has more than 12 decimals; take a coarser one")
    common = math.lcm(*(int(one.scaleb(-min(0, unit))) for one in multiples))
    _limit("multipleOf", common, MAX_MULTIPLE, "units of the last decimal, all of the schema taken together")


def _typed(value: Any, kind: type[list[Any]] | type[dict[str, Any]], where: str) -> Any:
    if not isinstance(value, kind):
        name = "a list" if kind is list else "an object"
        raise GrammarError(f"{where} must be {name}, not {json.dumps(value):.40}")
    return value


def _limit(what: str, count: int, most: int, unit: str) -> None:
    if count > most:
        raise GrammarError(f"{what} has {count} {unit}; the limit is {most}")


def _depth(value: Any) -> int:
    level, deepest = [value], 0
    while level := [item for item in level if isinstance(item, (dict, list))]:
        deepest += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return deepest


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise GrammarError(f"the name {twice!r:.40} stands twice in one object; each may stand once")
    return found


def _no_constant(name: str) -> Any:
    raise GrammarError(f"{name} is not JSON; leave it out")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)
