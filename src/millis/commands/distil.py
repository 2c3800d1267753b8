"""millis distil: a smaller model learns from a larger one, also as its draft model."""

from __future__ import annotations

import hashlib
import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millis.commands import common
from millis.commands import train as training
from millis.types import RequestError

if TYPE_CHECKING:
    from millis.tasks.model import LanguageModel

EXAMPLE = "millis distil texts.txt --teacher smollm2 --student layers=10 --out small --eval-split 0.05"
_PROMPT_TOKENS, _ANSWER_TOKENS, _PROMPTS = 32, 64, 8  # what is measured in the end

Student = Annotated[
    str, typer.Option(help="A model; layers=N of the teacher's; or llama:15M, new, with the teacher's vocabulary.")
]


def command(
    data: training.Data,
    student: Student,
    out: training.Out,
    teacher: Annotated[str | None, typer.Option(help="The model to learn from.")] = None,
    draft_for: Annotated[
        str | None,
        typer.Option(help="The model whose draft the student is to be; its teacher, unless --teacher is given."),
    ] = None,
    write: Annotated[
        int, typer.Option(min=0, help="Learn from texts that the teacher writes: so many tokens to each beginning.")
    ] = 0,
    temperature: Annotated[float, typer.Option(min=0.1, max=20, help="Softens both before they are compared.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=1, help="Tokens of the teacher's choice that are told apart.")] = 64,
    hard: Annotated[
        float, typer.Option(min=0, max=1, help="Weight of the text itself beside the teacher's view.")
    ] = 0.0,
    epochs: training.Epochs = None,
    steps: training.Steps = None,
    time_limit: training.TimeLimit = None,
    lr: training.Lr = None,
    batch: training.Batch = None,
    max_tokens: training.MaxTokens = None,
    eval_split: Annotated[float, typer.Option(min=0, max=0.9, help="Hold out this share for evaluation.")] = 0.0,
    eval_data: Annotated[list[Path] | None, typer.Option("--eval", help="Evaluate on this file; repeatable.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Where the text is, if not in an obvious column.")] = None,
    numbers: training.Numbers = "auto",
    gguf: training.Gguf = "Q8_0",
    seed: training.Seed = 0,
    threads: common.Threads = None,
    resume: training.Resume = None,
    checkpoint_every: training.CheckpointEvery = None,
    json: common.Json = False,
) -> None:
    """Teach a smaller model. Reports what of the quality is kept and what time is won."""
    named = teacher or draft_for
    if named is None:
        raise typer.BadParameter("give --teacher NAME, or --draft-for NAME")
    from millis.samples.read import files_of

    files_of([*data, *(eval_data or [])])
    training.prepare_torch(threads)
    from millis.train.distil import derived
    from millis.train.gguf_out import add_gguf
    from millis.train.start import settings_of, shares_vocabulary, train

    with common.usage():
        limited = training.limits(time_limit, numbers)
        derived(student)
    alike = shares_vocabulary(named, student, common.resolve)
    if draft_for is not None and not (alike and shares_vocabulary(draft_for, named, common.resolve)):
        raise RequestError(f"a draft model shares the vocabulary of the model it drafts for; {student} does not")
    if not alike and not write:
        raise RequestError(f"{named} and {student} have different vocabularies; give --write 128 to learn from texts")
    texts = [_written(named, data, text_column, out, write, threads)] if write else data
    column = "text" if write else text_column
    given: dict[str, Any] = dict(
        epochs=epochs, steps=steps, lr=lr, batch=batch, max_tokens=max_tokens, eval_split=eval_split,
        text_column=column, seed=seed,
    )  # fmt: skip
    if alike:
        given |= {"model": named, "student": student, "top_k": top_k, "soft_temperature": temperature, "hard": hard}
    else:
        given["model"] = student
    task = "distil" if alike else "lm"
    settings = settings_of(task, texts, eval_data or [], given | limited)
    report = train(settings, out, common.resolve, resume=resume, checkpoint_steps=checkpoint_every)
    if gguf is not None:
        common.tell("measuring teacher and student in Millis")
        source = common.resolve(named if alike else student)
        report["gguf_bytes"] = add_gguf(out, gguf, source)
        report["served"] = _measure(named, out / "model.gguf", texts, column, draft_for, threads)
    training.show(report, json)


def _written(
    teacher: str, data: Sequence[Path], column: str | None, out: Path, tokens: int, threads: int | None
) -> Path:
    """Texts that begin as those of `data` do and go on as the teacher would: a file beside OUT, made once."""
    from millis.files import whole
    from millis.train.settings import fingerprints

    mark = hashlib.sha256(repr((teacher, tokens, column, sorted(fingerprints(data).items()))).encode()).hexdigest()[:12]
    path = out.with_name(f"{out.name}.written-{mark}.jsonl")
    if path.exists():
        return path
    lm = common.load(teacher, threads=threads)
    prompts = _prompts(lm, data, column)
    if not prompts:
        raise RequestError(f"no text has {_PROMPT_TOKENS} tokens for the teacher to go on from; give longer ones")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as file, common.progress("the teacher writes", len(prompts)) as progress:
        for number, ids in enumerate(prompts):
            more = lm.generate(ids, max_tokens=tokens, temperature=1.0, seed=number).tokens
            text = lm.tokenizer.decode([*ids, *more])
            file.write(jsonlib.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            progress(advance=1)
    return path


def _prompts(lm: LanguageModel, data: Sequence[Path], wanted: str | None, limit: int | None = None) -> list[list[int]]:
    """The beginnings of stretches of the texts, as ids."""
    from millis.samples.read import Skipped, column, files_of, read_rows, text_of
    from millis.train.lm import TEXT_COLUMNS

    rows, quiet = list(read_rows(files_of(data), Skipped())), Skipped()
    name = column(rows, wanted, TEXT_COLUMNS, "the text", "--text-column")
    found: list[list[int]] = []
    for row in rows:
        ids = lm.tokenizer.encode(text_of(row, name, quiet) or "", add_special=False)
        for start in range(0, len(ids) - _PROMPT_TOKENS + 1, 4 * _PROMPT_TOKENS):
            found.append(ids[start : start + _PROMPT_TOKENS])
            if limit is not None and len(found) >= limit:
                return found
    return found


def _measure(
    teacher: str, student: Path, data: Sequence[Path], column: str | None, draft_for: str | None, threads: int | None
) -> Any:
    """Milliseconds a token of both in Millis; with a draft also those of the pair, and the share of guesses taken."""
    lm = common.load(teacher, threads=threads)
    prompts = _prompts(lm, data, column, _PROMPTS)
    if not prompts:
        return None
    found: dict[str, Any] = {"teacher_ms_a_token": _speed(lm, prompts)[0]}
    lm = common.load(str(student), threads=threads)
    found["student_ms_a_token"] = _speed(lm, _prompts(lm, data, column, _PROMPTS))[0]
    if draft_for is not None:
        alone = common.load(draft_for, threads=threads)
        pair = common.load(draft_for, threads=threads, draft=str(student))
        found["alone_ms_a_token"] = _speed(alone, prompts)[0]
        found["with_draft_ms_a_token"], drafted, accepted = _speed(pair, prompts)
        found["accepted"] = round(accepted / drafted, 4) if drafted else None
    return found


def _speed(lm: LanguageModel, prompts: Sequence[list[int]]) -> tuple[float, int, int]:
    """The median milliseconds of a generated token, and counts of drafted and accepted tokens."""
    import statistics

    room = lm.runner.context
    beginnings = [ids[: room // 2] for ids in prompts]
    outs = [
        lm.generate(ids, max_tokens=min(_ANSWER_TOKENS, room - len(ids)), ignore_eos=True).timings for ids in beginnings
    ]
    times = [t.decode_ms / (t.completion_tokens - 1) for t in outs]
    return round(statistics.median(times), 3), sum(t.drafted_tokens for t in outs), sum(t.accepted_tokens for t in outs)
