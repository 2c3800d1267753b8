"""The pre-tokenizers of byte-level BPE that GGUF files name in tokenizer.ggml.pre: how a text is split before merging.

Each is what its authors' tokenizer.json says, also where llama.cpp, which gave the names, departs from it: there no
text is normalized, merges come before whole tokens in smaug-bpe (SmolLM3's), tekken and gpt-4o know case of ASCII
letters alone and no marks, deepseek-llm's digits stay together, and so do wide spaces and what follows them in
deepseek-llm and deepseek-coder.
"""

from __future__ import annotations

from dataclasses import dataclass

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MARKED_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words end where a small letter is followed by a capital one.
_CASED_WORDS = (
    r"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{end}"
    r"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{end}"
    r"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED_WORDS = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}"
    "| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
_BLOOM_WORDS = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_DEEPSEEK_LETTERS = (  # escaped where editors would write another character for the same letter
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7d"
    "ᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_DEEPSEEK_ASIAN = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK_WORDS = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


@dataclass(frozen=True, slots=True)
class Form:
    """The regular expressions that split a text, one after the other; without any, GPT-2's own."""

    splits: tuple[str, ...] = ()
    digits: bool = False  # every digit by itself: before GPT-2's expression, after others
    nfc: bool = False  # texts are normalized first
    ignore_merges: bool = False  # what is a token stays whole, though no merges lead to it
    add_bos: bool = False  # where the file does not say


FORMS = {
    "gpt-2": Form(),
    "smollm": Form(digits=True),
    "llama-bpe": Form((_WORDS.format(digits=r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True),
    "smaug-bpe": Form((_WORDS.format(digits=r"\p{N}{1,3}"),), ignore_merges=True),
    "dbrx": Form((_WORDS.format(digits=r"\p{N}{1,3}"),)),
    "minicpm5": Form((r"\p{N}{1,3}", _WORDS.format(digits=r"\p{N}+")), ignore_merges=True),
    "qwen2": Form((_WORDS.format(digits=r"\p{N}"),), nfc=True),
    "qwen35": Form((_MARKED_WORDS,), nfc=True),
    "megrez": Form((_WORDS.format(digits=r"\p{N}"),)),
    "seed-coder": Form((_SEED_WORDS,)),
    "tekken": Form((_CASED_WORDS.format(end="", digits=r"\p{N}"),), ignore_merges=True, add_bos=True),
    "gpt-4o": Form((_CASED_WORDS.format(end="(?i:'s|'t|'re|'ve|'m|'ll|'d)?", digits=r"\p{N}{1,3}"),)),
    "deepseek-llm": Form(
        ("[\r\n]", _DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _DEEPSEEK_ASIAN), digits=True
    ),
    "deepseek-coder": Form(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_ASIAN), digits=True),
    "deepseek-v3": Form((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_WORDS)),
    "viking": Form((_BLOOM_WORDS,), digits=True),
}
ALIASES = {
    **dict.fromkeys(("gpt2", "default", "a.x-4.0", "granite-docling", "mellum", "trillion"), "gpt-2"),
    **dict.fromkeys(("refact", "starcoder", "minerva-7b"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "midm-2.0", "pixtral", "lfm2"), "llama-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "f2llmv2"), "qwen2"),
    "hunyuan-dense": "deepseek-v3",
    "kormo": "megrez",
    "llama4": "gpt-4o",
}


def form_of(name: str) -> Form | None:
    """What tokenizer.ggml.pre's `name` stands for; None where it is not known."""
    return FORMS.get(ALIASES.get(name, name))
