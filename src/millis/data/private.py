"""Personal data in text, replaced by what it was: [PHONE], [EMAIL], [IBAN], [ID], [CARD], [IP].

Digits alone prove little, so a number counts only where its own rules hold (checksum, date, network, numbering plan)
and the words before it do not call it something else: an order, a ticket, a version. Where a plan is so dense that
almost any digits fit (ten in America, seven in China), the text must also write it, or announce it, as a telephone.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date

from millis.types import DataError

KINDS = ("email", "iban", "id", "card", "ip", "phone")  # in this order: what one has taken is not looked at again
REGIONS = ("CN", "US", "GB")  # whose national forms of telephone numbers are looked for; +CC is found for all
MIN_DIGITS = 7
BEFORE_CHARS = 32

EMAIL = re.compile(
    r"(?<![\w.+%-])[a-z0-9_][\w.+%-]{0,63}@(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,24}(?![\w@])",
    re.I | re.A,
)
IBAN = re.compile(r"(?<![0-9A-Za-z])[A-Z]{2}\d\d(?: ?[0-9A-Z]){11,29}(?![0-9A-Za-z])", re.I | re.A)
ID_18 = re.compile(r"(?<![0-9A-Za-z])[1-9]\d{5}([ -]?)\d{8}\1\d{3}[\dXx](?![0-9A-Za-z])", re.A)
ID_15 = re.compile(r"(?<![0-9A-Za-z])[1-9]\d{14}(?![0-9A-Za-z])", re.A)
CARD = re.compile(r"(?<![\w.-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w-]|\.\d)", re.A)
IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)", re.A)
IPV6 = re.compile(r"(?<![\w:.])(?:[0-9a-f]{0,4}:){2,7}[0-9a-f]{0,4}(?![\w:])", re.I | re.A)
MOBILE_CN = re.compile(r"(?<![\w.+-])(?:(?:\+|00)?86[ -]?)?1[3-9]\d(?:\d{8}|[ -]\d{4}[ -]\d{4})(?![\w-]|\.\d)", re.A)
LANDLINE_CN = re.compile(r"(?<![\w.-])(?:\(0\d{2,3}\) ?|0\d{2,3}[ -])[2-9]\d{6,7}(?:-\d{1,5})?(?![\w-])", re.A)
SERVICE_CN = re.compile(r"(?<![\w.-])[48]00-\d{3}-?\d{4}(?![\w-])", re.A)
LOOSE_CN = re.compile(  # what is a telephone only where the text says so
    r"(?<![\w.-])(?:[48]00[ -]?\d{3}[ -]?\d{4}|1[3-9]\d[ .-]?\d{4}[ .-]?\d{4}"
    r"|(?:\(0\d{2,3}\) ?|0(?:10|2\d|[3-9]\d\d)[ -]?)[2-9]\d{2,3}[ -]?\d{4}(?:-\d{1,5})?)(?![\w-])",
    re.A,
)

ANOTHER_NUMBER = re.compile(
    r"(?:订单|单号|编号|流水|运单|快递单|工单|票号|序列|型号|条码|货号|时间戳|版本|期号|批号|案号|书号"
    r"|(?:快递|发票|合同|账单)(?=\s*[号码#:：])"  # without it, the courier or the signer may be the one to call
    r"|(?<!any )(?<!in )(?<!every )(?<!each )(?<!this )(?<!on )\b(?:case|time|part|request)"
    r"|\b(?:orders?|invoice|ticket|tracking|parcel|serial|sku|isbn|issn|ref|reference|transaction|txn|trace"
    r"|model|batch|version|ver|build|release|timestamp|epoch|unix|session|barcode|ean|upc|doi|uuid"
    r"|order_id|user_id|uid|id|v|scores?|results?))"
    r"[\s_.:：#=号為为是码碼（(\[【'\"-]*(?:(?:id|no|number|num|code|is|was)\b)?[\s_.:：#=号为是码（(\[【'\"-]*$",
    re.I,
)
TELEPHONE = re.compile(
    r"(?:电话|電話|手机|手機|热线|熱線|座机|传真|联系方式|聯絡|致电|拨打|撥打|客服"
    r"|(?<![a-z])(?:call|phone|tel|telephone|mobile|cell|fax|whatsapp|contact|text|txt|ring|dial|hotline"
    r"|reach me (?:at|on)|(?:my|his|her|our|their) number|number is))[^\d\n]{0,16}$",
    re.I,
)
IDENTITY = re.compile(r"(?:身份证|身份證|证件|證件|id card|identity)[^\d\n]{0,12}$", re.I)
URL = re.compile(r"(?:\w://|www\.)\S*$", re.A)
CHAPTER = re.compile(r"(?:章|节|節|第|§|版本|版|\b(?:section|chapter|clause|version|ver|v|oid))[\s.:：]*$", re.I)
MONEY = re.compile(r"(?:[$£€¥￥]|\b(?:RMB|CNY|USD|EUR|GBP))\s*$", re.I)
AMOUNT = re.compile(r"\s*(?:元|美元|欧元|(?:units?|pcs|dollars?|euros?|pounds?)\b)", re.I)
PICTURE = re.compile(r"\.(?:png|jpe?g|gif|webp|svg|bmp|ico)$", re.I)  # icon@2x.png: a file's name, and no domain's
WIDE = {code: chr(code - 0xFEE0) for code in range(0xFF10, 0xFF5B) if chr(code - 0xFEE0).isalnum()}
WIDE |= {0xFF0B: "+", 0xFF0D: "-", 0xFF20: "@", 0xFF0E: ".", 0xFF3F: "_", 0xFF05: "%"}

Span = tuple[int, int]


def mask(text: str, kinds: tuple[str, ...] = KINDS, regions: tuple[str, ...] = REGIONS) -> tuple[str, Counter[str]]:
    """The text with its personal data replaced, and how often each kind was.

    Full-width digits and letters are read as plain ones. Idempotent: a mask holds nothing that is masked.
    """
    plain, spans = text.translate(WIDE), list[tuple[Span, str]]()  # translated one to one: places stay
    digits = sum(c.isdigit() for c in plain)
    for kind in KINDS:
        if kind not in kinds or (kind == "email" and "@" not in plain) or (kind != "email" and digits < 1):
            continue
        if kind == "phone" and digits < MIN_DIGITS:
            continue
        for start, end in _FINDERS[kind](plain, regions):
            if all(end <= left or right <= start for (left, right), _ in spans):
                spans.append(((start, end), kind))
    for (start, end), kind in sorted(spans, reverse=True):
        text = f"{text[:start]}[{kind.upper()}]{text[end:]}"
    return text, Counter(kind for _, kind in spans)


def valid_id(number: str) -> bool:
    """Whether 18 characters are a Chinese citizen's number: GB 11643-1999, check character by ISO 7064 MOD 11-2."""
    if not re.fullmatch(r"[1-9]\d{16}[\dXx]", number, re.A) or not "11" <= number[:2] <= "91":
        return False
    total = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(number[:17]))
    return _is_birthday(number[6:14]) and "10X98765432"[total % 11] == number[17].upper()


