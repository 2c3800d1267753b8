"""Reading: every kind of file, encodings by name, bad lines by file and line, and text made plain."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest

from data_support import write_rows
from millis.data import Reader, clean, split
from millis.data.scrub import scrub
from millis.samples.encoding import encoding_of
from millis.types import DataError

CHINESE = "这是一个测试文件，内容用简体中文写成。\n今天天气很好，适合出门散步。\n客服专线请在上班时间拨打。\n"
TRADITIONAL = "這是一個測試文件，內容使用繁體中文書寫。\n台北市的天氣今天很好，適合出門散步。\n請於上班時間撥打。\n"
ENGLAND = "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"  # a flag, and tags that spell whose


class Told:
    """A reader, and what it complained of."""

    def __init__(self, **options: object) -> None:
        self.lines: list[str] = []
        self.reader = Reader(complain=lambda where, why: self.lines.append(f"{where}: {why}"), **options)  # type: ignore[arg-type]

    def rows(self, *inputs: Path | str) -> list[dict[str, object]]:
        return [row for _, row in self.reader.rows(list(inputs))]


@pytest.mark.parametrize(
    ("text", "encoding", "name"),
    [
        (CHINESE, "utf-8", None),
        (CHINESE, "utf-8-sig", None),
        (CHINESE, "gb18030", "gb18030"),
        (CHINESE, "utf-16", "utf-16"),
        (CHINESE, "utf-16-le", "utf-16-le"),
        (CHINESE, "utf-16-be", "utf-16-be"),
        (TRADITIONAL, "big5", "big5"),
        ("Le café est très bon, déjà vu à l'hôtel.\n", "utf-16", "utf-16"),
    ],
)
def test_encodings_by_name(text: str, encoding: str, name: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    told = Told()
    assert [row["text"] for row in told.rows(path)] == text.splitlines() and told.lines == []
    assert told.reader.encodings == ({} if name is None else {str(path): name})


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("我们明天开会。\n", "gb18030"),
        ("苹果手机壳\n", "gb18030"),
        ("退款怎么办\n订单还没到\n", "gb18030"),
        ("text,label\n手机很好,好评\n", "gb18030"),
        ("고객 서비스\n", "euc-kr"),
        ("안녕하세요 반갑습니다\n", "euc-kr"),
        ("你好，謝謝\n", "big5"),
        ("こんにちは世界\n", "euc-jp"),
        ("こんにちは\n", "shift-jis"),
    ],
)
def test_encodings_of_a_few_words(text: str, encoding: str) -> None:
    assert encoding_of(Path("a.txt"), text.encode(encoding)) == encoding


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
@pytest.mark.parametrize("before", ["", "x"])
def test_one_line_longer_than_what_is_looked_at(before: str, encoding: str, tmp_path: Path) -> None:
    path, text = tmp_path / "a.json", before + CHINESE.replace("\n", "") * 4000
    path.write_bytes(f'["{text}"]'.encode(encoding))
    told = Told()
    assert told.rows(path) == [{"text": text}] and told.reader.encodings.get(str(path), "utf-8") == encoding


def test_a_zero_byte_in_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nhe\0llo there,a\n你好，世界,b\n".encode())
    assert [row["text"] for row in Told().rows(path)] == ["hello there", "你好，世界"]


def test_a_bad_byte_makes_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    lines = [f"第{n}行，这是正常的内容。".encode() for n in range(30)]
    lines[4] = b"ok \xff\xfe no"
    path.write_bytes(b"\n".join(lines))
    told = Told()
    assert len(told.rows(path)) == 29
    assert told.lines == [f"{path}:5: not utf-8 (byte 0xff)"]


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(256)) * 40)
    with pytest.raises(DataError, match="a.txt is not text: it holds zero bytes"):
        Told().rows(path)
    assert len(Told(encoding="latin-1").rows(path)) > 0


def test_lines_paragraphs_and_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\nthree\n", encoding="utf-8")
    assert [row["text"] for row in Told().rows(path)] == ["one", "two", "three"]
    assert [row["text"] for row in Told(unit="paragraph").rows(path)] == ["one\ntwo", "three"]
    assert [row["text"] for row in Told(unit="file").rows(path)] == ["one\ntwo\n\nthree\n"]


def test_json_lines_with_bad_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n[1]\n"b"\n{"n": NaN}\n' + "[" * 100_000 + "\n", encoding="utf-8")
    told = Told()
    assert told.rows(path) == [{"text": "a"}, {"text": "b"}]
    assert [line.split(": ")[0] for line in told.lines] == [f"{path}:{n}" for n in (3, 4, 6, 7)]


def test_compressed_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"text": "row %d"}\n' % n for n in range(3000))))
    assert len(Told().rows(path)) == 3000
    whole = path.read_bytes()
    for damaged in (whole[:-6], whole[:12] + b"\xff\xff" + whole[14:], whole[:-6] + b"odd..."):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged gzip file"):
            Told().rows(path)


def test_tables_are_what_the_csv_module_wrote(tmp_path: Path) -> None:
    path, rows = tmp_path / "a.csv", [["x, y", "1"], ['say "hi"', "2"], ["two\nlines", "3"]]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "label"], *rows])
    assert [[row["text"], row["label"]] for row in Told().rows(path)] == rows
    path.write_text("text,label\na,1\nb\nc,2,3\nd,4\n", encoding="utf-8")
    told = Told()
    assert told.rows(path) == [{"text": "a", "label": "1"}, {"text": "d", "label": "4"}]
    assert told.lines == [f"{path}:3: 1 values for 2 columns", f"{path}:4: 3 values for 2 columns"]
    path.write_text("a,a\n1,2\n", encoding="utf-8")
    with pytest.raises(DataError, match="must begin with the names of its columns, each once"):
        Told().rows(path)


def test_a_table_parted_by_semicolons(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('"text";"label"\r\n"one; two, three";a\r\nfour, five;b\r\n', encoding="utf-8-sig", newline="")
    assert Told().rows(path) == [{"text": "one; two, three", "label": "a"}, {"text": "four, five", "label": "b"}]
    path.write_text("text,a;b\none;two,c\n", encoding="utf-8")
    assert Told().rows(path) == [{"text": "one;two", "a;b": "c"}]


def test_what_a_stray_quote_swallows_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\nfine,a\n"oops,b\n' + "more,c\n" * 50, encoding="utf-8")
    told = Told()
    assert told.rows(path) == [{"text": "fine", "label": "a"}]
    assert told.lines[0].startswith(f"{path}:3: a quote opens a field here that takes 51 lines")
    path.write_text('text,label\n"oops,b\n' + "more,c\n" * 50 + '5",d\nlast,e\n', encoding="utf-8")
    told = Told()  # even where it ends as a field does
    assert told.rows(path) == [{"text": "last", "label": "e"}] and "takes 52 lines" in told.lines[0]


def test_lines_that_end_in_carriage_returns_and_long_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,label\rone,a\r"two\rlines",b\r')
    assert [(row["text"], row["label"]) for row in Told().rows(path)] == [("one", "a"), ("two\rlines", "b")]
    path.write_text(f"text,label\n{'x' * 200_000},a\n", encoding="utf-8")
    assert len(str(Told().rows(path)[0]["text"])) == 200_000


def test_what_json_lines_cannot_hold_is_refused(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "fine words here", "n": 1e999}\n{"text": "more fine words", "n": 1e9}\n', encoding="utf-8"
    )
    told = Told()
    assert [row["n"] for row in told.rows(path)] == [1e9] and "1e999 is beyond" in told.lines[0]
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.Table.from_pylist([{"text": "some fine words", "image": b"\x00"}] * 30), path)
    for make in (lambda: clean([path], tmp_path / "o"), lambda: split([path], tmp_path / "o", tmp_path / "p", near=0)):
        with pytest.raises(DataError, match="fields text, image holds what JSON lines cannot: .*leave that field out"):
            make()
    assert [entry.name for entry in tmp_path.iterdir() if entry.name not in ("a.jsonl", "a.parquet")] == []


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    rows = [{"text": f"row {n}", "label": n % 2} for n in range(3000)]
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    assert Told().rows(path) == rows
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a sound Parquet file"):
        Told().rows(path)
    offsets, odd = arrow.py_buffer(b"\0\0\0\0\2\0\0\0"), arrow.py_buffer(b"a\xff")
    for column in (
        arrow.Array.from_buffers(arrow.utf8(), 1, [None, offsets, odd]),  # text that is not UTF-8
        arrow.array([1 << 62], arrow.duration("s")),
    ):
        parquet.write_table(arrow.table({"text": column}), path)
        with pytest.raises(DataError, match="not a sound Parquet file"):
            Told().rows(path)


def test_a_folder_labels_by_its_folders(tmp_path: Path) -> None:
    for label, text in (("good", "fine"), ("bad", "awful")):
        (tmp_path / "in" / label).mkdir(parents=True)
        (tmp_path / "in" / label / "1.txt").write_text(text, encoding="utf-8")
    (tmp_path / "in" / "good" / "picture.png").write_bytes(b"x")
    write_rows(tmp_path / "in" / "bad" / "own.jsonl", [{"text": "t", "label": "its own"}])
    told = Told()
    expected = [("awful", "bad"), ("t", "its own"), ("fine", "good")]
    assert [(row["text"], row["label"]) for row in told.rows(tmp_path / "in")] == expected
    assert told.lines == [f"{tmp_path / 'in' / 'good' / 'picture.png'}: of no kind that can be read"]


def test_a_saved_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is missing: reading its folders was not run")
    datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]).save_to_disk(str(tmp_path / "set"))
    assert Told().rows(tmp_path / "set") == [{"text": "a"}, {"text": "b"}]


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file, folder or named set nothing-such"):
        Told().rows("nothing-such")
    (tmp_path / "a.doc").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="a.doc is of no kind that can be read: .txt, "):
        Told().rows(tmp_path / "a.doc")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("âœ” No problems", "✔ No problems"),
        ("ä½\xa0å¥½", "你好"),
        ("你好，世界！“引”\u3000ＡＢＣ", "你好，世界！“引” ＡＢＣ"),
        ("<p>Hi <b>bold</b> you</p><script>x()</script><p>next &amp; last", "Hi bold you\n\nnext & last"),
        ("if a < b and c > d", "if a < b and c > d"),
        ("say <name> here", "say <name> here"),
        (
            "<html><head><title>T</title></head><body><nav>menu</nav><h1>Head</h1>text</body></html>",
            "T\n\nmenu\n\nHead\ntext",
        ),
        ("Use the <header> tag and <p>para</p> text", "Use the <header> tag and <p>para</p> text"),
        ("<form>My answer</form>", "My answer"),
        ("List<String> x; <br> y", "List<String> x; <br> y"),
        ("a<b and c>d, a<i or d>e", "a<b and c>d, a<i or d>e"),
        ("Fine.<br /><br />Buy <i>it</i>!", "Fine.\n\nBuy it!"),
        ("page one\fpage two\vthree", "page one\npage two\nthree"),
        (f"{ENGLAND} a\U000e0067b", f"{ENGLAND} ab"),
        ("a\u200bb\x00c\r\nd\r\n\r\n\r\n\r\ne  \t f ", "abc\nd\n\ne f"),
        ("👨\u200d👩\u200d👧", "👨\u200d👩\u200d👧"),
        ("\ufeffstart", "start"),
    ],
)
def test_text_made_plain(text: str, plain: str) -> None:
    assert scrub(text) == plain == scrub(plain)


def test_what_scrubbing_leaves_when_told_to() -> None:
    assert scrub("def f():\n    return 1\n", space=False) == "def f():\n    return 1\n"
    assert scrub("ＡＢＣ，ﬁn", nfkc=True) == "ABC,fin"
    assert scrub("<b>x</b>", html=False) == "<b>x</b>"
    assert scrub("\ud800x\udfff").encode("utf-8").endswith(b"x\xef\xbf\xbd")  # a lone surrogate is no character
