"""millis bench: numbers, with the machine's limit first."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from millis.commands import bench_serve, bench_tables, common

EXAMPLE = "millis bench engine --peers transformers"

app = typer.Typer(help="Numbers: speed on this machine, beside other engines.", epilog=f"Example: {EXAMPLE}")
Plot = Annotated[list[Path] | None, typer.Option(help="Draw a picture there: .png or .svg; may be given twice.")]


app.command("serve", epilog=f"Example: {bench_serve.EXAMPLE}")(bench_serve.command)


@app.callback()
def _group() -> None:
    """Numbers: speed on this machine, beside other engines."""


@app.command(epilog=f"Example: {EXAMPLE}")
def engine(
    model: common.Model = "smollm2",
    peers: Annotated[str, typer.Option(help="Other engines, comma-separated, or all; docs/benchmarks.md.")] = "",
    prompts: Annotated[str, typer.Option(help="Prompt lengths for the first token.")] = "16,128,512,2048",
    depths: Annotated[str, typer.Option(help="Tokens in the cache for the next token.")] = "32,512,2048",
    new_tokens: Annotated[int, typer.Option(min=2, max=4096, help="Tokens decoded at each depth.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Measured rounds; one more warms up.")] = 5,
    loads: Annotated[bool, typer.Option(help="Load three times: first, cold file cache, warm.")] = True,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a load or a run may take.")] = 600.0,
    installed: Annotated[Path, typer.Option(help="Where tools/install_peers.sh put the peers.")] = Path("build/peers"),
    threads: common.Threads = None,
    plot: Plot = None,
    json: common.Json = False,
) -> None:
    """Milliseconds to the first and the next token, one request at a time, beside the machine's limit."""
    from millis import hub
    from millis.bench.compare import Settings, compare
    from millis.bench.peers import LOADS, chosen
    from millis.config import EngineConfig

    pictures = pictures_of(plot)
    with common.usage():
        names = chosen(peers)
    settings = Settings(
        peers=names,
        threads=threads or EngineConfig().threads,
        prompts=_lengths("--prompts", prompts),
        depths=_lengths("--depths", depths),
        new_tokens=new_tokens,
        rounds=rounds,
        loads=LOADS if loads else LOADS[-1:],
        timeout_s=timeout,
        installed=installed.absolute(),
        kept=hub.home() / "bench",
    )
    path = common.resolve(model)
    lengths = {*settings.prompts, *settings.depths}
    with common.progress("", (1 + len(settings.peers)) * (rounds + 1) * len(lengths)) as progress:
        result = {"model": Path(model).name} | compare(
            path, settings, tell=lambda text: progress(description=text), advance=lambda: progress(advance=1)
        )
    if json:
        common.print_json(result)
    else:
        bench_tables.show_engines(result)
    for path in pictures:
        from millis.bench.picture import engines_picture

        engines_picture(result, path)


@app.command(epilog="Example: millis bench kernels -m qwen2.5-0.5b --isas avx2,avx512")
def kernels(
    model: common.Model = "smollm2",
    counts: Annotated[str, typer.Option(help="Rows of activations: tokens computed together.")] = "1,4,16,128",
    isas: Annotated[str, typer.Option(help="Instruction sets, comma-separated, or all.")] = "",
    int8: Annotated[bool, typer.Option("--int8", help="Activations of one byte, as in --precision int8.")] = False,
    seconds: Annotated[float, typer.Option(min=0.01, max=60, help="Time spent on each line.")] = 0.2,
    threads: common.Threads = None,
    json: common.Json = False,
) -> None:
    """Every matrix type and shape of a model, and its attention: GB/s, GFLOP/s, share of what this machine allows."""
    from millis import _native
    from millis.bench.kernels import measure
    from millis.config import EngineConfig

    supported = _native.supported_isas()
    chosen = supported if isas == "all" else [isa for isa in isas.split(",") if isa] or supported[-1:]
    for isa in chosen:
        if isa not in supported:
            raise typer.BadParameter(f"--isas: this machine has {', '.join(supported)}, not {isa!r}")
    threads = threads or EngineConfig().threads
    path = common.resolve(model)
    lines = measure(path, counts=_lengths("--counts", counts), isas=chosen, threads=threads, seconds=seconds, int8=int8)
    if json:
        common.print_json({"model": model, "threads": threads, "int8": int8, "lines": list(lines)})
    else:
        bench_tables.show_kernels(lines)


