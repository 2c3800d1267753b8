"""What an encoder-decoder model makes of requests for a chat or a completion: a text in, another out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from millis.server.api.errors import invalid, unsupported
from millis.server.api.job import PROMPT_FIELDS, Conversation, Job
from millis.server.served import Model
from millis.tasks.text import TextStream
from millis.tokenizer import Tokenizer


class Whole(TextStream):
    """A text that is there when its last token is."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.text, self.stopped, self.stopped_by = "", False, None
        self._tokens: list[int] = []
        self._tokenizer = tokenizer

    def push(self, token: int) -> str:
        self._tokens.append(token)
        return ""

    def finish(self) -> str:
        self.text = self._tokenizer.decode(self._tokens).strip()
        return self.text


def rewritten(job: Job, model: Model) -> Job:
    """The job as `model` does it: what the request leaves open is as its files say. ApiError 400 names what it cannot.

    Of a conversation, the text is the last message, which must be the user's.
    """
    info, params = model.client.info, job.params
    assert info is not None
    asks: Sequence[tuple[str, Any]] = (
        ("models", job.models),
        ("tools", job.tools or any(isinstance(one, Conversation) and one.tools for one in job.prompts)),
        (job.form or "response_format", params.grammar),
        ("stop", params.stop),
        ("ignore_eos", params.ignore_eos),
        ("logit_bias", params.logit_bias),
        ("logprobs", params.logprobs is not None),
        ("echo", job.echo),
        ("chat_template_kwargs", any(isinstance(one, Conversation) and one.variables for one in job.prompts)),
        ("prompt_logprobs", job.prompt_logprobs is not None),
    )
    for field, asked in asks:
        if asked:
            raise unsupported(field, f"{model.name} is an encoder-decoder model, which has no use for it; leave it out")
    if "temperature" in job.left_open:
        params = replace(params, temperature=0.0)
    longest = info.context
    if {"max_tokens", "max_completion_tokens"} <= job.left_open:
        longest = info.answer_tokens
        params = replace(params, max_tokens=longest)
    params = replace(params, max_tokens=min(params.max_tokens, longest))
    return replace(job, params=params, open_ended=False, prompts=tuple(_text(prompt, model) for prompt in job.prompts))


def _text(prompt: Any, model: Model) -> Any:
    if not isinstance(prompt, Conversation):
        return prompt
    for i, message in enumerate(prompt.messages):
        if message["role"] not in ("user", "assistant"):
            text = (
                f"{model.name} reads the last message of the user, and none of the role {message['role']}: leave it out"
            )
            raise invalid(f"messages[{i}]: {text}", f"messages[{i}].role")
    last = prompt.messages[-1]
    if last["role"] != "user":
        raise invalid(f"messages must end with one of the user, the text that {model.name} answers", "messages")
    return last["content"]


def check_source(job: Job, tokens: int, context: int) -> None:
    """ApiError where a text is longer than an encoder-decoder model reads."""
    if tokens > context:
        message = f"the model reads {context} tokens; the text has {tokens}: cut it into parts"
        raise invalid(message, PROMPT_FIELDS[job.endpoint], "context_length_exceeded")
