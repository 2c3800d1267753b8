"""indexes and answers: changes are whole or not there, processes share a file, quotes are exact, deadlines are kept"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bank import DOCUMENTS
from millis import Index, cli
from millis.tasks.answer import Source, ask, supported
from millis.tasks.model import LanguageModel
from millis.types import FormatError, RequestError
from shell import error_line
from shell import millis as shell

FEES = "# Fees\n- Monthly fee: $5.00\n- Overdraft fee: $12.50 an item"


class Hashed:
    """Vectors of the letters in a text: an embedder that needs no file."""

    name = "hashed"

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        x = np.array([[text.lower().count(chr(97 + i)) + 0.01 for i in range(26)] for text in texts], np.float32)
        return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index.open(tmp_path / "a.idx", embedder=None, create=True) as opened:
        opened.add(DOCUMENTS)
        yield opened


@pytest.fixture(scope="module")
def lm(model_path: Callable[[str], Path]) -> LanguageModel:
    return LanguageModel(str(model_path("smollm2")), threads=1, prefix_cache=True)


def best(index: Index, question: str) -> str | None:
    hits = index.search(question).hits
    return hits[0].document.id if hits else None


@pytest.mark.parametrize("embedder", [None, Hashed()])
def test_documents_are_added_replaced_and_deleted(tmp_path: Path, embedder: Hashed | None) -> None:
    with Index.open(tmp_path / "a.idx", embedder=embedder, create=True) as index:
        assert index.add(DOCUMENTS).added == 4 and best(index, "overdraft fee") == "fees"
        again = index.add([*DOCUMENTS[:3], {**DOCUMENTS[3], "text": "overdraft overdraft fee"}])
        assert (again.added, again.updated, again.unchanged) == (0, 1, 3) and best(index, "overdraft") == "zh"
        index.delete(["zh"])
        assert best(index, "overdraft") == "fees" and sorted(index.ids()) == ["card", "fees", "limits"]
        with pytest.raises(RequestError, match="no such document"):
            index.add([{"id": "new", "text": "t"}], delete=["zh"])
        assert len(index.ids()) == 3
    with Index.open(tmp_path / "a.idx", embedder=embedder) as index:
        assert best(index, "overdraft fees") == "fees" and list(tmp_path.iterdir()) == [tmp_path / "a.idx"]
        index.delete(index.ids())
        assert len(index) == 0 and index.search("anything").hits == []


def test_plain_texts_replace_none() -> None:
    with Index.of(["The fee is 5.", "A card costs 7."], embedder=None) as index:
        index.delete("1")
        assert index.add(["The limit is 9."]).added == 1 and index.ids() == ["2", "3"]


def test_chinese_questions_find_chinese_documents(index: Index) -> None:
    out = ask(None, "金卡年费是多少？", index).result()
    assert out.found and out.sources[0].document == "zh" and out.text == "金卡的年费是三百元。"
    no = ask(None, "住房贷款的利率是多少？", index).result()
    assert not no.found and no.sources == [] and "没有" in no.text


def test_quotes_are_where_they_say(index: Index) -> None:
    texts = {str(d["id"]): d["text"] for d in DOCUMENTS}
    for question in ("What is the overdraft fee?", "lost card replaced courier", "How much cash a day from a machine?"):
        out = ask(None, question, index).result()
        assert out.found and out.written == "quote" and out.text == out.sources[0].quote
        assert all(texts[s.document][s.start : s.stop] == s.quote for s in out.sources)
    assert ask(None, "What is the overdraft fee?", index).result().text == "- Overdraft fee: $12.50 an item"


def test_what_no_document_speaks_of_is_not_found(index: Index) -> None:
    for question in ("Do you sell life insurance?", "Which mortgage rates apply for farms?", "?!"):
        out = ask(None, question, index).result()
        assert not out.found and not out.sources and out.written == "none"


def test_a_model_writes_from_the_quote(index: Index, lm: LanguageModel) -> None:
    out = lm.answer("What is the overdraft fee of the Blue Account?", index, max_tokens=40)
    assert out.found and out.sources[0].document == "fees" and "12.50" in out.text
    assert out.timings.quote_ms <= out.timings.first_token_ms <= out.timings.total_ms
    assert out.timings.cached_tokens > 15  # the instruction
    assert json.loads(json.dumps(out.asdict()))["sources"][0]["quote"] == "- Overdraft fee: $12.50 an item"


def test_documents_can_be_given_instead_of_an_index(lm: LanguageModel) -> None:
    out = lm.answer("How fast is a lost card replaced?", DOCUMENTS, embedder=None, max_tokens=30)
    assert out.found and out.sources[0].document == "card"


def test_several_questions_share_steps(index: Index, lm: LanguageModel) -> None:
    questions = ["What is the overdraft fee of the Blue Account?", "Do you sell life insurance?"]
    questions += ["How fast is a lost card replaced?", "What is the overdraft fee?"]
    alone = [lm.answer(question, index, max_tokens=40) for question in questions]
    before = lm.engine.load().counters.steps
    together = lm.answer(questions, index, max_tokens=40)
    steps = lm.engine.load().counters.steps - before
    assert [(a.question, a.found, a.sources) for a in alone] == [(b.question, b.found, b.sources) for b in together]
    assert together[0].text == alone[0].text
    tokens = [one.timings.completion_tokens for one in together]
    assert min(tokens[0], *tokens[2:]) > 2 and steps < sum(tokens) - min(tokens[0], *tokens[2:])
    assert all(0 < one.timings.quote_ms <= one.timings.total_ms for one in together)
    late = lm.answer(questions[:1] * 2, index, deadline_ms=1e-3)
    assert [one.written for one in late] == ["quote", "quote"]
    assert all(one.timings.slack_ms is not None and one.timings.slack_ms < 0 for one in late)
    assert lm.answer([], index) == []
    for wrong, fault in ((["fee?", " "], "the question is empty"), ([5], "must be a str"), (5, "must be a list")):
        with pytest.raises(RequestError, match=fault):
            lm.answer(wrong, index)  # type: ignore[call-overload]


def test_with_no_time_for_a_model_the_quote_is_the_answer(index: Index, lm: LanguageModel) -> None:
    out = lm.answer("What is the overdraft fee?", index, deadline_ms=4.0)
    assert out.found and out.written == "quote" and out.timings.completion_tokens == 0
    with pytest.raises(RequestError, match="deadline_ms"):
        lm.answer("What is the overdraft fee?", index, deadline_ms=-1)


def test_a_number_that_is_not_quoted_is_not_said() -> None:
    source = [Source("a", "Fees of 2024", "- Fee: $1,500.00", 0, 16)]
    assert supported("It is 1500 dollars.", "What is it?", source)
    assert supported("In 2024 it was $1,500.", "What is it?", source)
    assert not supported("It is 1600 dollars.", "What is it?", source)
    loss = [Source("d", "Lost cards", "A lost card is replaced in 3 days.", 0, 34)]
    assert supported("A lost card is replaced in 3 days.", "How long does it take?", loss)
    assert supported("The answer is 3 days.", "How long does it take?", loss)
    assert not supported("A replacement is a type of currency, like gold or silver.", "How long does it take?", loss)
    assert not supported("The answer is:", "How long does it take?", loss)
    year = [Source("d", "信用卡年费", "金卡的年费是三百元。", 0, 10)]
    assert supported("金卡每年的年费是三百元。", "金卡的年费是多少？", year)
    assert not supported("黄金是一种贵重金属，可以投资。", "金卡的年费是多少？", year)


def test_a_change_by_another_process_is_seen(index: Index) -> None:
    assert best(index, "zebra") is None
    run_python(index.path, "index.add([{'id': 'z', 'text': 'A zebra.'}])")
    assert best(index, "zebra") == "z"


def test_processes_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    code = "[index.add([{'id': f'{sys.argv[2]}-{i}', 'text': f'text {i} of {sys.argv[2]}'}]) for i in range(10)]"
    children = [start_python(path, code, str(n)) for n in range(3)]
    assert [child.wait(600) for child in children] == [0, 0, 0]
    with Index.open(path, embedder=None) as index:
        assert len(index.ids()) == 30 and len(index) == 30


def test_a_process_that_dies_leaves_the_index_as_it_was(index: Index) -> None:
    code = """
