"""Fields that several endpoints share: sampling, form of the answer, deadline and priority. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from millis.engine.schema import closed
from millis.server.api.body import No, Request, Wire, Yes
from millis.server.api.errors import from_error, invalid, unsupported
from millis.server.api.job import MAX_DEADLINE_MS, Limits
from millis.tasks.cascade import CONFIDENCE
from millis.types import Grammar, MillisError, OnDeadline, Priority, SamplingParams

_GUIDED = "write structured_outputs: {json | regex | choice | grammar: …} instead"
COMMON_REFUSED: Mapping[str, str] = {
    "store": "only /v1/responses keeps what it answers; leave it out or send false",
    "service_tier": "there is one tier; use priority: interactive, standard or batch",
    "moderation": "answers are not moderated",
    "prompt_cache_options": "prefixes are cached by themselves",
    "prompt_cache_retention": "prefixes are kept in memory for as long as there is room",
    "guided_json": _GUIDED,
    "guided_regex": _GUIDED,
    "guided_choice": _GUIDED,
    "guided_grammar": _GUIDED,
    "guided_decoding_backend": _GUIDED,
    "best_of": "every choice that is generated is returned; use n",
    "use_beam_search": "answers are sampled",
    "length_penalty": "answers are sampled, not searched",
    "min_tokens": "an answer ends where the model ends it; use ignore_eos for a fixed length",
    "stop_token_ids": "use stop, with texts",
    "include_stop_str_in_output": "an answer ends before its stop text",
    "skip_special_tokens": "special tokens are never shown",
    "prompt_logprobs": "/v1/completions tells them",
    "bad_words": "use logit_bias, with the ids of tokens",
    "allowed_token_ids": "write structured_outputs: {choice | regex | grammar: …} instead",
    "logits_processors": "use logit_bias, with the ids of tokens",
    "return_token_ids": "answers are text; /tokenize tells its tokens",
    "return_tokens_as_token_ids": "logprobs name tokens by their text",
    "spaces_between_special_tokens": "special tokens are never shown",
    "truncate_prompt_tokens": "a prompt is read whole; of /v1/responses, truncation leaves out the oldest turns",
    "cache_prompt": "prefixes are cached by themselves",
    "cache_salt": "prefixes are told apart by the keys of --api-key-file",
    "kv_transfer_params": "there is one cache, that of this machine",
    "vllm_xargs": "they belong to another server",
}

# A request that takes longer than a day is a mistake.
DeadlineMs = Annotated[float, Field(gt=0, le=MAX_DEADLINE_MS, description="milliseconds from arrival to last byte")]
Metadata = dict[str, Any]
Stop = Annotated[str, Field(min_length=1)]
TemplateValue = bool | Annotated[int, Field(ge=-(2**63), lt=2**63)] | float | Annotated[str, Field(max_length=1024)]
TemplateValues = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], TemplateValue | None], Field(max_length=16)
]


class Scheduling(Request):
    """When the answer must be there, and before whose."""

    deadline_ms: DeadlineMs | None = None
    priority: Priority | Annotated[int, Field(ge=-(2**31), lt=2**31, strict=True)] | None = Field(
        None, description="a number as vLLM takes it: below 0 is interactive, 0 standard, above 0 batch"
    )


class Texts(Scheduling):
    """Texts that are read."""

    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = Field(
        None, description="an encoder reads so many tokens of each text, -1: as many as it can"
    )


class Deadline(Scheduling):
    on_deadline: OnDeadline | None = Field(
        None, description="what is answered when time runs out: what there is, `fallback`, or an error"
    )
    fallback: Annotated[str, Field(max_length=8192)] | None = Field(
        None, description="the answer with on_deadline=fallback, as long as nothing else was sent"
    )


class StructuredOutputs(Wire):
    """The form of the answer: exactly one of these."""

    json_: dict[str, Any] | None = Field(None, alias="json", description="a JSON schema")
    json_object: Literal[True] | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1)
    grammar: Annotated[str, Field(min_length=1)] | None = Field(None, description="a Lark grammar")


class StreamOptions(Wire):
    include_usage: bool | None = None
    include_obfuscation: No | None = None
    continuous_usage_stats: No | None = None


class Sampling(Deadline):
    """How tokens are chosen: OpenAI's fields, and vLLM's names for the others."""

    refused: ClassVar[Mapping[str, str]] = COMMON_REFUSED

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31, description="0 or -1: all")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | list[Stop] | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    # What follows is refused with any other value.
    best_of: Literal[1] | None = None
    use_beam_search: No | None = None
    length_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=0)] | None = None
    stop_token_ids: Annotated[list[Any], Field(max_length=0)] | None = None
    include_stop_str_in_output: No | None = None
    skip_special_tokens: Yes | None = None
    bad_words: Annotated[list[Any], Field(max_length=0)] | None = None
    logits_processors: Annotated[list[Any], Field(max_length=0)] | None = None
    return_token_ids: No | None = None
    return_tokens_as_token_ids: No | None = None
    spaces_between_special_tokens: Yes | None = None
    cache_prompt: Yes | None = None
    vllm_xargs: Annotated[dict[str, Any], Field(max_length=0)] | None = None


class Named(Request):
    """Which model answers, or which models: a larger answer replaces a small one's if it is sure to be in time."""

    model: str | None = Field(None, description="needed, unless `models` are given")
    models: Annotated[list[str], Field(min_length=2, max_length=8)] | None = Field(
        None, description="a cascade instead of `model`, the smallest model first"
    )
    confidence: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="of a cascade: an answer whose tokens are so probable, 0.9 unless given, needs no larger model",
    )


