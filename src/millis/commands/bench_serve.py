"""millis bench serve: a load on servers that speak OpenAI's API."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millis.commands import common
from millis.types import MillisError, RequestError

if TYPE_CHECKING:
    from millis.bench.serve_run import Level

EXAMPLE = "millis bench serve http://127.0.0.1:8000 --rate 2,4,8 --deadline-ms 500"
INTERRUPTED = 130
SCHEMA_LIMIT = 1 << 20  # bytes


def command(
    urls: Annotated[list[str], typer.Argument(metavar="URL...", help="Servers: URL or NAME=URL; they take turns.")],
    model: Annotated[str | None, typer.Option("-m", "--model", help="Default: the first that a server lists.")] = None,
    endpoint: Annotated[str, typer.Option(help="chat or completions.")] = "chat",
    trace: Annotated[str, typer.Option(help="Arrivals: poisson, burst, closed, or azure from a file.")] = "poisson",
    rate: Annotated[
        str | None, typer.Option(help="Requests a second: 2,4,8; or 0.5x,1x,2x,4x of --capacity. Default: 1.")
    ] = None,
    capacity: Annotated[float | None, typer.Option(min=0.001, help="Requests a second that 1x stands for.")] = None,
    concurrency: Annotated[str, typer.Option(help="Requests at once, of closed: 1,4,16.")] = "1",
    burst: Annotated[int, typer.Option(min=1, max=10_000, help="Requests that come together, of burst.")] = 16,
    requests: Annotated[int, typer.Option(min=1, max=100_000, help="At each rate, at most.")] = 200,
    duration: Annotated[float, typer.Option(min=0.1, max=86_400, help="Seconds at each rate, at most.")] = 300.0,
    prompt_words: Annotated[int, typer.Option(min=1, max=100_000, help="Words of a prompt.")] = 60,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Tokens of a prompt instead, as the server counts.")
    ] = None,
    output_tokens: Annotated[int, typer.Option(min=1, max=100_000, help="Longest answer.")] = 32,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Ask for answers of full length; not every server knows it.")
    ] = False,
    shared_prefix_tokens: Annotated[
        int, typer.Option(min=0, max=100_000, help="A system prompt of so many tokens, the same for all.")
    ] = 0,
    deadline_ms: Annotated[
        str | None, typer.Option(help="Sent as X-Deadline-Ms, and counted: 500; or 300-5000, log-uniform.")
    ] = None,
    slo: Annotated[str | None, typer.Option(help="Limits of a good answer: ttft:200,tpot:20,e2e:1000 (ms).")] = None,
    schema: Annotated[Path | None, typer.Option(help="JSON schema: asked for, and every answer checked.")] = None,
    trace_file: Annotated[Path | None, typer.Option(help="Of azure: TIMESTAMP,ContextTokens,GeneratedTokens.")] = None,
    speed: Annotated[float, typer.Option(min=1e-3, max=1e6, help="Of azure without --rate: times as fast.")] = 1.0,
    max_input: Annotated[int, typer.Option(min=1, help="Of azure: prompts are cut to so many tokens.")] = 1024,
    max_output: Annotated[int, typer.Option(min=1, help="Of azure: answers are cut to so many tokens.")] = 128,
    text: Annotated[Path | None, typer.Option(help="A text file to draw prompts from.")] = None,
    language: Annotated[str, typer.Option(help="Of the built-in text: en, zh or both.")] = "en",
    rounds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Turns that servers take; default 1, or 3 for several.")
    ] = None,
    warmup: Annotated[int, typer.Option(min=1, max=1000, help="Requests to each server that do not count.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same load.")] = 0,
    api_key: Annotated[
        str | None, typer.Option(help="Bearer token; better in the environment.", envvar="MILLIS_API_KEY")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds a request may take.")] = 30.0,
    connections: Annotated[int, typer.Option(min=1, max=20_000, help="Open at once, at most.")] = 512,
    yes_remote: Annotated[
        bool, typer.Option("--yes-remote", help="Load a server on another machine: it is yours to load.")
    ] = False,
    plot: Annotated[
        list[Path] | None, typer.Option(help="Draw a picture there: .png or .svg; may be given twice.")
    ] = None,
    detailed: Annotated[bool, typer.Option("--detailed", help="With --json: every single request, too.")] = False,
    json: common.Json = False,
) -> None:
    """Latency and goodput of servers under load: the same requests to each, in turns, never two at a time."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from millis.bench import serve_report, serve_trace
    from millis.bench.serve_text import LANGUAGES, Text
    from millis.bench.serve_wire import Server
    from millis.commands import bench_serve_table
    from millis.commands.bench import pictures_of

    pictures = pictures_of(plot)
    for flag, value, known in (
        ("--endpoint", endpoint, ("chat", "completions")),
        ("--trace", trace, serve_trace.TRACES),
        ("--language", language, LANGUAGES),
    ):
        if value not in known:
            raise typer.BadParameter(f"{flag} knows {', '.join(known)}, not {value!r}")
    if (trace == "azure") != (trace_file is not None):
        raise typer.BadParameter("--trace azure and --trace-file FILE go together; FILE is of the Azure public dataset")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise typer.BadParameter("--api-key has characters that no header may have")
    try:
        from millis.bench.serve import Settings, measure
        from millis.bench.serve_schema import validator
    except ImportError:
        raise MillisError("a load needs httptools; install it with: pip install 'millis[bench]'") from None
    try:
        servers = [Server.parse(url) for url in urls]
        limits = serve_report.limits(slo)
        levels = _levels(trace, rate, capacity, concurrency)
        if deadline_ms is not None:
            serve_trace.span(deadline_ms)
        found_schema = _schema(schema)
        if found_schema is not None:
            validator(found_schema)
        settings = Settings(
            servers=servers,
            levels=levels,
            text=Text.of_file(text) if text else Text.builtin(language),
            trace=trace,  # type: ignore[arg-type]
            model=model,
            endpoint=endpoint,  # type: ignore[arg-type]
            requests=requests,
            duration_s=duration,
            prompt_words=prompt_words,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            shared_prefix_tokens=shared_prefix_tokens,
            deadline=deadline_ms,
            schema=found_schema,
            seed=seed,
            api_key=api_key,
            timeout_s=timeout,
            rounds=rounds or (1 if len(servers) == 1 else 3),
            warmup=warmup,
            connections=connections,
            ignore_eos=ignore_eos,
            slo=limits,
            burst=burst,
            rows=serve_trace.read_azure(trace_file) if trace_file else None,
            speed=speed,
            max_input=max_input,
            max_output=max_output,
            detailed=detailed or bool(pictures),
        )
    except RequestError as error:
        raise typer.BadParameter(str(error)) from None
    if len({server.name for server in servers}) < len(servers):
        raise typer.BadParameter("two servers have the same name; write NAME=URL")
    for server in servers:
        if not server.loopback and not yes_remote:
            raise typer.BadParameter(f"{server.host} is another machine; --yes-remote says that it is yours to load")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not shown) as bar:
        task = bar.add_task("", total=len(servers) * len(levels) * requests)
        result = measure(
            settings,
            tell=lambda words: bar.update(task, description=words, refresh=True),
            advance=lambda count: bar.update(task, advance=count, refresh=True),
        )
    if result["interrupted"] and not result["runs"]:
        common.say("interrupted before anything was measured")
        raise typer.Exit(INTERRUPTED)
    for path in pictures:
        from millis.bench.serve_picture import load_picture

        load_picture(result, path)
    if json:
        common.print_json(result if detailed else bench_serve_table.brief(result))
    else:
        bench_serve_table.show(result)
    if result["interrupted"]:
        raise typer.Exit(INTERRUPTED)


def _levels(trace: str, rate: str | None, capacity: float | None, concurrency: str) -> list[Level]:
    from millis.bench.serve_run import Level
    from millis.bench.serve_trace import rates

    if trace == "closed":
        if rate is not None:
            raise RequestError("--trace closed has no --rate; --concurrency says how many requests are at once")
        try:
            counts = [int(part) for part in concurrency.split(",")]
        except ValueError:
            counts = [0]
        if not all(1 <= count <= 10_000 for count in counts):
            raise RequestError(f"--concurrency is a list such as 1,4,16, not {concurrency!r}")
        return [Level(concurrency=count) for count in dict.fromkeys(counts)]
    if concurrency != "1":
        raise RequestError(f"--concurrency belongs to --trace closed, not to {trace}")
    if trace == "azure" and rate is None:
        return [Level()]
    return [Level(rate=value) for value in dict.fromkeys(rates(rate or "1", capacity))]


def _schema(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    if path.stat().st_size > SCHEMA_LIMIT:
        raise RequestError(f"--schema: {path} is larger than {SCHEMA_LIMIT >> 20} MiB")
    try:
        found = jsonlib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"--schema: {path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise RequestError(f"--schema: {path} must hold an object")
    return found
