"""The command line at its edges: closed streams, Ctrl-C at once, lines that cannot be answered, misuse of each verb."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from millis import cli
from millis.commands import common, doctor, lines, translate
from millis.config import usable_cores
from millis.types import DeadlineError, GrammarError, RequestError, Timings
from shell import LIMIT_S, Terminal, error_line, millis, started

COMMAND = [sys.executable, "-m", "millis"]


@pytest.fixture(scope="module")
def smollm2(model_path: Callable[[str], Path]) -> Path:
    return model_path("smollm2")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: Callable[[Path], None]) -> None:
    monkeypatch.setenv("MILLIS_HOME", str(tmp_path / "home"))
    packed(tmp_path / "home")


def ended(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of a command in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(one) for one in arguments])
    return int(str(end.value.code)), *capsys.readouterr()


# Streams


@pytest.mark.parametrize(
    ("closed", "arguments", "code", "told"),
    [
        (0, ["run", "-"], 1, "millis: the prompt is empty; give a text, or - and a text on standard input\n"),
        (0, ["models"], 0, ""),
        (1, ["models"], 1, "millis: cannot write the output: Bad file descriptor\n"),
        (2, ["models"], 0, ""),
        (2, ["frobnicate"], 2, ""),
    ],
)
def test_a_standard_stream_that_is_closed(closed: int, arguments: list[str], code: int, told: str) -> None:
    done = subprocess.run(
        COMMAND + arguments, capture_output=True, text=True, timeout=LIMIT_S, preexec_fn=lambda: os.close(closed)
    )
    assert (done.returncode, done.stderr) == (code, told)


def test_a_system_that_starts_no_more_threads_is_one_line(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    told = "this system starts no more threads; raise its limit of processes (ulimit -u, or the container's pids limit)"
    assert ended(["serve", "-m", smollm2, "--port", 0], capsys) == (1, "", f"millis: {told}\n")


@pytest.mark.parametrize(
    ("available", "total", "told"),
    [(3 << 29, 64.0, "1.5 of 64.0 GiB available"), (None, None, "unknown: /proc/meminfo cannot be read")],
)
def test_doctor_tells_the_memory_that_limits_leave(
    available: int | None,
    total: float | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "available_memory_bytes", lambda: available)
    monkeypatch.setattr(doctor, "_memory_gib", lambda: total)
    code, shown, _ = ended(["doctor"], capsys)
    assert code == 0 and f"memory        {told}\n" in shown


def test_ctrl_c_while_the_command_is_imported_is_one_line(tmp_path: Path) -> None:
    """`typer` is one that interrupts, as a user may at that moment."""
    (tmp_path / "typer.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    done = millis("models", PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "millis: interrupted\n")


def test_ctrl_c_while_it_waits_is_one_line(smollm2: Path) -> None:
    with started("classify", "-", "--labels", "a,b", "-m", smollm2, "--threads", "1") as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("".join("a text\n" for _ in range(32)))
        process.stdin.flush()
        assert process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, told) == (130, "millis: interrupted\n")


@pytest.mark.parametrize(("terminal", "colours"), [("dumb", False), ("xterm", True)])
def test_what_is_said_is_dimmed_where_the_terminal_can(
    terminal: str, colours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", shown)
    common.say("hello")
    assert ("\x1b" in shown.getvalue()) == colours


def test_a_long_text_shows_how_far_its_summary_is(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("The cat sat on the mat, and it was warm. " * 60)
    with Terminal("summarize", "-m", smollm2, "--file", tmp_path / "long.txt", "--context", "512") as terminal:
        terminal.wait_for("summaries .* [1-9][0-9]%")
        terminal.wait_for("parts, 100 % of them read")
        assert terminal.exit_code() == 0


def test_one_is_no_plural() -> None:
    timings = Timings(total_ms=5, steps=1, cached_tokens=2)
    assert lines.status(timings) == "5.0 ms · 1 step · 2 tokens cached"


# Lines of standard input


class Model:
    """Doubles whole numbers; refuses what is none, by its number in the list, and what is late."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, texts: list[str]) -> list[int]:
        self.calls.append(texts)
        for i, text in enumerate(texts):
            if text == "late":
                raise DeadlineError("the answer would take 9 ms", predicted_ms=9, retry_after_s=0)
            if not text.isdigit():
                raise RequestError(f"text {i} is no number")
        return [2 * int(text) for text in texts]


def answered(data: bytes, capsys: pytest.CaptureFixture[str], count: int = 4) -> tuple[list[Any], str, Model]:
    """The records, the error in the end, and the model that was asked."""
    model, told = Model(), ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
        try:
            lines.answer("-", count, model, lambda one: {"double": one})
        except RequestError as error:
            told = str(error)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()], told, model


