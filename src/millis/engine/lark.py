"""Texts behind which an answer of a Lark grammar may end, for the closing of answers. Pure, and no more than proposals.

Of every symbol the shortest text is found, and of every rule the shortest text that may follow it (Knuth, 1977: "A
generalization of Dijkstra's algorithm"). An answer then lacks what is left of some alternative, and what follows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from millis.engine.pattern import endings, short_match

MOST_CHARACTERS = 4_096  # of a text; longer ones are given up
MOST_IN_ALL = 65_536  # characters of a grammar's texts, about; its first rules count most
ROUNDS = 20  # over all rules, at most
# Of the names that %import common brings; the others match one letter.
_COMMON = {"ESCAPED_STRING": '""', "FLOAT": "0.", "DECIMAL": "0.", "WS": " ", "WS_INLINE": " "}
_COMMON |= {"NEWLINE": "\n", "LF": "\n", "CR": "\r"}
_COMMON |= dict.fromkeys(("SIGNED_INT", "SIGNED_NUMBER", "INT", "NUMBER", "DIGIT", "HEXDIGIT"), "0")
_TOKENS = re.compile(
    r"""(?P<text>"(?:[^"\\\n]|\\.)*")(?:\s*\.\.\s*"(?:[^"\\\n]|\\.)*")?i? | /(?P<pattern>(?:[^/\\\n]|\\.)+)/[a-z]*
    | (?P<skipped>(?://|\#)[^\n]* | ->\s*\w+ | %(?!json)\w+[^\n]*) | (?P<json>%json\s*)
    | [?!]?(?P<rule>[A-Za-z_][\w-]*)\s*(?:\[(?P<attributes>[^\]\n]*)\]\s*)?: | (?P<name>[A-Za-z_][\w-]*)
    | (?:\{\s*|~\s*)(?P<least>\d+)(?:\s*(?:,|\.\.)\s*\d*)?\s*\}? | [()\[\]|?*+]""",
    re.VERBOSE,
)
_SUFFIX = re.compile(r'\b(?:suffix|stop)\s*=\s*("(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)+/|\w+)')

Sequence = list[tuple[str, int]]  # symbols, and how often each has to stand there at least


@dataclass(slots=True)
class _Rules:
    """A grammar: the alternatives of every rule, and texts of what is no rule."""

    alternatives: dict[str, list[Sequence]] = field(default_factory=dict)
    suffixes: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    ignored: str = ""  # a symbol that may stand between any two


def continuations(source: str, json_text: Callable[[str], str], most: int) -> list[str]:
    """What an answer may lack where it stands, shortest first; `most` of an alternative's endings among them.

    json_text: a short answer of a JSON schema.
    """
    rules = _parsed(source, json_text)
    _shorten(rules)
    follows = _follows(rules)
    gaps = dict.fromkeys(("", rules.texts.get(rules.ignored, "")))  # a gap ends a pattern that matches what follows
    found: dict[str, None] = {}
    left = MOST_IN_ALL
    for name, alternatives in rules.alternatives.items():
        for sequence in alternatives if name in follows else ():
            if left > 0 and (text := _text(rules, name, sequence)) is not None:
                some = [gap + ending + follows[name] for ending in ("", *endings(text, most)) for gap in gaps]
                found |= dict.fromkeys(some)
                left -= sum(map(len, some))
    return sorted(filter(None, found), key=len)


def _parsed(source: str, json_text: Callable[[str], str]) -> _Rules:
    """The rules; each group becomes one of its own."""
    rules = _Rules()
    open_rules = ["start"]  # the rule that is written, and the groups in it that are open
    at = 0
    while found := _TOKENS.search(source, at):
        token, at = found[0], found.end()
        sequence = rules.alternatives.setdefault(open_rules[-1], [[]])[-1]
        if found["skipped"]:
            for name in re.findall(r"[A-Z_]+", token if token.startswith("%import") else ""):
                rules.texts.setdefault(name, _COMMON.get(name, "a"))
            if token.startswith("%ignore"):
                rules.ignored = _terminal(rules, token.removeprefix("%ignore").strip())
        elif name := found["rule"]:
            open_rules = [name]
            rules.alternatives[name] = [[]]
            if suffix := _SUFFIX.search(found["attributes"] or ""):
                rules.suffixes[name] = _terminal(rules, suffix[1])
        elif found["json"]:
            try:
                schema, at = json.JSONDecoder().raw_decode(source, at)
            except ValueError:
                continue
            if isinstance(schema, dict):
                schema.pop("x-guidance", None)  # how it is spaced
            rules.texts[token := f"%json {found.start()}"] = json_text(json.dumps(schema))
            sequence.append((token, 1))
        elif token in ("(", "["):
            open_rules.append(f"({found.start()}")
            rules.alternatives[open_rules[-1]] = [[]]
        elif token in (")", "]"):
            if len(open_rules) > 1:
                group = open_rules.pop()
                rules.alternatives[open_rules[-1]][-1].append((group, int(token == ")")))
        elif token == "|":
            rules.alternatives[open_rules[-1]].append([])
        elif found["least"] or token in ("?", "*", "+"):
            if sequence:
                sequence[-1] = (sequence[-1][0], int((found["least"] or str(int(token == "+")))[:9]))
        else:
            sequence.append((_terminal(rules, token), 1))
    return rules


def _terminal(rules: _Rules, token: str) -> str:
    """The symbol of a text, a pattern or a name."""
    found = _TOKENS.match(token)
    if found and found["text"]:
        try:
            rules.texts[token] = str(json.loads(found["text"]))
        except ValueError:
            rules.texts[token] = short_match(found["text"][1:-1])  # its escapes are those of patterns
    elif found and found["pattern"]:
        rules.texts[token] = short_match(found["pattern"])
    return token


def _shorten(rules: _Rules) -> None:
    """Finds the shortest text of each rule that has one."""
    for _ in range(ROUNDS):
        shorter = False
        for name, alternatives in reversed(rules.alternatives.items()):  # rules are made of later ones, mostly
            texts = [text for one in alternatives if (text := _text(rules, name, one)) is not None]
            best = min(texts, key=len, default=None)
            if best is not None and (name not in rules.texts or len(best) < len(rules.texts[name])):
                rules.texts[name], shorter = best, True
        if not shorter:
            return


def _follows(rules: _Rules) -> dict[str, str]:
    """The shortest text that may follow each rule up to the answer's end."""
    follows = {"start": ""}
    for _ in range(ROUNDS):
        shorter = False
        for name, alternatives in rules.alternatives.items():
            for sequence in alternatives if name in follows else ():
                text: str | None = rules.texts.get(rules.suffixes.get(name, ""), "") + follows[name]
                for symbol, least in reversed(sequence):
                    if text is None:
                        break
                    if symbol in rules.alternatives and len(text) < len(follows.get(symbol, text + "+")):
                        follows[symbol], shorter = text, True
                    text = _joined(rules, symbol, least, text)
        if not shorter:
            break
    return follows


def _text(rules: _Rules, name: str, sequence: Sequence) -> str | None:
    """The shortest text of a rule's alternative; None where none is known, or it is too long."""
    text: str | None = rules.texts.get(rules.suffixes.get(name, ""), "")
    for symbol, least in reversed(sequence):
        if text is not None:
            text = _joined(rules, symbol, least, text)
    return text


def _joined(rules: _Rules, symbol: str, least: int, rest: str) -> str | None:
    """What follows, behind a symbol as often as it has to stand there; None where that is unknown or too long."""
    text = rules.texts.get(symbol) if least else ""
    if text is None or len(text) * least + len(rest) > MOST_CHARACTERS:
        return None
    return text * least + rest
