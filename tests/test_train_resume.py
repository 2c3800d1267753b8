"""Runs that are killed, interrupted or cut short by time: what is left of them, and what resuming makes of it."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from millis.train.checkpoints import Checkpoints
from millis.train.start import settings_of, train
from millis.types import ModelError, RequestError
from shell import error_line, millis
from training import bert_folder, command, labelled_csv

# A process that trains as told, over and over in children of its own, so that PyTorch is imported once only. It reads a
# line of JSON for each child, answers with its number, then with its exit code once it has ended.
DRIVER = """
import json, os, signal, sys
from dataclasses import asdict
from pathlib import Path
from millis.train.checkpoints import Checkpoints
from millis.train.start import settings_of, train
import tensorboardX, training
from millis.models.transformers_model import torch_module
torch_module()
for line in sys.stdin:
    ask = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        try:
            settings = settings_of("classify", [Path(ask["data"])], [], ask["given"])
            train(settings, Path(ask["out"]), Path, checkpoint_steps=4)
            os._exit(0)
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
KILLS = int(os.environ.get("MILLIS_KILLS", "3"))
GIVEN = {"epochs": max(2.0, KILLS), "batch": 4, "lr": 1e-3, "ema": 0.9, "dropout": 0.2, "bf16": False}


class Driver:
    """The process, as a context manager."""

    def __enter__(self) -> Driver:
        pipe = subprocess.PIPE
        path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-c", DRIVER]
        environment = os.environ | {"PYTHONPATH": path}
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, encoding="utf-8", env=environment)
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(60)
        self._process.stdout.close()  # type: ignore[union-attr]

    def start(self, data: Path, out: Path, model: Path) -> int:
        ask = {"data": str(data), "out": str(out), "given": GIVEN | {"model": str(model)}}
        print(json.dumps(ask), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())  # type: ignore[union-attr]

    def code(self) -> int:
        return int(self._process.stdout.readline())  # type: ignore[union-attr]


def wait_for_checkpoint(out: Path, newer_than: str) -> str:
    """The name of the first checkpoint that is newer; "" where the run ended before."""
    end = time.monotonic() + 60
    while time.monotonic() < end and not (out / "train" / "report.json").exists():
        names = [p.name for p in (out / "train" / "checkpoints").glob("step-*.pt")]
        if names and max(names) > newer_than:
            return max(names)
        time.sleep(0.002)
    return ""


def test_killed_at_any_moment_it_ends_where_it_would_have(tmp_path: Path) -> None:
    """kill -9 at random moments, and the weights of the end are bit for bit those of a run that nothing disturbed.

    MILLIS_KILLS: how often; one of them is a SIGTERM.
    """
    model, data = bert_folder(tmp_path / "model"), labelled_csv(tmp_path / "a.csv", 64)
    draw, kills, codes = random.Random(5), 0, []
    with Driver() as driver:
        driver.start(data, tmp_path / "whole", model)
        assert driver.code() == 0
        newest = ""
        while True:
            child = driver.start(data, tmp_path / "cut", model)
            if kills < KILLS:
                newest = wait_for_checkpoint(tmp_path / "cut", newest)
                time.sleep(draw.uniform(0, 0.03))
                os.kill(child, signal.SIGTERM if kills == 1 else signal.SIGKILL)
                kills += 1
            code = driver.code()
            if code == 0:
                break
            assert code in (-signal.SIGKILL, 130)
            codes.append(code)
            assert not (tmp_path / "cut" / "config.json").exists()  # no half of a model
    print(f"killed {len(codes)} times")
    assert len(codes) > KILLS // 2  # the last ones may come too late
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    one, other = (json.loads((tmp_path / n / "train" / "report.json").read_text()) for n in ("whole", "cut"))
    assert other["resumed_at"] is not None and one["resumed_at"] is None
    assert one["loss"] == other["loss"] and one["steps"] == other["steps"] and one["tokens"] == other["tokens"]


