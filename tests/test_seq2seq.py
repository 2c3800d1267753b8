"""Seq2Seq as Python programs use it, and its commands: answers against transformers' generate, deadlines, refusals."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, T5Tokenizer

import millis
from millis.engine.seq2seq import Wish, Writer
from millis.engine.seq2seq_runner import Seq2SeqRunner
from millis.models.generation import changed, read_generation
from millis.models.huggingface_config import Settings
from millis.models.load import load_model
from millis.types import DeadlineError, FormatError, ModelError, RequestError, SamplingParams
from seq2seqs import FAMILIES, LINES, VOCAB, add_tokenizer, random_ids, save, tiny
from shell import error_line
from shell import millis as shell

TASKS = {
    "summarization": {
        "prefix": "summarize: ",
        "num_beams": 4,
        "length_penalty": 2.0,
        "early_stopping": True,
        "min_length": 5,
        "max_length": 24,
        "no_repeat_ngram_size": 3,
    },
    "translation_en_to_de": {"prefix": "translate English to German: ", "max_length": 20},
    "translation_en_to_fr": {"prefix": "translate English to French: ", "max_length": 20},
}
ENDS = [0, 1, *range(7, VOCAB, 9)]  # many, so that random models end their answers at all lengths
MANNERS: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {}),
    (1, {"no_repeat_ngram_size": 2, "min_length": 6}),
    (2, {"no_repeat_ngram_size": 2}),
    (3, {"length_penalty": 2.0, "early_stopping": True}),
    (4, {"early_stopping": "never", "length_penalty": 0.5, "min_length": 9}),
    (5, {"length_penalty": -1.0}),
)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(family: str, seed: int, tmp_path: Path) -> None:
    """Texts of different lengths together, greedily and with beams."""
    model = tiny(family, seed)
    model.generation_config.forced_eos_token_id = None
    ours = load_model(save(model, tmp_path))
    runner = Seq2SeqRunner(ours, millis.EngineConfig(threads=2, precision="exact"))
    writer, plain = Writer(runner), read_generation(tmp_path, VOCAB)
    texts = [random_ids(length, 10 + seed) for length in (1, 17, 40, 33)]
    found = set()
    for (beams, extra), ends in zip(MANNERS, (ENDS, ENDS[:2]) * 3, strict=True):
        generation = replace(changed(plain, Settings(extra)), ends=frozenset(ends))
        wish = Wish(generation=generation, params=SamplingParams(max_tokens=20), beams=beams)
        wanted = generated(model, texts, eos_token_id=ends, max_new_tokens=20, num_beams=beams, **extra)
        written = writer.write(texts, wish)
        assert [one.reason for one in written] == ["length" if len(one.tokens) == 20 else "stop" for one in written]
        assert [one.tokens for one in written] == wanted, (beams, extra)
        found.update(one.reason for one in written)
        runner.pages.check_integrity([])
    assert found == {"stop", "length"}


def generated(model: Any, texts: list[list[int]], eos_token_id: list[int], **options: Any) -> list[list[int]]:
    """What transformers' generate writes, without its first token, the ending one and the padding."""
    longest, pad = max(map(len, texts)), model.config.pad_token_id
    ids = torch.tensor([text + [pad] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, eos_token_id=eos_token_id, **options)
    rows = [row[1:] for row in out.tolist()]
    return [row[: next((i for i, token in enumerate(row) if token in eos_token_id), len(row))] for row in rows]


def folder_of(family: str, path: Path, **generation: Any) -> tuple[Any, Path]:
    """A model with a tokenizer and settings, and its folder."""
    model = tiny(family, 1)
    model.config.task_specific_params = TASKS
    for key, value in {"max_length": 30, **generation}.items():
        setattr(model.generation_config, key, value)
    return model, add_tokenizer(save(model, path), family)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return folder_of("t5-gated", tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return folder_of("marian", tmp_path_factory.mktemp("marian"), num_beams=4, bad_words_ids=[[VOCAB - 1]])


def load(folder: Path, **options: Any) -> millis.Seq2Seq:
    found = millis.load(folder, **{"precision": "exact", "threads": 2, **options})
    assert isinstance(found, millis.Seq2Seq)
    return found


@pytest.fixture(scope="module")
def lm(t5: tuple[Any, Path]) -> millis.Seq2Seq:
    return load(t5[1])


def expected(model: Any, tokenizer: Any, text: str, **options: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(**tokenizer(text, return_tensors="pt"), **options)
    return str(tokenizer.decode(out[0], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Tokenizer, settings of the files and all."""
    marian = family == "marian"
    model, folder = folder_of(family, tmp_path, **({"num_beams": 3, "bad_words_ids": [[VOCAB - 1]]} if marian else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it recommends a package
        tokenizer = AutoTokenizer.from_pretrained(folder) if marian else T5Tokenizer.from_pretrained(folder)
    ours = load(folder)
    out = ours.generate(LINES)
    for text, one in zip(LINES, out, strict=True):
        assert ours.tokenizer.encode(text) == tokenizer(text).input_ids
        assert one.text == expected(model, tokenizer, text)
    assert ours.generate(LINES[0]).text == out[0].text
    assert [one.text for one in load(folder, max_sequences=1).generate([*LINES] * 5)] == [one.text for one in out] * 5


def test_tasks_are_those_that_the_files_tell_of(t5: tuple[Any, Path], lm: millis.Seq2Seq) -> None:
    model, folder = t5
    tokenizer = T5Tokenizer.from_pretrained(folder)
    options = {key: value for key, value in TASKS["summarization"].items() if key != "prefix"}
    summary = lm.summarize(LINES[4])
    assert summary.text == expected(model, tokenizer, "summarize: " + LINES[4], **options)
    german, french = lm.translate(LINES[0], "de"), lm.translate([LINES[0]], "fr", source="en")[0]
    assert german.text == expected(model, tokenizer, "translate English to German: " + LINES[0], max_length=20)
    assert (german.source, german.target, french.target) == ("en", "de", "fr") and german.text != french.text
    for call, fault in (
        (lambda: lm.translate("a"), "translates en to de, en to fr; say which"),
        (lambda: lm.translate("a", "zh"), "translates en to de, en to fr; say which"),
        (lambda: lm.translate("a", "de", source="fr"), "say which"),
        (lambda: lm.translate([" "], "de"), "text 0 is empty"),
        (lambda: lm.summarize(""), "the text is empty"),
        (lambda: lm.summarize("a", words=5), "takes no 'words'"),
    ):
        with pytest.raises(RequestError, match=fault):
            call()


def test_marian_knows_its_languages(marian: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = marian
    ours = load(folder)
    plain = ours.generate(LINES[3])
    for to in (None, "en", "English", "eng"):
        found = ours.translate(LINES[3], to)
        assert (found.text, found.source, found.target) == (plain.text, "zh", "en")
    with pytest.raises(RequestError, match="translates to en, not to de"):
        ours.translate("a", "de")
    with pytest.raises(RequestError, match="translates from zh, not from fr"):
        ours.translate("a", source="fr")
    several = add_tokenizer(save(tiny("marian", 1), tmp_path), "marian", (">>cmn_Hans<<", ">>yue<<"))
    names = json.loads((several / "tokenizer_config.json").read_text()) | {"source_lang": "en", "target_lang": "zh"}
    (several / "tokenizer_config.json").write_text(json.dumps(names))
    ours = load(several)
    assert ours.tokenizer.encode(">>yue<< card")[0] == 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ours.tokenizer.encode(">>yue<< card") == AutoTokenizer.from_pretrained(several)(">>yue<< card").input_ids
    assert ours.translate("card", "zh").text == ours.generate(">>cmn_Hans<< card").text
    assert ours.translate("card", "yue").text == ours.generate(">>yue<< card").text
    for call, fault in (
        (lambda: ours.translate("card"), "translates to cmn_Hans, yue; say which"),
        (lambda: ours.generate(">>fra<< card"), "the model has no language >>fra<<; it has >>cmn_Hans<< >>yue<<"),
    ):
        with pytest.raises(RequestError, match=fault):
            call()


def test_beams_are_renormalized_as_in_transformers(tmp_path: Path) -> None:
    """As published translators ask for it; the words banned here are likely ones, so that it shows."""
    found = []
    for renormalized in (True, False):
        words = [[VOCAB - 1], *([word] for word in range(4, 30))]
        folder = tmp_path / str(renormalized)
        model, _ = folder_of(
            "marian", folder, num_beams=4, bad_words_ids=words, renormalize_logits=renormalized, length_penalty=0.3
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(folder)
        for text, one in zip(LINES, load(folder).generate(LINES), strict=True):
            assert one.text == expected(model, tokenizer, text)
            found.append(one.text)
    assert found[: len(LINES)] != found[len(LINES) :]
    _, folder = folder_of("t5-gated", tmp_path / "t5", bad_words_ids=[[5]], renormalize_logits=True)
    with pytest.raises(FormatError, match="where logits have a bias"):
        load(folder)


def test_forced_ends_weigh_as_in_transformers(tmp_path: Path) -> None:
    model, folder = folder_of("marian", tmp_path, num_beams=4, max_length=12)
    assert read_generation(folder, VOCAB).forced_end == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, one in zip(LINES, load(folder).generate(LINES), strict=True):
        assert one.text == expected(model, tokenizer, text)


def test_banned_tokens_are_not_written(tmp_path: Path) -> None:
    _, folder = folder_of("t5-gated", tmp_path)
    written = load(folder).generate(LINES)
    words = sorted({token for one in written for token in one.tokens} - {1})[::2]
    for beams in (1, 3):
        folder_of("t5-gated", tmp_path, bad_words_ids=[[word] for word in words], num_beams=beams)
        again = load(folder).generate(LINES)
        assert not {token for one in again for token in one.tokens} & set(words)


def test_drawing(lm: millis.Seq2Seq) -> None:
    draws = [lm.generate(LINES[0], temperature=1.5, seed=seed).tokens for seed in (1, 1, 2, 3)]
    assert draws[0] == draws[1] and len({tuple(draw) for draw in draws}) > 1
    best = lm.generate(LINES[0], temperature=2.0, top_k=1).tokens
    assert best == lm.generate(LINES[0], beams=1).tokens
    calm = lm.generate(LINES[0], repetition_penalty=50.0, max_tokens=40).tokens
    assert len(set(calm)) == len(calm)


def test_timings(lm: millis.Seq2Seq) -> None:
    out = lm.generate(LINES[0], max_tokens=7)
    timings = out.timings
    assert out.finish_reason == "length" and timings.completion_tokens == timings.steps == len(out.tokens) == 7
    assert timings.prompt_tokens == len(lm.tokenizer.encode(LINES[0]))
    assert 0 < timings.tokenize_ms < timings.first_token_ms <= timings.total_ms and timings.decode_ms > 0
    assert timings.deadline_ms is None and lm.generate(LINES[0], deadline_ms=1e6).timings.slack_ms > 0  # type: ignore[operator]


class Clock:
    """A second for each call that moves it: reading a text, a step."""

    def __init__(self, runner: Seq2SeqRunner, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for name in ("read", "step"):
            monkeypatch.setattr(runner, name, self._slow(getattr(runner, name)))

    def _slow(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def slowed(*arguments: Any) -> Any:
            self.now += 1
            return call(*arguments)

        return slowed

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("beams", [1, 3])
def test_a_deadline_ends_an_answer_between_two_steps(
    beams: int, t5: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Seq2SeqRunner(load_model(t5[1]), millis.EngineConfig(threads=1, precision="exact"))
    clock = Clock(runner, monkeypatch)
    writer, generation = Writer(runner, clock=clock), read_generation(t5[1], VOCAB)
    writer.measure(generation)
    texts = [random_ids(16), random_ids(16)]

    def write(seconds: float) -> Any:
        wish = Wish(
            generation=generation, params=SamplingParams(max_tokens=20), beams=beams, deadline=clock() + seconds
        )
        return writer.write(texts, wish)

    free = write(1000)
    assert [len(one.tokens) for one in free] == [20, 20]
    begin = clock()
    found = write(8.5)
    assert [one.reason for one in found] == ["deadline"] * 2 and clock() - begin <= 8.5
    assert [len(one.tokens) for one in found] == [7, 7] and (
        beams > 1 or [one.tokens for one in found] == [one.tokens[:7] for one in free]
    )
    runner.pages.check_integrity([])
    begin = clock()
    for seconds in (0.0, -5.0, 1.5):
        with pytest.raises(DeadlineError, match="to read 16 tokens and write one takes about") as error:
            write(seconds)
        assert error.value.predicted_ms > 0 and clock() == begin, "refused before any work"


def test_an_answer_lands_at_a_sentence_end(t5: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Seq2SeqRunner(load_model(t5[1]), millis.EngineConfig(threads=1, precision="exact"))
    generation = read_generation(t5[1], VOCAB)
    wish = Wish(generation=generation, params=SamplingParams(max_tokens=29), beams=1)
    whole = Writer(runner).write([random_ids(9)], wish)[0].tokens
    end = whole[13]
    place = whole.index(end, 6)  # the first one within the last 16 steps that there is time for
    clock = Clock(runner, monkeypatch)
    writer = Writer(runner, frozenset({end}), clock)
    writer.measure(generation)
    wish = Wish(generation=generation, params=SamplingParams(max_tokens=29), beams=1, deadline=clock() + 23.5)
    found = writer.write([random_ids(9)], wish)[0]
    assert found.reason == "deadline" and found.tokens[-1] == end and len(found.tokens) <= 22
    assert found.tokens == whole[: len(found.tokens)] and place + 1 <= 22
    wish = replace(wish, deadline=clock() + 23.5, lands=False)  # of which a part is not wanted
    assert writer.write([random_ids(9)], wish)[0].tokens == whole[:22]


def test_an_answer_can_be_stopped(lm: millis.Seq2Seq) -> None:
    calls = iter([False] * 6 + [True] * 99)
    wish = Wish(generation=lm.generation, params=SamplingParams(max_tokens=20), beams=1)
    written = Writer(lm.runner).write([random_ids(9)], wish, lambda: next(calls))
    assert written[0].reason == "cancelled" and 0 < len(written[0].tokens) < 20
    lm.runner.pages.check_integrity([])


def test_threads_may_share_a_model(lm: millis.Seq2Seq) -> None:
    wanted = [one.tokens for one in lm.generate(LINES)]
    found: list[list[list[int]]] = []

    def work() -> None:
        found.extend([one.tokens for one in lm.generate(LINES)] for _ in range(5))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [wanted] * 15


@pytest.mark.parametrize(
    ("texts", "options", "fault"),
    [
        ("a", {"beams": 0}, r"beams must be a whole number in \[1, 16\]"),
        ("a", {"beams": 17}, r"beams must be a whole number in \[1, 16\]"),
        ("a", {"beams": 2, "temperature": 1.0}, "beams look for the likeliest answer"),
        ("a", {"schema": {}}, "takes no 'schema'; it takes temperature"),
        ("a", {"stop": "x"}, "takes no 'stop'"),
        ("a", {"max_tokens": 0}, "max_tokens must be a whole number"),
        ("a", {"temperature": -1}, "temperature must lie in"),
        ("a", {"deadline_ms": 0}, "deadline_ms must be a positive number"),
        ("a", {"deadline_ms": "soon"}, "deadline_ms must be a positive number"),
        ("", {}, "text 0 is empty"),
        ([], {}, "there is no text"),
        (["a", 3], {}, "text 1 must be a str"),
        ("the house " * 60, {}, "tokens; the context holds 96"),
        ("\ud800", {}, "lone surrogate"),
    ],
)
def test_calls_that_make_no_sense(texts: Any, options: dict[str, Any], fault: str, lm: millis.Seq2Seq) -> None:
    with pytest.raises(RequestError, match=fault):
        lm.generate(texts, **options)


@pytest.mark.parametrize("method", ["stream", "chat", "chat_stream", "score", "embed"])
def test_what_it_cannot_do(method: str, lm: millis.Seq2Seq) -> None:
    with pytest.raises(RequestError, match="answers a text with another: use generate, translate or summarize"):
        getattr(lm, method)("a")


def test_the_wrong_class_and_wrong_options_are_named(t5: tuple[Any, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is an encoder-decoder model, which answers a text with another"):
        millis.LanguageModel(t5[1])
    with pytest.raises(ModelError, match="is no encoder"):
        millis.Encoder(t5[1])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="is no encoder-decoder model"):
        millis.Seq2Seq(tmp_path)
    with pytest.raises(RequestError, match="has no option 'draft'; it has threads"):
        millis.load(t5[1], draft="smollm2")
    with pytest.raises(RequestError, match="no instruction set"):
        millis.load(t5[1], isa="z80")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"do_sample": True}, "sets do_sample to True"),
        ({"num_beams": 99}, r"num_beams must be a whole number in \[1, 16\]"),
        ({"max_length": 1}, "max_length must be a whole number"),
        ({"max_length": 10**40}, "max_length must be a whole number"),
        ({"length_penalty": 1e9}, "length_penalty must lie in"),
        ({"length_penalty": "much"}, "length_penalty must be a number"),
        ({"early_stopping": "soon"}, "early_stopping must be true, false or 'never'"),
        ({"eos_token_id": VOCAB}, "eos_token_id must be a whole number in"),
        ({"eos_token_id": []}, "how an answer begins and ends"),
        ({"decoder_start_token_id": -1}, "decoder_start_token_id must be a whole number in"),
        ({"bad_words_ids": [[1, 2]]}, "words of one token each"),
        ({"bad_words_ids": 7}, "words of one token each"),
        ({"bad_words_ids": [[VOCAB]]}, "bad_words_ids must be a whole number in"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be a whole number"),
        ({"forced_bos_token_id": 3}, "sets forced_bos_token_id to 3"),
        ({"renormalize_logits": True, "no_repeat_ngram_size": 2}, "renormalize_logits with min_length"),
    ],
)
def test_settings_of_writing_that_cannot_be(
    changes: dict[str, Any], fault: str, t5: tuple[Any, Path], tmp_path: Path
) -> None:
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((t5[1] / name).read_bytes())
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(FormatError, match=fault):
        read_generation(tmp_path, VOCAB)


def test_without_a_file_of_its_own_the_configuration_says_how_to_write(t5: tuple[Any, Path], tmp_path: Path) -> None:
    values = json.loads((t5[1] / "config.json").read_text())
    del values["decoder_start_token_id"]  # then it is the padding, as in T5
    (tmp_path / "config.json").write_text(
        json.dumps({**values, "num_beams": 5, "max_length": 77, "eos_token_id": [1, 4]})
    )
    found = read_generation(tmp_path, VOCAB)
    assert (found.beams, found.max_length, found.start, found.ends) == (5, 77, 0, frozenset({1, 4}))


def test_the_commands(t5: tuple[Any, Path], marian: tuple[Any, Path], lm: millis.Seq2Seq) -> None:
    exact = ("--precision", "exact", "--threads", "2")
    done = shell("run", "-m", t5[1], LINES[0], "--max-tokens", "9", *exact)
    assert done.returncode == 0 and done.stdout == lm.generate(LINES[0], max_tokens=9).text + "\n"
    assert "ended by length" in done.stderr
    found = json.loads(shell("summarize", "-m", t5[1], LINES[4], "--json", "--beams", "2", *exact).stdout)
    assert found["text"] == lm.summarize(LINES[4], beams=2).text and found["timings"]["steps"] > 0
    done = shell("translate", "-m", marian[1], "-", "--deadline-ms", "1e6", *exact, stdin="今天\n你好\n")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["source"], line["target"]) for line in lines] == [("zh", "en")] * 2
    assert [line["text"] for line in lines] == [one.text for one in load(marian[1]).translate(["今天", "你好"])]


def test_what_the_commands_refuse(t5: tuple[Any, Path]) -> None:
    path = t5[1]
    for arguments, fault, code in (
        (
            ("run", "-m", path, "a", "--system", "b"),
            "is an encoder-decoder model, which takes no --system; leave it out",
            2,
        ),
        (("run", "-m", path, "a", "--ignore-eos"), "takes no --ignore-eos", 2),
        (("summarize", "-m", path, "a", "--words", "5"), "takes no --words", 2),
        (("translate", "-m", path, "a", "--to", "zh"), "translates en to de, en to fr", 1),
        (
            ("quantize", path, path / "out.gguf", "--type", "q8_0"),
            "is an encoder-decoder model, which Millis does not",
            1,
        ),
        (("chat", "-m", path), "the commands run, translate and summarize take it", 1),
    ):
        assert fault in error_line(shell(*arguments), code)
