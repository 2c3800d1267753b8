"""SentencePiece models against the sentencepiece library, on Gemma's vocabulary and on models trained here."""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from millis.models.gguf import read_gguf
from millis.tokenizer import Tokenizer
from millis.types import FormatError
from tokenizer_lines import lines
from tokenizer_tiny import spm

Processor = sentencepiece.SentencePieceProcessor


def field(number: int, wire: int, data: bytes) -> bytes:
    """One field of a protocol buffer, as the encoding's specification has it."""
    return varint(number << 3 | wire) + (varint(len(data)) + data if wire == 2 else data)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def library(metadata: Mapping[str, Any]) -> Processor:
    """The sentencepiece library over the tokens, scores and types of `metadata`; a model it has no text normaliser."""
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    fallback = 6 in ggml["token_type"]
    proto = bytearray()
    for i, (token, score, kind) in enumerate(zip(ggml["tokens"], ggml["scores"], ggml["token_type"], strict=True)):
        kind = 2 if i == ggml["unknown_token_id"] else int(kind)  # the library insists on one unknown token
        spelled = token.replace(" ", "▁") if kind == 4 else token
        piece = field(1, 2, spelled.encode()) + field(2, 5, struct.pack("<f", score)) + field(3, 0, varint(kind))
        proto += field(1, 2, piece)
    names = {name: ggml["tokens"][ggml[f"{key}_token_id"]] for name, key in NAMES.items() if f"{key}_token_id" in ggml}
    trainer = field(3, 0, varint(2)) + field(35, 0, varint(int(fallback)))
    trainer += b"".join(field(number, 2, names[number].encode()) for number in names)
    prefix = int(ggml.get("add_space_prefix", True))
    normalizer = field(1, 2, b"identity") + field(3, 0, varint(prefix)) + field(4, 0, b"\0") + field(5, 0, b"\1")
    processor = Processor()
    processor.LoadFromSerializedProto(bytes(proto) + field(2, 2, trainer) + field(3, 2, normalizer))
    return processor


NAMES = {45: "unknown", 46: "bos", 47: "eos"}  # fields of TrainerSpec


