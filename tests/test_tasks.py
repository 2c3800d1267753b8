"""Extraction, translation, summaries, moderation, cascades: what they ask a scripted model, and a real one at work."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

import millis
from millis.engine.schema import check_value
from millis.tasks.cascade import Cascade
from millis.tasks.classify import Classification
from millis.tasks.language import language
from millis.tasks.methods import TaskMethods
from millis.tasks.summarize import Length, cut_parts, sentences, summarize, words
from millis.types import Completion, DeadlineError, RequestError, Timings, TokenLogprob
from shell import error_line
from shell import millis as shell
from training import chat_gguf

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Scripted(TaskMethods):
    """A language model as the tasks see it: it writes what it is told to, and remembers what it was asked."""

    def __init__(self, *says: str) -> None:
        self._classifiers = {}
        self.says, self.asked, self.options = list(says), [], []
        self.engine = SimpleNamespace(room=400)
        self.config = SimpleNamespace(max_sequences=8)
        self.tokenizer = SimpleNamespace(
            has_chat_template=True, encode=lambda text, add_special=True: text.replace("。", " 。").split()
        )

    def chat_stream(self, messages: Sequence[Any], **options: Any) -> Any:
        self.asked.append(messages[-1]["content"])
        self.options.append(options)
        out = Completion(text=self.says.pop(0), tokens=[1], finish_reason="stop", timings=Timings(total_ms=1.0))
        stream = SimpleNamespace(result=lambda: out)
        return type("S", (), {"__enter__": lambda s: stream, "__exit__": lambda s, *a: None})()


def test_a_language_is_told_by_its_characters() -> None:
    assert [language(text) for text in ("你好 world", "Hello, 李!", "", "12 €", "今天 API 调用失败")] == [
        *("zh", "en", "en", "en", "zh")
    ]


def test_translation_goes_the_right_way_and_strips_quotes() -> None:
    lm = Scripted('"Good weather."', "“天气很好。”")
    first, second, third = lm.translate(["天气很好。", "Fine.", "It is fine."], to="en")[0], None, None
    assert (first.text, first.source, first.target) == ("Good weather.", "zh", "en")
    assert "from Chinese to English" in lm.asked[0] and lm.asked[0].endswith("天气很好。")
    assert len(lm.asked) == 1, "what is English already was translated"
    back = lm.translate("Fine weather.", to="Chinese")
    assert back.text == "天气很好。" and "翻译成中文" in lm.asked[1]
    assert second is third is None
    with pytest.raises(RequestError, match="between zh and en"):
        lm.translate("hi", to="fr")


def test_a_term_of_a_glossarys_file_has_one_translation(tmp_path: Path) -> None:
    file = tmp_path / "terms.txt"
    file.write_text("card\t卡\nbranch=网点\ncard\t银行卡\n", encoding="utf-8")
    said = error_line(shell("translate", "x", "--to", "zh", "--glossary", file))
    assert "terms.txt, line 3: 'card' has another translation above; keep one" in said


def test_a_glossary_is_asked_for_and_checked() -> None:
    glossary = {"bank card": "银行卡", "branch": "网点"}
    lm = Scripted("卡被锁了。", "银行卡被锁了。")
    out = lm.translate("My bank card was blocked.", to="zh", glossary=glossary)
    assert "bank card → 银行卡" in lm.asked[0] and "网点" not in lm.asked[0]
    assert "译文中必须出现：银行卡" in lm.asked[1]
    assert (out.text, out.missing) == ("银行卡被锁了。", ())
    lm = Scripted("卡被锁了。", "卡锁了。")
    assert lm.translate("My bank card was blocked.", to="zh", glossary=glossary).missing == ("银行卡",)
    lm = Scripted("卡被锁了。")
    assert lm.translate("My bank card", to="zh", glossary=glossary, deadline_ms=500).missing == ("银行卡",)
    assert len(lm.asked) == 1 and lm.options[0]["deadline_ms"] == 500


def test_terms_are_whole_words_and_the_longest() -> None:
    glossary = {
        "card": "卡",
        "bank card": "银行卡",
        "art": "艺术",
        "C++ (v2.0)": "C加加",
        "{text}": "文本",
        "API": "接口",
    }
    lm = Scripted("", "")
    lm.translate("He discarded an article on bank cards, c++ (V2.0) and {text}. 调用API时", "zh", glossary=glossary)
    assert "：bank card → 银行卡；C++ (v2.0) → C加加；{text} → 文本；API → 接口。\n" in lm.asked[0]
    lm = Scripted("", "")
    lm.translate("The card is no bank card.", "zh", glossary=glossary)
    assert "：card → 卡；bank card → 银行卡。\n" in lm.asked[0]
    for text, missing in (("Two cards were discarded.", ()), ("It was discarded.", ("card",))):
        assert Scripted(text).translate("卡", "en", glossary={"卡": "card"}, deadline_ms=9).missing == missing


class Person(BaseModel):
    name: str
    age: int = Field(ge=0, le=150)


def test_extraction_gives_values_models_and_errors() -> None:
    lm = Scripted('{"name": "Anna", "age": 31}', '{"name": "Bo", "age": 3', '{"name": "Cy", "age": 900}')
    assert lm.extract("Anna is 31", SCHEMA).value == {"name": "Anna", "age": 31}
    assert lm.options[0]["schema"] == SCHEMA and '"age"' in lm.asked[0]
    cut = lm.extract("Bo is 3", json.dumps(SCHEMA))
    assert cut.value is None and cut.error
    wrong = lm.extract("Cy", Person)
    assert wrong.value is None and "less than or equal to 150" in wrong.error
    lm.says = ['{"name": "Di", "age": 4}']
    assert lm.extract(["Di is 4"], Person)[0].value == Person(name="Di", age=4)
    with pytest.raises(RequestError, match="not JSON"):
        lm.extract("x", "{")
    with pytest.raises(RequestError, match="a schema is a mapping"):
        lm.extract("x", 3)


class Colour(enum.Enum):
    red = "red"
    blue = "blue"


class Open(BaseModel, extra="allow"):
    name: str


class Bag(BaseModel, strict=True):
    people: list[Person]
    counts: dict[Colour, int]
    sizes: set[int]
    data: bytes
    more: Open


@dataclass
class Point:
    x: int


class Named(TypedDict):
    name: str


def test_what_a_schema_says_in_braces_is_no_place_for_the_text() -> None:
    lm = Scripted('{"a": 1}')
    lm.extract("a {schema}", {"type": "object", "properties": {"a": {"type": "integer", "description": "of {text}"}}})
    assert '"of {text}"' in lm.asked[0] and lm.asked[0].endswith("Text: a {schema}")


def test_types_are_what_pydantic_makes_of_them() -> None:
    al = '{"name": "Al", "age": 3}'
    bag = f'{{"people": [{al}], "counts": {{"red": 2}}, "sizes": [1, 1], "data": "x", "more": {{"name": "b", "y": 1}}}}'
    for kind, said, value in (
        (list[Person], f"[{al}]", [Person(name="Al", age=3)]),
        (Person | Point, '{"x": 3}', Point(3)),
        (Literal["a", "b"], '"a"', "a"),
        (Named, '{"name": "Al"}', {"name": "Al"}),
        (list[int], "[1]", [1]),
        (Bag, bag, Bag(people=[Person(name="Al", age=3)], counts={Colour.red: 2}, sizes={1}, data=b"x",
                       more=Open(name="b", y=1))),
    ):  # fmt: skip
        lm = Scripted(said)
        assert lm.extract("x", kind).value == value
        check_value(lm.options[0]["schema"])
        assert "uniqueItems" not in json.dumps(lm.options[0]["schema"])
    lm = Scripted(bag)
    lm.extract("x", Bag)
    defined = lm.options[0]["schema"]
    assert defined["additionalProperties"] is False and defined["$defs"]["Person"]["additionalProperties"] is False
    assert defined["$defs"]["Open"]["additionalProperties"] is True
    lm = Scripted("{}")
    explicit = {"type": "object", "properties": {"a": {}}}
    lm.extract("x", explicit)
    assert lm.options[0]["schema"] == explicit
    for wrong in (3, None, object(), "Missing", Callable[[int], int]):
        with pytest.raises(RequestError, match="schema"):
            lm.extract("x", wrong)


def test_sentences_join_to_the_text_and_end_where_they_should() -> None:
    text = "Version 3.5 is here! 他来了。“真的？” Yes... no"
    cut = sentences(text)
    assert "".join(cut) == text
    assert [one.strip() for one in cut] == ["Version 3.5 is here!", "他来了。", "“真的？”", "Yes...", "no"]


def test_lengths_are_kept_at_sentence_ends() -> None:
    text = "One two three. Four five. Six seven eight nine."
    assert Length(5, "words").cut(text) == "One two three. Four five."
    assert Length(2, "words").cut(text) == "One two"
    assert Length(1, "sentences").cut(text) == "One two three."
    assert Length(6, "characters").cut("他来了。她走了，又回来了。") == "他来了。"
    assert Length(3, "characters").cut("他又回来了。") == "他又回"
    assert Length(4, "words").cut("他说，Millis 是 fast 的。") == "他说，Millis 是"
    assert words("他来了 today") == 4 and words("he came") == 2


def test_long_texts_are_summarized_by_parts() -> None:
    part = " ".join(["word"] * 99) + " end. "
    lm = Scripted(*[f"Summary {i}." for i in range(20)])
    out = lm.summarize(part * 5, sentences=2)
    assert out.parts > 1 and out.read == 1.0
    assert all(f"Summary {i}." in lm.asked[-1] for i in range(out.parts))
    assert out.text == f"Summary {out.parts}."
    told: list[tuple[int, int]] = []
    again = Scripted(*[f"Summary {i}." for i in range(20)])
    summarize(again, part * 5, sentences=2, progress=lambda *done: told.append(done))  # type: ignore[arg-type]
    assert told == [(i, out.parts + 1) for i in range(out.parts + 2)]
    parts = cut_parts(lm, part * 5, 150)  # type: ignore[arg-type]
    assert "".join(parts) == part * 5 and all(len(one.split()) <= 150 for one in parts)
    with pytest.raises(RequestError, match="one of words"):
        lm.summarize("x", words=3, sentences=2)


def test_parts_that_the_cache_cannot_hold_together_are_summarized_in_time(tmp_path: Path) -> None:
    lm = millis.LanguageModel(chat_gguf(tmp_path / "tiny.gguf", context=1024), threads=1)
    out = lm.summarize("The fee is five. " * 240, sentences=1, deadline_ms=60_000)
    assert out.parts > 2 and out.read == 1.0
    assert out.timings.slack_ms is not None and out.timings.slack_ms > 0


class Judge:
    """A model of a cascade that says what it is told to, how surely, and how long an answer takes."""

    def __init__(self, name: str, label: str, sure: float, *, late: bool = False, complete: bool = True) -> None:
        self.path, self.label, self.sure, self.late, self.complete = Path(name), label, sure, late, complete
        self.calls = 0

    def prepare_deadlines(self, deadline_ms: float) -> None:
        self.prepared = False

    def classifier(self, labels: Sequence[str]) -> Judge:
        return self

    def prepare(self) -> None:
        self.prepared = True

    def classify(self, text: str, labels: Sequence[str], **options: Any) -> Classification:
        self.calls += 1
        if self.late:
            raise DeadlineError("no", predicted_ms=1.0, retry_after_s=1.0)
        scores = {self.label: self.sure, "other": 1 - self.sure}
        return Classification(label=self.label, scores=scores, timings=Timings(total_ms=5.0), complete=self.complete)

    def generate(self, prompt: str, **options: Any) -> Completion:
        self.calls += 1
        logprob = math.log(self.sure) if self.sure else -0.5
        probs = [TokenLogprob(1, logprob)] if options.get("logprobs") is not None else None
        return Completion(text=self.label, tokens=[1], finish_reason="stop", timings=Timings(), logprobs=probs)


@pytest.mark.parametrize(
    ("small", "large", "label", "why"),
    [
        (Judge("s", "a", 0.95), Judge("l", "b", 0.9), "a", "confident"),
        (Judge("s", "a", 0.6), Judge("l", "b", 0.9), "b", "replaced"),
        (Judge("s", "a", 0.6), Judge("l", "b", 0.9, late=True), "a", "no time"),
        (Judge("s", "a", 0.6), Judge("l", "b", 0.9, complete=False), "a", "not whole"),
    ],
)
def test_a_cascade_takes_the_large_answer_where_it_is_sure_to_be_in_time(
    small: Judge, large: Judge, label: str, why: str
) -> None:
    models: Any = [small, large]
    out = Cascade(models, confidence=0.9).classify("text", ["a", "b"], deadline_ms=1000)
    assert (out.label, out.timings.why) == (label, why)
    assert out.timings.model == ("l" if why == "replaced" else "s")
    assert large.calls == (why != "confident") and out.timings.deadline_ms == 1000
    assert small.prepared and large.prepared
    assert set(out.timings.asdict()) >= {"model", "model_ms", "why", "confidence", "slack_ms"}


def test_a_cascades_text_is_kept_by_its_tokens_probabilities() -> None:
    models: Any = [Judge("s", "small", 0), Judge("l", "large", 0)]
    assert Cascade(models, confidence=0.6).generate("x").text == "small"  # exp(−0.5) = 0.61
    out = Cascade(models, confidence=0.62).generate("x")
    assert out.text == "large" and out.logprobs is None and out.timings.why == "replaced"
    three: Any = [Judge("s", "small", 0.1), Judge("m", "middle", 0.9), Judge("l", "large", 0)]
    out = Cascade(three, confidence=0.9).generate("x")
    assert (out.text, out.timings.why, three[2].calls) == ("middle", "confident", 0)
    with pytest.raises(RequestError, match="at least two"):
        Cascade(models[:1])
    with pytest.raises(RequestError, match="takes a list"):
        millis.cascade("smollm2")


def test_a_cascade_hands_out_the_small_answer_then_the_large_one() -> None:
    small, large = Judge("s", "small", 0), Judge("l", "large", 0)
    models: Any = [small, large]
    found = Cascade(models, confidence=0.62).answers("x")
    assert large.calls == small.calls == 0
    first = next(found)
    assert (first.text, first.timings.why, large.calls) == ("small", "first", 0) and first.logprobs is None
    (second,) = found
    assert (second.text, second.timings.why, second.timings.model) == ("large", "replaced", "l")
    assert [out.text for out in Cascade(models, confidence=0.6).answers("x")] == ["small"]
    with pytest.raises(RequestError, match="deadline_ms must be"):
        Cascade(models).answers("x", deadline_ms=0)


@pytest.fixture(scope="module")
def lm(model_path: Callable[[str], Path]) -> millis.LanguageModel:
    return millis.load(model_path("smollm2"), threads=1, context=1024)


def test_the_answers_of_real_models_are_those_of_chat(lm: millis.LanguageModel) -> None:
    messages = [{"role": "user", "content": "Say hello."}]
    found = list(Cascade([lm, lm], confidence=1.0).answers(messages, deadline_ms=60_000, max_tokens=8))
    assert [out.text for out in found] == [lm.chat(messages, max_tokens=8).text] * 2
    assert [out.text for out in Cascade([lm, lm], confidence=0).answers("Once", max_tokens=3)] == [
        lm.generate("Once", max_tokens=3).text
    ]


def test_run_shows_the_small_answer_and_what_replaces_it(model_path: Callable[[str], Path]) -> None:
    name = str(model_path("smollm2"))
    command = ("run", "-m", f"{name},{name}", "--threads", "1", "--max-tokens", "4", "Tell me of cats.")
    done = shell(*command)
    assert done.returncode == 0 and done.stdout.count("\n") == 2
    assert "replaces it:" in done.stderr and "first" in done.stderr
    assert shell(*command, "--raw").returncode == 2


def test_a_real_model_does_the_tasks(lm: millis.LanguageModel) -> None:
    found = lm.extract(["Anna is 31 years old.", "Bob is 7."], SCHEMA)
    assert [one.value["age"] for one in found] == [31, 7]
    person = lm.extract("Anna is 31 years old.", Person).value
    assert isinstance(person, Person) and person.age == 31
    people = lm.extract("Anna is 31 years old. Bob is 7.", list[Person]).value
    assert people and all(isinstance(one, Person) for one in people)
    short = lm.summarize("The cat sat on the mat. It was warm. The dog slept.", sentences=1)
    assert len(sentences(short.text)) == 1
    verdict = lm.moderate(["Have a nice day", "I hate you"])
    assert all(sum(one.scores.values()) == pytest.approx(1) for one in verdict)
    timings = lm.moderate("I hate you", threshold=0.001, deadline_ms=600_000).timings
    assert timings.deadline_ms == 600_000 and timings.slack_ms == 600_000 - timings.total_ms
    lm.engine.scheduler.check_integrity()


def test_the_commands_answer(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA), encoding="utf-8")
    common = ("-m", model_path("smollm2"), "--threads", "1")
    done = shell("extract", "Anna is 31 years old.", "--schema", schema, *common)
    assert done.returncode == 0 and json.loads(done.stdout)["age"] == 31, done.stderr
    done = shell("embed", "-", *common, stdin="one\ntwo\n")
    vectors = [json.loads(line) for line in done.stdout.splitlines()]
    assert [len(v) for v in vectors] == [576, 576] and sum(x * x for x in vectors[0]) == pytest.approx(1, abs=1e-4)
    done = shell("summarize", "-", "--sentences", "1", *common, stdin="The cat sat.\nIt was warm.\n")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
