"""Text made plain: mojibake repaired, HTML taken out, control characters and stray white space removed."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Any

from millis.types import DataError

DOCUMENT = re.compile(r"\s*(?:<\?xml[^>]*>\s*)?<(?:!doctype\s+html|html)\b", re.I)
TAG = re.compile(r"<(/?)([a-z][\w:-]*)(?:\s[^<>]*?)?(/?)>", re.I)
KNOWN = frozenset(
    "html head body p div span br hr a b i u em strong h1 h2 h3 h4 h5 h6 ul ol li table tr td th img script style font"
    " pre code blockquote section article header footer nav form input button meta link title iframe svg".split()
)
ALONE = frozenset("br hr img input meta link p li tr td th".split())  # may stand without a closing tag
MOST_OPEN = 0.25  # tags never closed, of those that are: more, and the tags are what the text speaks of
BLOCKS = (
    "p, div, br, hr, li, tr, h1, h2, h3, h4, h5, h6, table, ul, ol, blockquote, section, article, header, footer, nav"
    ", form, pre, title"
)
# Not the joiners U+200C and U+200D that Persian, Indic scripts and emoji need; nor the tags that spell a flag's region.
INVISIBLE = re.compile(
    "(\U0001f3f4[\U000e0020-\U000e007e]{2,8}\U000e007f)|"
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)
PAGES = re.compile("[\x0b\x0c]")  # form feeds and vertical tabs end a line
SPACES = re.compile(r"[^\S\n]+")
LINES = re.compile(r" ?\n ?")
EMPTY_LINES = re.compile(r"\n{3,}")


def scrub(text: str, *, html: bool = True, nfkc: bool = False, space: bool = True) -> str:
    """The text without what only machines see.

    ftfy repairs text that was decoded wrongly (Speer, 2019) and brings it to Unicode NFC. `nfkc` also folds full-width
    forms, ligatures and the like: it turns the Chinese comma into the Latin one, so it is off unless asked for. `html`
    takes out the tags of a text that is HTML (`is_html`). `space` keeps one space and one empty line of many; without
    it, only line ends are made alike, as code needs.
    """
    text = PAGES.sub("\n", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = INVISIBLE.sub(r"\1", _repaired(text))
    if html and is_html(text):
        text = plain(text)
    if nfkc:
        text = unicodedata.normalize("NFKC", text)
    if not space:
        return text
    return EMPTY_LINES.sub("\n\n", LINES.sub("\n", SPACES.sub(" ", text))).strip()


def is_html(text: str) -> bool:
    """Whether a text is an HTML page or a piece of one, and not prose or code in which tags are named.

    A piece has two known tags or more, and what it opens it closes, but for a few.
    """
    if DOCUMENT.match(text):
        return True
    opened, known, closed = Counter[str](), 0, 0
    for match in TAG.finditer(text):
        name = match[2].lower()
        known += name in KNOWN
        if match[1]:
            closed += opened[name] > 0
            opened[name] -= opened[name] > 0
        elif not match[3] and name not in ALONE:
            opened[name] += 1
    return known >= 2 and opened.total() <= MOST_OPEN * closed


def plain(html: str) -> str:
    """The text of an HTML page or fragment: a block a line, without scripts and styles."""
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError:
        raise DataError("HTML needs a library; run: pip install 'millis[data]'") from None
    page = LexborHTMLParser(html)
    for node in page.css("script, style"):
        node.decompose()
    for node in page.css(BLOCKS):
        node.insert_before("\n")
        node.insert_after("\n")
    return page.root.text() if page.root is not None else ""


def _repaired(text: str) -> str:
    return str(_ftfy().fix_text(text, config=_config()))


def _ftfy() -> Any:
    try:
        import ftfy
    except ImportError:
        raise DataError("repairing text needs a library; run: pip install 'millis[data]'") from None
    return ftfy


def _config() -> Any:
    """Quotes, ligatures and full-width characters are the author's own; entities wait for the HTML reader."""
    return _ftfy().TextFixerConfig(
        uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, explain=False, unescape_html="auto"
    )
