"""What others may rely on: the public names, what an import costs, which part imports which, and the pages."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest

import millis
from millis import cli, data
from millis.hub import CATALOGUE
from millis.server.settings import PREFIX
from millis.tasks import load
from shell import millis as shell

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "millis"
PUBLIC = """
    Answer Calibration Cascade Classification Completion Conversation DataError DeadlineError Document Encoder
    EngineConfig Extraction FormatError Grammar GrammarError Index LanguageModel MillisError ModelError Moderation
    OverloadError PullError RequestError SamplingParams Seq2Seq Source Stream Summary TemplateError Timings
    TokenLogprob Translation cascade load
""".split()
HEAVY = ["numpy", "torch", "transformers", "jinja2", "tokenizers", "huggingface_hub", "typer", "rich", "millis._native"]

# Part → what it may import of ours, besides itself and types. native ← models ← engine ← tasks ← commands, bench.
MAY_IMPORT = {
    "types": set(),
    "cgroup": set(),
    "config": {"cgroup"},
    "files": set(),
    "models": {"_native", "files"},
    "tokenizer": {"models.checkpoint"},
    "hub": set(),
    "samples": set(),
    "data": {"files", "hub", "samples"},
    "engine": {"_native", "config", "files", "models"},
    "documents": set(),
    "tasks": {"_native", "config", "files", "models", "engine", "tokenizer", "hub", "documents", "samples"},
    "quantize": {"_native", "config", "files", "models", "engine", "tasks", "tokenizer"},
    "train": {"models", "tokenizer", "samples", "tasks.translate", "tasks.language"},  # what a model will be asked
    "bench": {"_native", "models", "engine", "tasks"},
    "server": {"__version__", "_native", "config", "models", "engine", "tasks", "tokenizer", "hub"},
    "commands": {
        "_native",
        "config",
        "data",
        "documents",
        "files",
        "hub",
        "models",
        "tokenizer",
        "tasks",
        "quantize",
        "samples",
        "train",
        "bench",
        "server",
    },
    "cli": {"commands", "__version__"},
    "__main__": {"cli"},
    "__init__": {"config", "documents", "tasks"},
}


def test_public_names() -> None:
    assert sorted(millis.__all__) == PUBLIC
    assert all(hasattr(millis, name) for name in PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        millis.lode  # noqa: B018


def test_the_version_is_the_packages() -> None:
    assert f'version = "{millis.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(("module", "heavy"), [("millis", HEAVY), ("millis.cli", ["numpy", "torch", "millis._native"])])
def test_an_import_costs_next_to_nothing(module: str, heavy: list[str]) -> None:
    code = f"import sys, json, {module}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert "millis.types" in loaded
    assert not set(heavy) & set(loaded)


def test_a_model_is_loaded_without_the_training_libraries(model_path: Callable[[str], Path]) -> None:
    code = (
        "import sys, millis; lm = millis.load(sys.argv[1]); lm.chat([{'role': 'user', 'content': 'Hi'}], max_tokens=2)"
    )
    code += "\nprint(*sys.modules)"
    command = [sys.executable, "-c", code, str(model_path("smollm2"))]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "gguf", "safetensors", "huggingface_hub", "typer"} & set(loaded)


def imports(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, anywhere in it, without `millis.`"""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"millis.{alias.name}" for alias in node.names] if node.module == "millis" else [node.module or ""]
        else:
            continue
        yield from (name.removeprefix("millis.") for name in names if name.startswith("millis."))


def test_imports_point_one_way() -> None:
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        allowed = {part, "types", *MAY_IMPORT[part]}
        for name in imports(path):
            if name not in allowed and name.partition(".")[0] not in allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports millis.{name}")
    assert not wrong, "\n".join(wrong)


def test_only_the_readers_of_a_file_know_the_network() -> None:
    """Prompts stay here: the hub alone asks others, and the load tool the servers it is given; the server waits to be
    asked, and starts its own engine process."""

    def parts(modules: str) -> set[str]:
        imported = re.compile(rf"^\s*(?:import|from) ({modules})\b", re.M)
        return {p.relative_to(SOURCE).parts[0] for p in SOURCE.rglob("*.py") if imported.search(p.read_text("utf-8"))}

    assert parts("http|urllib|requests|httpx|huggingface_hub") == {"bench", "hub"}
    assert parts("socket|ssl") == {"server"}
    assert parts("subprocess") == {"hub", "bench"}


def our_files() -> Iterator[str]:
    for folder in ("src", "native", "tests", "tools"):
        for path in sorted((ROOT / folder).rglob("*")):
            hidden = any(part.startswith((".", "__pycache__")) for part in path.relative_to(ROOT).parts)
            if path.is_file() and not hidden and path.suffix != ".so":
                yield path.relative_to(ROOT).as_posix()


def test_every_file_has_its_line_in_the_map() -> None:
    text = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
    mapped = re.findall(r"^- `([^`]+)` — \S", text, re.MULTILINE)
    ours = set(our_files())
    missing = ours - set(mapped)
    assert not missing, "docs/map.md has no line for: " + ", ".join(sorted(missing))
    gone = {name for name in mapped if name.startswith(("src/", "native/", "tests/", "tools/"))} - ours
    assert not gone, "docs/map.md describes what is not there: " + ", ".join(sorted(gone))
    assert len(mapped) == len(set(mapped)), "a file stands in docs/map.md twice"