def settings(tmp_path: Path, **given: Any) -> Any:
    model, data = tmp_path / "model", tmp_path / "a.csv"
    if not data.exists():
        bert_folder(model)
        labelled_csv(data, 24)
    return settings_of("classify", [data], [], {"model": str(model), "batch": 4, "bf16": False} | given)


def test_time_ends_a_run_with_the_rate_down(tmp_path: Path) -> None:
    report = train(settings(tmp_path, time_limit_s=0.5), tmp_path / "out", Path)
    assert report["seconds"] == pytest.approx(0.5, abs=0.4)
    assert report["epochs"] > 0 and (tmp_path / "out" / "config.json").exists()


def test_a_loss_that_is_not_finite_ends_the_run_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not finite 10 times in a row; train with a lower --lr"):
        train(settings(tmp_path, lr=1e9, epochs=50.0), tmp_path / "out", Path)
    assert not (tmp_path / "out" / "config.json").exists()


def test_resume_where_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no run to resume"):
        train(settings(tmp_path, steps=1), tmp_path / "out", Path, resume=True)


def test_checkpoints_without_settings_are_nobodys(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "out" / "train" / "checkpoints").save(1, {"model": {}})
    assert train(settings(tmp_path, steps=1), tmp_path / "out", Path)["resumed_at"] is None


def test_a_run_that_failed_before_its_first_checkpoint_claims_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    wrong = settings(tmp_path, steps=1, text_column="nowhere")
    (out / "train").mkdir(parents=True)
    (out / "train" / "settings.json").write_text(json.dumps(asdict(wrong)))  # killed while it read the data
    right = settings(tmp_path, steps=1)
    with pytest.raises(RequestError, match="text_column"):
        train(right, out, Path, resume=True)
    assert train(right, out, Path)["steps"] == 1
    with pytest.raises(RequestError, match="other settings"):
        train(wrong, out, Path)


