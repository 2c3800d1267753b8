"""The installed package: what it needs, how large that is, what it carries, and that the stub tells the truth."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import millis
from millis import _native

ROOT = Path(__file__).parent.parent
LIMIT_BYTES = 150_000_000


def needed(name: str) -> set[str]:
    """`name` and all that it needs without extras, as installed here."""
    found: set[str] = set()
    todo = [name]
    while todo:
        current = todo.pop()
        if current in found:
            continue
        found.add(current)
        for line in metadata.requires(current) or []:
            requirement, _, marker = line.partition(";")
            if "extra ==" in marker or "sys_platform == 'win32'" in marker or 'platform_system == "Windows"' in marker:
                continue
            match = re.match(r"[\w.-]+", requirement)
            assert match is not None
            if installed(match[0]):
                todo.append(match[0].lower().replace("_", "-"))
    return found


def installed(name: str) -> bool:
    try:
        metadata.distribution(name)
        return True
    except metadata.PackageNotFoundError:
        return False


def locked(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    pins = [line.partition(";")[0].strip().partition("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, _, version in pins}


def test_base_install_is_small_and_without_pytorch() -> None:
    names = needed("millis")
    assert {"numpy", "tokenizers", "jinja2"} <= names
    assert not names & {"torch", "transformers", "gguf", "pandas", "scipy"}
    sizes = {name: sum(p.size or 0 for p in metadata.files(name) or []) for name in names}
    assert sum(sizes.values()) < LIMIT_BYTES, sizes


def test_everything_needed_is_locked() -> None:
    pins = locked("requirements.lock")
    missing = needed("millis") - set(pins) - {"millis"}
    assert not missing
    for name in ("rich", "jinja2", "tokenizers", "typer"):
        assert metadata.version(name) == pins[name]


def test_what_is_tested_is_what_the_references_lock_says() -> None:
    pins = locked("requirements-dev.lock")
    for name in ("transformers", "gguf", "pytest"):
        assert metadata.version(name) == pins[name]
    assert metadata.version("torch").partition("+")[0] == pins["torch"]


def test_the_wheel_carries_types_stub_page_and_licence() -> None:
    names = {p.name for p in metadata.files("millis") or []}
    assert {"py.typed", "_native.pyi", "LICENSE", "cli.py", "index.html", "app.js", "style.css"} <= names
    assert any(re.fullmatch(r"_native\..*\.so", name) for name in names)
    assert not any(name.startswith("test_") for name in names)
    assert metadata.version("millis") == millis.__version__
    assert metadata.metadata("millis")["License-Expression"] == "Apache-2.0"


def test_the_stub_names_what_the_module_has() -> None:
    stub = ast.parse((Path(millis.__file__).parent / "_native.pyi").read_text())
    names: dict[str, set[str]] = {}
    for node in stub.body:
        if isinstance(node, ast.ClassDef):
            names[node.name] = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            names[node.name] = set()
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = set()
    public = {name for name in dir(_native) if not name.startswith("_")}
    assert set(names) == public
    for cls in ("PackedFile", "Runtime", "Sampler"):
        members = {name for name in vars(getattr(_native, cls)) if not name.startswith("_")}
        assert names[cls] - {"__init__"} == members


@pytest.mark.parametrize("module", ["millis", "millis.types", "millis.config"])
def test_importing_is_cheap(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(m for m in sys.modules if '.' not in m))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"numpy", "torch", "jinja2", "tokenizers", "huggingface_hub", "rich", "typer", "transformers"}
