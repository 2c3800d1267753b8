"""Adapters in the engine: mixed answers, cached pages apart, loaded under traffic, memory that stays bounded."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_support import save_adapter
from fake import FakeRunner
from gguf_files import DROP, HIDDEN, write_tiny
from millis.engine.adapters import Adapter, Adapters, named
from millis.engine.engine import Engine
from millis.models.adapter import AdapterWeights
from millis.tasks.model import LanguageModel
from millis.types import ModelError, OverloadError, RequestError, SamplingParams
from reference import greedy, reference_model
from tokenizer_tiny import bpe

NAMES = ["red", "green", "blue"]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A tiny GGUF model, and by name transformers' model with the adapter of that name merged; "": without one."""
    folder = tmp_path_factory.mktemp("adapters")
    vocabulary = bpe() | {"tokenizer.ggml.scores": DROP, ".context_length": 256}
    size = len(vocabulary["tokenizer.ggml.tokens"])
    write_tiny(folder / "tiny.gguf", keys=vocabulary, tensors={"token_embd.weight": (size, HIDDEN)})
    theirs = reference_model(folder / "tiny.gguf")
    merged = {name: save_adapter(theirs, folder / name, seed=i, size=1.0) for i, name in enumerate(NAMES)}
    return folder / "tiny.gguf", {"": theirs, **merged}


def loaded(path: Path, **options: Any) -> LanguageModel:
    lm = LanguageModel(path, threads=2, precision="exact", context=128, **options)
    for name in NAMES:
        assert lm.load_adapter(path.parent / name) == name
    return lm


def wanted(model: tuple[Path, dict[str, Any]], prompt: list[int], count: int) -> dict[str, list[int]]:
    return {name: greedy(theirs, prompt, count)[0] for name, theirs in model[1].items()}


@pytest.mark.parametrize(
    "options", [{}, {"speculation": "off"}, {"prefix_cache": True, "max_batch_tokens": 8}], ids=str
)
def test_answers_in_one_batch_are_those_of_merged_models(
    model: tuple[Path, dict[str, Any]], options: dict[str, Any]
) -> None:
    lm = loaded(model[0], **options)
    want = wanted(model, PROMPT, 20)
    assert len({tuple(tokens) for tokens in want.values()}) == 4
    for _ in range(2):  # the second time out of the cache, where there is one
        names = [*want, *want]
        requests = [
            lm.engine.submit(PROMPT, SamplingParams(max_tokens=20, ignore_eos=True), adapter=lm._adapter(name or None))
            for name in names
        ]
        while lm.engine.has_work:
            lm.engine.step()
        for name, request in zip(names, requests, strict=True):
            assert request.output == want[name], name
    lm.engine.scheduler.check_integrity()


def test_what_an_adapter_computed_is_cached_for_it_alone(model: tuple[Path, dict[str, Any]]) -> None:
    lm = loaded(model[0], prefix_cache=True)
    prompt = PROMPT * 6
    lm.engine.pin(prompt)  # everybody's, of the model as it is
    cached = []
    for name in ["red", "red", "green", None, "red"]:
        out = lm.generate(prompt, max_tokens=2, ignore_eos=True, adapter=name)
        cached.append(out.timings.cached_tokens)
    assert cached == [0, len(prompt) - 1, 0, len(prompt) - 1, len(prompt) - 1]
    lm.unload_adapter("red")
    lm.load_adapter(model[0].parent / "green", "red")  # another of the same name
    out = lm.generate(prompt, max_tokens=8, ignore_eos=True, adapter="red")
    assert out.timings.cached_tokens == 0
    assert out.tokens == wanted(model, prompt, 8)["green"]


def test_scores_are_the_adapters(model: tuple[Path, dict[str, Any]]) -> None:
    import torch

    lm = loaded(model[0])
    for name, theirs in model[1].items():
        with torch.no_grad():
            logs = torch.log_softmax(theirs(torch.tensor([[*PROMPT, 7, 2]])).logits[0].double(), -1)
        want = float(logs[len(PROMPT) - 1, 7] + logs[len(PROMPT), 2])
        assert lm.score(PROMPT, [[7, 2]], adapter=name or None)[0] == pytest.approx(want, abs=1e-3)


def test_loaded_and_unloaded_while_others_answer(model: tuple[Path, dict[str, Any]]) -> None:
    lm = loaded(model[0], max_adapters=2)
    want = wanted(model, PROMPT, 12)
    wrong: list[str] = []
    stop = threading.Event()

    def ask(name: str) -> None:
        while not stop.is_set():
            try:
                if lm.generate(PROMPT, max_tokens=12, ignore_eos=True, adapter=name or None).tokens != want[name]:
                    wrong.append(name)
            except OverloadError:
                pass  # both that fit are in use

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("", "red", "green")]
    for thread in threads:
        thread.start()
    for i in range(12):
        name = f"passing{i}"
        try:
            lm.load_adapter(model[0].parent / "blue", name)
        except OverloadError:
            continue
        with_it = lm.stream(PROMPT, max_tokens=12, ignore_eos=True, adapter=name)
        lm.unload_adapter(name)
        assert with_it.result().tokens == want["blue"], "what runs goes on with what was unloaded"
        with pytest.raises(RequestError, match="no adapter 'passing"):
            lm.generate(PROMPT, adapter=name)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert lm.adapters.names == NAMES
    lm.engine.scheduler.check_integrity()


