"""/tokenize and /detokenize, as vLLM has them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from millis.server.api.body import Body, No, Request, read
from millis.server.api.completions import Token
from millis.server.api.conversation import Message, check_length, conversation
from millis.server.api.errors import invalid
from millis.server.api.fields import TemplateValues
from millis.server.api.job import Conversation, Job, Limits, Prompt, Tool, ToolChoice
from millis.server.api.tools import ToolWire, check_tools, openai_tool, parameters


class TokenizeRequest(Request):
    """The body of POST /tokenize: a prompt, or messages and tools."""

    refused: ClassVar[Mapping[str, str]] = {
        "continue_final_message": "an answer is always begun",
        "chat_template": "the template is the model's",
    }

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[ToolWire] | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = Field(
        None, description="whether the prompt may spell control tokens, as that of /v1/completions may; here it may not"
    )
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: TemplateValues | None = None
    continue_final_message: No | None = None  # refused with any other value


class DetokenizeRequest(Request):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: list[Token]


def parse_tokenize(body: Body, limits: Limits) -> Job:
    """ApiError 400 names the field at fault."""
    request = read(TokenizeRequest, body)
    if (request.prompt is None) == (request.messages is None):
        raise invalid("give exactly one of prompt and messages", "prompt")
    prompt: Prompt
    if request.messages is None:
        for name in ("tools", "add_generation_prompt", "chat_template_kwargs"):
            if getattr(request, name) is not None:
                raise invalid(f"{name} needs messages", name)
        prompt = request.prompt or ""
        check_length(len(prompt), limits, "prompt")
    else:
        for name in ("add_special_tokens", "parse_special"):
            given = getattr(request, name)
            if given is not None and (name, given) != ("add_special_tokens", False):  # that is what happens anyway
                raise invalid(f"{name} needs prompt: the chat template writes its own, and messages are text", name)
        functions = [tool.function for tool in request.tools or ()]
        tools = [Tool(f.name, f.description, parameters(f.parameters)) for f in functions]
        shown = [openai_tool(tool) for tool in check_tools(tools, ToolChoice(), limits)]
        prompt = Conversation(conversation(request.messages, limits), tuple(shown), request.chat_template_kwargs or {})
    return Job(
        endpoint="tokenize",
        kind="tokenize",
        model=request.model,
        prompts=(prompt,),
        add_special=request.add_special_tokens is not False,
        parse_special=request.parse_special is True,
        add_generation_prompt=request.add_generation_prompt is not False,
        extra={"strings": request.return_token_strs is True},
    )


def parse_detokenize(body: Body, limits: Limits) -> Job:
    """ApiError 400 names the field at fault."""
    request = read(DetokenizeRequest, body)
    check_length(len(request.tokens), limits, "tokens")
    return Job(endpoint="detokenize", kind="detokenize", model=request.model, prompts=(tuple(request.tokens),))


def tokenize_body(job: Job, ids: Sequence[int], context: int, token_bytes: Callable[[int], bytes]) -> dict[str, Any]:
    """The answer of /tokenize."""
    strings = [token_bytes(token).decode(errors="replace") for token in ids] if job.extra["strings"] else None
    return {"count": len(ids), "max_model_len": context, "tokens": list(ids), "token_strs": strings}


def detokenize_body(text: str) -> dict[str, Any]:
    """The answer of /detokenize."""
    return {"prompt": text}