def valid_iban(number: str) -> bool:
    """Whether letters and digits are a bank account's: a country's length by ISO 13616, and ISO 7064's MOD 97-10."""
    number = number.upper()
    if len(number) != _ACCOUNTS.get(number[:2]):
        return False
    return int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1


def valid_card(number: str) -> bool:
    """Whether digits are a payment card's: a network's prefix and length (ISO/IEC 7812), and Luhn's check digit."""
    lengths = next((lengths for prefix, lengths in _NETWORKS if re.match(prefix, number)), ())
    return len(number) in lengths and luhn(number)


def luhn(number: str) -> bool:
    """Luhn's check (ISO/IEC 7812-1, annex B): every second digit from the right doubled, digits summed, 0 modulo 10."""
    digits = [int(digit) for digit in reversed(number)]
    return sum(digits[0::2] + [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]) % 10 == 0


_ACCOUNTS = {  # the registry of ISO 13616: country → characters
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
        29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip
_NETWORKS: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"4", (16, 19)),  # Visa
    (r"5[1-5]|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)", (16,)),  # Mastercard
    (r"3[47]", (15,)),  # American Express
    (r"30[0-5]|36|38", (14,)),  # Diners Club
    (r"35(?:2[89]|[3-8]\d)", (16,)),  # JCB
    (r"62|81", (16, 17, 18, 19)),  # UnionPay
    (r"6(?:011|5)", (16,)),  # Discover
)