@functools.cache
def trained(fallback: bool, prefix: bool) -> tuple[Processor, dict[str, Any]]:
    """A model that the library trained on our lines, and the GGUF metadata that describes it."""
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text for text in lines() if "\0" not in text and "▁" not in text),
        model_writer=writer,
        model_type="bpe",
        vocab_size=2500,
        character_coverage=0.98,
        byte_fallback=fallback,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<tool>", "<tool><tool>", "▁▁", "\n", "\n\n"],
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    sp = Processor(model_proto=writer.getvalue())
    count = sp.get_piece_size()
    user_defined = {"<tool>", "<tool><tool>", "▁▁", "\n", "\n\n"}

    def kind(i: int) -> int:
        tests = ((sp.is_unknown, 2), (sp.is_control, 3), (sp.is_byte, 6), (sp.is_unused, 5))
        return next((kind for test, kind in tests if test(i)), 4 if sp.id_to_piece(i) in user_defined else 1)

    metadata = {
        "model": "llama",
        "tokens": [sp.id_to_piece(i) for i in range(count)],
        "scores": [sp.get_score(i) for i in range(count)],
        "token_type": [kind(i) for i in range(count)],
        "bos_token_id": sp.bos_id(),
        "eos_token_id": sp.eos_id(),
        "unknown_token_id": sp.unk_id(),
        "add_space_prefix": prefix,
    }
    return sp, {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


@pytest.fixture(scope="module")
def gemma(model_path: Callable[[str], Path]) -> dict[str, Any]:
    return dict(read_gguf(model_path("gemma3-270m")).metadata)


def test_gemma_equals_sentencepiece(gemma: dict[str, Any]) -> None:
    tokenizer, sp = Tokenizer.from_gguf(gemma), library(gemma)
    assert sp.get_piece_size() == tokenizer.vocab_size == 262144
    for text in lines():
        ids = tokenizer.encode(text, add_special=False)
        assert ids == sp.encode(text), repr(text)
        assert tokenizer.encode(text) == [2, *ids]
        assert tokenizer.decode(ids) == sp.decode(ids), repr(text)
        assert tokenizer.decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("fallback", [True, False])
def test_trained_models_equal_sentencepiece(fallback: bool, prefix: bool) -> None:
    sp, metadata = trained(fallback, prefix)
    tokenizer = Tokenizer.from_gguf(metadata)
    for text in (*lines(), "<tool>", "a<tool><tool><tool>b", "  ", "   a", "\n\n\n", " \n a", "", "\0", "一" * 3000):
        ids = tokenizer.encode(text, add_special=False)
        assert ids == sp.encode(text), repr(text)
        assert tokenizer.decode(ids) == sp.decode(ids), repr(text)


@pytest.mark.parametrize("prefix", [True, False])
def test_one_long_word_equals_sentencepiece(prefix: bool) -> None:
    sp, metadata = trained(True, prefix)
    tokenizer = Tokenizer.from_gguf(metadata)
    text = "".join("".join(lines()[:300]).split())
    assert len(text) > 5000
    assert tokenizer.encode(text, add_special=False) == sp.encode(text)


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.text(alphabet="ab<tol> \n▁é中\x00"), fallback=st.booleans(), prefix=st.booleans())
def test_any_text_equals_sentencepiece(text: str, fallback: bool, prefix: bool) -> None:
    sp, metadata = trained(fallback, prefix)
    assert Tokenizer.from_gguf(metadata).encode(text, add_special=False) == sp.encode(text)


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="ab▁", min_size=2, max_size=6), unique=True, max_size=20),
    scores=st.lists(st.sampled_from([-3.0, -2.0, -1.0]), min_size=20, max_size=20),
    kinds=st.lists(st.sampled_from([1, 1, 1, 4, 5]), min_size=20, max_size=20),
    text=st.text(alphabet="ab ", max_size=40),
)
def test_any_vocabulary_equals_sentencepiece(
    pieces: list[str], scores: list[float], kinds: list[int], text: str
) -> None:
    """Equal scores, unused tokens and tokens with a space inside are where a merge can go astray."""
    count = len(pieces)
    metadata = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", "a", "b", "▁", *pieces],
        "scores": [0.0] * 3 + [-9.0] * 3 + scores[:count],
        "token_type": [2, 3, 3, 1, 1, 1, *kinds[:count]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_space_prefix": False,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    assert Tokenizer.from_gguf(metadata).encode(text, add_special=False) == library(metadata).encode(text)


def test_control_tokens_in_text_stay_text(gemma: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_gguf(gemma)
    text = "a<end_of_turn>\n<bos><unused17>"
    assert not {2, 106, 23} & set(tokenizer.encode(text, add_special=False))
    ids = tokenizer.encode(text, add_special=False, parse_special=True)
    assert [i for i in ids if i in (2, 106, 23)] == [106, 2, 23]
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.decode(ids) == "a\n"


def test_spaces_and_bytes_of_a_small_model() -> None:
    tokenizer = Tokenizer.from_gguf(spm())
    ids = {token: i for i, token in enumerate(spm()["tokenizer.ggml.tokens"])}
    assert tokenizer.encode("abc") == [1, ids["▁abc"]]  # by way of "ab" and "▁ab"
    assert tokenizer.encode("aab") == [1, ids["▁a"], ids["ab"]]
    assert tokenizer.encode("bc") == [1, ids["▁"], ids["bc"]]
    assert tokenizer.encode("中é") == [1, ids["▁"], ids["中"], ids["é"]]
    assert tokenizer.encode("z", add_special=False) == [ids["▁"], ids["<0x7A>"]]
    assert tokenizer.encode("") == [1]
    assert tokenizer.decode(tokenizer.encode(" a b ")) == " a b "


def test_bos_by_default_and_as_the_metadata_says() -> None:
    assert Tokenizer.from_gguf(spm()).encode("a")[0] == 1
    assert Tokenizer.from_gguf(spm(add_bos_token=False)).encode("a")[0] != 1
    assert Tokenizer.from_gguf(spm(add_eos_token=True)).encode("a")[-1] == 2
    assert Tokenizer.from_gguf(spm(bos_token_id=...)).encode("a")[0] != 1


COUNT = len(spm()["tokenizer.ggml.tokens"])
KINDS = spm()["tokenizer.ggml.token_type"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": ...}, "scores is missing"),
        ({"scores": [0.0]}, f"scores holds 1 entries for {COUNT} tokens"),
        ({"scores": [float("inf")] * COUNT}, "scores must hold finite numbers"),
        ({"token_type": [2, 3, 3] + [6] * 255 + [1] * 12}, "must hold all of <0x00> to <0xFF>"),
        ({"token_type": [2, 3, 3] + [6] * 257 + [1] * 10}, "must hold all of <0x00> to <0xFF>"),
        ({"token_type": [3] * 259 + [1] * 11, "unknown_token_id": ...}, "neither byte tokens nor an unknown token"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is set"),
        ({"precompiled_charsmap": [1, 2, 3]}, "precompiled_charsmap is set"),
        ({"precompiled_charsmap": 5}, "precompiled_charsmap must be an array"),
        ({"remove_extra_whitespaces": "yes"}, "remove_extra_whitespaces must be true or false"),
        ({"add_space_prefix": "yes"}, "add_space_prefix must be true or false"),
        ({"bos_token_id": COUNT}, "bos_token_id must be a token id"),
    ],
)
def test_hostile_metadata_is_a_format_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError) as error:
        Tokenizer.from_gguf(spm(**changes))
    assert message in str(error.value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_random_metadata_never_fails_otherwise(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([*sorted(spm()), "tokenizer.ggml.precompiled_charsmap"]))
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
    value = data.draw(
        scalars | st.lists(scalars, max_size=4) | st.dictionaries(st.text(max_size=3), scalars, max_size=2)
    )
    try:
        tokenizer = Tokenizer.from_gguf(spm() | {key: value})
    except FormatError:
        return
    assert tokenizer.encode("abc z")
    tokenizer.decode(range(tokenizer.vocab_size))
