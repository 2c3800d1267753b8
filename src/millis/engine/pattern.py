"""A short text that a regular expression matches, for the closing of answers. Pure, and no more than a proposal."""

from __future__ import annotations

import re
from collections.abc import Iterator

_MEMBERS = "a0A -_.:/@\n一"  # what a class is tried with, besides what it lists
_CONTROL = {"\\n": "\n", "\\r": "\r", "\\t": "\t", "\\f": "\f", "\\v": "\v"}
_CLASSES = frozenset("dDwWsSpP")
_TOKENS = re.compile(
    r"""\(\?[a-z-]*\) | \((?:\?(?:P?<\w+>|[a-z-]*:))? | \{(?P<least>\d+)(?:,\d*)?\} | \[\^?\]?(?:\\.|[^\]\\])*\]
    | \\(?:[pP](?:\{[^}]*\}|.) | x[0-9A-Fa-f]{2} | u[0-9A-Fa-f]{4} | [xu]\{[0-9A-Fa-f]+\} | .) | .""",
    re.DOTALL | re.VERBOSE,
)

_PROPERTY = re.compile(r"\\(?:p(?:\{([^}]*)\}|(.))|P(?:\{[^}]*\}|.))")
_MEMBER_OF = {"Han": "一", "Lu": "A", "N": "0", "Nd": "0"}  # of properties that Python's patterns do not know
_SET_OPERATION = re.compile(r"(?<!\\)\[|--|&&|~~|\|\|")  # of classes, which Python's do not know


def short_match(pattern: str, longest: bool = False) -> str:
    """A text that the pattern matches, with no more repetitions than it asks for.

    It is of the shortest branches; or of the longest, which may stand where others may not: (^|,)a behind a beginning.
    """
    groups: list[list[str]] = [[""]]  # of each group that is open, its branches; the last of them grows
    atom = ""  # what a repetition would repeat
    for found in _TOKENS.finditer(pattern):
        token = found[0]
        if found["least"] or token in ("*", "?", "+"):
            branch = groups[-1][-1]
            times = int((found["least"] or ("1" if token == "+" else "0"))[:9])
            groups[-1][-1] = branch.removesuffix(atom) + atom * times if atom else branch
            atom = ""  # a ? behind a repetition repeats nothing
        elif token == "|":
            groups[-1].append("")
            atom = ""
        elif token.startswith("(") and not token.endswith(")"):
            groups.append([""])
            atom = ""
        else:
            atom = _branch(groups.pop(), longest) if token == ")" and len(groups) > 1 else _one(token)
            groups[-1][-1] += atom
    return _branch(groups[0], longest)


def _branch(branches: list[str], longest: bool) -> str:
    return max(reversed(branches), key=len) if longest else min(branches, key=len)


def endings(text: str, most: int) -> Iterator[str]:
    """What may be left of a text that has begun, shortest first; then the text itself."""
    yield from (text[-size:] for size in range(1, min(most, len(text))))
    if text:
        yield text


def _one(token: str) -> str:
    """A text of one token: its character, one of its class, or none where it stands for a place."""
    if token in ("^", "$", ")", "\\") or token.startswith("(?"):
        return ""
    if token[0] not in ".[\\":
        return token
    if token in _CONTROL:
        return _CONTROL[token]
    if token[0] == "\\" and token[1] not in _CLASSES:
        code = token[2:].strip("{}")
        if token[1] in "xu" and code:
            return chr(min(int(code, 16), 0x10FFFF))
        return "" if token[1].isalnum() else token[1]
    if _SET_OPERATION.search(token, 1):
        return ""
    known = _PROPERTY.sub(
        lambda found: _MEMBER_OF.get(found[1] or found[2], r"\W" if found[0][1] == "P" else r"\w"), token
    )
    try:
        return next((one for one in _MEMBERS + token if re.fullmatch(known, one)), "")
    except re.error:
        return ""
