"""Every endpoint in one table: what its body is, what parses it, and what writes its answer. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from millis.server.api.answer import AnswerRequest, AnswerWriter, parse_answer
from millis.server.api.anthropic import CountRequest, MessagesRequest, parse_count, parse_messages
from millis.server.api.body import Body, Request
from millis.server.api.chat import ChatRequest, ChatWriter, parse_chat
from millis.server.api.classify import ClassifyRequest, parse_classify
from millis.server.api.completions import CompletionRequest, CompletionWriter, parse_completion
from millis.server.api.embeddings import EmbeddingRequest, parse_embedding
from millis.server.api.job import Endpoint, Job, Limits
from millis.server.api.message_writer import MessageWriter
from millis.server.api.response_writer import ResponseWriter
from millis.server.api.responses import Past, ResponseRequest, parse_response
from millis.server.api.similarity import RerankRequest, ScoreRequest, parse_rerank, parse_score
from millis.server.api.tokenize import DetokenizeRequest, TokenizeRequest, parse_detokenize, parse_tokenize
from millis.server.api.writer import Head, Writer


@dataclass(frozen=True, slots=True)
class Route:
    """One endpoint. `request` describes its body for OpenAPI; `writer` is there where text is generated; `aliases`:
    other paths that clients ask it by."""

    path: str
    request: type[Request]
    parse: Callable[[Body, Limits], Job]
    writer: type[Writer] | None = None
    aliases: tuple[str, ...] = ()


ROUTES: Mapping[Endpoint, Route] = {
    "chat": Route("/v1/chat/completions", ChatRequest, parse_chat, ChatWriter),
    "completions": Route("/v1/completions", CompletionRequest, parse_completion, CompletionWriter),
    "responses": Route("/v1/responses", ResponseRequest, parse_response, ResponseWriter),
    "messages": Route("/v1/messages", MessagesRequest, parse_messages, MessageWriter),
    "count_tokens": Route("/v1/messages/count_tokens", CountRequest, parse_count),
    "embeddings": Route("/v1/embeddings", EmbeddingRequest, parse_embedding),
    "classify": Route("/v1/classify", ClassifyRequest, parse_classify, aliases=("/classify",)),
    "score": Route("/v1/score", ScoreRequest, parse_score, aliases=("/score",)),
    "rerank": Route("/v1/rerank", RerankRequest, parse_rerank, aliases=("/rerank", "/v2/rerank")),
    "answer": Route("/v1/answer", AnswerRequest, parse_answer, AnswerWriter),
    "tokenize": Route("/tokenize", TokenizeRequest, parse_tokenize),
    "detokenize": Route("/detokenize", DetokenizeRequest, parse_detokenize),
}


def parse(endpoint: Endpoint, body: Body, limits: Limits, past: Past | None = None) -> Job:
    """The job that `body` asks of an endpoint. ApiError 400 names the field at fault.

    past: the responses that are kept; None: none is.
    """
    if endpoint == "responses":
        return parse_response(body, limits, past)
    return ROUTES[endpoint].parse(body, limits)


def writer(job: Job, head: Head) -> Writer:
    """What writes the answer of a job of kind "generate"."""
    kind = ROUTES[job.endpoint].writer
    if kind is None:
        raise TypeError(f"/{job.endpoint} generates nothing")
    return kind(job, head)
