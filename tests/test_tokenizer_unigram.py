"""SentencePiece's own files: pieces against the sentencepiece library, ids against transformers, and hostile files."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, T5Tokenizer

from millis.tokenizer import Tokenizer
from millis.tokenizer.encoding import LONG_CHARACTERS
from millis.tokenizer.spm_file import parse_spm, read_spm
from millis.tokenizer.unigram import Unigram
from millis.types import FormatError
from seq2seqs import LINES, add_tokenizer, spm
from tokenizer_lines import lines

STYLES: tuple[dict[str, Any], ...] = (
    {},
    {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    {"byte_fallback": True},
    {"add_dummy_prefix": False},
)
# The library that runs the normalizer reads it a grapheme at a time, sentencepiece by its longest rule: of all our
# lines that shows where this letter is followed by a mark.
ODD = "\u1e9b"
EDGES = [
    "",
    " ",
    "  a  b ",
    "\n",
    "\ta\u3000b",
    "①②ｆｕｌｌ",
    "𠀀𠀀x",
    "</s><unk><s>",
    "<0x41>",
    "▁▁a",
    " ▁ ",
    "\U0010ffff 0",
]


@functools.cache
def trained(style: int) -> tuple[sentencepiece.SentencePieceProcessor, bytes]:
    options = {"vocab_size": 600, "character_coverage": 0.98, **STYLES[style]}
    data = spm([text for text in lines() if "\0" not in text][::2], **options)
    return sentencepiece.SentencePieceProcessor(model_proto=data), data


def pieces(unigram: Unigram, text: str, unknown: int) -> list[int]:
    return [unknown if isinstance(part, str) else part for part in unigram(text)]


def as_likely(library: sentencepiece.SentencePieceProcessor, ids: list[int], others: list[int]) -> bool:
    """Splits that are equally likely, but for rounding: "0" and "00", "00" and "0"."""
    scores = [sum(map(library.get_score, split)) for split in (ids, others)]
    return scores[0] == pytest.approx(scores[1], abs=1e-3)


@pytest.mark.parametrize("style", range(len(STYLES)))
def test_pieces_are_sentencepieces(style: int) -> None:
    library, data = trained(style)
    ours = Unigram(parse_spm(data))
    texts = [text for text in [*lines()[::2], *EDGES] if ODD not in text]
    wrong = [text for text in texts if pieces(ours, text, library.unk_id()) != library.encode(text)]
    for text in wrong:
        assert as_likely(library, pieces(ours, text, library.unk_id()), library.encode(text)), text
    assert len(wrong) <= 4 and not set(wrong) & set(EDGES)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("aber the\u2581<>/s0x41\n\t 天气。\ufffd\U0010ffffé"), max_size=24), st.integers(0, 3))
def test_pieces_of_any_text(text: str, style: int) -> None:
    library, data = trained(style)
    found, wanted = pieces(_unigram(style), text, library.unk_id()), library.encode(text)
    assert found == wanted or as_likely(library, found, wanted)


def test_pieces_of_a_long_text() -> None:
    style = STYLES.index({"byte_fallback": True})
    library, _ = trained(style)
    text = "The weather in 天气 is 🚀. " * (LONG_CHARACTERS // 10)
    assert pieces(_unigram(style), text, library.unk_id()) == library.encode(text)


@functools.cache
def _unigram(style: int) -> Unigram:
    return Unigram(parse_spm(trained(style)[1]))


@pytest.mark.parametrize("family", ["t5", "marian"])
def test_ids_and_texts_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    codes = (">>fra<<", ">>deu<<") if family == "marian" else ()
    folder = add_tokenizer(tmp_path, family, codes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoTokenizer.from_pretrained(folder) if codes else T5Tokenizer.from_pretrained(folder)
    ours = Tokenizer.from_folder(folder)
    texts = [*LINES, "straße zzz 龘龘 ok", " card  lost ", "A. b? c!"] + [f"{code} the card" for code in codes]
    for text in texts:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids).strip() == theirs.decode(ids, skip_special_tokens=True).strip()
    stream = ours.detokenizer()
    ids = ours.encode(LINES[3])
    assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids)
    assert ours.language_codes == list(codes)
    assert ours.encode("a</s>b<pad>").count(ours.encode("a")[-1]) == 1, "what ends a text cannot be spelled in one"


def test_a_tokenizer_json_made_of_the_same_file_gives_the_same_ids(tmp_path: Path) -> None:
    spm_alone = add_tokenizer(tmp_path, "t5")
    T5Tokenizer.from_pretrained(spm_alone).save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "tokenizer.json").is_file()
    ours, theirs = Tokenizer.from_folder(spm_alone), Tokenizer.from_folder(tmp_path / "whole")
    assert ours.eos == theirs.eos == {1}
    for text in LINES:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids and ours.decode(ids) == theirs.decode(ids)


def test_t5s_gaps_stand_behind_its_pieces(tmp_path: Path) -> None:
    ours = Tokenizer.from_folder(add_tokenizer(tmp_path, "t5"))
    size = len(read_spm(tmp_path / "spiece.model").pieces)
    assert ours.vocab_size == size + 10
    for i in (0, 9):
        assert ours.encode(f"<extra_id_{i}>", add_special=False, parse_special=True) == [size + 9 - i]
    assert ours.decode([size + 9, 1, 0]) == ""


def test_files_that_end_early_or_were_changed() -> None:
    """Each is read or refused by name; nothing else happens."""
    _, data = trained(0)
    refused = 0
    for i in range(0, len(data), max(1, len(data) // 70)):
        for broken in (data[:i], data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :]):
            try:
                Unigram(parse_spm(broken))("the card is lost")
            except FormatError:
                refused += 1
    assert refused > 70


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "its pieces must be there"),
        (b"\xff" * 12, "a number has no end"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "ends early, inside a field"),
        (b"\x0a\x02\x0a\x00", "has no text"),
        (b"\x08\x01", "a number where a message is expected"),
        (b"\x0b", "a field of an unknown kind"),
        (b"\x0a\x03\x0a\x01\xff", "a piece is not UTF-8"),
        (b"\x0a\x03\x0a\x01a", "one unknown piece, not 0"),
        (b"\x0a\x05\x0a\x01a\x18\x02" * 2, "each of them once"),
        (b"\x0a\x05\x0a\x01a\x18\x02\x12\x02\x18\x02", "a BPE model stands where a unigram"),
        (b"\x0a\x05\x0a\x01a\x18\x02\x12\x02\x18\x03", "of the kinds unigram and BPE"),
        (b"\x0a\x05\x0a\x01a\x18\x02\x12\x03\xc0\x01\x01", "white space behind words"),
        (b"\x0a\x05\x0a\x01a\x18\x02\x1a\x02\x28\x00", "or left as it is"),
        (b"\x0a\x05\x0a\x01a\x18\x02\x0a\x05\x0a\x01b\x18\x04", "user-defined pieces"),
        (b"\x0a\x0a\x0a\x01a\x18\x02\x15\x00\x00\xc0\x7f", "no finite score"),
    ],
)
def test_files_that_are_no_model(data: bytes, fault: str) -> None:
    with pytest.raises(FormatError, match=fault):
        Unigram(parse_spm(data))


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("vocab.json", "[]", "must hold a JSON object"),
        ("vocab.json", "{}", "missing or empty"),
        ("vocab.json", '{"</s>": 0, "<unk>": 1, "<pad>": 3}', "number its tokens from 0 on"),
        ("vocab.json", '{"</s>": 0, "<unk>": 1, "<pad>": 1152921504606846976}', "number its tokens from 0 on"),
        ("vocab.json", '{"</s>": 0, "<unk>": 1, "<pad>": "2"}', "a whole number"),
        ("vocab.json", '{"</s>": 0, "<unk>": 1}', "no token '<pad>'"),
        ("tokenizer_config.json", '{"separate_vocabs": true}', "a vocabulary for each language"),
        ("tokenizer_config.json", '{"eos_token": 7}', "no token 7"),
        ("source.spm", "no model", "source.spm: "),
    ],
)
def test_marian_folders_that_cannot_be(name: str, content: str, fault: str, tmp_path: Path) -> None:
    (add_tokenizer(tmp_path, "marian") / name).write_text(content)
    with pytest.raises(FormatError, match=fault):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("extra", [-1, 10**12, "ten"])
def test_t5_folders_that_cannot_be(extra: Any, tmp_path: Path) -> None:
    (add_tokenizer(tmp_path, "t5") / "tokenizer_config.json").write_text(json.dumps({"extra_ids": extra}))
    with pytest.raises(FormatError, match="extra_ids must be a whole number"):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_without_any_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="from tokenizer.json, tokenizer.model, spiece.model or source.spm"):
        Tokenizer.from_folder(tmp_path)
