"""Adapters over HTTP: named by requests, loaded and unloaded while others answer, by those who may."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from gguf_files import DROP, HIDDEN, write_tiny
from millis.bench.adapters import random_adapter
from millis.models.adapter import AdapterWeights
from millis.models.load import read_checkpoint
from millis.tasks.model import LanguageModel
from serving import Server
from shell import error_line, millis
from tokenizer_tiny import bpe

MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONFIG = '{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": [%s]}'
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
EXACT = ("--context", "512", "--precision", "exact", "--threads", "1")


def save(weights: AdapterWeights, folder: Path) -> Path:
    folder.mkdir(parents=True)
    tensors = {}
    for pair in weights.pairs:
        _, layer, part, _ = pair.weight.split(".")
        name = f"base_model.model.model.layers.{layer}.{MODULES[part]}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = pair.a, 4 * pair.b
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = ", ".join(f'"{module.split(".")[1]}"' for module in MODULES.values())
    (folder / "adapter_config.json").write_text(CONFIG % targets)
    return folder


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = bpe() | {"tokenizer.ggml.scores": DROP, ".context_length": 512}
    size = len(vocabulary["tokenizer.ggml.tokens"])
    found = tmp_path_factory.mktemp("served") / "tiny.gguf"
    write_tiny(found, keys=vocabulary, tensors={"token_embd.weight": (size, HIDDEN)})
    return found


@pytest.fixture(scope="module")
def folder(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folder") / "adapters"
    config = read_checkpoint(path).config
    for i, name in enumerate(["one", "two", "three"]):
        save(random_adapter(config, rank=8, seed=i), root / name)
    (root / "broken").mkdir()
    (root / "broken" / "adapter_config.json").write_text("{}")
    save(random_adapter(config, rank=8, seed=9), root.parent / "outside")
    (root / "link").symlink_to(root.parent / "outside")
    return root


@pytest.fixture(scope="module")
def server(path: Path, folder: Path) -> Iterator[Server]:
    arguments = (
        "--adapter",
        f"one={folder / 'one'}",
        "--adapter-dir",
        str(folder),
        "--max-adapters",
        "2",
        *EXACT,
    )
    with Server(path, *arguments) as running:
        yield running


def ask(server: Server, model: str) -> tuple[int, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    return server.json("/v1/completions", body)


def text_of(server: Server, model: str) -> str:
    status, body = ask(server, model)
    assert status == 200, body
    assert body["model"] == model
    return str(body["choices"][0]["text"])


def load(server: Server, name: Any, where: Any, **extra: Any) -> tuple[int, Any]:
    return server.json("/v1/load_lora_adapter", {"lora_name": name, "lora_path": where, **extra})


def unload(server: Server, name: str) -> tuple[int, Any]:
    return server.json("/v1/unload_lora_adapter", {"lora_name": name})


def test_a_request_names_its_adapter(server: Server) -> None:
    status, listed = server.json("/v1/models")
    assert [(one["id"], one.get("parent")) for one in listed["data"]] == [("m", None), ("m:one", "m")]
    assert server.json("/v1/models/m:one")[0] == 200
    base, one = text_of(server, "m"), text_of(server, "m:one")
    assert base != one and (text_of(server, "m"), text_of(server, "m:one")) == (base, one)
    status, body = ask(server, "m:nine")
    assert status == 404 and body["error"]["code"] == "model_not_found" and "m:one" in body["error"]["message"]
    assert ask(server, "one")[0] == 404
    labels = {"model": "m:one", "input": "fine", "labels": ["good", "bad"]}
    plain = server.json("/v1/classify", {**labels, "model": "m"})[1]
    status, body = server.json("/v1/classify", labels)
    assert status == 200 and body["data"] != plain["data"]
    status, body = server.json("/v1/embeddings", {"model": "m:one", "input": "x"})
    assert status == 400 and body["error"]["param"] == "model"


def test_prompts_are_read_with_their_adapter(server: Server, path: Path, folder: Path) -> None:
    """And what is cached of one is none of the model's."""
    lm = LanguageModel(path, precision="exact", threads=1, context=512)
    lm.load_adapter(folder / "one", "one")
    for _ in range(2):
        for model, adapter in (("m", None), ("m:one", "one")):
            body = {"model": model, "prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
            status, answer = server.json("/v1/completions", body)
            assert status == 200
            found = answer["choices"][0]["logprobs"]["token_logprobs"]
            want = [one.logprob for one in lm.token_logprobs(PROMPT, adapter=adapter)]
            assert found[1:8] == pytest.approx(want, abs=1e-4)


def test_loaded_and_unloaded_while_others_answer(server: Server) -> None:
    want = {model: text_of(server, model) for model in ("m", "m:one")}
    wrong: list[Any] = []
    stop = threading.Event()

    def go_on(model: str) -> None:
        while not stop.is_set():
            if (text := text_of(server, model)) != want[model]:
                wrong.append((model, text))

    threads = [threading.Thread(target=go_on, args=(model,)) for model in want]
    for thread in threads:
        thread.start()
    for _ in range(2):
        for name in ("two", "three"):
            assert load(server, name, name)[0] == 200
            assert text_of(server, f"m:{name}") != want["m"]
            assert unload(server, name)[0] == 200
            assert ask(server, f"m:{name}")[0] == 404
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [one["id"] for one in server.json("/v1/models")[1]["data"]] == ["m", "m:one"]


@pytest.mark.parametrize(
    ("name", "where", "status", "says"),
    [
        ("one", "one", 400, "already"),
        ("a:b", "two", 400, "name has"),
        (5, "two", 400, "lora_name must be a text"),
        ("x", "nowhere", 404, "no adapter"),
        ("x", "../outside", 400, "below"),
        ("x", "/etc", 400, "below"),
        ("x", "link", 400, "below"),
        ("x", ".", 400, "below"),
        ("x", "two\0", 400, "no path"),
        ("x", "broken", 400, "peft_type"),
    ],
)
def test_what_cannot_be_loaded_is_said(server: Server, name: Any, where: str, status: int, says: str) -> None:
    found, body = load(server, name, where)
    assert found == status and says in body["error"]["message"], body
    assert load(server, "x", "two", scale=2)[1]["error"]["param"] == "scale"
    assert unload(server, "nine")[0] == 404
    assert [one["id"] for one in server.json("/v1/models")[1]["data"]] == ["m", "m:one"]


def test_a_new_engine_process_knows_them_again(path: Path, folder: Path) -> None:
    with Server(path, "--adapter-dir", str(folder), *EXACT) as server:
        assert load(server, "two", "two")[0] == 200
        text = text_of(server, "m:two")
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        until = time.monotonic() + 60
        while (status := ask(server, "m:two")[0]) != 200:
            assert status == 503 and time.monotonic() < until
            time.sleep(0.05)
        assert text_of(server, "m:two") == text


def test_only_some_may_load(path: Path, folder: Path, tmp_path: Path) -> None:
    keys = "".join(f"sha256:{hashlib.sha256(k.encode()).hexdigest()} {k}-name\n" for k in ("admin", "user"))
    (tmp_path / "keys").write_text(keys)
    arguments = ("--api-key-file", str(tmp_path / "keys"), "--adapter-dir", str(folder), *EXACT)
    with Server(path, *arguments, key="user") as server:
        assert load(server, "two", "two")[0] == 403
        server.key = "admin"
        assert load(server, "two", "two")[0] == 200
        server.key = "user"
        assert unload(server, "two")[0] == 403
        text_of(server, "m:two")
    with Server(path, *EXACT) as server:
        assert load(server, "two", "two")[0] in (404, 405), "nothing is loaded where no folder was named"


def test_what_a_server_cannot_start_with(path: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "one", tmp_path / "cut")
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(b"0123456789")
    for arguments, code, says in (
        (["--adapter", f"a={tmp_path / 'cut'}"], 1, "safetensors"),
        (["--adapter", f"a={tmp_path / 'nowhere'}"], 1, "no adapter at"),
        (["--adapter", "=x"], 2, "an adapter's name"),
        (["--adapter", f"a={folder / 'one'}", "--adapter", f"a={folder / 'two'}"], 2, "two adapters are called 'a'"),
    ):
        done = millis("serve", "-m", path, "--port", "0", *arguments)
        assert says in error_line(done, code), done.stderr


def test_the_command_line_takes_one(path: Path, folder: Path) -> None:
    options = ("run", "a b", "-m", path, "--max-tokens", "12", "--ignore-eos", *EXACT)
    plain, with_it = millis(*options), millis(*options, "--adapter", folder / "one")
    assert plain.returncode == with_it.returncode == 0, with_it.stderr
    assert plain.stdout != with_it.stdout
    assert millis(*options, "--adapter", folder / "broken").returncode == 1