@app.command(epilog="Example: millis bench jitter --steps 10000 --plot jitter.svg")
def jitter(
    model: common.Model = "smollm2",
    steps: Annotated[int, typer.Option(min=10, max=10_000_000, help="Decode steps measured.")] = 10_000,
    depth: Annotated[int, typer.Option(min=32, max=1 << 20, help="Tokens in the cache when it starts anew.")] = 512,
    threads: common.Threads = None,
    plot: Plot = None,
    json: common.Json = False,
) -> None:
    """How even decoding is: p50, p99, p99.9 and maximum of single steps, and what the slow ones coincide with."""
    from millis import _native
    from millis.bench.jitter import decode_steps, report

    pictures = pictures_of(plot)
    lm = common.load(model, threads=threads, context=depth, speculation="off")  # a step, a token
    with common.progress("measuring", steps, auto_refresh=False) as progress:
        mib = max(1, lm.runner.token_bytes >> 20)
        read = partial(_native.read_times, mib, lm.config.threads)
        found, reads = decode_steps(lm, steps=steps, depth=depth, tell=progress, read=read)
    result = {
        "model": model,
        "threads": lm.config.threads,
        "isa": lm.runner.isa,
        "depth": depth,
        "read_mib": mib,
        **report(found, reads),
    }
    if json:
        common.print_json(result)
    else:
        bench_tables.show_jitter(result)
    for path in pictures:
        from millis.bench.picture import jitter_picture

        jitter_picture(result, path)


@app.command(epilog="Example: millis bench speculation -m qwen2.5-1.5b --draft qwen2.5-0.5b")
def speculation(
    model: common.Model = "smollm2",
    draft: common.Draft = None,
    kinds: Annotated[str, typer.Option(help="Of prompts: chat, code, edit, extract.")] = "chat,code,edit,extract",
    new_tokens: Annotated[int, typer.Option(min=2, max=4096, help="Longest answer in tokens.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Times each prompt is answered both ways.")] = 1,
    prompts: Annotated[int | None, typer.Option(min=1, help="Prompts of each kind; default: all.")] = None,
    threads: common.Threads = None,
    precision: common.Precision = "fast",
    json: common.Json = False,
) -> None:
    """Tokens a second with guesses and without, in turn, and whether the greedy answers are the same."""
    from dataclasses import asdict

    from millis.bench.speculation import PROMPTS, measure, summary

    names = [kind.strip() for kind in kinds.split(",")]
    if unknown := sorted(set(names) - set(PROMPTS)):
        raise typer.BadParameter(f"--kinds knows {', '.join(PROMPTS)}, not {', '.join(map(repr, unknown))}")
    lm = common.load(model, threads=threads, context=2048, draft=draft, precision=precision)
    with common.progress("measuring", 2 * rounds * sum(len(PROMPTS[kind][:prompts]) for kind in names)) as progress:
        rows = measure(
            lm, names, new_tokens=new_tokens, rounds=rounds, limit=prompts, advance=lambda: progress(advance=1)
        )
    found = summary(rows)
    if json:
        common.print_json({"model": model, "draft": draft, "summary": found, "rows": [asdict(row) for row in rows]})
    else:
        bench_tables.show_speculation(found)


@app.command(epilog="Example: millis bench labels banking77_test.csv -m smollm2")
def labels(
    file: Annotated[Path, typer.Argument(help="Texts and their labels: CSV or JSONL.")],
    model: common.Model = "smollm2",
    texts: Annotated[int, typer.Option(min=1, max=10000, help="Texts, spread evenly.")] = 20,
    single: Annotated[int, typer.Option(min=1, max=1000, help="Of them, those done label by label, too.")] = 1,
    threads: common.Threads = None,
    precision: common.Precision = "fast",
    json: common.Json = False,
) -> None:
    """Classification with all labels in one forward, beside one whole forward for each label."""
    from millis.bench.labels import label_times
    from millis.tasks.dataset import read_labelled, spread

    rows = read_labelled(file)
    names = sorted({label for _, label in rows})
    lm = common.load(model, threads=threads, precision=precision)
    chosen = [text for text, _ in spread(rows, texts)]
    found = label_times(lm, chosen, names, min(single, len(chosen)))
    if json:
        common.print_json({"model": model, "file": str(file), "precision": precision, **found.asdict()})
        return
    print(f"{model}, {found.labels} labels, {found.texts} texts, precision {precision}, {lm.config.threads} threads")
    steps = f"{found.forwards} step, {found.rows} rows"
    print(f"one forward behind the cached instruction {found.tree_ms:9.1f} ms   ({steps})")
    print(f"a whole forward for each label            {found.single_ms:9.1f} ms   ({found.single_texts} of the texts)")
    print(f"{found.ratio:.0f} times faster; scores differ by {found.difference:.1e} at most")