def test_lines_are_answered_together(capsys: pytest.CaptureFixture[str]) -> None:
    records, told, model = answered(b"\xef\xbb\xbf1\n\n 2 \n3\n4\n5\n", capsys)
    assert records == [{"double": n} for n in (2, 4, 6, 8, 10)] and told == ""
    assert model.calls == [["1", "2", "3", "4"], ["5"]]


def test_a_bad_line_is_a_record_and_the_others_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    records, told, _ = answered(b"1\n\n2\nthree\n4\n\xff\nlate\n7\n", capsys)
    assert records == [
        {"double": 2},
        {"double": 4},
        {"error": "the text is no number", "line": 4},
        {"double": 8},
        {"error": "not UTF-8 text; convert it first", "line": 6},
        {"error": "the answer would take 9 ms", "line": 7},
        {"double": 14},
    ]
    assert told == "3 of 7 lines were not answered; their records say why"


def test_lines_that_come_slowly_are_answered_as_they_come(smollm2: Path) -> None:
    """Through a pipe that stays open: lines that came together share a batch, and none waits for those to come."""
    with started("classify", "-", "-m", smollm2, "--threads", "1", "--labels", "good,bad", "--batch", "64") as process:
        assert process.stdin is not None and process.stdout is not None
        for written, expected in (("fine\n", 1), ("bad\n\ngood\nand beg", 2), ("un\n", 1), ("last", 0)):
            process.stdin.write(written)
            process.stdin.flush()
            answers = b""
            while answers.count(b"\n") < expected:
                assert select.select([process.stdout], [], [], LIMIT_S)[0], f"no answer to {written!r}"
                answers += os.read(process.stdout.fileno(), 1 << 16)
            assert [json.loads(line)["label"] in ("good", "bad") for line in answers.splitlines()] == [True] * expected
        rest, errors = process.communicate(timeout=LIMIT_S)
    assert len(rest.splitlines()) == 1 and process.returncode == 0, errors


def test_lines_longer_than_a_read_and_lines_of_a_file_are_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["7" * 200_000, "1", "", "2", "3" * 70_000, *map(str, range(90_000))]
    (tmp_path / "texts").write_text("\n".join(texts))
    asked: list[list[str]] = []

    def run(given: list[str]) -> list[int]:
        asked.append(given)
        return list(map(len, given))

    with open(tmp_path / "texts", "rb") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", SimpleNamespace(buffer=file))
        lines.answer("-", 32, run, lambda one: one)
    assert [text for batch in asked for text in batch] == [text for text in texts if text]
    assert {len(batch) for batch in asked[:-1]} == {32}  # a file is all there
    assert len(capsys.readouterr().out.splitlines()) == len(texts) - 1


# Text that is not ASCII

POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0"}  # all that Python knows then is ASCII


def test_chinese_is_read_and_written_whatever_the_locale(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "标签.txt").write_text("好评\n差评\n", encoding="utf-8")
    options = ("-m", smollm2, "--threads", "1", "--labels", f"@{tmp_path / '标签.txt'}")
    expected = millis("classify", "这部电影太好看了", *options, "--json")
    found = millis("classify", "这部电影太好看了", *options, "--json", **POSIX)
    assert found.returncode == 0 and json.loads(found.stdout)["scores"].keys() == {"好评", "差评"}, found.stderr
    assert json.loads(found.stdout)["scores"] == json.loads(expected.stdout)["scores"]
    lines_too = millis("classify", "-", *options, stdin="这部电影太好看了\n", **POSIX)
    assert json.loads(lines_too.stdout)["scores"] == json.loads(expected.stdout)["scores"]
    assert "没有.gguf" in error_line(millis("run", "-m", "没有.gguf", "你好", **POSIX))


@pytest.mark.parametrize("environment", [{}, POSIX])
def test_arguments_that_are_no_text_are_told(environment: dict[str, str], tmp_path: Path) -> None:
    told = error_line(millis("classify", "--labels", "a,b", "very \udcfffine", **environment), 2)
    assert told == r"the argument 'very \xfffine' is not UTF-8 text; convert it, or set the terminal to UTF-8"
    name = os.fsdecode(bytes(tmp_path) + b"/\xff.gguf")
    Path(name).write_bytes(b"no model")
    assert "not UTF-8" not in error_line(millis("run", "-m", name, "Hello", **environment))  # a file may be called so


def test_what_is_wrong_with_every_line_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    def run(texts: list[str]) -> list[int]:
        raise GrammarError("the schema is too deep")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"1\n2\n")))
        with pytest.raises(GrammarError):
            lines.answer("-", 4, run, lambda one: one)
    assert capsys.readouterr().out == ""


def test_a_text_alone_has_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError, match="^the text is no number$"):
        lines.answer("one", 4, Model(), lambda one: one)


