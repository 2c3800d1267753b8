"""millis run: one prompt, streamed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millis.commands import common, lines
from millis.types import RequestError

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel, Stream

EXAMPLE = 'millis run -m qwen2.5-0.5b "写一首关于秋天的诗。" --max-tokens 100'


def command(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads standard input.")],
    model: Annotated[
        str,
        typer.Option("-m", "--model", help="A model; SMALL,LARGE: the large one replaces the answer."),
    ] = "smollm2",
    system: common.System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without chat template.")] = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens; default: 256, or as the model says.")
    ] = None,
    temperature: common.Temperature = 0.0,
    top_k: common.TopK = 0,
    top_p: common.TopP = 1.0,
    min_p: common.MinP = 0.0,
    repetition_penalty: common.Penalty = 1.0,
    seed: common.Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    schema: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A file with a JSON schema: answer as JSON of it.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of the answer.")] = False,
    beams: common.Beams = None,
    deadline_ms: common.DeadlineMs = None,
    threads: common.Threads = None,
    context: common.Context = None,
    precision: common.Precision = "fast",
    speculation: common.Speculation = "auto",
    draft: common.Draft = None,
    adapter: common.Adapter = None,
    json: common.Json = False,
) -> None:
    """Answers one prompt, as it is written."""
    from millis.models.load import is_seq2seq

    options: dict[str, Any]
    sampling = common.checked(
        max_tokens=256 if max_tokens is None else max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        ignore_eos=ignore_eos,
    )
    text = _prompt(prompt)
    form = None if schema is None else lines.read_schema(schema)
    if "," in model:
        if draft is not None or adapter is not None or beams is not None or raw:
            raise typer.BadParameter("several models take no --draft, --adapter, --beams or --raw; leave them out")
        options = {**sampling, "deadline_ms": deadline_ms, "schema": form}
        loading = {"threads": threads, "context": context, "precision": precision, "speculation": speculation}
        return _cascade(model, text, system, options, json, **loading)
    path = common.resolve(model)
    if is_seq2seq(path):
        options = {"speculation": speculation != "auto", "draft": draft, "system": system, "raw": raw}
        options |= {"schema": schema, "stop": stop, "ignore_eos": ignore_eos, "adapter": adapter}
        sampling = {key: value for key, value in sampling.items() if key not in ("stop", "ignore_eos", "max_tokens")}
        sampling |= {"max_tokens": max_tokens, "beams": beams, "deadline_ms": deadline_ms}
        common.refuse(path, **options)
        return _rewrite(model, text, sampling, json, threads=threads, context=context, precision=precision)
    common.refuse(path, beams=beams)
    lm = common.load(model, threads=threads, context=context, precision=precision, speculation=speculation, draft=draft)
    name = None if adapter is None else lm.load_adapter(adapter, "adapter")
    stream = _stream(lm, text, system, raw, {**sampling, "deadline_ms": deadline_ms, "schema": form, "adapter": name})
    if json:
        with common.stopped_by_interrupt(stream):
            out = stream.result()
        common.print_json({"model": model, **common.record(out)})
    else:
        out = common.show(stream)
        common.say(common.status_line(out, lm))
    if out.finish_reason == "cancelled":
        raise typer.Exit(130)


def _rewrite(model: str, text: str, options: dict[str, Any], json: bool, **loading: Any) -> None:
    """The same of an encoder-decoder model, whose answer comes as a whole."""
    from millis.tasks.seq2seq import Seq2Seq

    lm = Seq2Seq(common.resolve(model), **loading)
    with common.on_first_interrupt(lm.stop_soon):
        out = lm.generate(text, **options)
    if json:
        common.print_json({"model": model, **common.record(out)})
    else:
        print(out.text, flush=True)
        common.say(common.status_line(out, lm))
    if out.finish_reason == "cancelled":
        raise typer.Exit(130)


def _cascade(names: str, text: str, system: str | None, options: dict[str, Any], json: bool, **loading: Any) -> None:
    """The small model's answer, then each that replaces it, with a line on standard error that says so."""
    from millis.tasks.cascade import CONFIDENCE, Cascade, CascadeTimings

    models = common.load_reader(names, CONFIDENCE, **loading)
    assert isinstance(models, Cascade)
    messages = [{"role": "system", "content": system}] if system is not None else []
    for out in models.answers([*messages, {"role": "user", "content": text}], **options):
        assert isinstance(out.timings, CascadeTimings)
        if json:
            common.print_json({"model": out.timings.model, **common.record(out)})
            continue
        if out.timings.why == "replaced":
            common.say(f"{out.timings.model} replaces it:")
        print(out.text, flush=True)
        common.say(lines.status(out.timings))


def _prompt(prompt: str) -> str:
    text = lines.whole_input() if prompt == "-" else prompt
    if not text.strip():
        raise RequestError("the prompt is empty; give a text, or - and a text on standard input")
    return text


def _stream(lm: LanguageModel, text: str, system: str | None, raw: bool, options: dict[str, Any]) -> Stream:
    if not raw and lm.tokenizer.has_chat_template:
        messages = [{"role": "system", "content": system}] if system is not None else []
        return lm.chat_stream([*messages, {"role": "user", "content": text}], **options)
    if system is not None:
        raise RequestError("a system message needs a chat template; leave out --raw and use an instruct model")
    return lm.stream(text, **options)