class Packed:
    nbytes = 10


def kept(most: int) -> tuple[Adapters, list[weakref.ref[Packed]]]:
    made: list[weakref.ref[Packed]] = []

    def pack(weights: AdapterWeights) -> Packed:
        packed = Packed()
        made.append(weakref.ref(packed))
        return packed

    def read(path: Path) -> AdapterWeights:
        if "bad" in str(path):
            raise ModelError("bad")
        return AdapterWeights(path, 1, ())

    return Adapters(read, pack, most), made


def test_memory_is_bounded_and_the_least_recently_used_goes() -> None:
    adapters, made = kept(2)
    for name in "abc":
        adapters.add(name, Path(name))
    assert adapters.nbytes == 20 and [ref() is None for ref in made] == [True, False, False]
    adapters.use("b"), adapters.use("a")  # reads it again; c goes
    assert [ref() is None for ref in made] == [True, False, True, False]
    assert adapters.names == ["a", "b", "c"]
    in_use = adapters.use("a")
    in_use.users, adapters.use("b").users = 1, 1
    with pytest.raises(OverloadError, match="requests use all 2"):
        adapters.use("c")
    with pytest.raises(OverloadError):
        adapters.add("d", Path("d"))
    assert adapters.names == ["a", "b", "c"]
    adapters.remove("a")
    adapters.use("c")
    assert made[3]() is not None, "whoever runs with it holds it"
    del in_use
    gc.collect()
    assert made[3]() is None and adapters.nbytes == 20


def test_names_and_failures() -> None:
    adapters, _ = kept(2)
    for name in ("", "a b", "../x", "x" * 101, ":", "-a"):
        with pytest.raises(RequestError, match="an adapter's name"):
            adapters.add(name, Path("a"))
    with pytest.raises(ModelError):
        adapters.add("wrong", Path("bad"))
    assert adapters.names == [] and adapters.ready("wrong")
    with pytest.raises(RequestError, match="none is loaded"):
        adapters.use("wrong")
    adapters.add("a", Path("a"))
    with pytest.raises(RequestError, match="already"):
        adapters.add("a", Path("a"))
    with pytest.raises(RequestError, match="there are a"):
        adapters.remove("b")
    adapters.add("late", Path("bad"), load=False)
    with pytest.raises(ModelError):
        adapters.use("late")
    assert named("a=b/c") == ("a", "b/c") and named("x/y.gguf") == ("y", "x/y.gguf")
    for text in ("=b", "a=", "a b=c"):
        with pytest.raises(RequestError):
            named(text)


def test_a_request_lets_go_of_its_adapter_however_it_ends() -> None:
    runner = FakeRunner()
    engine = Engine(runner, frozenset())
    adapter = Adapter("a", None, 0, 1)
    ended = engine.submit([1, 2], SamplingParams(max_tokens=2), adapter=adapter)
    cancelled = engine.submit([1, 2], SamplingParams(max_tokens=99), adapter=adapter)
    scored = engine.submit_score([1, 2], [[3]], adapter=adapter)
    assert adapter.users == 3
    with pytest.raises(RequestError):
        engine.submit([], SamplingParams(), adapter=adapter)
    while ended.finish_reason is None or scored.finish_reason is None:
        engine.step()
    engine.cancel(cancelled)
    assert adapter.users == 0 and ended.adapter is None
    failing = engine.submit([1, 2], SamplingParams(), adapter=adapter)
    runner.fail = RuntimeError("broken")
    with pytest.raises(RuntimeError):
        engine.step()
    assert failing.error is not None and adapter.users == 0


def test_twenty_on_a_real_model(model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty adapters mixed in one batch write what each writes alone."""
    from millis.bench import adapters

    monkeypatch.setattr(adapters, "ROUNDS", 1)
    lm = LanguageModel(
        model_path("smollm2"),
        threads=2,
        context=256,
        max_sequences=20,
        max_adapters=20,
        cache_tokens=20 * 256,
        speculation="off",
        precision="exact",  # prompts computed together are otherwise rounded to bfloat16, alone they are not
    )
    found = adapters.measure(lm, count=20, rank=4, steps=1, answer=2)
    rows = {row.sequences: row for row in found["rows"]}
    assert set(rows) == {1, 20} and rows[20].alone
    assert all(row.base_ms > 0 and row.ratio == row.adapters_ms / row.base_ms for row in rows.values())
    assert np.isfinite(found["adapter_mb"])
