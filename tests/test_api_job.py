"""From jobs to what the engine is given: token ids, sampling parameters, deadlines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api_support import USER, job
from millis.models.gguf import read_gguf
from millis.server.api.errors import ApiError
from millis.server.api.job import Endpoint, Job, check_ids, choice_params, prompt_ids, with_deadline
from millis.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def smollm(model_path: Callable[[str], Path]) -> Tokenizer:
    return load_tokenizer(read_gguf(model_path("smollm2")))


@pytest.fixture(scope="module")
def gemma(model_path: Callable[[str], Path]) -> Tokenizer:
    """A base model: BOS before a text, no chat template."""
    return load_tokenizer(read_gguf(model_path("gemma3-270m")))


def error(call: Callable[[], Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call()
    return caught.value


def test_each_kind_of_prompt_becomes_ids(smollm: Tokenizer, gemma: Tokenizer) -> None:
    assert prompt_ids(job("chat"), smollm) == [smollm.encode_chat([{"role": "user", "content": "Hi"}])]
    assert prompt_ids(job("completions", prompt=["Hi", "Ho"]), gemma) == [gemma.encode("Hi"), gemma.encode("Ho")]
    assert prompt_ids(job("completions", prompt=[5, 6]), smollm) == [[5, 6]]
    assert prompt_ids(job("tokenize"), gemma) == [gemma.encode("Hi")]
    assert prompt_ids(job("tokenize", add_special_tokens=False), gemma) == [gemma.encode("Hi", add_special=False)]
    assert prompt_ids(job("tokenize", prompt=""), smollm) == [[]]
    chat = {"prompt": None, "messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": False}
    whole = prompt_ids(job("tokenize", **{**chat, "add_generation_prompt": True}), smollm)[0]
    begun = prompt_ids(job("tokenize", **chat), smollm)[0]
    assert whole[: len(begun)] == begun and len(whole) > len(begun)


def test_a_completions_text_may_spell_control_tokens(smollm: Tokenizer, gemma: Tokenizer) -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    parsed = smollm.encode(text, parse_special=True)
    assert prompt_ids(job("completions", prompt=text), smollm) == [parsed]
    assert prompt_ids(job("tokenize", prompt=text, parse_special=True), smollm) == [parsed]
    plain = prompt_ids(job("completions", prompt=text, parse_special=False), smollm)
    assert plain == [smollm.encode(text)] == prompt_ids(job("tokenize", prompt=text), smollm)
    assert len(plain[0]) > len(parsed) and not set(plain[0]) & smollm.control
    for spelled in ("<bos>Hi", "Hi"):  # what is put before every text is there once
        assert prompt_ids(job("completions", prompt=spelled), gemma) == [gemma.encode("Hi")]
    twice = prompt_ids(job("completions", prompt="<bos><bos>Hi"), gemma)[0]
    assert twice == [gemma.bos, *gemma.encode("Hi")]  # as it was written


def test_a_message_never_spells_control_tokens(smollm: Tokenizer) -> None:
    messages = [{"role": "user", "content": "<|im_end|>"}]
    for asked in (job("chat", messages=messages), job("count_tokens", messages=messages)):
        (ids,) = prompt_ids(asked, smollm)
        assert ids == smollm.encode_chat(messages)
        empty = smollm.encode_chat([{"role": "user", "content": ""}])
        end = smollm.encode("<|im_end|>", parse_special=True)[0]
        assert ids.count(end) == empty.count(end)


def test_an_instruction_needs_no_chat_template(smollm: Tokenizer, gemma: Tokenizer) -> None:
    asked = job("classify", template="Mood of {text}?", labels=["good", "bad"])
    assert prompt_ids(asked, gemma) == [gemma.encode("Mood of Hi?")]
    assert prompt_ids(asked, smollm) == [smollm.encode_chat([{"role": "user", "content": "Mood of Hi?"}])]
    question = asked.extra["question"]
    assert question.answers(smollm) == [smollm.encode(label, add_special=False) for label in ("good", "bad")]
    assert question.answers(gemma) == [gemma.encode(label, add_special=False) for label in (" good", " bad")]


def test_a_base_model_cannot_chat(gemma: Tokenizer) -> None:
    found = error(lambda: prompt_ids(job("chat"), gemma))
    assert (found.status, found.code, found.param) == (400, "chat_template_error", "messages")
    assert error(lambda: prompt_ids(job("responses"), gemma)).param == "input"


# As the templates of Qwen 3 read it: thoughts are closed before an answer that is to have none.
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{{ mood }}"
)


def test_a_template_is_told_its_settings_and_no_others(model_path: Callable[[str], Path], smollm: Tokenizer) -> None:
    metadata = read_gguf(model_path("smollm2")).metadata
    thinks = Tokenizer.from_gguf({**metadata, "tokenizer.chat_template": THINKS})

    def text(**settings: Any) -> str:
        (ids,) = prompt_ids(job("chat", chat_template_kwargs=settings), thinks)
        assert prompt_ids(job("tokenize", prompt=None, messages=[USER], chat_template_kwargs=settings), thinks) == [ids]
        return thinks.decode(ids, skip_special=False)

    assert text() == text(enable_thinking=True) == text(enable_thinking=None)
    assert text(enable_thinking=False) == text() + "<think>\n\n</think>\n\n"
    spelled = prompt_ids(job("chat", chat_template_kwargs={"mood": "<|im_end|>"}), thinks)[0]
    assert thinks.decode(spelled, skip_special=False).endswith("<|im_end|>")
    assert smollm.encode("<|im_end|>", parse_special=True)[0] != spelled[-1], "a setting is text"
    for name in ("weather", "messages", "tools", "bos_token", "add_generation_prompt", "raise_exception"):
        found = error(lambda name=name: prompt_ids(job("chat", chat_template_kwargs={name: "x"}), thinks))  # type: ignore[misc]
        assert (found.code, found.param) == ("unsupported_parameter", "chat_template_kwargs")
        assert name in found.message


@pytest.mark.parametrize(
    ("endpoint", "field"), [("completions", "prompt"), ("embeddings", "input"), ("responses", "input"), ("score", None)]
)
def test_a_text_without_a_token_is_named_as_its_endpoint_names_it(endpoint: Endpoint, field: str | None) -> None:
    class Mute:
        around: tuple[list[int], list[int]] = ([], [])
        has_chat_template, chat_variables = True, frozenset(("tools",))

        def encode(self, text: str, **options: Any) -> list[int]:
            return []

        encode_chat = encode

    found = error(lambda: prompt_ids(job(endpoint), Mute()))  # type: ignore[arg-type]
    assert found.param == field and found.message.startswith("text 0 is empty")


def test_no_tokens_are_an_empty_text(smollm: Tokenizer) -> None:
    assert prompt_ids(job("detokenize", tokens=[]), smollm) == [[]]


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    check_ids([0, 99], 100)
    found = error(lambda: check_ids([0, 100], 100))
    assert (found.status, found.param) == (400, "prompt")


def test_an_answer_fits_into_the_context() -> None:
    open_ended = job("chat", seed=5)
    assert choice_params(open_ended, 0, 90, 100).max_tokens == 10
    assert [choice_params(open_ended, i, 90, 100).seed for i in (0, 1)] == [5, 6]
    fixed = job("chat", max_tokens=20, seed=-1)
    assert choice_params(fixed, 1, 80, 100).max_tokens == 20
    assert choice_params(fixed, 1, 80, 100).seed == 0
    for asked, prompt in ((fixed, 81), (open_ended, 100)):
        found = error(lambda asked=asked, prompt=prompt: choice_params(asked, 0, prompt, 100))  # type: ignore[misc]
        assert (found.status, found.code) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("endpoint", "field"),
    [("chat", "messages"), ("messages", "messages"), ("responses", "input"), ("completions", "prompt")],
)
def test_a_prompt_that_is_too_long_is_named_as_its_endpoint_names_it(endpoint: Endpoint, field: str) -> None:
    assert error(lambda: choice_params(job(endpoint), 0, 100, 100)).param == field


@pytest.mark.parametrize(
    ("body_ms", "headers", "expected"),
    [
        (None, {}, None),
        (200.0, {}, 200),
        (None, {"x-deadline-ms": "250.5"}, 250.5),
        (None, {"x-request-timeout-seconds": "2"}, 2000),
        (200.0, {"x-deadline-ms": "250", "x-request-timeout-seconds": "2"}, 200),
        (None, {"x-deadline-ms": "1e30"}, 86_400_000),
    ],
)
def test_the_earliest_deadline_counts(body_ms: float | None, headers: dict[str, str], expected: float | None) -> None:
    assert with_deadline(job("chat", deadline_ms=body_ms), headers).deadline_ms == expected


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf", "1" * 40])
def test_a_deadline_that_is_none_is_refused(value: str) -> None:
    asked: Job = job("chat")
    assert error(lambda: with_deadline(asked, {"x-deadline-ms": value})).param == "x-deadline-ms"
