"""Folders that transformers and tokenizers wrote, exported as GGUF: the same logits, the same ids, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from gguf_files import write_tiny
from millis.models.config import RopeScaling
from millis.models.gguf_metadata import config_metadata, gguf_checkpoint
from millis.models.load import build_plan, read_checkpoint
from millis.models.oracle import Oracle
from millis.quantize.export import export_gguf
from millis.tokenizer import Tokenizer
from millis.tokenizer.to_gguf import tokenizer_metadata
from millis.types import FormatError
from reference import TINY, minicpm, next_logits, tiny_model
from tokenizer_lines import lines
from tokenizer_tiny import TEMPLATE
from training import bert_folder

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = {  # as published with Qwen2 and with Llama 3
    "qwen2": r"\p{N}",
    "llama-bpe": r"\p{N}{1,3}",
}
CONFIG = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[2], "chat_template": TEMPLATE}


def pre_tokenizer(pre: str) -> Any:
    if pre in WORDS:
        words = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + WORDS[pre] + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = pre_tokenizers.Split(Regex(words), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]) if pre == "smollm" else plain


def backend(pre: str = "gpt-2", vocab: int = 400) -> Backend:
    """Byte-level BPE trained on the lines, with special tokens and one ordinary added token."""
    found = Backend(models.BPE(ignore_merges=pre == "llama-bpe"))
    found.pre_tokenizer = pre_tokenizer(pre)
    found.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        found.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found.train_from_iterator(
        lines()[:300], trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    )
    found.add_special_tokens(SPECIALS)
    found.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return found


def save(folder: Path, tokenizer: Backend, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.token_to_id(SPECIALS[2])}))
    return folder


def tiny_tokenizer() -> Backend:
    found = Backend(
        models.BPE({token: i for i, token in enumerate([*map(chr, range(0x21, 0x7A)), "ab"])}, [("a", "b")])
    )
    found.pre_tokenizer, found.decoder = pre_tokenizer("gpt-2"), decoders.ByteLevel()
    found.add_special_tokens([SPECIALS[0], SPECIALS[2]])
    return found


@pytest.mark.parametrize("name", [name for name in TINY if name != "phi4_mini"])
def test_an_exported_folder_has_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "model")
    path = save(tmp_path / "model", tiny_tokenizer())  # of 92 tokens, where the model has 96 rows
    size = export_gguf(read_checkpoint(path), tmp_path / "out.gguf")
    assert size == (tmp_path / "out.gguf").stat().st_size
    found = read_checkpoint(tmp_path / "out.gguf")
    assert found.config.vocab == 96
    prompt = np.random.default_rng(1).integers(0, 96, 40).tolist()
    logits = Oracle(build_plan(found, 64), found.tensors).logits(prompt)
    np.testing.assert_allclose(logits, next_logits(model, prompt), atol=1e-4, rtol=1e-5)
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["general.architecture"].contents() == found.config.architecture
    assert fields["tokenizer.ggml.tokens"].contents()[92:] == ["[PAD92]", "[PAD93]", "[PAD94]", "[PAD95]"]
    assert fields["tokenizer.ggml.token_type"].contents() == [1] * 90 + [3] * 2 + [5] * 4


def test_minicpm_is_exported_as_granite(tmp_path: Path) -> None:
    model = minicpm(tmp_path / "model")
    export_gguf(read_checkpoint(save(tmp_path / "model", tiny_tokenizer())), tmp_path / "out.gguf")
    found = read_checkpoint(tmp_path / "out.gguf")
    assert found.metadata["general.architecture"] == "granite"
    prompt = np.random.default_rng(1).integers(0, 96, 40).tolist()
    logits = Oracle(build_plan(found, 64), found.tensors).logits(prompt)
    np.testing.assert_allclose(logits, next_logits(model, prompt), atol=1e-4, rtol=1e-5)


def test_exporting_what_is_a_gguf_file_changes_nothing(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    save(tmp_path / "model", tiny_tokenizer())
    export_gguf(read_checkpoint(tmp_path / "model"), tmp_path / "a.gguf")
    export_gguf(read_checkpoint(tmp_path / "a.gguf"), tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
@pytest.mark.parametrize("bos", [False, True])
def test_ids_and_texts_are_the_folders(pre: str, bos: bool, tmp_path: Path) -> None:
    library = backend(pre)
    path = save(tmp_path, library, add_bos_token=bos)
    metadata = tokenizer_metadata(path, library.get_vocab_size() + 3)
    assert metadata["tokenizer.ggml.pre"] == pre and metadata["tokenizer.chat_template"] == TEMPLATE
    ours = Tokenizer.from_gguf(metadata)
    begin = library.token_to_id(SPECIALS[0])
    library.encode_special_tokens = True
    for text in [*lines(), "<tool> and <|im_end|>"]:
        expected = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ([begin] if bos else []) + expected, repr(text)
        assert ours.decode(ours.encode(text)) == library.decode(expected, skip_special_tokens=False)
    folder = Tokenizer.from_folder(path)
    assert ours.eos == folder.eos and ours.bos == folder.bos
    chat = [{"role": "user", "content": "Hi <|im_end|>"}]
    assert ours.encode_chat(chat) == folder.encode_chat(chat)


def test_ends_of_answers_that_no_reader_would_guess_are_named(tmp_path: Path) -> None:
    library = backend()
    library.add_special_tokens(["<end>", "<stop>", "<halt>"])
    path, ids = save(tmp_path, library), [library.token_to_id(token) for token in ("<end>", "<stop>", "<halt>")]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[:2]}))
    metadata = tokenizer_metadata(path, library.get_vocab_size())
    assert {metadata["tokenizer.ggml.eot_token_id"], metadata["tokenizer.ggml.eom_token_id"]} == set(ids[:2])
    assert Tokenizer.from_folder(path).eos == Tokenizer.from_gguf(metadata).eos
    for named, fault in (
        (ids, "end an answer, more than"),
        ([7], "eos_token_id names token 7, which is ordinary text"),
    ):
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        with pytest.raises(FormatError, match=fault):
            tokenizer_metadata(path, library.get_vocab_size())


def with_prefix_space(library: Backend) -> None:
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def with_lower_case(library: Backend) -> None:
    library.normalizer = normalizers.Lowercase()


def with_class_token(library: Backend) -> None:
    library.post_processor = processors.TemplateProcessing(
        f"$A {SPECIALS[1]}", special_tokens=[(SPECIALS[1], library.token_to_id(SPECIALS[1]))]
    )


def with_greedy_token(library: Backend) -> None:
    library.add_special_tokens([AddedToken("<mask>", lstrip=True)])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (with_prefix_space, "no name for its pre-tokenizer"),
        (with_lower_case, "no name for its pre-tokenizer and normalizer"),
        (with_class_token, "more than BOS and EOS"),
        (with_greedy_token, "works otherwise"),
    ],
)
def test_what_a_gguf_file_cannot_say_of_a_tokenizer(
    change: Callable[[Backend], None], fault: str, tmp_path: Path
) -> None:
    library = backend()
    change(library)
    with pytest.raises(FormatError, match=fault):
        tokenizer_metadata(save(tmp_path, library), library.get_vocab_size())


def test_a_tokenizer_larger_than_the_embedding_and_one_of_another_kind(tmp_path: Path) -> None:
    library = backend()
    with pytest.raises(FormatError, match=f"{library.get_vocab_size()} tokens, the model's embedding 10 rows"):
        tokenizer_metadata(save(tmp_path, library), 10)
    letter = Backend(models.BPE({"a": 0}, []))
    letter.pre_tokenizer, letter.decoder = pre_tokenizer("gpt-2"), decoders.ByteLevel()
    letter.add_special_tokens([SPECIALS[0], SPECIALS[2]])
    with pytest.raises(FormatError, match="it has no merges"):
        tokenizer_metadata(save(tmp_path, letter), 10)
    words = Backend(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(FormatError, match="only BPE can be written to a GGUF file, not WordPiece"):
        tokenizer_metadata(tmp_path, 2)


def test_encoders_are_refused_with_what_is_possible(tmp_path: Path) -> None:
    path = bert_folder(tmp_path / "bert")
    with pytest.raises(
        FormatError,
        match="reads texts and writes none, which Millis does not write as GGUF.*run it from its folder",
    ):
        export_gguf(read_checkpoint(path), tmp_path / "out.gguf")


def test_windows_and_scalings_that_no_key_says(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    with pytest.raises(FormatError, match="windowed attention of qwen2"):
        config_metadata(replace(checkpoint.config, windows=(8, 0)))
    scaled = replace(checkpoint.config, rope_scaling=RopeScaling(kind="llama3", factor=8.0))
    with pytest.raises(FormatError, match="llama3's rope scaling of a qwen2"):
        gguf_checkpoint(replace(checkpoint, config=scaled))
    tiny_model("smollm3").save_pretrained(tmp_path / "smollm3")
    turned = read_checkpoint(tmp_path / "smollm3").config
    for rotated in ((), (False, True, True, True, True)):
        with pytest.raises(FormatError, match="smollm3 in a GGUF file cannot say which of its layers are rotated"):
            config_metadata(replace(turned, rotated=rotated))
    yarn = RopeScaling(kind="yarn", factor=4.0)
    with pytest.raises(FormatError, match="yarn of gemma3"):
        config_metadata(replace(turned, architecture="gemma3", rotated=(), rope_scaling=yarn))


def test_phi3_from_a_gguf_file_and_its_longrope_are_not_exported(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a.gguf", "phi3")
    with pytest.raises(FormatError, match="a.gguf is a GGUF file of phi3, .* give the model's Hugging Face folder"):
        export_gguf(read_checkpoint(tmp_path / "a.gguf"), tmp_path / "out.gguf")
    tiny_model("phi3").save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    scaling = RopeScaling(kind="longrope", factor=2.0, short_factors=(1.0,) * 8, long_factors=(2.0,) * 8)
    with pytest.raises(FormatError, match="longrope cannot be said in the GGUF file of a llama"):
        gguf_checkpoint(replace(checkpoint, config=replace(checkpoint.config, rope_scaling=scaling)))
    with pytest.raises(FormatError, match="rotation of a part of each head cannot be said in the GGUF file of a llama"):
        gguf_checkpoint(replace(checkpoint, config=replace(checkpoint.config, rotary_dim=12)))


def test_keys_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    """And granite without rotation is so again."""
    keys = gguf.Keys
    for name in ("granite", "granitemoehybrid"):
        tiny_model(name).save_pretrained(tmp_path / name)
    config = read_checkpoint(tmp_path / "granite").config
    said = config_metadata(replace(config, rotated=(False,) * 3, rope_scaling=RopeScaling(kind="yarn", factor=4.0)))
    wanted = {
        keys.LLM.EMBEDDING_SCALE: 6.0,
        keys.LLM.RESIDUAL_SCALE: 0.22,
        keys.LLM.LOGIT_SCALE: 0.7,
        keys.Attention.SCALE: 0.1,
        keys.Rope.SCALING_TYPE: gguf.RopeScalingType.YARN.value,
        keys.Rope.SCALING_FACTOR: 4.0,
        keys.Rope.SCALING_ORIG_CTX_LEN: 8192,
        keys.Rope.SCALING_FINETUNED: False,
        keys.Rope.SCALING_YARN_BETA_FAST: 32.0,
        keys.Rope.SCALING_YARN_BETA_SLOW: 1.0,
    }
    architecture = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GRANITE]
    assert {key: said[key.format(arch=architecture)] for key in wanted} == wanted
    assert said[keys.Rope.SCALING_ATTN_FACTOR.format(arch=architecture)] == pytest.approx(1 / (0.1 * np.log(4) + 1))
    for arch, name in ((gguf.MODEL_ARCH.SMOLLM3, "smollm3"), (gguf.MODEL_ARCH.ERNIE4_5, "ernie4_5")):
        assert gguf.MODEL_ARCH_NAMES[arch] == name
    path = save(tmp_path / "granitemoehybrid", tiny_tokenizer())
    values = json.loads((path / "config.json").read_text()) | {"position_embedding_type": None}
    (path / "config.json").write_text(json.dumps(values))
    export_gguf(read_checkpoint(path), tmp_path / "out.gguf")
    assert read_checkpoint(tmp_path / "out.gguf").config.rotated == (False,) * 3
