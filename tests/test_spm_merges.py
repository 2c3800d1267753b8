"""SentencePiece tokenizers as folders and back: ids against the GGUF file's, transformers' and the library's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import generate_merges

from millis.models.gguf import read_gguf
from millis.tokenizer import Tokenizer
from millis.tokenizer.spm_merges import merges_of, scores_of
from millis.tokenizer.to_folder import write_tokenizer
from millis.tokenizer.to_gguf import tokenizer_metadata
from millis.types import FormatError
from test_tokenizer_spm import trained
from tokenizer_lines import lines
from tokenizer_tiny import spm

SPACE = "▁"
CONFIG = {"bos_token": "<s>", "eos_token": "</s>"}
ODD = ("", " ", "  ", "   a", "\n\n\n", "<s> and </s>", "<0x41>", "\0", "一" * 50, "-" * 40)


def small(prefix: bool, fallback: bool = True) -> dict[str, Any]:
    """What SentencePiece trained on our lines, as a GGUF file has it; user-defined tokens only without a prefix."""
    metadata = dict(trained(fallback, prefix)[1])
    kinds = [1 if kind == 4 and prefix else kind for kind in metadata["tokenizer.ggml.token_type"]]
    return metadata | {"tokenizer.ggml.token_type": kinds}


def texts(prefix: bool) -> tuple[str, ...]:
    return (*lines(), *ODD, *(() if prefix else ("<tool>", "a <tool><tool><tool>b")))


@pytest.mark.parametrize(("prefix", "fallback"), [(True, True), (False, True), (False, False)])
def test_a_folder_has_the_ids_of_the_gguf_file(prefix: bool, fallback: bool, tmp_path: Path) -> None:
    metadata = small(prefix, fallback)
    write_tokenizer(metadata, tmp_path)
    ours, folder = Tokenizer.from_gguf(metadata), Tokenizer.from_folder(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    again = tokenizer_metadata(tmp_path, folder.vocab_size)
    back = Tokenizer.from_gguf(again)
    for text in texts(prefix):
        ids = ours.encode(text)
        assert folder.encode(text) == back.encode(text) == ids, repr(text)
        assert theirs(text, split_special_tokens=True).input_ids == ids, repr(text)
        if fallback:
            assert folder.decode(ids) == back.decode(ids) == ours.decode(ids), repr(text)
            assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert folder.eos == back.eos == ours.eos and folder.bos == back.bos == ours.bos
    assert again["tokenizer.ggml.add_space_prefix"] == prefix
    assert again["tokenizer.ggml.token_type"] == metadata["tokenizer.ggml.token_type"]


def test_gemma_as_a_folder_and_back(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    metadata = read_gguf(model_path("gemma3-270m")).metadata
    write_tokenizer(metadata, tmp_path)
    ours, folder = Tokenizer.from_gguf(metadata), Tokenizer.from_folder(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    again = tokenizer_metadata(tmp_path, 262144)
    back = Tokenizer.from_gguf(again)
    for text in (*lines()[::4], *ODD, " " * 40 + "a", "\t\t a"):
        ids = ours.encode(text)
        assert folder.encode(text) == back.encode(text) == ids, repr(text)
        assert theirs(text, split_special_tokens=True).input_ids == ids, repr(text)
        assert folder.decode(ids) == ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    for key in ("tokens", "token_type"):
        assert again[f"tokenizer.ggml.{key}"] == list(metadata[f"tokenizer.ggml.{key}"])


def published(prefix: bool) -> Backend:
    """As Llama 2 (with a prefix) and Gemma are published: transformers' merges, added tokens found as they stand."""
    metadata = {key.removeprefix("tokenizer.ggml."): value for key, value in small(prefix).items()}
    tokens, kinds = metadata["tokens"], metadata["token_type"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    scores = {t: 0.0 if kinds[i] == 4 else metadata["scores"][i] for t, i in vocabulary.items() if kinds[i] in (1, 4)}
    library = Backend(
        models.BPE(
            vocabulary,
            generate_merges({t: vocabulary[t] for t in scores}, scores),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    escape = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        library.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        library.normalizer = escape
        library.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    library.decoder = decoders.Sequence(steps)
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    added = [token for i, token in enumerate(tokens) if kinds[i] == 4]
    library.add_tokens([AddedToken(token, normalized=False, special=False) for token in added])
    return library


def save(path: Path, library: Backend) -> Path:
    library.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.mark.parametrize("prefix", [True, False])
def test_published_folders_have_their_ids_as_gguf_files(prefix: bool, tmp_path: Path) -> None:
    library = published(prefix)
    metadata = tokenizer_metadata(save(tmp_path, library), library.get_vocab_size() + 2)
    ours = Tokenizer.from_gguf(metadata)
    library.encode_special_tokens = True
    for text in texts(prefix):
        ids = library.encode(text).ids
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == library.decode(ids), repr(text)
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{library.get_vocab_size() + 1}]"
    assert metadata["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 4 if not prefix else 1]


def test_tokens_of_spaces_stand_as_spaces(tmp_path: Path) -> None:
    """As llama.cpp looks for user-defined tokens before it writes spaces as U+2581."""
    metadata = tokenizer_metadata(save(tmp_path, published(False)), 3000)
    tokens, kinds = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    assert "  " in [token for token, kind in zip(tokens, kinds, strict=True) if kind == 4] and "▁▁" not in tokens
    assert Tokenizer.from_folder(tmp_path).decode([tokens.index("  ")]) == "  "


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"scores": ...}, "scores is missing"),
        ({"token_type": [2, 3, 3] + [6] * 256 + [1] * 4 + [5] + [1] * 6}, "'ab' is unused, and other tokens make it"),
        ({"token_type": [2, 3, 3] + [6] * 256 + [1, 3] + [1] * 9}, "'a' is a control token of one character"),
        ({"token_type": [2, 3, 3] + [6] * 256 + [1] * 5 + [4] + [1] * 5}, "'▁a' is user-defined with a space in it"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is set"),
        ({"tokens": [*spm()["tokenizer.ggml.tokens"][:-1], "x" * 2000]}, "a token has 2000 characters"),
        ({"model": "t5"}, "gpt2 and llama can be written to a folder"),
    ],
)
def test_what_a_folder_cannot_say(changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=fault):
        write_tokenizer(spm(**changes), tmp_path)


