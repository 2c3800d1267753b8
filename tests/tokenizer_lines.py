"""Two thousand lines to tokenize: English, Chinese, code, emoji, control characters, look-alikes of special tokens.

Made the same on every machine: sentences from word lists with a seeded generator, and our own source as code.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

ENGLISH = """the of and to in a is that for it as was with be by on not he his but at are this have from or had
an they which one you were her all she there would their we him been has when who will more no if out so said
what up its about into than them can only other new some could time these two may then do first any my now such
like our over man me even most made after also did many before must through years where much your way well down
should because each just those people Mr. how too little state good very make world still own see men work long
get here between both life being under never day same another know while last might us great old year off come
since against go came right used take three customer account balance transfer deadline translation newspaper
weather happened yesterday morning antidisestablishment don't I'm we've they'll she'd it's you're O'Neill WON'T
can't've e-mail co-operate naïve café Zürich façade señor""".split()
CHINESE = """的 一 是 在 不 了 有 和 人 这 中 大 为 上 个 国 我 以 要 他 时 来 用 们 生 到 作 地 于 出 就 分 对
成 会 可 主 发 年 动 同 工 也 能 下 过 子 说 产 种 面 而 方 后 多 定 行 学 法 所 民 得 经 十 三 之 进 着 等 部
度 家 电 力 里 如 水 北京 上海 中国 今天 天气 很好 银行 账户 余额 客服 您好 请问 翻译 成英文 人工智能 医院 学校
公司 市场 经济 發展 臺灣 龘 𠮷 ， 。 ！ ？ 、 ； ： “ ” 《 》 （ ） … 2024年 ３０％""".split()
EMOJI = [
    "😀", "🙂", "🚀", "❤", "🎉", "🐍", "🇩", "🇪", "🏴", "☃", "♻", "⚡",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\u2764\ufe0f", "👍🏽", "🇨🇳", "e\u0301", "한국어", "日本語",
    "العربية", "עברית", "हिन्दी", "ไทย", "Ελληνικά", "русский", "\u1e9b\u0323", "ﬁ", "Å", "\u212b", "½", "Ⅷ",
    "٣", "१२३",
]  # fmt: skip
SPECIAL = """<|im_start|> <|im_end|> <|endoftext|> <|eot_id|> <start_of_turn> <end_of_turn> <bos> <eos> <s> </s>
<unk> <pad> <|im_end <|im_end| |im_end|> <<|im_end|>> <|IM_END|> <| im_end|> <unused0> <0x41> <0xff> [PAD151936]
<|fim_prefix|> <repo_name> [INST] [/INST] <<SYS>> <mask> <|object_ref_start|> [multimodal]""".split()
SPACES = [
    "",
    " ",
    "  ",
    "   ",
    "\t",
    "\t\t",
    " \t ",
    "\r\n",
    "\n",
    "\n\n",
    "\n\n\n",
    "\u00a0",
    "\u3000",
    "\u2009",
    "     ",
]


@functools.cache
def lines() -> tuple[str, ...]:
    """2,000 texts, the longer kinds 20 to 200 characters; some hold line breaks."""
    rng = random.Random(7)
    found = [_english(rng) for _ in range(550)] + [_chinese(rng) for _ in range(450)]
    found += [_mixed(rng, EMOJI, 6) for _ in range(150)] + [_controls(rng) for _ in range(200)]
    found += [_mixed(rng, SPECIAL, 4) for _ in range(200)] + [_unicode(rng) for _ in range(100)]
    source = [
        line for file in sorted(Path(__file__).parent.glob("*.py")) for line in file.read_text("utf-8").split("\n")
    ]
    found += rng.choices([line for line in source if line], k=2000 - len(found))
    rng.shuffle(found)
    return tuple(found)


def _english(rng: random.Random) -> str:
    words = rng.choices(ENGLISH, k=rng.randint(3, 25))
    for _ in range(rng.randint(0, 4)):
        number = str(rng.randint(0, 10 ** rng.randint(1, 12)))
        words.insert(rng.randrange(len(words)), rng.choice([number, f"${number}.50", f"{number}%", f"({number})"]))
    if rng.random() < 0.3:
        words = [rng.choice((str.upper, str.title, str.lower))(word) for word in words]
    return "".join(word + rng.choice([" "] * 8 + [", ", ". ", "  ", "-", "...", "\n", "!? "]) for word in words)


def _chinese(rng: random.Random) -> str:
    return "".join(rng.choices(CHINESE, k=rng.randint(5, 40)))


def _mixed(rng: random.Random, marks: list[str], most: int) -> str:
    parts = [rng.choice(ENGLISH + CHINESE) + rng.choice(SPACES) for _ in range(rng.randint(0, 8))]
    for _ in range(rng.randint(1, most)):
        parts.insert(rng.randint(0, len(parts)), rng.choice(marks) + rng.choice(SPACES))
    return "".join(parts)


def _controls(rng: random.Random) -> str:
    controls = [chr(i) for i in (*range(32), 127, 0x85, 0x200B, 0x2028, 0xFEFF, 0xFFFD, 0x10FFFF, 0x2581)]
    return "".join(rng.choice([*controls, *SPACES, *ENGLISH[:40]]) for _ in range(rng.randint(1, 20)))


def _unicode(rng: random.Random) -> str:
    codes = [i for low, high in ((0x20, 0xD7FF), (0xE000, 0x2FFFF)) for i in rng.choices(range(low, high), k=15)]
    return "".join(chr(code) + rng.choice(["", "", " ", "a"]) for code in rng.sample(codes, rng.randint(1, 30)))
