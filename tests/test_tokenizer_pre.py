"""The pre-tokenizers that GGUF files name: ids against the tokenizers library on published settings.

No model is needed: the vocabulary's merges cross every border of words, so that each split shows in the ids.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from millis.tokenizer import Tokenizer
from millis.tokenizer.bpe import backend
from millis.tokenizer.pre import ALIASES, FORMS
from millis.tokenizer.to_gguf import tokenizer_metadata
from millis.tokenizer.vocabulary import read_vocabulary
from millis.types import FormatError
from tokenizer_lines import lines
from tokenizer_tiny import bpe

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
QWEN2 = ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST
QWEN35 = ENGLISH + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MINICPM5 = ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+" + REST
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED = ENGLISH + "|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
LETTERS = (
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7d"
    "ᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


def split(pattern: str, **changes: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | changes


MATCHES = {"behavior": "Removed", "invert": True}  # as the tokenizer.json of Phi-4, Granite 4 and GPT-4o have it
# name → pre-tokenizer, normalizer and ignore_merges as published.
PUBLISHED: dict[str, tuple[list[dict[str, Any]], dict[str, Any] | None, bool]] = {
    "gpt-2": ([GPT2], None, False),
    "smollm": ([DIGITS, GPT2], None, False),
    "llama-bpe": ([split(LLAMA3), BYTES], None, True),
    "smaug-bpe": ([split(LLAMA3), BYTES], None, True),
    "dbrx": ([split(LLAMA3, **MATCHES), BYTES], None, False),
    "minicpm5": ([split(r"\p{N}{1,3}"), split(MINICPM5), BYTES], None, True),
    "qwen2": ([split(QWEN2), BYTES], {"type": "NFC"}, False),
    "qwen35": ([split(QWEN35), BYTES], {"type": "NFC"}, False),
    "megrez": ([split(QWEN2), BYTES], None, False),
    "seed-coder": ([split(SEED), BYTES], None, False),
    "tekken": ([split(TEKKEN), BYTES], None, True),
    "gpt-4o": ([split(GPT4O, **MATCHES), BYTES], None, False),
    "deepseek-llm": (
        [
            *map(split, ("[\r\n]", LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", ASIAN)),
            *(DIGITS, BYTES),
        ],
        {"type": "Sequence", "normalizers": []},
        False,
    ),
    "deepseek-coder": (
        [*map(split, ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", ASIAN)), DIGITS, BYTES],
        {"type": "Sequence", "normalizers": []},
        False,
    ),
    "deepseek-v3": (
        [*map(split, (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK3)), BYTES],
        {"type": "Sequence", "normalizers": []},
        False,
    ),
    "viking": ([split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), DIGITS, BYTES], None, False),
}
TEXTS = [
    *lines()[:700],
    "It's we'LL DON'T 'tis O'Neill, rock'n'roll; HelloWorld XMLParser camelCase __init__",
    "1 12 123 1234 12345 1234567 3.14159 1,000,000 ٣ १२३४ Ⅷ ½ ²³ ３０％ a1b22c333",
    "a  b   c\td \t e\n\n  f \r\n\r\n g\n h  \n  \n   i\u00a0\u3000j\u2009k\u2028l   ",
    "नमस्ते हिन्दी עִבְרִית العَرَبِيَّة ไทยแลนด์ cafe\u0301 Ångstro\u0308m \u1e9b\u0323 ǅ ʰa ПРИВЕТмир ΑΒΓδ",
    "中文，测试。日本語テスト「カタカナ」ひらがなー 한국어의 龘𠮷 ，。！？ (括号)",
    "def f(x):\n    return x**2  # a_b\n\n\tif x != -1 && y => z:\n\t\tprint('/path/to\\n', \"q\")",
    "😀👍🏽👩‍👩‍👧🇨🇳❤️ ™ € → ∑ \x00\x01\x1b\x7f\u0085\ufeff\u200b\u00ad",
]


BEGINNING = "<|beginning|>"  # in no merge, whatever the source is that the lines hold


def beginning() -> int:
    return int(model()["vocab"][BEGINNING])


@functools.cache
def model() -> dict[str, Any]:
    """BPE trained on whole texts, with words that no merges lead to."""
    trained = Backend(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=12,
    )
    trained.train_from_iterator(TEXTS * 2, trainer)
    found: dict[str, Any] = json.loads(trained.to_str())["model"]
    whole = ["XMLParser", "ĠXML", "HelloWorld", "ĠHello", "ĠXMLParser", "567", "234", BEGINNING]
    for word in [word for word in whole if word not in found["vocab"]]:
        found["vocab"][word] = len(found["vocab"])
    return found


@functools.cache
def published(name: str) -> str:
    """tokenizer.json of the vocabulary above with the settings of `name`."""
    steps, normalizer, ignore_merges = PUBLISHED[name]
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model() | {"ignore_merges": ignore_merges},
    }
    return json.dumps(content)


def metadata(pre: str, **changes: Any) -> dict[str, Any]:
    vocabulary = model()["vocab"]
    return bpe(
        pre=pre,
        tokens=sorted(vocabulary, key=vocabulary.__getitem__),
        token_type=[1] * len(vocabulary),
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model()["merges"]],
        **{"bos_token_id": ..., "eos_token_id": ..., "add_bos_token": ...} | changes,
    )


def test_every_form_has_its_published_settings() -> None:
    assert PUBLISHED.keys() == FORMS.keys()
    assert set(ALIASES.values()) <= FORMS.keys() and not ALIASES.keys() & FORMS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_are_those_of_the_published_tokenizer(name: str) -> None:
    library, ours = Backend.from_str(published(name)), Tokenizer.from_gguf(metadata(name))
    for text in TEXTS:
        assert ours.encode(text) == library.encode(text).ids, repr(text)


@pytest.mark.parametrize("name", ALIASES)
def test_another_name_means_the_same(name: str) -> None:
    first, second = (Tokenizer.from_gguf(metadata(pre, bos_token_id=beginning())) for pre in (name, ALIASES[name]))
    assert all(first.encode(text) == second.encode(text) for text in TEXTS[-8:])


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("llama-bpe", "1234567 WE'LL", ["123", "456", "7", " WE", "'LL"]),
        ("llama3", "Hi!!\n\n  x", ["Hi", "!!\n\n", " ", " x"]),
        ("qwen2", "12 a", ["1", "2", " a"]),
        ("qwen2", "नमस्ते", ["नमस", "्त", "े"]),
        ("qwen35", "नमस्ते", ["नमस्ते"]),
        ("smollm", "a 12", ["a", " ", "1", "2"]),
        ("gpt-2", "a 12  b", ["a", " 12", " ", " b"]),
        ("tekken", "HelloWorld it's 12", ["Hello", "World", " it", "'s", " ", "1", "2"]),
        ("gpt-4o", "HelloWorld it's 1234", ["Hello", "World", " it's", " ", "123", "4"]),
        ("minicpm5", "a  1234", ["a", "  ", "123", "4"]),
        ("dbrx", "a  1234", ["a", " ", " ", "123", "4"]),
        ("seed-coder", "a!!\n12", ["a", "!!", "\n", "1", "2"]),
        ("deepseek-llm", "a12, b\n\n我的", ["a", "1", "2", ",", " b", "\n", "\n", "我的"]),
        ("deepseek-coder", "a12, b\n\n我的", ["a", "1", "2", ",", " b", "\n", "\n", "我的"]),
        ("deepseek-v3", "x.foo 1234我的abc", ["x", ".foo", " ", "123", "4", "我的", "abc"]),
        ("viking", "ab, cd 12", ["ab", ",", " cd", " ", "1", "2"]),
    ],
)
def test_texts_split_where_they_should(name: str, text: str, parts: list[str]) -> None:
    steps = backend(read_vocabulary(metadata(name))).pre_tokenizer
    assert steps is not None
    assert [text[begin:end] for _, (begin, end) in steps.pre_tokenize_str(text)] == parts


@pytest.mark.parametrize("name", [*FORMS, *ALIASES])
def test_where_the_file_does_not_say_some_begin_with_bos(name: str) -> None:
    begins, bos = ALIASES.get(name, name) in ("llama-bpe", "tekken"), beginning()
    assert Tokenizer.from_gguf(metadata(name, bos_token_id=bos)).encode("") == ([bos] if begins else [])
    assert Tokenizer.from_gguf(metadata(name, bos_token_id=bos, add_bos_token=False)).encode("") == []
    assert Tokenizer.from_gguf(metadata(name)).encode("") == []


def test_an_unknown_name_is_told_with_those_that_are_read() -> None:
    with pytest.raises(FormatError, match=r"pre is 'kimi-k2'; Millis reads a\.x-4\.0, dbrx, .*, tekken, ") as error:
        Tokenizer.from_gguf(metadata("kimi-k2"))
    assert "\n" not in str(error.value)


def folder(path: Path, content: str) -> Path:
    (path / "tokenizer.json").write_text(content)
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_folder_is_exported_under_the_name(name: str, tmp_path: Path) -> None:
    found = tokenizer_metadata(folder(tmp_path, published(name)), len(model()["vocab"]))
    # Llama 3's and Smaug's differ only in what they begin with, which an exported file says itself.
    assert found["tokenizer.ggml.pre"] == ("llama-bpe" if name == "smaug-bpe" else name)
    library, ours = Backend.from_str(published(name)), Tokenizer.from_gguf(found)
    for text in TEXTS[-8:]:
        assert ours.encode(text) == library.encode(text).ids, repr(text)


@pytest.mark.parametrize(
    ("name", "old", "new", "fault"),
    [
        ("viking", '"Isolated", "invert": false', '"Removed", "invert": true', "no name for its pre-tokenizer"),
        ("tekken", '"normalizer": null', '"normalizer": {"type": "NFC"}', "no name for its pre-tokenizer"),
        ("qwen35", '"NFC"', '"NFKC"', "no name for its pre-tokenizer"),
        ("qwen2", '"ignore_merges": false', '"ignore_merges": true', "works otherwise than a GGUF file's qwen2"),
    ],
)
def test_a_folder_that_differs_in_one_setting_is_refused(
    name: str, old: str, new: str, fault: str, tmp_path: Path
) -> None:
    assert old in published(name)
    with pytest.raises(FormatError, match=fault):
        tokenizer_metadata(folder(tmp_path, published(name).replace(old, new)), len(model()["vocab"]))
