"""Twenty prompts in English, Chinese and code, cut to 16 to 600 tokens: what the agreement tests continue."""

# ruff: noqa: E501  the texts are data

from __future__ import annotations

import inspect
import json.decoder
import textwrap
from pathlib import Path

ENGLISH = [
    "The lighthouse keeper had not spoken to anyone for eleven days when the small boat appeared at the edge of the bay,",
    "Dear customer service team, I ordered a pair of running shoes three weeks ago and the parcel still has not arrived. "
    "The tracking page says it left the warehouse on Monday, but nothing has changed since then. Could you please",
    "Photosynthesis is the process by which green plants turn light into chemical energy. It takes place in two stages. "
    "In the first, light is absorbed by chlorophyll and water is split; in the second, carbon dioxide is",
    "Question: A train leaves the station at nine in the morning and travels at eighty kilometres an hour. A second "
    "train leaves one hour later and travels at one hundred and twenty kilometres an hour. When does it catch up?\nAnswer:",
    "Minutes of the meeting. Present: Anna, Ben, Carla, David. First item: the budget for next year. Anna reported that",
]
CHINESE = [
    "北京的秋天天高云淡，香山的红叶吸引了许多游客。周末的时候，",
    "尊敬的客服，您好！我上周在贵公司网站购买了一台空气净化器，收到货后发现外壳有明显的划痕，而且开机时噪音很大。我希望",
    "请把下面的句子翻译成英文：今天的会议改到下午三点，请大家准时参加。\n翻译：",
    "人工智能正在改变我们的生活。从手机里的语音助手，到医院里的影像诊断，再到道路上的自动驾驶汽车，它的应用越来越广泛。"
    "然而，技术的进步也带来了新的问题，例如隐私保护、就业变化和算法的公平性。专家认为，",
    "从前有一座山，山上有一座庙，庙里住着一个老和尚和一个小和尚。有一天，老和尚对小和尚说：",
]
CODE = [
    'def fibonacci(n: int) -> list[int]:\n    """The first n Fibonacci numbers."""\n',
    "SELECT customers.name, COUNT(orders.id) AS orders\nFROM customers\nJOIN orders ON",
    "#include <vector>\n#include <algorithm>\n\n// Returns the median of the values, which must not be empty.\ndouble median(",
    "import unittest\n\nclass TestStack(unittest.TestCase):\n    def setUp(self):\n        self.stack = Stack()\n\n    def test_push(self):",
    "async function fetchJson(url, options = {}) {\n  const response = await fetch(url, options);\n  if (!response.ok) {",
]


def texts() -> list[tuple[str, int]]:
    """(text, tokens to keep): the short prompts whole, then five long ones of 100 to 600 tokens."""
    licence = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")
    code, wrap = inspect.getsource(json.decoder), inspect.getsource(textwrap)
    long = [(licence, 600), (code, 500), (wrap, 200), ("".join(CHINESE) * 3, 400), (" ".join(ENGLISH), 100)]
    return [(text, 600) for text in ENGLISH + CHINESE + CODE] + long