class Account(Request):
    """For whom a request is and how it is booked: of OpenAI's requests, and changes no answer."""

    user: str | None = None
    metadata: Metadata | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None  # refused with any other value


class Asked(Named, Sampling, Account):
    """A request of OpenAI's completions, of chats and of texts alike."""

    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    store: No | None = None  # refused with any other value


FROM_FILES = ("temperature", "max_tokens", "max_completion_tokens")  # may be, of an encoder-decoder model


def asked(request: Named) -> dict[str, Any]:
    """The job's fields of whom it asks. ApiError 400: nobody, or what models that take turns do not do."""
    models = request.models
    left_open = frozenset(name for name in FROM_FILES if getattr(request, name, None) is None)
    if models is None:
        if request.model is None:
            raise invalid("model is missing", "model", "missing_required_parameter")
        if request.confidence is not None:
            raise invalid("confidence needs models, two or more of them", "confidence")
        return {"model": request.model, "left_open": left_open}
    if request.model not in (None, models[0]):
        raise invalid("model must be the first of models; leave one of them out", "model")
    if len(set(models)) < len(models):
        raise invalid("models names one model twice", "models")
    if getattr(request, "n", None) not in (None, 1):
        raise unsupported("n", "several models give one answer; leave it out, or name one model")
    if getattr(request, "logit_bias", None):
        raise unsupported("logit_bias", "a token's id is another token's in another model; name one model")
    for name in ("echo", "prompt_logprobs"):  # of a completion
        value = getattr(request, name, None)
        if value is not None and value is not False:
            raise unsupported(name, "what one model holds of a prompt is not what several do; name one model")
    confidence = CONFIDENCE if request.confidence is None else request.confidence
    return {"model": models[0], "models": tuple(models), "confidence": confidence}


def _priority(given: Priority | int) -> Priority:
    if isinstance(given, str):
        return given
    return "interactive" if given < 0 else "batch" if given else "standard"


def schedule(request: Scheduling) -> dict[str, Any]:
    """The job's fields of deadline and priority."""
    fields: dict[str, Any] = {"deadline_ms": request.deadline_ms, "priority": _priority(request.priority or 0)}
    if isinstance(request, Texts) and request.truncate_prompt_tokens is not None:
        if request.truncate_prompt_tokens == 0:
            raise invalid("truncate_prompt_tokens must be -1 or at least 1", "truncate_prompt_tokens")
        fields["truncate"] = request.truncate_prompt_tokens
    if isinstance(request, Deadline):
        on_deadline = request.on_deadline or "partial"
        if (on_deadline == "fallback") != (request.fallback is not None):
            raise invalid("fallback and on_deadline=fallback need each other", "fallback")
        fields |= {"on_deadline": on_deadline, "fallback": request.fallback or ""}
    return fields