def _is_birthday(digits: str) -> bool:
    try:
        born = date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
    except ValueError:
        return False
    return 1900 <= born.year <= date.today().year


def _before(text: str, start: int) -> str:
    return text[max(0, start - BEFORE_CHARS) : start]


def _ends(match: re.Match[str], valid: Callable[[str], bool]) -> list[int]:
    """Behind which of its groups what matched is a valid number."""
    found = match.group()
    ends = (end.start() for end in re.finditer(r"[ -]|$", found))
    return [match.start() + end for end in ends if valid(re.sub("[ -]", "", found[:end]))]


def _emails(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    yield from (match.span() for match in EMAIL.finditer(text) if not PICTURE.search(match.group()))


def _ibans(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    """A word in capitals may follow behind a space."""
    for match in IBAN.finditer(text):
        yield from ((match.start(), end) for end in _ends(match, valid_iban))


def _ids(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    yield from (match.span() for match in ID_18.finditer(text) if valid_id(re.sub(r"[ -]", "", match.group())))
    for match in ID_15.finditer(text):  # no check digit, so it must be announced
        if IDENTITY.search(_before(text, match.start())) and _is_birthday("19" + match.group()[6:12]):
            yield match.span()


def _cards(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    """The longest card number at a place: an expiry date or a security code may follow behind a space."""
    for match in CARD.finditer(text):
        ends = _ends(match, valid_card)
        if ends and not ANOTHER_NUMBER.search(_before(text, match.start())):
            yield match.start(), ends[-1]


def _addresses(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    """Addresses that point to somebody: not the machine itself, not "any", and no numbered chapter or version."""
    for pattern in (IPV4, IPV6):
        for match in pattern.finditer(text):
            try:
                address = ipaddress.ip_address(match.group())
            except ValueError:
                continue
            if not (address.is_loopback or address.is_unspecified or CHAPTER.search(_before(text, match.start()))):
                yield match.span()


def _phones(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    found = [*_chinese_phones(text), *_other_phones(text, regions)] if "CN" in regions else _other_phones(text, regions)
    for start, end in found:
        before = _before(text, start)
        other = any(pattern.search(before) for pattern in (ANOTHER_NUMBER, URL, MONEY)) or AMOUNT.match(text, end)
        if not other:
            yield start, end


def _chinese_phones(text: str) -> Iterator[Span]:
    for pattern in (MOBILE_CN, LANDLINE_CN, SERVICE_CN):
        yield from (match.span() for match in pattern.finditer(text))
    for match in LOOSE_CN.finditer(text):
        if TELEPHONE.search(_before(text, match.start())):
            yield match.span()


def _other_phones(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    """By Google's numbering plans (phonenumbers): international forms anywhere, national ones where told apart."""
    try:
        from phonenumbers import Leniency, PhoneNumberMatcher
    except ImportError:
        raise DataError("telephone numbers need a library; run: pip install 'millis[data]'") from None
    for region in [region for region in regions if region != "CN"] + [None]:
        for match in PhoneNumberMatcher(text, region, leniency=Leniency.VALID):
            raw = match.raw_string
            told = "+" in raw or raw.startswith("(") or TELEPHONE.search(_before(text, match.start))
            grouped = len(re.findall(r"\d+", raw)) >= 3 and not re.match(r"(?:19|20)\d\d\D", raw)
            grouped = grouped and (region != "US" or " " not in raw)  # three numbers in a row are many things
            if told or grouped or (region == "GB" and raw.startswith("0") and len(raw) >= 10):
                inside = match.start and text[match.start - 1] in "./-_"
                if not (inside or re.fullmatch(r"\d+\.\d+", raw)):  # of a longer number, or a decimal
                    yield match.start, match.end


_FINDERS: dict[str, Callable[[str, tuple[str, ...]], Iterator[Span]]] = {
    "email": _emails,
    "iban": _ibans,
    "id": _ids,
    "card": _cards,
    "ip": _addresses,
    "phone": _phones,
}
