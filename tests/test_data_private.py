"""Personal data: what is masked, what looks like it and stays, and checksums against python-stdnum's."""

from __future__ import annotations

import inspect
import random
import re
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stdnum import iban as stdnum_iban
from stdnum import luhn as stdnum_luhn
from stdnum.iso7064 import mod_11_2

from millis.commands.data import clean as command
from millis.data import mask
from millis.data.private import _ACCOUNTS, KINDS, luhn, valid_card, valid_iban, valid_id


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("我的手机号是13812345678，请回电", "我的手机号是[PHONE]，请回电"),
        ("电话:138-1234-5678", "电话:[PHONE]"),
        ("手机１３８１２３４５６７８", "手机[PHONE]"),
        ("联系 +86 138 1234 5678 吧", "联系 [PHONE] 吧"),
        ("(010) 62345678 或 0755-26888888", "[PHONE] 或 [PHONE]"),
        ("客服热线400-820-8820，拨打4008208820", "客服热线[PHONE]，拨打[PHONE]"),
        ("Call me at (415) 555-2671 now", "Call me at [PHONE] now"),
        ("ring 02079460958", "ring [PHONE]"),
        ("+44 20 7946 0958 or +33 1 42 68 53 00.", "[PHONE] or [PHONE]."),
        ("mail a.b+c@example.co.uk, ok", "mail [EMAIL], ok"),
        ("邮箱zhang.san@163.com。", "邮箱[EMAIL]。"),
        ("身份证号11010519491231002X，勿外传", "身份证号[ID]，勿外传"),
        ("card 4111 1111 1111 1111 exp", "card [CARD] exp"),
        ("卡号6222021234567890128", "卡号[CARD]"),
        ("card 4111 1111 1111 1111 123", "card [CARD] 123"),  # a security code
        ("4111111111111111 12/27 123, thanks", "[CARD] 12/27 123, thanks"),
        ("我的电话138 12345678，手机138.1234.5678", "我的电话[PHONE]，手机[PHONE]"),
        ("IBAN: GB29 NWBK 6016 1331 9268 19.", "IBAN: [IBAN]."),
        ("zahlen an DE89370400440532013000, danke", "zahlen an [IBAN], danke"),
        ("账户nl91 abna 0417 1643 00。", "账户[IBAN]。"),
        ("to FR14 2004 1010 0505 0001 3M02 606 BY FRIDAY", "to [IBAN] BY FRIDAY"),
        ("Amex 378282246310005", "Amex [CARD]"),
        ("from 8.8.8.8 and 2001:db8::1", "from [IP] and [IP]"),
        ("IP地址192.168.1.20的", "IP地址[IP]的"),
        ("The DNS server 203.0.113.9 is down", "The DNS server [IP] is down"),
        ("server 10.0.0.1:8080", "server [IP]:8080"),
        ("Call me any time: 415-555-1234", "Call me any time: [PHONE]"),
        ("In any case 13812345678", "In any case [PHONE]"),
        ("联系快递13812345678", "联系快递[PHONE]"),
        ("签合同13812345678", "签合同[PHONE]"),
        ("客服电话：400 820 8820", "客服电话：[PHONE]"),
        ("电话：02162345678", "电话：[PHONE]"),
        ("电话：0755 8321 2345", "电话：[PHONE]"),
        ("tel: 010-8888 8888", "tel: [PHONE]"),
        ("my number 415 555 2671", "my number [PHONE]"),
        ("身份证 110105 19491231 002X", "身份证 [ID]"),
        ("ｆｏｏ＠ｂａｒ．ｃｏｍ", "[EMAIL]"),
    ],
)
def test_what_is_masked(text: str, masked: str) -> None:
    number = text.replace("6222021234567890128", "622202123456789012" + luhn_digit("622202123456789012"))
    assert mask(number)[0] == masked


