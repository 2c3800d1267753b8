"""millis run: one prompt, streamed."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from millis.commands import common
from millis.types import RequestError


def command(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads standard input.")],
    model: common.Model = "smollm2",
    system: common.System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without chat template.")] = False,
    max_tokens: common.MaxTokens = 256,
    temperature: common.Temperature = 0.0,
    top_k: common.TopK = 0,
    top_p: common.TopP = 1.0,
    min_p: common.MinP = 0.0,
    repetition_penalty: common.Penalty = 1.0,
    seed: common.Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of the answer.")] = False,
    deadline_ms: common.DeadlineMs = None,
    threads: common.Threads = None,
    context: common.Context = None,
    precision: common.Precision = "fast",
    json: common.Json = False,
) -> None:
    """Answers one prompt. Example: millis run -m qwen2.5-0.5b "写一首关于秋天的诗。" """
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise RequestError("the prompt is empty; give a text, or - and a text on standard input")
    lm = common.load(model, threads=threads, context=context, precision=precision)
    options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or (),
        "ignore_eos": ignore_eos,
        "deadline_ms": deadline_ms,
    }
    if raw or not lm.tokenizer.has_chat_template:
        if system is not None:
            raise RequestError("a system message needs a chat template; leave out --raw and use an instruct model")
        stream = lm.stream(text, **options)
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        stream = lm.chat_stream([*messages, {"role": "user", "content": text}], **options)
    if json:
        with common.stopped_by_interrupt(stream):
            for _ in stream:
                pass
    else:
        common.show(stream)
    out = stream.completion
    assert out is not None
    if json:
        common.print_json(
            {
                "model": model,
                "text": out.text,
                "tokens": out.tokens,
                "finish_reason": out.finish_reason,
                "timings": out.timings.asdict(),
            }
        )
    else:
        common.say(common.status_line(out.timings, lm))
    if out.finish_reason == "cancelled":
        sys.exit(130)
