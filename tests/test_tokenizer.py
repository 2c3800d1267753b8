"""The tokenizer against a plain byte-level BPE, against transformers, and against hostile metadata."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bpe_reference import ReferenceBpe
from millis.models.gguf import read_gguf
from millis.tokenizer import Tokenizer, load_tokenizer
from millis.tokenizer.encoding import LONG_CHARACTERS
from millis.types import FormatError, RequestError
from tokenizer_lines import lines
from tokenizer_tiny import bpe

ModelPath = Callable[[str], Path]


@pytest.fixture(scope="module")
def smollm(model_path: ModelPath) -> dict[str, Any]:
    return dict(read_gguf(model_path("smollm2")).metadata)


@pytest.fixture(scope="module")
def qwen(model_path: ModelPath) -> dict[str, Any]:
    return dict(read_gguf(model_path("qwen2.5-0.5b")).metadata)


def assert_same(tokenizer: Tokenizer, encode: Callable[[str], list[int]], texts: list[str], **options: bool) -> None:
    for text in texts:
        assert tokenizer.encode(text, **options) == encode(text), repr(text)


def test_lines_are_what_the_tests_claim() -> None:
    assert len(lines()) == 2000
    text = "".join(lines())
    for sample in ("客服", "don't", "def ", "🚀", "\x00", "\x1d", "<|im_end|>", "\u200d"):
        assert sample in text


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "default", "llama-bpe"])
def test_bpe_equals_the_reference_on_smollm_vocabulary(smollm: dict[str, Any], pre: str) -> None:
    metadata = smollm | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    assert_same(Tokenizer.from_gguf(metadata), ReferenceBpe(metadata).encode, list(lines()))


def test_bpe_equals_the_reference_on_qwen(qwen: dict[str, Any]) -> None:
    tokenizer, reference = Tokenizer.from_gguf(qwen), ReferenceBpe(qwen)
    assert_same(tokenizer, reference.encode, list(lines()))
    assert "<tool_call>" in reference.user_defined
    assert tokenizer.encode("a<tool_call>b") == reference.encode("a<tool_call>b")


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5-0.5b"])
def test_bpe_equals_transformers(model_path: ModelPath, name: str) -> None:
    from transformers import AutoTokenizer

    path = model_path(name)
    peer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = load_tokenizer(read_gguf(path))
    # Its conversion leaves out Qwen's NFC and SmolLM2's splitting of digits, which the two models' own files have.
    texts = list(lines())
    if name == "smollm2":
        texts = ["".join(character for character in text if not character.isnumeric()) for text in texts]
    texts = [text for text in texts if unicodedata.is_normalized("NFC", text)]
    assert len(texts) > 1500
    assert_same(tokenizer, lambda text: peer.encode(text), texts, parse_special=True)
    for text in texts[:200]:
        assert tokenizer.decode(tokenizer.encode(text)) == peer.decode(
            tokenizer.encode(text), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_qwen_round_trip(qwen: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_gguf(qwen)
    for text in lines():
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_facts_of_the_files(smollm: dict[str, Any], qwen: dict[str, Any], model_path: ModelPath) -> None:
    first, second = Tokenizer.from_gguf(smollm), Tokenizer.from_gguf(qwen)
    assert (first.vocab_size, first.bos, first.eos) == (49152, 1, {0, 2})
    assert (second.vocab_size, second.bos, second.eos) == (151936, 151643, {151643, 151645})
    base = load_tokenizer(read_gguf(model_path("gemma3-270m")))
    assert (base.vocab_size, base.bos, base.eos) == (262144, 2, {1, 106})
    assert [t.has_chat_template for t in (first, second, base)] == [True, True, False]
    assert base.encode("")[0] == 2 and first.encode("") == second.encode("") == []


def test_special_tokens_stay_text_unless_asked_for() -> None:
    tokenizer = Tokenizer.from_gguf(bpe())
    assert tokenizer.encode("<|im_end|>") == list(b"<|im_end|>")  # a byte's id is the byte
    assert tokenizer.encode("hello<|im_end|>", parse_special=True) == [259, 263]
    assert tokenizer.encode("<<|im_end|>>", parse_special=True) == [*b"<", 263, *b">"]
    assert tokenizer.encode("<|im_end<|im_end|>", parse_special=True)[-1] == 263
    assert tokenizer.encode("<tool>") == [264]
    assert tokenizer.encode("[PAD]") == list(b"[PAD]")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"add_bos_token": True}, [261, 259]),
        ({"add_bos_token": True, "add_eos_token": True}, [261, 259, 263]),
        ({"add_bos_token": ...}, [259]),
        ({"add_bos_token": ..., "pre": "llama-bpe"}, [261, 259]),
        ({"add_bos_token": False, "pre": "llama-bpe"}, [259]),
    ],
)
def test_bos_is_added_exactly_when_the_metadata_says(changes: dict[str, Any], expected: list[int]) -> None:
    tokenizer = Tokenizer.from_gguf(bpe(**changes))
    assert tokenizer.encode("hello") == expected
    assert tokenizer.encode("hello", add_special=False) == [259]


def test_every_token_that_ends_an_answer() -> None:
    assert Tokenizer.from_gguf(bpe(eos_token_id=...)).eos == {261, 263}
    assert Tokenizer.from_gguf(bpe(eos_token_id=5, eot_token_id=6, eom_token_id=7)).eos == {5, 6, 7, 261, 263}
    kinds = [1] * 266
    assert Tokenizer.from_gguf(bpe(token_type=kinds, eos_token_id=263, bos_token_id=...)).eos == {263}


def test_an_ending_token_is_control_even_where_its_type_is_not() -> None:
    kinds = bpe()["tokenizer.ggml.token_type"]
    tokenizer = Tokenizer.from_gguf(bpe(token_type=[*kinds[:263], 1, *kinds[264:]]))
    assert tokenizer.encode("<|im_end|>", parse_special=True) == [263]
    assert tokenizer.decode([259, 263]) == "hello"


def test_without_token_types_only_the_named_tokens_are_special() -> None:
    tokenizer = Tokenizer.from_gguf(bpe(token_type=...))
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>", parse_special=True)[0] == 261
    assert tokenizer.eos == {261, 263}


def test_arrays_of_any_kind_are_read() -> None:
    kinds = np.array(bpe()["tokenizer.ggml.token_type"], dtype=np.int32)
    tokens = tuple(token.encode() for token in bpe()["tokenizer.ggml.tokens"])
    tokenizer = Tokenizer.from_gguf(bpe(token_type=kinds, tokens=tokens, eos_token_id=np.uint32(263)))
    assert tokenizer.encode("hello") == [259]
    assert tokenizer.eos == {261, 263}


TOKENS = bpe()["tokenizer.ggml.tokens"]
HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"model": ...}, "model must be a text"),
    ({"model": 7}, "model must be a text"),
    ({"model": "t5"}, "model is 't5'"),
    ({"pre": "qwen9"}, "pre is 'qwen9'"),
    ({"pre": b"gpt-2"}, "pre must be a text"),
    ({"tokens": ...}, "tokens is missing"),
    ({"tokens": []}, "tokens is empty"),
    ({"tokens": "abc"}, "tokens must be an array"),
    ({"tokens": 5}, "tokens must be an array"),
    ({"tokens": {"a": 1}}, "tokens must be an array"),
    ({"tokens": [*TOKENS[:-1], 5]}, "tokens must hold UTF-8"),
    ({"tokens": [*TOKENS[:-1], None]}, "tokens must hold UTF-8"),
    ({"tokens": [*TOKENS[:-1], b"\xff\xfe"]}, "tokens must hold UTF-8"),
    ({"tokens": [*TOKENS[:-1], "\ud800"]}, "tokens must hold UTF-8"),
    ({"tokens": [*TOKENS[:-1], "he"]}, "'he' twice"),
    ({"tokens": [*TOKENS, "more"]}, "token_type holds 266 entries for 267 tokens"),
    ({"token_type": [1] * 5}, "token_type holds 5 entries"),
    ({"token_type": [1] * 265 + [7]}, "integers from 1 to 6"),
    ({"token_type": [1] * 265 + [-1]}, "integers from 1 to 6"),
    ({"token_type": [1] * 265 + ["x"]}, "integers from 1 to 6"),
    ({"token_type": [1.0] * 266}, "integers from 1 to 6"),
    ({"token_type": 3}, "token_type must be an array"),
    ({"scores": [0.0]}, "scores holds 1 entries"),
    ({"scores": [float("nan")] * 266}, "scores must hold finite"),
    ({"scores": ["0"] * 266}, "scores must hold finite"),
    ({"merges": ...}, "merges is missing"),
    ({"merges": []}, "merges is missing"),
    ({"merges": ["h"]}, "'h', which is not a pair"),
    ({"merges": ["h e l"]}, "'h e l', which is not a pair"),
    ({"merges": [" h"]}, "' h', which is not a pair"),
    ({"merges": [""]}, "'', which is not a pair"),
    ({"merges": ["x y"]}, "'x y', which is not a pair"),
    ({"merges": ["zz zz"]}, "'zz zz', which is not a pair"),
    ({"merges": [5]}, "merges must hold UTF-8"),
    ({"eos_token_id": 266}, "eos_token_id must be a token id in [0, 266)"),
    ({"eos_token_id": -1}, "eos_token_id must be"),
    ({"eos_token_id": 2**32 - 1}, "eos_token_id must be"),
    ({"eos_token_id": "2"}, "eos_token_id must be"),
    ({"eos_token_id": 2.0}, "eos_token_id must be"),
    ({"eos_token_id": True}, "eos_token_id must be"),
    ({"eot_token_id": 10**30}, "eot_token_id must be"),
    ({"bos_token_id": [1]}, "bos_token_id must be"),
    ({"unknown_token_id": 9999}, "unknown_token_id must be"),
    ({"add_bos_token": 1}, "add_bos_token must be true or false"),
    ({"add_bos_token": True, "bos_token_id": ...}, "bos_token_id is missing"),
    ({"add_eos_token": True, "eos_token_id": ...}, "eos_token_id is missing"),
    ({"add_space_prefix": True}, "add_space_prefix is set"),
]


@pytest.mark.parametrize(("changes", "message"), HOSTILE)
def test_hostile_metadata_is_a_format_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError) as error:
        Tokenizer.from_gguf(bpe(**changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_template_that_is_no_text_is_a_format_error() -> None:
    with pytest.raises(FormatError, match="chat_template must be a text"):
        Tokenizer.from_gguf(bpe() | {"tokenizer.chat_template": 5})


def test_an_absurdly_long_list_is_refused_before_it_is_read() -> None:
    with pytest.raises(FormatError, match="holds 1000000000 entries"):
        Tokenizer.from_gguf(bpe(tokens=range(10**9)))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_random_metadata_never_fails_otherwise(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(bpe())))
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
    value = data.draw(
        scalars | st.lists(scalars, max_size=4) | st.dictionaries(st.text(max_size=3), scalars, max_size=2)
    )
    try:
        tokenizer = Tokenizer.from_gguf(bpe() | {key: value})
    except FormatError:
        return
    assert tokenizer.encode("hello world")


def test_llama_3_takes_a_word_that_is_a_token_whole() -> None:
    """Though no merge leads to it; the others only merge."""
    metadata = {key: value for key, value in bpe(pre="llama-bpe", add_bos_token=False).items()}
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"][:265], "zoo"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"][:265], 1]
    assert Tokenizer.from_gguf(metadata).encode("zoo") == [265] == ReferenceBpe(metadata).encode("zoo")
    metadata["tokenizer.ggml.pre"] = "gpt-2"
    assert Tokenizer.from_gguf(metadata).encode("zoo") == list(b"zoo") == ReferenceBpe(metadata).encode("zoo")


def test_smollm_takes_digits_one_by_one() -> None:
    """Even where a merge of two digits exists; the others use it."""
    metadata = bpe(pre="smollm", merges=[*bpe()["tokenizer.ggml.merges"], "1 2"])
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"][:265], "12"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"][:265], 1]
    assert Tokenizer.from_gguf(metadata).encode("12") == list(b"12") == ReferenceBpe(metadata).encode("12")
    metadata["tokenizer.ggml.pre"] = "gpt-2"
    assert Tokenizer.from_gguf(metadata).encode("12") == [265] == ReferenceBpe(metadata).encode("12")


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    tokenizer = Tokenizer.from_gguf(bpe())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == ReferenceBpe(bpe()).encode(text)


def test_a_lone_surrogate_is_a_request_error() -> None:
    tokenizer = Tokenizer.from_gguf(bpe())
    with pytest.raises(RequestError, match="lone surrogate at position 2"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(RequestError, match="must be a str, not bytes"):
        tokenizer.encode(b"ab")  # type: ignore[arg-type]


def test_a_vocabulary_larger_or_smaller_than_the_model() -> None:
    tokenizer = Tokenizer.from_gguf(bpe())
    assert tokenizer.for_model(300).vocab_size == 300
    assert tokenizer.for_model(300).decode([259, 299]) == "hello"
    with pytest.raises(RequestError, match="outside the vocabulary of 300"):
        tokenizer.for_model(300).decode([300])
    with pytest.raises(FormatError, match="names token 263, but the model knows only 262"):
        tokenizer.for_model(262)
    with pytest.raises(RequestError, match="token 264, but the model knows only 264"):
        tokenizer.for_model(264).encode("<tool>")


def test_many_threads_encode_alike() -> None:
    tokenizer = Tokenizer.from_gguf(bpe(pre="qwen2"))
    texts = lines()[:300]
    expected = [tokenizer.encode(text, parse_special=True) for text in texts]
    found: list[list[list[int]]] = []

    def work() -> None:
        found.append([tokenizer.encode(text, parse_special=True) for text in texts])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_long_texts_equal_the_reference(smollm: dict[str, Any]) -> None:
    text = "".join(lines())
    assert len(text) > 4 * LONG_CHARACTERS
    assert_same(Tokenizer.from_gguf(smollm), ReferenceBpe(smollm).encode, [text])


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    tokenizer = Tokenizer.from_gguf(bpe())
    text, done = "hello world " * (64 * LONG_CHARACTERS // 12), False
    counted = 0
    met: list[bool] = []  # whether another thread ran while the text was encoded

    def work() -> None:
        nonlocal done
        while not any(met) and len(met) < 100:  # the system may let the other wait for long
            before = counted
            tokenizer.encode(text)
            met.append(counted > before)
        done = True

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # no thread is made to let go of the lock; those that wait or compute elsewhere do
    try:
        thread = threading.Thread(target=work)
        thread.start()
        while not done:
            counted += 1
            time.sleep(0)
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert any(met)


def test_import_is_light() -> None:
    code = "import sys, millis.tokenizer; print({'jinja2', 'tokenizers', 'numpy', 'torch'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "set()"