def sampling(
    request: Sampling, limits: Limits, *, max_tokens: int | None, grammar: Grammar | None, logprobs: int | None
) -> SamplingParams:
    """SamplingParams of a request, with OpenAI's defaults."""
    grammar = _one_grammar(grammar, structured(request.structured_outputs, limits))
    given = {
        name: value
        for name in ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos")
        if (value := getattr(request, name)) is not None
    }
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    try:
        return SamplingParams(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=max(0, request.top_k or 0),
            seed=None if request.seed is None else request.seed % 2**64,
            stop=stop_texts(request.stop, limits),
            logit_bias=_biases(request.logit_bias, limits),
            grammar=grammar,
            logprobs=logprobs,
            **given,
        )
    except MillisError as error:
        raise from_error(error) from None


def stop_texts(stop: str | list[str] | None, limits: Limits, param: str = "stop") -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(texts) > limits.stop:
        raise invalid(f"{param} has {len(texts)} texts; {limits.stop} can be used", param)
    if any(len(text) > limits.stop_chars for text in texts):
        raise invalid(f"a text of {param} may have {limits.stop_chars} characters", param)
    return texts


def structured(given: StructuredOutputs | None, limits: Limits) -> Grammar | None:
    """The grammar of `structured_outputs`."""
    if given is None:
        return None
    found = [name for name in type(given).model_fields if getattr(given, name) is not None]
    if len(found) != 1:
        raise invalid(
            "structured_outputs takes exactly one of json, json_object, regex, choice, grammar", "structured_outputs"
        )
    where = f"structured_outputs.{found[0].rstrip('_')}"
    if given.json_ is not None:
        return json_grammar(given.json_, limits, where)
    if given.json_object:
        return Grammar("json_object", "")
    if given.choice is not None:
        return Grammar("choice", _bounded(json.dumps(given.choice, ensure_ascii=False), limits, where))
    if given.regex is not None:
        return Grammar("regex", _bounded(given.regex, limits, where))
    return Grammar("lark", _bounded(given.grammar or "", limits, where))


def form_field(
    grammar: Grammar | None, answer: Grammar | None, field: str, request: Sampling | None = None
) -> str | None:
    """The field that an answer's form comes from. grammar: what `answer`, which is that of `field`, and tools make."""
    if grammar is not None:
        return field if grammar is answer else "tools"
    return None if request is None or request.structured_outputs is None else "structured_outputs"


def json_grammar(schema: Mapping[str, Any], limits: Limits, where: str, *, strict: bool | None = None) -> Grammar:
    """The grammar of a JSON schema. Properties keep their order: answers are written in it.

    strict: objects have the properties that are named and no others, as OpenAI has it.
    """
    return Grammar("json_schema", _bounded(compact(closed(schema) if strict else schema), limits, where))


def compact(value: Any) -> str:
    """JSON without a needless character."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _bounded(source: str, limits: Limits, where: str) -> str:
    if len(source) > limits.schema_chars:
        raise invalid(f"{where} has {len(source)} characters; {limits.schema_chars} can be used", where)
    return source


def _one_grammar(first: Grammar | None, second: Grammar | None) -> Grammar | None:
    if first is not None and second is not None:
        raise invalid(
            "structured_outputs cannot be joined with response_format, text.format or tools; send one of them",
            "structured_outputs",
        )
    return first or second


def _biases(given: Mapping[str, float] | None, limits: Limits) -> dict[int, float]:
    if given is None:
        return {}
    if len(given) > limits.logit_bias:
        raise invalid(f"logit_bias has {len(given)} entries; {limits.logit_bias} can be used", "logit_bias")
    wrong = next(
        (key for key in given if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < 2**31)), None
    )
    if wrong is not None:
        raise invalid(f"logit_bias must have token ids as keys, not {wrong!r:.40}", "logit_bias")
    return {int(key): float(value) for key, value in given.items()}
