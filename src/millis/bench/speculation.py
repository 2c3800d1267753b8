"""What speculation is worth: the same greedy answers with and without it, in turn, and whether they are the same."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from millis.tasks.model import LanguageModel
from millis.types import Completion, RequestError

MINUTES = (
    "The board of Harbour Lines met on Monday, 3 March 2025, in the main office. Present were Anna Schmidt, Peter Wong "
    "and Maria Gonzalez. The board approved 2.4 million euros for the new terminal and asked Peter Wong to report on "
    "its progress every month. Maria Gonzalez will lead the talks with the port authority from 1 April 2025."
)
NOTICE = (
    "各位住户：因设备检修，本小区将于2025年6月12日上午九点至下午四点停水。请提前储备生活用水，并关好水龙头。"
    "如有疑问，请致电物业服务中心，电话是010-5550-1234。感谢您的理解与配合。"
)
STACK = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("empty stack")
        return self.items.pop()

    def peek(self):
        return self.items[-1]
"""
ORDERS = """id,customer,city,amount
1041,Anna Schmidt,Hamburg,120.50
1042,Peter Wong,Singapore,89.00
1043,Maria Gonzalez,Valencia,310.75
1044,Li Wei,Chengdu,45.20
"""

PROMPTS: dict[str, tuple[str, ...]] = {
    "chat": (
        "Give me three tips for a good night's sleep.",
        "Explain how a vaccine works to a ten-year-old.",
        "Write a short story about a robot who learns to paint.",
        "What is the difference between weather and climate?",
        "Write a polite e-mail that moves a meeting from Tuesday to Thursday.",
        "Summarize the plot of Romeo and Juliet in five sentences.",
        "List five things to check before buying a used car.",
        "为什么天空是蓝色的？",
        "写一封感谢客户的短信。",
        "请介绍三种常见的数据结构。",
    ),
    "code": (
        "Write a Python function that reverses a linked list, with type hints.",
        "Implement binary search in Python and explain each step.",
        "Write a SQL query that lists the ten customers with the highest total orders.",
        "Write a Python class for an LRU cache.",
        "Write a C function that counts the words of a string.",
        "Write a JavaScript function that debounces another function.",
        "Write a Python script that renames all .txt files of a folder to .md.",
        "Write unit tests in Python for a function add(a, b).",
        "Implement quicksort in Rust.",
        "用Python写一个函数，判断一个字符串是否是回文。",
    ),
    "edit": (
        f"Repeat this text exactly, but write John Smith wherever it says Peter Wong:\n\n{MINUTES}",
        f"Correct the spelling of this text, if there is anything to correct, and print it in full:\n\n{MINUTES}",
        f"Repeat the text, with every date written as YYYY-MM-DD:\n\n{MINUTES}",
        f"把下面通知里的日期改成2025年6月19日，其余原样输出：\n\n{NOTICE}",
        f"Rename the class to LifoStack. Answer with the whole code only:\n\n{STACK}",
        f"Add type hints to this class. Answer with the whole code only:\n\n{STACK}",
        f"Add a method size to this class. Answer with the whole code only:\n\n{STACK}",
    ),
    "extract": (
        f"Extract every person with the sentence that names them, as a JSON list:\n\n{MINUTES}",
        f"Quote every sentence of this text as one item of a numbered list:\n\n{MINUTES}",
        f"把这份通知的每句话作为JSON数组的一项输出：\n\n{NOTICE}",
        f"Convert this CSV to a JSON list of objects:\n\n{ORDERS}",
        f"List the methods of this class, each with its code:\n\n{STACK}",
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt, both ways: milliseconds a token after the first, the median of the rounds."""

    kind: str
    prompt: str
    tokens: int
    plain_ms: float
    speculated_ms: float
    steps: int
    drafted: int
    accepted: int
    same: bool


def measure(
    lm: LanguageModel,
    kinds: Sequence[str],
    *,
    new_tokens: int,
    rounds: int,
    limit: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[Row]:
    """A row for each prompt of `kinds`, at most `limit` of a kind. RequestError: the model speculates about nothing."""
    speculator = lm.engine.speculator
    if speculator is None:
        raise RequestError("speculation is off; load the model with speculation='auto'")
    rows = []
    try:
        for kind in kinds:
            for prompt in PROMPTS[kind][:limit]:
                found: dict[bool, list[Completion]] = {False: [], True: []}
                for _ in range(rounds):
                    for on in (False, True):
                        speculator.enabled = on
                        found[on].append(_ask(lm, prompt, new_tokens))
                        advance()
                rows.append(_row(kind, prompt, found[False], found[True]))
    finally:
        speculator.enabled = True
    return rows


def _ask(lm: LanguageModel, prompt: str, new_tokens: int) -> Completion:
    if lm.tokenizer.has_chat_template:
        return lm.chat([{"role": "user", "content": prompt}], max_tokens=new_tokens)
    return lm.generate(prompt, max_tokens=new_tokens)


def _row(kind: str, prompt: str, plain: Sequence[Completion], speculated: Sequence[Completion]) -> Row:
    def token_ms(answers: Sequence[Completion]) -> float:
        return statistics.median(a.timings.decode_ms / max(1, len(a.tokens) - 1) for a in answers)

    last = speculated[-1].timings
    return Row(
        kind,
        prompt,
        len(plain[0].tokens),
        token_ms(plain),
        token_ms(speculated),
        last.steps,
        last.drafted_tokens,
        last.accepted_tokens,
        all(answer.tokens == plain[0].tokens for answer in (*plain, *speculated)),
    )


def summary(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """By kind and over all: tokens a second of all prompts together, their ratio, and the share of right guesses."""
    found = {}
    for kind in [*dict.fromkeys(row.kind for row in rows), "all"]:
        some = [row for row in rows if kind in (row.kind, "all")]
        tokens = sum(row.tokens for row in some)
        plain_s = sum(row.tokens * row.plain_ms for row in some) / 1000
        speculated_s = sum(row.tokens * row.speculated_ms for row in some) / 1000
        found[kind] = {
            "prompts": len(some),
            "plain_tokens_per_s": tokens / plain_s,
            "speculated_tokens_per_s": tokens / speculated_s,
            "ratio": plain_s / speculated_s,
            "median_ratio": statistics.median(row.plain_ms / row.speculated_ms for row in some),
            "least_ratio": min(row.plain_ms / row.speculated_ms for row in some),
            "right": sum(row.accepted for row in some) / max(1, sum(row.drafted for row in some)),
            "same": sum(row.same for row in some),
        }
    return found