@app.command(epilog="Example: millis bench encoder -m ./classifier --peers transformers --json")
def encoder(
    model: common.Model = "minilm",
    peers: Annotated[str, typer.Option(help="Other engines, comma-separated: transformers, onnxruntime.")] = "",
    onnx: Annotated[Path | None, typer.Option(help="Float32 export of the model, for onnxruntime.")] = None,
    words: Annotated[str, typer.Option(help="Lengths of the texts.")] = "11,100",
    calls: Annotated[int, typer.Option(min=1, max=100_000, help="Calls of each text in a round.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Measured rounds; one more warms up.")] = 5,
    installed: Annotated[Path, typer.Option(help="Where peers have environments of their own.")] = Path("build/peers"),
    threads: common.Threads = None,
    json: common.Json = False,
) -> None:
    """Milliseconds from a text to its label or vector, tokenizing included, one at a time."""
    from itertools import cycle, islice

    from millis.bench.encoder import PEERS, QUESTION, Settings, compare
    from millis.config import EngineConfig

    names = list(dict.fromkeys(name.strip() for name in peers.split(",") if name.strip()))
    if unknown := sorted(set(names) - set(PEERS)):
        raise typer.BadParameter(f"--peers knows {', '.join(PEERS)}, not {', '.join(map(repr, unknown))}")
    lengths = _lengths("--words", words)
    settings = Settings(
        peers=names,
        threads=threads or EngineConfig().threads,
        texts=[" ".join(islice(cycle(QUESTION.split()), length)) for length in lengths],
        calls=calls,
        rounds=rounds,
        onnx=onnx.absolute() if onnx else None,
        installed=installed.absolute(),
    )
    path = common.resolve(model)
    with common.progress("measuring", (1 + len(names)) * (rounds + 1)) as progress:
        result = {"model": model} | compare(path, settings, advance=lambda: progress(advance=1))
    if json:
        common.print_json(result)
    else:
        bench_tables.show_encoders(result)


@app.command(epilog="Example: millis bench adapters --count 20 --rank 16")
def adapters(
    model: common.Model = "smollm2",
    count: Annotated[int, typer.Option(min=1, max=256, help="Sequences, each with an adapter of its own.")] = 20,
    rank: Annotated[int, typer.Option(min=1, max=512, help="Of each adapter.")] = 16,
    steps: Annotated[int, typer.Option(min=3, max=10_000, help="Decode steps measured of each kind.")] = 90,
    threads: common.Threads = None,
    json: common.Json = False,
) -> None:
    """What a decode step costs with LoRA adapters, beside one without, and whether mixed answers are those alone."""
    from dataclasses import asdict

    from millis.bench.adapters import measure

    options = {"max_sequences": count, "max_adapters": count, "cache_tokens": count * 512, "speculation": "off"}
    lm = common.load(model, threads=threads, context=max(512, steps + 128), **options)
    with common.progress("measuring", 2 * count + 24) as progress:
        found = measure(lm, count=count, rank=rank, steps=steps, advance=lambda: progress(advance=1))
    found = {"model": model, "threads": lm.config.threads, "isa": lm.runner.isa, **found}
    if json:
        common.print_json({**found, "rows": [asdict(row) for row in found["rows"]]})
    else:
        bench_tables.show_adapters(found)


def _lengths(flag: str, text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{flag} must be whole numbers with commas between, not {text!r}") from None
    if not all(1 <= length <= 1 << 20 for length in lengths):
        raise typer.BadParameter(f"{flag} must be positive, not {text!r}")
    return lengths


def pictures_of(paths: list[Path] | None) -> list[Path]:
    """Checked before anything is measured."""
    for path in paths or []:
        if path.suffix not in (".png", ".svg"):
            raise typer.BadParameter(f"--plot writes .png or .svg, not {str(path)!r}")
        if not path.parent.is_dir():
            raise typer.BadParameter(f"--plot: there is no folder {str(path.parent)!r}")
    if paths:
        from millis.bench.picture import pyplot

        pyplot()
    return paths or []
