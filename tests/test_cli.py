"""The command line at its border with the shell: exit codes, streams, JSON, help, and Ctrl-C."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import millis as package
from gguf_files import DROP, HIDDEN, write_tiny
from millis import cli
from millis.tasks.model import LanguageModel, Stream
from millis.types import Timings
from shell import LIMIT_S, error_line, millis, started
from tokenizer_tiny import bpe

VERBS = [[verb] for verb in cli.COMMANDS] + [["bench", "engine"], ["bench", "speculation"]]
PROMPT = "Name three colours of the rainbow."
STATUS = re.compile(
    r"first token \d+\.\d ms · \d+\.\d tokens/s · (\d+) \+ (\d+) tokens in \d+ ms(?: · \d+ of \d+ guesses right)?"
    r"( · \d+ ms (?:before|after) the deadline)?( · ended by (?:length|deadline|cancelled))? · (\S+), 1 threads, \w+\n"
)


@pytest.fixture(scope="module")
def smollm2(model_path: Callable[[str], Path]) -> Path:
    return model_path("smollm2")


@pytest.fixture(scope="module")
def minilm(model_path: Callable[[str], Path]) -> Path:
    return model_path("minilm")


@pytest.fixture(scope="module")
def lm(smollm2: Path) -> LanguageModel:
    return package.load(smollm2, threads=1)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: Callable[[Path], None]) -> Path:
    monkeypatch.setenv("MILLIS_HOME", str(tmp_path / "home"))
    packed(tmp_path / "home")
    return tmp_path / "home"


# Help and misuse


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_help_with_an_example(
    verb: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        cli.main([*verb, "--help"])
    shown = capsys.readouterr()
    assert (ended.value.code, shown.err) == (0, "")
    assert f"Usage: millis {' '.join(verb)} [OPTIONS]" in shown.out
    assert re.search(rf"^ *Example: millis {' '.join(verb)}[^`\\]*$", shown.out, re.MULTILINE)
    if verb == VERBS[0]:
        assert millis(*verb, "-h", COLUMNS="200").stdout == shown.out


def test_the_example_of_run_can_be_copied() -> None:
    assert 'millis run -m qwen2.5-0.5b "写一首关于秋天的诗。" --max-tokens 100\n' in re.sub(
        " +\n", "\n", millis("run", "--help").stdout
    )


def test_the_list_of_verbs() -> None:
    done = millis("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^│ (\w+)  ", done.stdout, re.MULTILINE) == list(cli.COMMANDS)
    assert "completion" not in done.stdout and "--no-version" not in done.stdout
    alone = millis()
    assert (alone.returncode, alone.stdout.rstrip()) == (2, done.stdout.rstrip())


def test_the_version() -> None:
    done = millis("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"millis {package.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "expected", "verb"),
    [
        (["rum"], "no such command 'rum'. Did you mean 'run'", ""),
        (["frobnicate"], "no such command 'frobnicate'", ""),
        (["--frobnicate"], "no such option: --frobnicate", ""),
        (["run"], "missing argument 'prompt'", " run"),
        (["run", "a", "b"], "unexpected extra argument", " run"),
        (["run", "a", "--max-token", "5"], "no such option: --max-token (Possible options: --max-tokens)", " run"),
        (["run", "a", "--max-tokens", "many"], "'--max-tokens'", " run"),
        (["run", "a", "--max-tokens", "0"], "'--max-tokens'", " run"),
        (["run", "a", "--seed", "-1"], "'--seed'", " run"),
        (["run", "a", "--seed", str(2**64)], "'--seed'", " run"),
        (["run", "a", "--temperature", "nan"], "'--temperature'", " run"),
        (["run", "a", "--top-p", "0"], "top_p must be above 0", " run"),
        (["run", "a", "--stop", ""], "stop must hold non-empty strings", " run"),
        (["run", "a", "--repetition-penalty", "0"], "repetition_penalty", " run"),
        (["run", "a", "--deadline-ms", "inf"], "'--deadline-ms'", " run"),
        (["run", "a", "--precision", "half"], "'half' is not one of 'fast', 'int8', 'exact'", " run"),
        (["run", "a", "--threads", "0"], "'--threads'", " run"),
        (["chat", "--context", "0"], "'--context'", " chat"),
        (["evaluate"], "give a task and a file, or --perplexity FILE", " evaluate"),
        (["bench"], "missing command", " bench"),
        (["bench", "engine", "--prompts", "a"], "whole numbers with commas between, not 'a'", " bench engine"),
        (["pull"], "missing argument 'name'", " pull"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(
    arguments: list[str], expected: str, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    done = subprocess.CompletedProcess(arguments, int(str(ended.value.code)), *capsys.readouterr())
    line = error_line(done, 2)
    assert expected in line
    assert line.endswith(f"; see: millis{verb} --help")


def test_misuse_in_a_process_of_its_own() -> None:
    assert error_line(millis("run", "--bogus", "a"), 2) == "no such option: --bogus; see: millis run --help"


# Run


def test_run_streams_the_answer_and_says_how_fast(smollm2: Path, lm: LanguageModel) -> None:
    done = millis("run", "-m", smollm2, PROMPT, "--threads", "1", "--max-tokens", "20")
    out = lm.chat([{"role": "user", "content": PROMPT}], max_tokens=20)
    assert (done.returncode, done.stdout) == (0, out.text + "\n")
    status = STATUS.fullmatch(done.stderr)
    assert status is not None, done.stderr
    assert status.groups() == (
        str(out.timings.prompt_tokens), "20", None, " · ended by length", smollm2.name
    )  # fmt: skip


def test_run_with_json_and_every_option(smollm2: Path, lm: LanguageModel) -> None:
    flags = "--temperature 0.8 --top-k 40 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.1 --seed 5 --ignore-eos"
    arguments = [
        "run",
        "-m",
        smollm2,
        PROMPT,
        "--system",
        "Be brief.",
        "--json",
        "--threads",
        "1",
        "--max-tokens",
        "16",
    ]
    done = millis(*arguments, *flags.split(), "--stop", "never said", "--stop", "nor this", "--deadline-ms", "100000")
    assert (done.returncode, done.stderr) == (0, ""), done
    result = json.loads(done.stdout)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    params: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
    out = lm.chat(messages, seed=5, ignore_eos=True, max_tokens=16, stop=["never said"], **params)
    assert list(result) == ["model", "text", "tokens", "finish_reason", "timings"]
    assert (result["text"], result["tokens"], result["finish_reason"]) == (out.text, out.tokens, "length")
    assert result["model"] == str(smollm2)
    assert set(result["timings"]) == set(Timings.__dataclass_fields__)
    assert result["timings"]["deadline_ms"] == pytest.approx(100000)
    assert result["timings"]["completion_tokens"] == 16


def test_run_raw_continues_the_text_of_standard_input(smollm2: Path, lm: LanguageModel) -> None:
    done = millis("run", "-m", smollm2, "--raw", "-", "--threads", "1", "--max-tokens", "8", stdin="Once upon\na time")
    assert done.stdout == lm.generate("Once upon\na time", max_tokens=8).text + "\n"


def test_run_takes_a_prompt_that_looks_like_a_flag(smollm2: Path, lm: LanguageModel) -> None:
    done = millis("run", "-m", smollm2, "--raw", "--max-tokens", "4", "--threads", "1", "--", "--json")
    assert done.stdout == lm.generate("--json", max_tokens=4).text + "\n"


def test_a_deadline_is_met_and_said(smollm2: Path) -> None:
    arguments = ("-m", smollm2, PROMPT, "--threads", "1", "--ignore-eos", "--max-tokens", "4000")
    done = millis("run", *arguments, "--deadline-ms", "1500")
    assert done.returncode == 0
    assert re.search(
        r" tokens in \d+ ms(?: · \d+ of \d+ guesses right)? · \d+ ms (before|after) the deadline · ended by deadline",
        done.stderr,
    )


def test_a_terminal_that_knows_only_ascii_gets_question_marks(smollm2: Path) -> None:
    arguments = ("run", "-m", smollm2, "--raw", "北京是中国的首都，上海是", "--max-tokens", "8", "--json")
    done = millis(*arguments, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "?" in json.loads(done.stdout)["text"]


# Other verbs


def test_models_and_doctor_for_machines(home: Path) -> None:
    rows = {row["name"]: row for row in json.loads(millis("models", "--json").stdout)}
    assert set(rows) >= {"smollm2", "qwen2.5-0.5b", "gemma3-270m"}
    assert rows["smollm2"]["state"] == "absent" and rows["smollm2"]["licence"] == "Apache-2.0"
    facts = json.loads(millis("doctor", "--json").stdout)
    assert facts["isa"] in facts["isas"] and facts["isa_known"] and facts["isa_from"] == "detected"
    assert 0 < facts["threads"] <= facts["cpus"] == os.cpu_count()
    assert facts["read_gb_per_s"] > 0
    assert 0 < facts["memory_available_gib"] <= facts["memory_gib"]
    assert (facts["home"], facts["models"]) == (str(home), {})


def test_models_and_doctor_for_people(home: Path, smollm2: Path) -> None:
    whole = home / "models" / "smollm2" / smollm2.name
    whole.parent.mkdir(parents=True)
    whole.symlink_to(smollm2)
    table = millis("models", COLUMNS="80").stdout
    assert re.search(r"^smollm2 +complete +98 MB +Q4_1 +en +instruct +Apache-2.0", table, re.MULTILINE)
    assert re.search(r"^qwen2.5-0.5b +absent +491 MB ", table, re.MULTILINE)
    assert f"in {home}\n" in table
    done = millis("doctor", MILLIS_ISA="nonsense")
    told = done.stdout
    assert done.returncode == 1 and "MILLIS_ISA asks for nonsense, which this machine lacks" in done.stderr
    assert "kernels       nonsense (MILLIS_ISA)" in told and "this machine lacks it: unset MILLIS_ISA" in told
    assert re.search(r"smollm2 +98 MB, at most about \d+ tokens/s here", told)
    answer = millis("run", "Hi", "--max-tokens", "2", "--threads", "1")  # the default model, by its name
    assert answer.returncode == 0 and answer.stdout.strip()


def test_doctor_promises_no_tokens_of_a_model_that_reads(home: Path, minilm: Path) -> None:
    (home / "models").mkdir(parents=True)
    (home / "models" / "minilm").symlink_to(minilm)
    assert re.search(r"minilm +91 MB, reads texts only\n", millis("doctor").stdout)


def test_doctor_predicts_a_models_steps(tmp_path: Path) -> None:
    keys = bpe() | {"tokenizer.ggml.scores": DROP, ".context_length": 1024}
    vocabulary = (len(keys["tokenizer.ggml.tokens"]), HIDDEN)
    write_tiny(tmp_path / "tiny.gguf", keys=keys, tensors={"token_embd.weight": vocabulary})
    found = json.loads(millis("doctor", "-m", tmp_path / "tiny.gguf", "--json").stdout)["predictions"]
    assert {row["rows"] for row in found["steps"]} >= {1, 4, 16, 128, 384}
    assert all(row["predicted_ms"] > 0 and row["actual_ms"] > 0 for row in found["steps"])
    assert sum(row["steps"] for row in found["steps"]) > 100 and 0 <= found["median_error"]


def test_bench_measures_and_compares_with_the_limit(smollm2: Path) -> None:
    size = ("--prompts", "4,8", "--depths", "8", "--new-tokens", "3", "--rounds", "2", "--threads", "1", "--no-loads")
    done = millis("bench", "engine", "-m", smollm2, *size, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert [row["tokens"] for row in result["rows"]] == [4, 8]
    limit = 1000 * result["bytes_per_token"] / (result["read_gb_per_s"] * 1e9)
    assert result["limit_next_ms"] == pytest.approx(limit)
    four, eight = result["rows"]
    assert four["next"] is None and four["first_over_millis"] == eight["next_over_millis"] == 1
    assert eight["next_share_of_limit"] == pytest.approx(eight["next_limit_ms"] / eight["next"]["median_ms"])


# Ctrl-C


ENDLESS = ("--ignore-eos", "--max-tokens", "8000", "--threads", "1")


def test_ctrl_c_ends_an_answer_and_keeps_what_was_written(smollm2: Path, lm: LanguageModel) -> None:
    with started("run", "-m", smollm2, PROMPT, *ENDLESS) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        written, told = first + process.stdout.read(), process.stderr.read()
    assert process.returncode == 130
    status = STATUS.fullmatch(told)
    assert status is not None and status[4] == " · ended by cancelled", told
    tokens = int(status[2])
    assert 0 < tokens < 4000
    assert written == lm.chat([{"role": "user", "content": PROMPT}], max_tokens=tokens, ignore_eos=True).text + "\n"


def test_ctrl_c_with_json_still_gives_whole_json(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = 0
    original = Stream.__next__

    def interrupted_at_the_third(stream: Stream) -> str:
        nonlocal pieces
        pieces += 1
        if pieces == 3:
            signal.raise_signal(signal.SIGINT)
        return original(stream)

    monkeypatch.setattr(Stream, "__next__", interrupted_at_the_third)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "-m", str(smollm2), PROMPT, *ENDLESS, "--json"])
    assert ended.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before
    result = json.loads(capsys.readouterr().out)
    assert (result["finish_reason"], len(result["tokens"])) == ("cancelled", 2)


def test_ctrl_c_before_the_answer(smollm2: Path) -> None:
    """While it waits for the end of standard input."""
    with started("run", "-m", smollm2, "-") as process:
        assert process.stdin is not None
        process.stdin.write("half a prompt")
        process.stdin.flush()
        while fcntl.ioctl(process.stdin, termios.FIONREAD, b"1234") != bytes(4):  # until it has read that
            time.sleep(0.01)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, told = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in told


def test_run_with_a_schema_answers_json_of_it(smollm2: Path, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"mood": {"enum": ["good", "bad"]}}, "required": ["mood"]}
    schema["additionalProperties"] = False
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema), encoding="utf-8")
    done = millis("run", "-m", smollm2, "How do you feel?", "--schema", path)
    assert done.returncode == 0 and json.loads(done.stdout)["mood"] in ("good", "bad")
    path.write_text('{"uniqueItems": true}', encoding="utf-8")
    assert "uniqueItems" in error_line(millis("run", "-m", smollm2, "How do you feel?", "--schema", path))
    path.write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in error_line(millis("run", "-m", smollm2, "How do you feel?", "--schema", path))
    assert "exist" in error_line(millis("run", "Hi", "--schema", tmp_path / "none.json"), code=2)