import os
import sqlite3
def documents():
    yield Document("new", "", "zebra"), []
    os._exit(9)
index._store.put(documents(), ["fees"])"""
    assert start_python(index.path, code).wait(600) == 9
    with Index.open(index.path, embedder=None) as again:
        assert sorted(again.ids()) == sorted(str(d["id"]) for d in DOCUMENTS)
        assert best(again, "overdraft") == "fees"


def test_files_that_are_no_index_are_refused(tmp_path: Path, index: Index) -> None:
    (tmp_path / "text").write_text("no index " * 1000)
    index.close()
    whole = index.path.read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "holes").write_bytes(whole[:4096] + bytes(len(whole) - 4096))
    for name in ("text", "cut", "holes"):
        with pytest.raises(FormatError, match=name):
            with Index.open(tmp_path / name, embedder=None, create=True) as opened:
                opened.search("fee")
    with pytest.raises(RequestError, match="there is no index"):
        Index.open(tmp_path / "nowhere", embedder=None)
    with pytest.raises(RequestError, match="made with the embedder none, not hashed"):
        Index.open(index.path, embedder=Hashed())


def test_names_and_texts_that_are_not_utf_8_are_damage(tmp_path: Path) -> None:
    with Index.open(path := tmp_path / "good.idx", embedder=None, create=True) as index:
        index.add(["Cards cost five euros."])
    for found in (b"PRIMARY KEY", b"Cards cost"):
        bad = tmp_path / "bad.idx"
        bad.write_bytes(path.read_bytes().replace(found, found[:-2] + b"\xc4\xff"))
        with pytest.raises(FormatError, match="damaged.*index anew"), Index.open(bad, embedder=None) as index:
            index.search("cards")


@pytest.mark.parametrize(
    "change",
    ["documents SET title = x'c4'", "passages SET document = 99", "documents SET id = x'c4'"],
)
def test_rows_that_cannot_be_are_damage(tmp_path: Path, change: str) -> None:
    with Index.open(path := tmp_path / "bad.idx", embedder=None, create=True) as index:
        index.add(["Cards cost five euros."])
    with closing(sqlite3.connect(path)) as other, other:
        other.execute(f"UPDATE {change}")
    with pytest.raises(FormatError, match="damaged.*index anew"), Index.open(path, embedder=None) as index:
        index.search("cards")
        index.add(["Trains run."])


def test_an_id_may_be_a_long_number() -> None:
    index = Index.of([{"id": "9" * 5000, "text": "Cards cost five euros."}], embedder=None)
    index.add(["Trains run."])
    assert index.ids() == ["9" * 5000, "1"]


def test_an_index_that_is_closed_says_so(tmp_path: Path) -> None:
    index = Index.open(tmp_path / "a.idx", embedder=None, create=True)
    index.add(DOCUMENTS)
    index.close()
    index.close()
    for use in (
        lambda: index.search("fee"), lambda: index.add(DOCUMENTS), lambda: len(index), lambda: index.delete("zh"),
        lambda: index.ids(), lambda: ask(None, "fee?", index),
    ):  # fmt: skip
        with pytest.raises(RequestError, match="the index is closed"):
            use()
    assert Index.open(tmp_path / "a.idx", embedder=None).search("fee").hits


def test_what_cannot_be_searched_or_deleted_is_refused(index: Index) -> None:
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: index.search(None), "the question must be a str"),  # type: ignore[arg-type]
        (lambda: index.search(" "), "the question is empty"),
        (lambda: index.search("fee", "x"), "count must be a whole number"),  # type: ignore[arg-type]
        (lambda: index.delete(None), "the ids to delete must be a list"),  # type: ignore[arg-type]
        (lambda: index.add([], delete="zh"), "the ids to delete must be a list, not 'zh'"),
        (lambda: index.add("The fee is 5."), "documents must be a list of documents, not 'The fee"),
        (lambda: index.add(5), "documents must be a list"),  # type: ignore[arg-type]
    ]
    for use, message in wrong:
        with pytest.raises(RequestError, match=message):
            use()


def test_what_another_program_made_is_not_touched(tmp_path: Path) -> None:
    import sqlite3

    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE t (x)")
    other.close()
    before = (tmp_path / "other.db").read_bytes()
    with pytest.raises(FormatError, match="not an index that millis has made"):
        Index.open(tmp_path / "other.db", embedder=None, create=True)
    assert (tmp_path / "other.db").read_bytes() == before


def test_the_commands(tmp_path: Path) -> None:
    path, idx = tmp_path / "d.json", tmp_path / "a.idx"
    path.write_text(json.dumps(DOCUMENTS), "utf-8")
    made = shell("index", path, "--index", idx, "--embedder", "none", "--json")
    assert json.loads(made.stdout) | {"index": ""} == {
        "index": "", "added": 4, "updated": 0, "unchanged": 0, "deleted": 0, "documents": 4, "passages": 4,
    }  # fmt: skip
    less = shell("index", "--index", idx, "--embedder", "none", "--delete", "zh")
    assert "1 deleted; 3 documents" in less.stdout
    options = ("--index", str(idx), "--extractive", "--embedder", "none")
    shown = shell("answer", *options, "What is the overdraft fee?")
    assert "“- Overdraft fee: $12.50 an item”\n  — Blue Account fees (fees, 28–59)" in shown.stdout
    batch = shell("answer", *options, "-", stdin="overdraft fee\n\nDo you sell life insurance?\n")
    assert [json.loads(line)["found"] for line in batch.stdout.splitlines()] == [True, False]
    assert "no such document" in error_line(shell("index", "--index", idx, "--embedder", "none", "--delete", "zh"))
    assert "give documents" in error_line(shell("index", "--index", idx), 2)
    for verb, what in (("index", path), ("answer", "q")):
        other = error_line(shell(verb, what, "--index", idx, "--embedder", "minilm"))
        assert "was made with --embedder none; leave --embedder out" in other
    assert "there is no index" in error_line(shell("answer", "--index", tmp_path / "no", "q"))
    late = shell("answer", *options, "overdraft fee", "--deadline-ms", "0.001")
    assert late.returncode == 0 and "Overdraft fee: $12.50" in late.stdout
    assert "after the deadline · the quote itself came after it" in late.stderr
    record = json.loads(shell("answer", *options, "overdraft fee", "--deadline-ms", "0.001", "--json").stdout)
    assert record["timings"]["slack_ms"] == pytest.approx(0.001 - record["timings"]["total_ms"]) and record["found"]
    assert "slack_ms" not in json.loads(shell("answer", *options, "overdraft fee", "--json").stdout)["timings"]


def test_an_index_without_passages_answers_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.md").write_text("\n")
    idx = tmp_path / "a.idx"
    assert shell("index", tmp_path / "empty.md", "--index", idx, "--embedder", "none").returncode == 0
    line = error_line(shell("answer", "--index", idx, "--extractive", "--embedder", "none", "q"))
    assert "holds no passages; add documents: millis index DOCUMENTS" in line


@pytest.mark.parametrize("error", [KeyboardInterrupt, RequestError])
def test_an_index_that_is_not_finished_is_not_there(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    (tmp_path / "a.md").write_text("A fee of $5.\n")
    arguments = ["index", str(tmp_path / "a.md"), "--index", str(tmp_path / "a.idx"), "--embedder", "none"]
    with monkeypatch.context() as patch:
        patch.setattr(Index, "add", failing)
        with pytest.raises(SystemExit):
            cli.main(arguments)
    assert os.listdir(tmp_path) == ["a.md"]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert not ended.value.code and sorted(os.listdir(tmp_path)) == ["a.idx", "a.md"]


def test_a_text_file_is_not_advised_to_be_deleted(tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text("my report " * 1000)
    (tmp_path / "a.md").write_text("A fee of $5.\n")
    line = error_line(shell("index", tmp_path / "a.md", "--index", tmp_path / "report.txt", "--embedder", "none"))
    assert "give another path to --index" in line and "delete" not in line


def run_python(path: Path, code: str) -> None:
    assert start_python(path, code).wait(600) == 0


def start_python(path: Path, code: str, *arguments: str) -> subprocess.Popen[bytes]:
    start = "import sys\nfrom millis import Index\nfrom millis.documents.store import Document\n"
    start += "index = Index.open(sys.argv[1], embedder=None, create=True)\n"
    return subprocess.Popen([sys.executable, "-c", start + code, str(path), *arguments])