@cache
def help_of(verbs: str) -> str:
    return shell(*verbs.split(), "--help").stdout


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_commands_of_the_readme_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", text, re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no make target {target}"
    commands = re.findall(r"`millis ([^`]+)`", text)
    assert {command.split()[0] for command in commands} == set(cli.COMMANDS)
    for command in commands:
        verbs = re.match(r"[a-z]+(?: engine| speculation)?", command)
        assert verbs is not None
        for flag in re.findall(r"--[a-z-]+", command):
            assert flag in help_of(verbs.group()), f"millis {verbs.group()} knows no {flag}"


@pytest.mark.parametrize("verbs", [*cli.COMMANDS, "data clean", "bench serve", "bench engine"])
def test_help_in_a_narrow_terminal_cuts_no_word(verbs: str) -> None:
    text = shell(*verbs.split(), "--help", COLUMNS="80").stdout
    assert "Example: millis" in text and "…" not in text


PAGES = ["README.md", "README.zh.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@cache
def anchors(page: Path) -> set[str]:
    """What a link may name behind #: the headings, as they are made into ids."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_the_links_of_a_page_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", PAGES)
def test_the_options_that_a_page_names_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    for verb, sub, rest in re.findall(r"(?<![\w./-])millis ([a-z]+)(?: ([a-z]+))?([^\n`|&;#]*)", text):
        if verb in cli.COMMANDS:
            verbs = f"{verb} {sub}" if verb in ("bench", "data") else verb
            for flag in re.findall(r"(?<!\S)--[a-z0-9-]+", rest):
                assert re.search(rf"{flag}(?![\w-])", help_of(verbs)), f"millis {verbs} knows no {flag}"


OBJECTS: dict[str, Any] = {  # what the programs on the pages call so
    "millis": millis,
    "data": data,
    "lm": millis.LanguageModel,
    "models": millis.Cascade,
    "mt": millis.Seq2Seq,
    "t5": millis.Seq2Seq,
    "talk": millis.Conversation,
}


@pytest.mark.parametrize("name", PAGES)
def test_what_the_programs_of_a_page_call_exists(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for program in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for call in (node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
                owner, called = call.func.value.id, call.func.attr
                if owner in OBJECTS:
                    function = getattr(OBJECTS[owner], called)
                    takes = inspect.signature(function).parameters
                    more = any(one.kind is one.VAR_KEYWORD for one in takes.values())
                    for keyword in call.keywords:
                        assert more or keyword.arg in takes, f"{owner}.{called} takes no {keyword.arg}"
    for owner, called in re.findall(r"`(lm|millis)\.([a-z_]+)\(", text):
        assert hasattr(OBJECTS[owner], called), f"{owner}.{called}"


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readme_names_every_variable_and_no_other(name: str) -> None:
    read = r"""(?:environ(?:\.get\(|\[)|flag\(|envvar=)"((?:MILLIS|HF)_[A-Z_]+)\""""
    ours = {found for path in SOURCE.rglob("*.py") for found in re.findall(read, path.read_text(encoding="utf-8"))}
    ours -= {"MILLIS_REQUIREMENT"}  # said by us to the build backend that we hand to pip
    rows = re.findall(r"^\| `([A-Z_]+)(?:=1|…)?` \|", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert set(rows) == {*ours, PREFIX}


def test_the_chinese_readme_has_the_same_parts_and_figures() -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    for pattern in (
        r"^##",
        r"^```",
        r"^- ",
        r"^\| `millis [a-z]+(?: [a-z]+(?=[ `]))?",
        r"^\| `[^m].*?`",
        r"\| \**(\d+\.\d)",
    ):
        assert re.findall(pattern, english, re.MULTILINE) == re.findall(pattern, chinese, re.MULTILINE), pattern


TYPED = """
from typing_extensions import assert_type
assert_type(lm, millis.LanguageModel)
assert_type(millis.load("minilm").embed(["x"]).ndim, int)
assert_type(millis.load("smollm2").classify("a", ["x", "y"]), millis.Classification)
assert_type(lm.classify(["a"], ["x", "y"]), list[millis.Classification])
assert_type(lm.extract("a", {}), millis.Extraction)
assert_type(lm.translate(["a"], "zh"), list[millis.Translation])
assert_type(lm.summarize("a", words=5).text, str)
assert_type(lm.moderate("a"), millis.Moderation)
assert_type(lm.answer("a", []), millis.Answer)
millis.nonsense
"""


def test_programs_are_type_checked(tmp_path: Path) -> None:
    """The README's first, and one that asks for the type of every task's answer; what does not exist is an error."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert program is not None
    (tmp_path / "readme.py").write_text(program.group(1) + TYPED, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", str(tmp_path / "readme.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    errors = re.findall(r"error: (.*)", done.stdout)
    assert len(errors) == 1 and 'no attribute "nonsense"' in errors[0], done.stdout + done.stderr


def test_a_type_checker_knows_every_name_of_the_catalogue() -> None:
    writers, readers = get_args(load.Writes), get_args(load.Reads)
    assert sorted([*writers, *readers]) == sorted(entry.name for entry in CATALOGUE.values())


def test_the_first_program_of_the_readme_runs(
    model_path: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert program is not None
    code = program.group(1).replace("deadline_ms=2000", "deadline_ms=60000")  # a busy machine would refuse two seconds
    real: Any = millis.load
    with mock.patch.object(millis, "load", lambda name: real(model_path(name)), create=True):
        exec(compile(code, "README.md", "exec"), {})
    assert re.search(r"length \d+\.\d+\n(.|\n)+\[-\d+\.\d+, -\d+\.\d+\]\n$", capsys.readouterr().out)
