"""Text made plain: mojibake repaired, HTML taken out, control characters and stray white space removed."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from millis.types import DataError

# Tags that are tags and not an "a < b" or a "<name>" of somebody's template.
TAG = re.compile(
    r"</?(?:html|head|body|p|div|span|br|hr|a|b|i|u|em|strong|h[1-6]|ul|ol|li|table|tr|td|th|img|script|style|font|pre|code"
    r"|blockquote|section|article|header|footer|nav|form|input|button|meta|link|title|iframe|svg)(?:\s[^<>]*)?/?>|<!--|<!doctype",
    re.I,
)
UNREAD = "script, style, noscript, template, iframe, svg, head, nav, header, footer, aside, form, button"
BLOCKS = "p, div, br, hr, li, tr, h1, h2, h3, h4, h5, h6, table, ul, ol, blockquote, section, article, pre, title"
# Not the joiners U+200C and U+200D: Persian, Indic scripts and emoji need them.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)
SPACES = re.compile(r"[^\S\n]+")
LINES = re.compile(r" ?\n ?")
EMPTY_LINES = re.compile(r"\n{3,}")


def scrub(text: str, *, html: bool = True, nfkc: bool = False, space: bool = True) -> str:
    """The text without what only machines see.

    ftfy repairs text that was decoded wrongly (Speer, 2019) and brings it to Unicode NFC. `nfkc` also folds full-width
    forms, ligatures and the like: it turns the Chinese comma into the Latin one, so it is off unless asked for. `html`
    takes out tags where there are any. `space` keeps one space and one empty line of many; without it, only line ends
    are made alike, as code needs.
    """
    text = INVISIBLE.sub("", _repaired(text.replace("\r\n", "\n").replace("\r", "\n")))
    if html and TAG.search(text):
        text = plain(text)
    if nfkc:
        text = unicodedata.normalize("NFKC", text)
    if not space:
        return text
    return EMPTY_LINES.sub("\n\n", LINES.sub("\n", SPACES.sub(" ", text))).strip()


def plain(html: str) -> str:
    """The text of an HTML page or fragment: a block a line, without scripts, styles, menus and footers."""
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError:
        raise DataError("HTML needs a library; run: pip install 'millis[data]'") from None
    page = LexborHTMLParser(html)
    for node in page.css(UNREAD):
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