@pytest.mark.parametrize(
    "text",
    """订单号 13812345678
订单13812345678已发货
运单号：75512345678901
流水号 6222021234567890123
快递单号 SF1381234567890
order no. 4111111111111111
Order #4155552671
id=4155552671
tracking number 02079460958
timestamp 1700000000
1700000000000
20261126204801
2026-11-26 20:48:01
2023-11-16 18:15:46.6805900
12:30:45
version 1.2.3.4
v10.2.3.4
第1.2.3.4节
127.0.0.1 and 0.0.0.0
IP 999.1.1.1
ISBN 978-7-111-12345-6
UUID 123e4567-e89b-12d3-a456-426614174000
MAC 00:1a:2b:3c:4d:5e
3.14159265358979
2,000,000,000
价格 13800 元
QQ 123456789
1234567890
9876543210123
4111111111111112
身份证 110105194912310021
score 100-200-3000
2008-2012 200-300 4000
1 2 3 4 5 6 7 8 9 10 11
https://shop.example/item/13812345678
ab13812345678cd
13812345678901
user@localhost, @user, a@b
std::vector a::b
probability 0.2079460958
213 456 7890 units
scores 212-345-6789
余额：¥13812345678
余额13812345678元
合同号13812345678
快递单号：13812345678
icon@2x.png
OID 1.3.6.1
DE89370400440532013001
GB29NWBK60161331926819X
XX29NWBK60161331926819
AB12 CDEF 3456 7890 1234
ver. 1.2.3.4""".splitlines(),
)
def test_what_looks_like_it_and_stays(text: str) -> None:
    assert mask(text) == (text, {})


def luhn_digit(digits: str) -> str:
    return str(stdnum_luhn.calc_check_digit(digits))


@given(st.text("0123456789", min_size=2, max_size=25))
def test_luhn_is_stdnums(digits: str) -> None:
    assert luhn(digits) == stdnum_luhn.is_valid(digits)


@given(st.dates(date(1900, 1, 1), date(2025, 1, 1)))
def test_one_check_character_of_eleven_is_right(born: date) -> None:
    """For every birthday exactly the character that ISO 7064 computes makes a citizen's number valid."""
    stem = f"110105{born:%Y%m%d}002"
    right = [last for last in "0123456789X" if valid_id(stem + last)]
    assert right == [mod_11_2.calc_check_digit(stem)]
    assert mask(f"号码{stem}{right[0]}。")[0] == "号码[ID]。"


def test_numbers_that_are_no_ids() -> None:
    for stem in ("110105194913310022", "110105194902300022", "010105194912310022", "990105194912310022"):
        assert not valid_id(stem[:17] + mod_11_2.calc_check_digit(stem[:17]))


def test_ibans_are_stdnums() -> None:
    """For every country of the registry: with the digits that ISO 7064 computes and no others."""
    draw = random.Random(7)
    for country, length in _ACCOUNTS.items():
        parts = stdnum_iban._ibandb.info(country + "00")[0][1]["bban"]
        assert length == 4 + sum(map(int, re.findall(r"\d+", parts)))
        bban = "".join(draw.choice("0123456789") for _ in range(length - 4))
        digits = stdnum_iban.calc_check_digits(country + "00" + bban)
        assert [n for n in range(2, 99) if valid_iban(f"{country}{n:02}{bban}")] == [int(digits)]
        assert mask(f"an {country}{digits}{bban}")[0] == "an [IBAN]"


@pytest.mark.parametrize(("prefix", "length"), [("4", 16), ("55", 16), ("37", 15), ("6222", 19), ("3530", 16)])
def test_cards_of_the_networks(prefix: str, length: int) -> None:
    draw = random.Random(length)
    for _ in range(20):
        digits = prefix + "".join(draw.choice("0123456789") for _ in range(length - len(prefix) - 1))
        good = digits + luhn_digit(digits)
        others = [digits + last for last in "0123456789" if last != good[-1]]
        assert valid_card(good) and not any(map(valid_card, others)) and not valid_card(good + "00000")


PARTS = st.sampled_from(["13812345678", "a@b.com", "8.8.8.8", "，", "订单", " ", "call ", "x", "１３", "-", "4111"])


@settings(max_examples=60)
@given(st.lists(PARTS))
def test_masking_again_changes_nothing(parts: list[str]) -> None:
    masked, counts = mask("".join(parts))
    assert mask(masked)[0] == masked
    assert sum(masked.count(f"[{kind.upper()}]") for kind in KINDS) == sum(counts.values())


def test_only_the_kinds_that_are_asked_for() -> None:
    assert mask("a@b.com 13812345678", ("email",))[0] == "[EMAIL] 13812345678"
    assert mask("13812345678 call (415) 555-2671", regions=("CN",))[0].startswith("[PHONE] call")


def test_the_command_masks_every_kind_unless_told_otherwise() -> None:
    assert inspect.signature(command).parameters["mask"].default == ",".join(KINDS)