def test_spellings_that_differ_in_spaces_only(tmp_path: Path) -> None:
    tokens = [*spm()["tokenizer.ggml.tokens"], "▁ a", "▁▁a"]
    kinds = [*spm()["tokenizer.ggml.token_type"], 4, 1]
    given = spm(tokens=tokens, token_type=kinds, scores=[0.0] * len(tokens), add_space_prefix=False)
    with pytest.raises(FormatError, match="differs from another only in how spaces are written"):
        write_tokenizer(given, tmp_path)


def with_lower_case(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def with_words_first(content: dict[str, Any]) -> None:
    content["normalizer"] = None
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}


def with_whole_words(content: dict[str, Any]) -> None:
    content["model"]["ignore_merges"] = True


def with_a_merge_less(content: dict[str, Any]) -> None:
    content["model"]["merges"].pop()


def with_merges_apart(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    twice = next(i for i in range(1, len(merges)) if "".join(merges[i]) == "".join(merges[i - 1]))
    merges.append(merges.pop(twice))


def with_a_late_token(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges.append(merges.pop(merges.index([SPACE, SPACE])))


def with_other_spaces(content: dict[str, Any]) -> None:
    content["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})


def without_bytes(content: dict[str, Any]) -> None:
    content["model"]["byte_fallback"] = False


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (with_lower_case, "not those of Llama 2 or Gemma"),
        (with_words_first, "not those of Llama 2 or Gemma"),
        (with_other_spaces, "not those of Llama 2 or Gemma"),
        (with_whole_words, "works otherwise than a GGUF file's llama"),
        (without_bytes, "works otherwise than a GGUF file's llama"),
        (with_a_merge_less, "its merges do not make"),
        (with_merges_apart, "at two ranks"),
        (with_a_late_token, "'▁▁' is found after others are merged"),
    ],
)
def test_what_a_gguf_file_cannot_say(change: Callable[[dict[str, Any]], None], fault: str, tmp_path: Path) -> None:
    path = save(tmp_path, published(False))
    content = json.loads((path / "tokenizer.json").read_bytes())
    change(content)
    (path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=fault):
        tokenizer_metadata(path, 3000)


def test_scores_and_merges() -> None:
    pieces = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    scores = {"a": -9.0, "b": -9.0, "c": -9.0, "bc": -1.0, "abc": -2.0, "ab": -3.0}
    merges = merges_of(scores)
    assert merges == [("b", "c"), ("ab", "c"), ("a", "bc"), ("a", "b")]
    assert scores_of(merges, pieces) == {"bc": 0.0, "abc": -1.0, "ab": -2.0}
    assert scores_of([("<", "s"), *merges], pieces) == scores_of(merges, pieces)
    with pytest.raises(FormatError, match="of a token that is special or added"):
        scores_of(merges, {token: i for token, i in pieces.items() if token != "c"})