@pytest.mark.parametrize("verb", [("classify", "--labels", "a,b"), ("embed",), ("translate", "--to", "zh")])
def test_a_line_beyond_the_context_is_no_end(verb: tuple[str, ...], smollm2: Path) -> None:
    options = ("-m", smollm2, "--threads", "1", "--context", "128", "--batch", "4")
    done = millis(verb[0], "-", *verb[1:], *options, stdin="one\n" + "word " * 400 + "\nthree\n")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1 and len(rows) == 3, done.stderr
    assert [isinstance(row, dict) and "error" in row for row in rows] == [False, True, False]
    assert rows[1]["line"] == 2 and "text 0" not in rows[1]["error"] and "text 1" not in rows[1]["error"]
    assert done.stderr == "millis: 1 of 3 lines were not answered; their records say why\n"


def test_json_that_was_cut_is_a_failure(smollm2: Path, tmp_path: Path) -> None:
    schema = tmp_path / "s.json"
    schema.write_text('\ufeff{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}', "utf-8")
    arguments = ("extract", "-m", smollm2, "--schema", schema, "--max-tokens", "2", "--threads", "1")
    done = millis(*arguments, "n is 5")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("millis: the answer ended before its JSON did")
    done = millis(*arguments, "n is 5", "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["value"] is None
    done = millis(*arguments, "-", stdin="n is 5\n")
    assert done.returncode == 1 and json.loads(done.stdout)["line"] == 1


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    file = tmp_path / "marked.txt"
    file.write_text("\ufeffbank=银行\nb=乙\n", encoding="utf-8")
    assert lines.read_text(file).startswith("bank")
    assert translate._glossary(file) == {"bank": "银行", "b": "乙"}
    assert lines.labels_of(f"@{file}")[0] == "bank=银行"


def test_labels_of_a_file_may_hold_commas(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_text("fees, cards\r\n\n 其他，不明 \n", encoding="utf-8")
    assert lines.labels_of(f"@{file}") == ["fees, cards", "其他，不明"]
    assert lines.labels_of("a，b, c") == ["a", "b", "c"]


# Misuse


def test_misuse_is_known_before_a_model_is_loaded(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    for name in ("load", "load_reader", "load_writer"):
        monkeypatch.setattr(common, name, load)
    table, pipe = tmp_path / "t.csv", tmp_path / "pipe"
    table.write_text("text,label\na,b\n")
    os.mkfifo(pipe)
    for arguments, told in (
        (["classify", "x", "-m", smollm2], "give the labels: --labels a,b,c"),
        (["classify", "x", "--labels", "a,b", "--save", "f"], "--save keeps what --calibrate finds"),
        (["classify", "x", "--labels", "a", "-m", smollm2], "at least 2 labels are needed, not 1"),
        (["classify", "x", "--labels", "a,a", "-m", smollm2], "a label is given twice"),
        (["moderate", "x", "--categories", "a，a"], "categories: a label is given twice"),
        (
            ["classify", "x", "--labels", "a,b", "--calibrate", table, "--save", tmp_path / "none" / "c.json"],
            "there is no folder",
        ),
        *(([verb, " "], "the text is empty") for verb in ("classify", "embed", "translate", "moderate", "summarize")),
        (["translate", "x", "-m", smollm2, "--to", "fr"], "--to='fr': Millis translates between zh and en"),
        (["translate", "x", "-m", smollm2, "--to", "en", "--from", "fr"], "--from='fr': Millis translates"),
        (["summarize", "x", "--words", "9", "--sentences", "1"], "give one of --words, --sentences and --characters"),
        (["bench", "engine", "--peers", "none"], "no peer named 'none'"),
        (["train", table, "--task", "classify", "--out", table], "is a file"),
        (["translate", "x", "-m", smollm2], "say which with --to"),
        (
            ["translate", "x", "-m", smollm2, "--to", "en", "--beams", "2"],
            "is a language model, which takes no --beams",
        ),
        (["run", "x", "-m", smollm2, "--beams", "2"], "is a language model, which takes no --beams"),
        (["run", "x", "--context", "99999999"], "'--context'"),
        (["chat", "--summarize"], "--summarize is for what --memory-tokens drops"),
        (["summarize", "x", "--lines"], "--lines reads standard input"),
        (["serve", "--port", "99999"], "port must be a whole number in [0, 65535]"),
        (["serve", "--isa", "foo"], "this machine has no instruction set 'foo'"),
        (["serve", "--cors-origin", "foo"], "cors_origin must be * or an origin"),
        (["serve", "--allowed-host", "a:80"], "allowed_host must be a name such as llm.example"),
        (["serve", "--adapter", "a=x", "--adapter", "a=y"], "two adapters are called 'a'"),
        (["answer", "--index", "no.idx", " "], "the question is empty"),
        (["index", table, "--index", tmp_path / "none" / "a.idx"], "there is no folder"),
        (["index", table, "--index", pipe], "it is a device or pipe, not a file"),
        (["quantize", smollm2, tmp_path / "small.txt", "--type", "Q4_K"], "the name must end in .gguf"),
        (
            ["quantize", smollm2, tmp_path / "a.gguf", "--type", "Q4_K", "--importance", "none"],
            "give --calibration FILE",
        ),
        (["evaluate", "classify", table, "--plot", "plot.pdf"], "a plot is .svg or .png"),
        (["evaluate", "classify", table, "--plot", tmp_path / "none" / "p.svg"], "there is no folder"),
        (["evaluate", "classify", table, "--window", "9"], "--window is not for classify"),
        (["evaluate", "--perplexity", table, "--limit", "9"], "--limit is not for --perplexity"),
        (["evaluate", "--perplexity", table, "--labels", "a"], "--labels is not for --perplexity"),
        (["train", table, "--task", "classify", "--out", tmp_path / "o", "--time-limit", "abc"], "no length of time"),
        (["train", table, "--task", "embed", "--out", tmp_path / "o", "--layers", "2"], "layers has no meaning"),
        (["data", "clean", table, "--out", tmp_path / "o", "--languages", "xx"], "xx: no language"),
    ):
        code, out, error = ended(arguments, capsys)
        assert (code, out) == (2, "") and told in error and error.count("\n") == 1, (arguments, error)
        assert error.endswith(" --help\n")


@pytest.mark.parametrize("verb", ["run", "extract"])
def test_a_schema_that_is_no_json_is_known_before_a_model_is_loaded(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    schema = tmp_path / "s.json"
    schema.write_text("{bad")
    code, out, error = ended([verb, "x", "--schema", schema], capsys)
    assert (code, out) == (1, "") and error.startswith(f"millis: {schema} is not JSON: ")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--api-key-file", "none"), "cannot read the keys in none: No such file or directory"),
        (("--pin", "none"), "cannot read the text to pin in none: No such file or directory"),
        (("--tls-cert", "none", "--tls-key", "none"), "cannot use none with none: No such file or directory"),
        (("--tls-cert", __file__, "--tls-key", __file__), f"cannot use {__file__} with {__file__}: "),
        (("--adapter-dir", "none"), "there is no folder none of adapters"),
        (("--index", "none"), "there is no index none"),
    ],
)
def test_files_of_a_server_are_read_before_its_model_is_fetched(
    flags: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "resolve", lambda *_, **__: pytest.fail("a model was fetched"))
    code, out, error = ended(["serve", *flags], capsys)
    assert (code, out) == (1, "") and error.startswith(f"millis: {told}") and error.count("\n") == 1


def test_more_threads_than_cores_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    cores = usable_cores()
    assert common.warn_of_threads(cores) == cores and capsys.readouterr().err == ""
    assert common.warn_of_threads(cores + 1) == cores + 1
    assert f"{cores + 1} threads share {cores} cores here" in capsys.readouterr().err


# Outputs


def test_an_output_that_is_no_file_stays_what_it_is(smollm2: Path, tmp_path: Path) -> None:
    pipe, link, target = tmp_path / "pipe.gguf", tmp_path / "link.json", tmp_path / "target.json"
    os.mkfifo(pipe)
    assert "it is a device or pipe" in error_line(millis("quantize", smollm2, pipe, "--type", "Q8_0"), 2)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    target.write_text("old")
    link.symlink_to(target)
    common.write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    with pytest.raises(RequestError, match="it is a device or pipe"):
        common.write_text(pipe, "x")


def test_a_file_that_holds_only_a_dash_is_a_text(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[str] = []

    def asked(_: Any, texts: list[str], **__: Any) -> Any:
        given.extend(texts)
        raise RequestError("asked")

    (tmp_path / "dash.txt").write_text("-")
    monkeypatch.setattr(common, "load_writer", lambda *_, **__: None)
    monkeypatch.setattr("millis.tasks.summarize.summarize", asked)
    assert ended(["summarize", "-m", smollm2, "--file", tmp_path / "dash.txt"], capsys)[0] == 1
    assert given == ["-"]


def test_vectors_and_replies_as_json(smollm2: Path) -> None:
    options = ("-m", smollm2, "--threads", "1")
    plain, asked = millis("embed", "one", *options), millis("embed", "one", *options, "--json")
    assert json.loads(plain.stdout) == json.loads(asked.stdout) and len(json.loads(plain.stdout)) == 576
    done = millis("chat", *options, "--json", "--max-tokens", "4", stdin=b"Hi\n\xff\nBye\n")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert (
        done.returncode == 0
        and [set(row) for row in (rows[0], rows[2])] == [{"text", "tokens", "finish_reason", "timings"}] * 2
    )
    assert list(rows[1]) == ["error"] and len(rows) == 3
