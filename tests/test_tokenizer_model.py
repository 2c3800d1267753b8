"""Folders with a tokenizer.model: ids against the sentencepiece library and transformers, and hostile folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaTokenizer

import seq2seqs
from millis.tokenizer import Tokenizer
from millis.tokenizer.to_gguf import tokenizer_metadata
from millis.types import FormatError
from test_tokenizer_spm import field, trained, varint
from tokenizer_lines import lines

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
TEXTS = [
    "",
    " ",
    "  a  b ",
    "Hello 世界! 🙂🧪 ﷽ \x07",
    "<s></s><unk><0x41>",
    "▁▁a",
    "\n\n\n",
    "<tool><tool>x",
    "一" * 3000,
]


def write(path: Path, model: bytes, **files: Mapping[str, Any]) -> Path:
    (path / "tokenizer.model").write_bytes(model)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def bpe(fallback: bool = True, prefix: bool = True) -> bytes:
    return trained(fallback, prefix)[0].serialized_model_proto()


def listed(token: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    return {"content": token, "special": special, "lstrip": False, "rstrip": False, "normalized": False} | flags


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("fallback", [True, False])
def test_bpe_ids_and_texts_are_sentencepieces(fallback: bool, prefix: bool, tmp_path: Path) -> None:
    library = trained(fallback, prefix)[0]
    ours = Tokenizer.from_folder(write(tmp_path, bpe(fallback, prefix)))
    assert (ours.bos, ours.eos) == (library.bos_id(), {library.eos_id()})
    for text in [*lines(), *TEXTS]:
        ids = library.encode(text)
        assert ours.encode(text) == [library.bos_id(), *ids], repr(text)
        assert ours.decode(ids) == library.decode(ids), repr(text)


@pytest.mark.parametrize("options", [{"byte_fallback": True}, {"add_dummy_prefix": False}, {}])
def test_unigram_ids_are_sentencepieces(options: dict[str, Any], tmp_path: Path) -> None:
    data = seq2seqs.spm(seq2seqs.LINES * 20, vocab_size=600, **options)
    library = seq2seqs.sentencepiece.SentencePieceProcessor(model_proto=data)
    ours = Tokenizer.from_folder(write(tmp_path, data))
    for text in [*seq2seqs.LINES, *TEXTS]:
        assert ours.encode(text, add_special=False) == library.encode(text), repr(text)
    text = "Hello 世界! 🙂"
    assert ours.decode(ours.encode(text)) == library.decode(library.encode(text))


@pytest.mark.parametrize("legacy", [True, False])
def test_special_and_added_tokens_are_those_of_transformers(legacy: bool, tmp_path: Path) -> None:
    library = trained(True, True)[0]
    size = library.get_piece_size()
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    added = {0: "<unk>", 1: "<s>", 2: "</s>", size: "<|im_start|>", size + 1: "<|im_end|>"}
    decoder = {str(i): listed(token) for i, token in added.items()}
    config = {"tokenizer_class": "LlamaTokenizer", **named, "legacy": legacy, "chat_template": TEMPLATE}
    path = write(tmp_path, bpe(), tokenizer_config=config | {"added_tokens_decoder": decoder}, config={})
    theirs, ours = LlamaTokenizer.from_pretrained(path), Tokenizer.from_folder(path)
    assert ours.vocab_size == len(theirs) == size + 2
    assert ours.eos == {2, size + 1}, "tokens that are known to end answers do"
    theirs.save_pretrained(tmp_path / "json")
    for text in ("<|im_start|>user</s>a<|im_end|>", "天气</s>世界</s>🙂", "Hello"):
        ids = theirs.encode(text, add_special_tokens=False)
        for tokenizer in (ours, Tokenizer.from_folder(tmp_path / "json")):
            assert tokenizer.encode(text, add_special=False, parse_special=True) == ids, text
    ids = ours.encode("Hello 世界! 🙂")
    assert ids == [1, *theirs.encode("Hello 世界! 🙂", add_special_tokens=False)]
    assert ours.decode([*ids, size + 1]) == theirs.decode([*ids, size + 1], skip_special_tokens=True)
    chat = [{"role": "user", "content": "a</s><|im_end|>b"}]
    assert ours.chat_text(chat) == "[user]a</s><|im_end|>b</s>"
    assert [i for i in ours.encode_chat(chat) if i in added] == [2], "only the template's own token is special"


def test_older_folders_name_their_added_tokens_elsewhere(tmp_path: Path) -> None:
    size = trained(True, True)[0].get_piece_size()
    special = {"additional_special_tokens": ["<tool>", "<|end|>"], "eos_token": {"content": "<|end|>"}}
    added = {"<|end|>": size + 1, "<plain>": size + 2}
    ours = Tokenizer.from_folder(write(tmp_path, bpe(), special_tokens_map=special, added_tokens=added))
    tool = trained(True, True)[0].piece_to_id("<tool>")
    assert ours.eos == {size + 1} and ours.vocab_size == size + 3
    assert {1, 2, tool, size + 1} <= ours.control and size + 2 not in ours.control
    assert ours.encode("a<plain>b").count(size + 2) == 1 and ours.decode([size + 2]) == "<plain>"
    assert tool not in ours.encode("<tool>") and tool in ours.encode("<tool>", parse_special=True)
    assert ours.decode([size]) == f"[PAD{size}]", "an id that no file knows"


def test_settings_of_the_configuration_come_first(tmp_path: Path) -> None:
    config = {"bos_token": None, "add_eos_token": True, "add_prefix_space": False}
    generation = {"eos_token_id": [2, 7, 8, 9]}
    path = write(tmp_path, bpe(), tokenizer_config=config, generation_config=generation)
    ours, library = Tokenizer.from_folder(path), trained(True, False)[0]
    assert ours.bos is None and ours.eos == {2, 7, 8, 9}
    assert ours.encode("the card")[-1] == 2 and ours.decode(ours.encode("the card")) == "the card"
    assert len(ours.encode("the", add_special=False)) == len(library.encode("the"))


def test_a_special_token_takes_the_spaces_that_its_flags_say(tmp_path: Path) -> None:
    size = trained(True, True)[0].get_piece_size()
    config = {"added_tokens_decoder": {str(size): listed("<|end|>", rstrip=True)}}
    path = write(tmp_path, bpe(), tokenizer_config=config)
    ours = Tokenizer.from_folder(path)
    assert ours.encode("a<|end|>  b", parse_special=True) == ours.encode("a<|end|>b", parse_special=True)
    with pytest.raises(FormatError, match="reaches over spaces"):
        tokenizer_metadata(path, size + 1)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_gguf_file_of_the_folder_has_its_ids(prefix: bool, tmp_path: Path) -> None:
    size = trained(True, prefix)[0].get_piece_size()
    config = {"added_tokens_decoder": {str(size): listed("<|end|>")}, "chat_template": TEMPLATE}
    path = write(tmp_path, bpe(True, prefix), tokenizer_config=config, generation_config={"eos_token_id": [2, size]})
    metadata = tokenizer_metadata(path, size + 9)
    ours, file = Tokenizer.from_folder(path), Tokenizer.from_gguf(metadata)
    assert file.vocab_size == size + 9 and file.eos == ours.eos == {2, size}
    assert metadata["tokenizer.chat_template"] == TEMPLATE
    for text in [*lines()[::4], *TEXTS]:
        ids = ours.encode(text + "<|end|>", parse_special=True)
        assert file.encode(text + "<|end|>", parse_special=True) == ids and file.decode(ids) == ours.decode(ids)
    with pytest.raises(FormatError, match=f"has {size + 1} tokens, the model's embedding {size} rows"):
        tokenizer_metadata(path, size)


def test_a_space_before_the_first_word_only_is_not_written_to_a_gguf_file(tmp_path: Path) -> None:
    path = write(tmp_path, bpe(), tokenizer_config={"legacy": False})
    with pytest.raises(FormatError, match="a space before the first word only"):
        tokenizer_metadata(path, 3000)


def test_a_unigram_model_is_not_written_to_a_gguf_file(tmp_path: Path) -> None:
    path = write(tmp_path, seq2seqs.spm(seq2seqs.LINES * 20, vocab_size=600))
    with pytest.raises(FormatError, match="it is no BPE model, for which GGUF has no name"):
        tokenizer_metadata(path, 1000)


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"tokenizer_config": {"bos_token": "<nope>"}}, "bos_token '<nope>' is not a token of tokenizer.model"),
        ({"tokenizer_config": {"add_bos_token": "yes"}}, "add_bos_token must be true or false"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "must be an object, not list"),
        ({"tokenizer_config": {"added_tokens_decoder": {"3": "x"}}}, "the added token 3 has no text"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": listed("a")}}}, "must have a token id, not x"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9" * 9: listed("a")}}}, "must have a token id, not 9"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9999": listed("</s>")}}}, "'</s>' has the text of another"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"9999": listed("<x>", special=False, lstrip=True)}}},
            "'<x>' is not special, but reaches over spaces",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": {"9": listed("</b>")}}}, "tokenizer.model: .*<0x00>"),
        ({"added_tokens": {"<x>": -1}}, "added_tokens.json: the added token '<x>' must have a token id, not -1"),
        ({"added_tokens": {"<x>": True}}, "must have a token id, not True"),
        ({"generation_config": {"eos_token_id": "2"}}, "eos_token_id must hold token ids"),
    ],
)
def test_folders_that_cannot_be(files: dict[str, Any], fault: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=fault):
        Tokenizer.from_folder(write(tmp_path, bpe(), **files))


def proto(kind: int, normalizer: bytes = b"", piece: int = 1) -> bytes:
    """A model of the pieces <unk> and a, the latter of type `piece`."""
    pieces = ((b"<unk>", 2), (b"a", piece))
    written = [field(1, 2, field(1, 2, text) + field(3, 0, varint(number))) for text, number in pieces]
    return b"".join([*written, field(2, 2, field(3, 0, varint(kind))), field(3, 2, normalizer)])


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        (b"", "tokenizer.model: its pieces must be there"),
        (proto(2), "tokenizer.model: its normalizer has remove_extra_whitespaces"),
        (proto(2, field(2, 2, b"map")), "tokenizer.model: its normalizer has precompiled_charsmap"),
        (proto(3), "of the kinds unigram and BPE"),
        (proto(1, piece=4), "'a' is an added token that is not special, not supported of unigram"),
    ],
)
def test_models_that_cannot_be(model: bytes, fault: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=fault):
        Tokenizer.from_folder(write(tmp_path, model))


def test_a_model_without_tokens_that_begin_and_end_a_text(tmp_path: Path) -> None:
    ours = Tokenizer.from_folder(write(tmp_path, proto(2, field(4, 0, b"\0"))))
    assert ours.bos is None and ours.eos == frozenset() and ours.encode("ab") == [0, 1, 0]


def test_files_that_end_early_or_were_changed(tmp_path: Path) -> None:
    """Each is read or refused by name; nothing else happens."""
    data, refused = bpe(), 0
    for i in range(0, len(data), max(1, len(data) // 40)):
        for broken in (data[:i], data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :]):
            try:
                Tokenizer.from_folder(write(tmp_path, broken)).encode("the card is lost")
            except FormatError:
                refused += 1
    assert refused > 30


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_configuration_is_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
    values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=3), scalars, max_size=2)
    token = st.fixed_dictionaries({"content": values, "special": values})
    decoder = st.dictionaries(st.integers(-3, 3000).map(str) | st.text(max_size=3), token | values, max_size=3)
    keys = ("bos_token", "eos_token", "add_bos_token", "add_prefix_space", "additional_special_tokens")
    config = data.draw(st.fixed_dictionaries({}, optional={key: values for key in keys}))
    config["added_tokens_decoder"] = data.draw(decoder)
    path = write(tmp_path_factory.getbasetemp(), bpe(), tokenizer_config=config)
    try:
        ours = Tokenizer.from_folder(path)
    except FormatError:
        return
    assert ours.encode("abc z")
    ours.decode(range(ours.vocab_size))
