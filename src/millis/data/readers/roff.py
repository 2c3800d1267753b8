"""Manual pages in roff as plain text: what a reader would see, without the layout."""

from __future__ import annotations

import re

HEADINGS = {"SH", "SS", "Sh", "Ss"}
ALTERNATE = {"BR", "RB", "BI", "IB", "IR", "RI"}  # arguments in turns of two fonts, no space between them
SPOKEN = ALTERNATE | {"B", "I", "R", "SM", "SB", "IP", "Nm", "Nd", "Fl", "Ar", "Pa", "Xr", "It", "Em", "Sy", "Li", "Dq"}
SPOKEN |= {"Sq", "Ql", "Op", "Cm", "Va", "Fn"}
BREAKS = {"PP", "P", "LP", "Pp", "IP", "TP", "It", "br", "sp", "HP"}
BLOCKS = {"de": "..", "ig": "..", "TS": ".TE", "EQ": ".EN"}  # definitions, comments, tables, formulas: left out
ESCAPES = {
    "-": "-", "e": "\\", " ": " ", "&": "", "|": "", "^": "", "%": "", "/": "", ",": "", ":": "", "c": "", "0": " ",
    "'": "'", "`": "`", "~": " ", "t": "\t",
}  # fmt: skip
NAMED = {
    "aq": "'", "dq": '"', "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "em": "—", "en": "–", "co": "©", "bu": "•",
    "ha": "^", "ti": "~", "rs": "\\", "ga": "`", "mu": "×", "->": "→", "<=": "≤", ">=": "≥", "hy": "-", "at": "@",
    "sh": "#", "Do": "$", "lB": "[", "rB": "]", "lC": "{", "rC": "}", "ba": "|", "or": "|", "pl": "+", "**": "*",
}  # fmt: skip
ESCAPE = re.compile(
    r"""\\(?:
        (?P<comment>["\#].*)
      | [fnmMFgkY](?:\[[^]]*\] | \(.. | .)                         # fonts, registers, colours
      | s(?:\[[^]]*\] | [-+]?\(.. | [-+]?'[^']*' | [-+]?\d)       # sizes
      | [hvwNlLDbozZ]'[^']*'                                      # moves and drawings
      | \*(?:\[(?P<v1>[^]]*)\] | \((?P<v2>..) | (?P<v3>.))        # variables
      | \((?P<two>..) | \[(?P<long>[^]]*)\] | (?P<one>.) | $      # characters by name
    )""",
    re.X,
)
VARIABLES = {"lq": "“", "rq": "”", "R": "®", "Tm": "™"}


def plain(source: str) -> str:
    """The text of a page: a paragraph per line, headings among them; "" for a page that only points to another."""
    paragraphs: list[list[str]] = [[]]
    until, literal = "", False
    for raw in source.splitlines():
        line = raw.strip() if until else raw.rstrip()
        if until:
            until = "" if line == until else until
            continue
        if not line.startswith((".", "'")):
            if literal or not line:
                paragraphs.append([])
            paragraphs[-1].append(_text(line))
            continue
        macro, _, rest = line[1:].lstrip().partition(" ")
        if macro == "so":
            return ""
        until = BLOCKS.get(macro, "")
        literal = macro in ("nf", "EX", "Bd") or (literal and macro not in ("fi", "EE", "Ed"))
        if macro in HEADINGS or macro in BREAKS:
            paragraphs.append([])
        if macro in HEADINGS or macro in SPOKEN:
            paragraphs[-1].append(_arguments(macro, rest))
        if macro in HEADINGS or macro == "TP":
            paragraphs.append([])
    lines = (re.sub(r"[ \t]+", " ", " ".join(words)).strip() for words in paragraphs)
    return "\n".join(line for line in lines if line)


def _arguments(macro: str, rest: str) -> str:
    """What a macro's arguments say."""
    found = [quoted.replace('""', '"') if quoted else word for quoted, word in _split(rest)]
    if macro == "IP":  # the second is an indent
        found = found[:1]
    return _text(("" if macro in ALTERNATE else " ").join(found))


def _split(rest: str) -> list[tuple[str, str]]:
    return re.findall(r'"((?:[^"]|"")*)"?|((?:[^ \\]|\\.)+)', rest)


def _text(line: str) -> str:
    def spoken(match: re.Match[str]) -> str:
        if match["comment"] is not None:
            return ""
        if (variable := match["v1"] or match["v2"] or match["v3"]) is not None:
            return VARIABLES.get(variable, "")
        if (name := match["two"] or match["long"]) is not None:
            return NAMED.get(name, chr(int(name[1:], 16)) if re.fullmatch(r"u[0-9A-F]{4,5}", name) else "")
        return ESCAPES.get(match["one"] or "", match["one"] or "")

    return ESCAPE.sub(spoken, line)
