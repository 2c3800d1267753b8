"""Decoding: pieces against the whole, the whole against bytes.decode and sentencepiece's rules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bpe_reference import byte_alphabet
from millis.models.gguf import read_gguf
from millis.tokenizer import Detokenizer, Tokenizer
from millis.types import RequestError
from tokenizer_lines import lines
from tokenizer_tiny import bpe, spm

BUILDERS: dict[str, Callable[[], dict[str, Any]]] = {
    "bpe": bpe,
    "spm": spm,
    "spm without prefix": lambda: spm(add_space_prefix=False),
}


@functools.cache
def tiny(name: str) -> Tokenizer:
    return Tokenizer.from_gguf(BUILDERS[name]())


def expected_bytes(metadata: dict[str, Any]) -> list[bytes]:
    """id → bytes, control tokens empty, worked out from the metadata by rule."""
    letters = {character: byte for byte, character in byte_alphabet().items()}
    found = []
    for token, kind in zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True):
        if kind == 3 or (kind == 5 and metadata["tokenizer.ggml.model"] == "gpt2"):
            found.append(b"")
        elif kind == 6:
            found.append(bytes.fromhex(token[3:5]))
        elif kind == 2:
            found.append(" ⁇ ".encode())
        elif metadata["tokenizer.ggml.model"] == "llama":
            found.append(token.replace("▁", " ").encode())
        else:
            found.append(token.encode() if kind == 4 else bytes(letters[character] for character in token))
    return found


def pieces(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    detokenizer = tokenizer.detokenizer(**options)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(BUILDERS)), st.lists(st.integers(0, 265), max_size=30), st.booleans())
def test_pieces_join_to_the_whole(name: str, ids: list[int], skip: bool) -> None:
    tokenizer = tiny(name)
    assert "".join(pieces(tokenizer, ids, skip_special=skip)) == tokenizer.decode(ids, skip_special=skip)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(["bpe", "spm without prefix"]), st.lists(st.integers(0, 265), max_size=30))
def test_the_whole_is_the_bytes_decoded(name: str, ids: list[int]) -> None:
    table = expected_bytes(BUILDERS[name]())
    assert tiny(name).decode(ids) == b"".join(table[i] for i in ids).decode("utf-8", errors="replace")


@settings(max_examples=500, deadline=None)
@given(st.text(), st.integers(0, 255))
def test_no_piece_holds_part_of_a_character(text: str, stray: int) -> None:
    """Byte by byte, a character appears with its last byte and never before."""
    seen = ""
    detokenizer = tiny("bpe").detokenizer()
    for count, byte in enumerate(text.encode(), 1):
        seen += detokenizer.push(byte)
        assert seen == text.encode()[:count].decode(errors="ignore")
    assert detokenizer.flush() == ""
    assert tiny("bpe").decode([*text.encode(), stray]) == (text.encode() + bytes([stray])).decode(errors="replace")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xf0\x9f\x99\x82", ["", "", "", "🙂", ""]),
        (b"\xf0\x9f", ["", "", "\ufffd"]),
        (b"\xf0\x9fA", ["", "", "\ufffdA", ""]),
        (b"\xffA", ["\ufffd", "A", ""]),
        (b"\xe4\xbd\xe4\xbd\xa0", ["", "", "\ufffd", "", "你", ""]),
        (b"\xed\xa0\x80", ["", "\ufffd\ufffd", "\ufffd", ""]),  # a surrogate is no character
        (b"\xc0\x80", ["\ufffd", "\ufffd", ""]),
    ],
)
def test_bytes_one_by_one(data: bytes, expected: list[str]) -> None:
    found = pieces(tiny("bpe"), list(data))
    assert "".join(found) == data.decode(errors="replace") == "".join(expected)
    assert found == expected or "\ufffd" in "".join(found)  # when an invalid byte is shown may differ, what may not


def test_control_tokens_are_skipped_unless_asked_for() -> None:
    ids = [262, 259, 263]
    assert pieces(tiny("bpe"), ids) == ["", "hello", "", ""]
    assert tiny("bpe").decode(ids, skip_special=False) == "<|im_start|>hello<|im_end|>"
    assert tiny("bpe").decode([259, 264, 265]) == "hello<tool>"


def test_a_control_token_does_not_break_a_character() -> None:
    assert tiny("bpe").decode([0xE4, 0xBD, 263, 0xA0]) == "你"
    assert pieces(tiny("bpe"), [0xE4, 263, 0xBD, 0xA0]) == ["", "", "", "你", ""]


def test_token_bytes() -> None:
    for name in ("bpe", "spm"):
        metadata = BUILDERS[name]()
        for i, expected in enumerate(expected_bytes(metadata)):
            if metadata["tokenizer.ggml.token_type"][i] == 3:
                expected = metadata["tokenizer.ggml.tokens"][i].encode()
            assert tiny(name).token_bytes(i) == expected


@pytest.mark.parametrize("token", [-1, 266, 10**12])
def test_an_id_outside_the_vocabulary_is_a_request_error(token: int) -> None:
    for call in (tiny("bpe").token_bytes, tiny("bpe").detokenizer().push, lambda i: tiny("bpe").decode([i])):
        with pytest.raises(RequestError, match="outside the vocabulary of 266"):
            call(token)


def spm_ids(*tokens: str) -> list[int]:
    return [spm()["tokenizer.ggml.tokens"].index(token) for token in tokens]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["▁a", "▁a"], "a a"),
        (["▁", "▁a"], " a"),  # one space only
        (["<s>", "▁a"], "a"),
        (["a", "▁a"], "a a"),
        (["<0x20>", "a"], " a"),  # a byte is no piece: nothing is dropped
        (["<unk>", "a"], " ⁇ a"),
        ([], ""),
    ],
)
def test_sentencepiece_leading_space(tokens: list[str], expected: str) -> None:
    assert tiny("spm").decode(spm_ids(*tokens)) == expected


def test_a_text_that_goes_on_keeps_its_space() -> None:
    detokenizer = tiny("spm").detokenizer(continues=True)
    assert detokenizer.push(spm_ids("▁a")[0]) == " a"
    assert tiny("spm without prefix").decode(spm_ids("▁a")) == " a"


def test_detokenizers_are_independent() -> None:
    first, second = tiny("bpe").detokenizer(), tiny("bpe").detokenizer()
    assert isinstance(first, Detokenizer)
    assert first.push(0xE4) == second.push(ord("A")).replace("A", "")
    assert second.flush() == "" and first.flush() == "\ufffd" and first.flush() == ""


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5-0.5b", "gemma3-270m"])
def test_real_vocabularies(model_path: Callable[[str], Path], name: str) -> None:
    """Every token's bytes by rule, and every line in pieces."""
    metadata = dict(read_gguf(model_path(name)).metadata)
    tokenizer = Tokenizer.from_gguf(metadata)
    kinds = metadata["tokenizer.ggml.token_type"]
    for i, expected in enumerate(expected_bytes(metadata)):
        if kinds[i] != 3:
            assert tokenizer.token_bytes(i) == expected
    for text in lines()[:400]:
        ids = tokenizer.encode(text)
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
