"""Models that are closed or forgotten: their memory goes back at once, answers under way end, later calls say why."""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import encoders
import millis
import seq2seqs
from adapter_support import save_adapter
from millis.types import RequestError
from reference import reference_model

CLOSED = "^the model was closed; load it again$"
STORY = "Once upon a time, there was"
LABELS = ["positive", "negative"]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed in the test is freed because nothing holds it, not because the collector came by."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def load(model_path: Callable[[str], Path], **options: Any) -> millis.LanguageModel:
    return millis.LanguageModel(model_path("smollm2"), threads=2, context=1024, **options)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("how", ["close", "del"])
def test_memory_goes_back_at_once(how: str, model_path: Callable[[str], Path], no_collector: None) -> None:
    load(model_path).close()  # what stays of a first load is no model's
    before = resident_bytes()
    lm = load(model_path)
    lm.classify("what a fine day", LABELS)
    lm.moderate("what a fine day")
    list(lm.stream(STORY, max_tokens=8))
    weights, gone = lm.runner.weight_bytes, weakref.ref(lm)
    loaded = resident_bytes() - before
    assert loaded > weights > 50e6
    if how == "close":
        lm.close()
        most = 0.2 * loaded
    else:
        del lm
        assert gone() is None
        most = loaded - 0.95 * weights  # the C library keeps some of what was freed beside
    kept = resident_bytes() - before
    assert kept < most, f"{kept / 1e6:.0f} MB of {loaded / 1e6:.0f} MB are still taken"


def test_a_closed_model_says_so(model_path: Callable[[str], Path]) -> None:
    with load(model_path) as lm:
        assert lm.generate(STORY, max_tokens=2).tokens
        classifier = lm.classifier(LABELS)
    lm.close()
    calls: list[Callable[[], Any]] = [
        lambda: lm.generate(STORY),
        lambda: lm.generate(STORY, deadline_ms=500),
        lambda: lm.stream(STORY),
        lambda: lm.chat([{"role": "user", "content": "Hello"}], schema={"type": "object"}),
        lambda: lm.score(STORY, ["a"]),
        lambda: lm.token_logprobs(STORY),
        lambda: lm.embed([STORY]),
        lambda: lm.embed([STORY], deadline_ms=500),
        lambda: lm.classify(STORY, LABELS),
        lambda: lm.summarize(STORY),
        lambda: lm.prepare_deadlines(),
        lambda: classifier.classify([STORY]),
        lambda: lm.__enter__().generate(STORY),
    ]
    for call in calls:
        with pytest.raises(RequestError, match=CLOSED):
            call()


def test_answers_under_way_are_cancelled(model_path: Callable[[str], Path]) -> None:
    lm = load(model_path)
    stream = lm.stream(STORY, max_tokens=900, ignore_eos=True)
    first = next(stream)
    found: list[Any] = []
    begun = threading.Barrier(3)

    def answer() -> None:
        begun.wait()
        found.append(lm.generate(STORY, max_tokens=900, ignore_eos=True).finish_reason)

    def score() -> None:
        begun.wait()
        try:
            lm.score(STORY, ["".join(f" {i}" for i in range(250))] * 200)
        except RequestError as error:
            found.append(str(error))

    threads = [threading.Thread(target=work) for work in (answer, score)]
    for thread in threads:
        thread.start()
    begun.wait()
    while lm.engine.load().running + lm.engine.load().waiting < 3:
        pass
    lm.close()
    for thread in threads:
        thread.join(20)
    assert sorted(found) == ["cancelled", CLOSED[1:-1]]
    rest = "".join(stream)
    assert stream.completion is not None and stream.completion.finish_reason == "cancelled"
    assert stream.completion.text == first + rest
    lm.engine.scheduler.check_integrity()


@pytest.mark.parametrize("head", [True, False])
def test_encoders_close(head: bool, tmp_path: Path) -> None:
    for number, model in enumerate((encoders.tiny("bert", head), encoders.decoder("Qwen3", head))):
        with millis.load(encoders.save(model, tmp_path / str(number)), threads=2) as lm:
            read = lm.classify if head else lm.embed
            read(["where is my parcel"])
        lm.close()
        for options in ({}, {"deadline_ms": 500}):
            with pytest.raises(RequestError, match=CLOSED):
                read(["where is my parcel"], **options)


def test_encoder_decoder_models_close(tmp_path: Path) -> None:
    folder = seq2seqs.add_tokenizer(seq2seqs.save(seq2seqs.tiny("t5"), tmp_path), "t5")
    with millis.load(folder, threads=2) as lm:
        assert lm.generate("the house", max_tokens=4).tokens
        found: list[str] = []
        options = {"max_tokens": 90, "generation": None}
        texts = ["the house is wonderful"] * 4000
        thread = threading.Thread(target=lambda: found.extend(o.finish_reason for o in lm.generate(texts, **options)))
        thread.start()
        while not lm._turn._lock.locked():
            pass
    thread.join(20)
    assert len(found) == 4000 and found[-1] == "cancelled"
    lm.close()
    for more in ({}, {"deadline_ms": 500}):
        with pytest.raises(RequestError, match=CLOSED):
            lm.generate("the house", **more)


def test_adapters_go_with_their_model(tmp_path: Path, model_path: Callable[[str], Path]) -> None:
    path = model_path("smollm2")
    save_adapter(reference_model(path), tmp_path)
    lm = load(model_path)
    lm.generate(STORY, adapter=lm.load_adapter(tmp_path, "polite"), max_tokens=2)
    runtime = lm.runner._runtime
    lm.close()
    assert sys.getrefcount(runtime) == 2, "something but this name and the call holds the weights"
    for call in (lambda: lm.generate(STORY, adapter="polite"), lambda: lm.load_adapter(tmp_path, "other")):
        with pytest.raises(RequestError, match=CLOSED):
            call()


def test_a_draft_model_is_closed_with_its_model(model_path: Callable[[str], Path]) -> None:
    lm = load(model_path, draft=model_path("smollm2"))
    lm.generate(STORY, max_tokens=16)
    assert lm._draft is not None
    runtime = lm._draft._runtime
    lm.close()
    assert sys.getrefcount(runtime) == 2