@pytest.mark.parametrize(
    ("text", "options", "why"),
    [
        ("", {}, "no usable row"),
        ("text,label\nsnow,cold\nice,cold\n", {}, "all rows have the label 'cold'"),
        ("words,label\nsnow,cold\n", {}, "no column text"),
        ("text,label\n,\n", {}, "no usable"),
        ("words\nsnow\n", {"shape": "llama"}, "no column text"),
        ("text\n \n", {"shape": "llama"}, "no usable"),
    ],
)
def test_unusable_data_leaves_nothing_behind(text: str, options: dict[str, Any], why: str, tmp_path: Path) -> None:
    data = tmp_path / "a.csv"
    data.write_text(text)
    given = options or {"model": str(bert_folder(tmp_path / "model"))}
    with pytest.raises(RequestError, match=why):
        train(
            settings_of("lm" if options else "classify", [data], [], given | {"bf16": False}),
            tmp_path / "new" / "out",
            Path,
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("watched", [True, False])
def test_reading_is_told_where_somebody_watches(watched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: watched, raising=False)
    monkeypatch.setattr(sys, "stderr", shown)
    (tmp_path / "a.csv").write_text("")
    assert command("train", tmp_path / "a.csv", "--task", "lm", "--shape", "llama", "--out", tmp_path / "out") == 1
    assert ("reading models and data" in shown.getvalue()) == watched


def test_unusable_data_leaves_an_earlier_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(settings(tmp_path, steps=1), out, Path)
    with pytest.raises(RequestError, match="nowhere"):
        train(settings(tmp_path, steps=1, text_column="nowhere"), out, Path, resume=False)
    assert (out / "config.json").exists() and not (out / "train" / "settings.json").exists()
    assert train(settings(tmp_path, steps=1), out, Path, resume=False)["steps"] == 1


@pytest.mark.parametrize("resume", [None, False])
def test_a_users_own_folder_named_train_is_left_alone(resume: bool | None, tmp_path: Path) -> None:
    out, chosen = tmp_path / "out", settings(tmp_path, steps=1)
    mine = out / "train" / "cold" / "a.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("snow")
    if resume is None:
        with pytest.raises(RequestError, match=r"is not empty \(it holds train/cold\)"):
            train(chosen, out, Path)
    else:
        assert train(chosen, out, Path, resume=False)["steps"] == 1
        assert train(chosen, out, Path, resume=False)["steps"] == 1
    assert mine.read_text() == "snow"


def test_damaged_checkpoints_are_removed_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen, folder = settings(tmp_path, steps=3), tmp_path / "out" / "train" / "checkpoints"
    with pytest.raises(KeyboardInterrupt):
        stopped_after(1, chosen, tmp_path / "out")
    assert "stopped after step 1; the same command goes on from there" in capsys.readouterr().err
    for name in ("step-000000001.pt", "step-000000099.pt"):
        (folder / name).write_bytes(b"x" * 100)
    report = train(chosen, tmp_path / "out", Path)
    assert report["resumed_at"] is None and report["steps"] == 3
    shown = capsys.readouterr().err.replace("\n", " ")
    assert "step-000000099.pt cannot be read and is removed; going on from the beginning, at step 0" in shown


def stopped_after(step: int, chosen: Any, out: Path) -> None:
    """A run that is told to stop while it makes this step."""
    from unittest import mock

    from millis.train.loop import Loop

    update = Loop._update

    def stopping(loop: Loop, *arguments: Any) -> None:
        update(loop, *arguments)
        if loop._place.step == step:
            loop.stop_soon()

    with mock.patch.object(Loop, "_update", stopping):
        train(chosen, out, Path)


def test_a_base_that_changed_is_noticed(tmp_path: Path) -> None:
    chosen, out = settings(tmp_path, steps=3), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        stopped_after(1, chosen, out)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(RequestError, match="the files of .*model have changed since the run"):
        train(chosen, out, Path)


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    chosen, path = settings(tmp_path, steps=3), tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
    save_file(weights, path)
    with pytest.raises(ModelError, match="hold NaN or infinity .*layer.1.output.dense.weight"):
        train(chosen, tmp_path / "out", Path)


def test_no_step_with_a_finite_loss_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from millis.train.classify import Classify

    loss = Classify.loss
    monkeypatch.setattr(Classify, "loss", lambda job, micro: loss(job, micro) * float("nan"))
    with pytest.raises(ModelError, match="not finite at any of 3 steps"):
        train(settings(tmp_path, steps=3), tmp_path / "out", Path)
    assert not (tmp_path / "out" / "config.json").exists()


def test_another_run_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    """What was exported goes, its files are as readable as others, and what was not ours stays."""
    out, chosen = tmp_path / "out", settings(tmp_path, steps=1)
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("query,positive\nsnow ice,winter frost\nsun heat,summer beach\nthe sun,the beach\n")
    given = {"model": str(tmp_path / "model"), "steps": 1, "batch": 3, "bf16": False}
    train(settings_of("embed", [pairs], [], given), out, Path)
    assert {"1_Pooling", "sentence_bert_config.json"} < {path.name for path in out.iterdir()}
    (out / "notes.txt").write_text("mine")
    train(chosen, out, Path, resume=False)
    names = {path.name for path in out.iterdir()}
    assert not names & {"1_Pooling", "sentence_bert_config.json"} and {"config.json", "notes.txt"} < names
    assert (out / "model.safetensors").stat().st_mode == (out / "notes.txt").stat().st_mode
    assert train(chosen, out, Path)["already_done"]
    (out / "model.safetensors").unlink()
    with pytest.raises(RequestError, match="model.safetensors of its model has gone; --no-resume"):
        train(chosen, out, Path)


def test_a_model_that_does_not_fit_on_the_disk(tmp_path: Path) -> None:
    chosen, limits = settings(tmp_path, steps=1), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(RequestError, match="cannot write the model to .*free some space"):
            train(chosen, tmp_path / "out", Path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out" / "train" / "export").exists()
    assert train(chosen, tmp_path / "out", Path)["written"]


def test_one_run_a_folder(tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(RequestError, match="another process trains into"):
        train(settings(tmp_path, steps=1), tmp_path / "out", Path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", tmp_path, "--task", "lm", "--out", tmp_path / "out", "--epochs", "inf") == 2
    assert "'--epochs'" in capsys.readouterr().err
    absent = millis("train", tmp_path / "absent.csv", "--task", "classify", "--out", tmp_path / "out")
    assert "no file or folder" in error_line(absent)
    settings(tmp_path)  # makes the data
    arguments = ["--task", "classify", "-m", tmp_path / "model", "--out", tmp_path / "out", "--steps", "2"]
    arguments += ["--eval-split", "0.2", "--threads", "1"]
    assert command("train", tmp_path / "a.csv", *arguments, "--json") == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert report["steps"] == 2 and 0 <= report["quality"]["accuracy"] <= 1
    assert "evaluating" in shown.err
    assert command("train", tmp_path / "a.csv", *arguments) == 0  # done already: its report again, as a table
    assert f"{report['quality']['accuracy']:.4f}" in capsys.readouterr().out


def test_the_mean_of_rounds_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round begins with the same weights and ends with others; the first is a run without rounds."""
    from millis.train.loop import Loop

    begun: list[dict[str, torch.Tensor]] = []
    ended: list[dict[str, torch.Tensor]] = []
    rates: list[float] = []
    round_, end, update = Loop._round, Loop._end_round, Loop._update

    def beginning(loop: Loop, *arguments: Any) -> None:
        begun.append(loop._copied())
        round_(loop, *arguments)

    def ending(loop: Loop) -> None:
        end(loop)
        ended.append(loop._copied())

    def updating(loop: Loop, *arguments: Any) -> None:
        update(loop, *arguments)
        rates.append(loop._place.history[-1][2])

    for name, replacement in (("_round", beginning), ("_end_round", ending), ("_update", updating)):
        monkeypatch.setattr(Loop, name, replacement)
    options = {"epochs": 2.0, "ema": 0.9, "lr": 1e-3, "dropout": 0.1}
    report = train(settings(tmp_path, rounds=3, **options), tmp_path / "three", Path)
    assert (report["steps"], report["epochs"], len(begun), len(ended)) == (36, 6, 3, 3)
    assert rates[:12] == rates[12:24] == rates[24:] and len(set(rates)) > 6
    for name in ended[0]:
        assert torch.equal(begun[0][name], begun[2][name])
    assert not torch.equal(ended[0]["classifier.weight"], ended[1]["classifier.weight"])
    train(settings(tmp_path, **options), tmp_path / "one", Path)
    assert all(torch.equal(ended[0][name], ended[3][name]) for name in ended[3])
    kept = load_file(tmp_path / "three" / "model.safetensors")
    mean = sum(weights["classifier.weight"] for weights in ended[:3]) / 3
    torch.testing.assert_close(kept["classifier.weight"], mean)


@pytest.mark.parametrize("step", [5, 12, 17, 24])
def test_rounds_go_on_where_they_were(step: int, tmp_path: Path) -> None:
    """Within a round, and between two."""
    chosen = settings(tmp_path, rounds=2, epochs=2.0, ema=0.9, lr=1e-3, dropout=0.1)
    with pytest.raises(KeyboardInterrupt):
        stopped_after(step, chosen, tmp_path / "cut")
    assert train(chosen, tmp_path / "cut", Path)["resumed_at"] == step
    whole = train(chosen, tmp_path / "whole", Path)
    assert whole["resumed_at"] is None and whole["steps"] == 24
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_rounds_share_the_time(tmp_path: Path) -> None:
    report = train(settings(tmp_path, time_limit_s=0.6, rounds=3), tmp_path / "out", Path)
    assert report["seconds"] == pytest.approx(0.6, abs=0.4)
    with pytest.raises(RequestError, match="--rounds has no meaning for --task lm"):
        settings_of("lm", [tmp_path / "a.csv"], [], {"model": "smollm2", "rounds": 2})
