"""Tiny GGUF tokenizer sections for tests that need no model file."""

from __future__ import annotations

from typing import Any

from bpe_reference import byte_alphabet

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def bpe(**changes: Any) -> dict[str, Any]:
    """Byte-level BPE: 256 bytes, a few merges, control tokens 261 to 263, user-defined 264, unused 265."""
    tokens = list(byte_alphabet().values()) + ["he", "ll", "hell", "hello", "Ġw"]
    tokens += ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", "[PAD]"]
    kinds = [1] * 261 + [3, 3, 3, 4, 5]
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": kinds,
        "merges": ["h e", "l l", "he ll", "hell o", "Ġ w"],
        "bos_token_id": 261,
        "eos_token_id": 263,
        "add_bos_token": False,
    }
    return _prefixed(metadata, {"tokenizer.chat_template": TEMPLATE}, changes)


def spm(**changes: Any) -> dict[str, Any]:
    """SentencePiece: unknown 0, BOS 1, EOS 2, bytes 3 to 258, then pieces by falling score."""
    pieces = ["▁", "a", "b", "c", "ab", "▁a", "bc", "▁ab", "▁abc", "é", "中"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return _prefixed(metadata, {}, changes)


def _prefixed(metadata: dict[str, Any], others: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """With `changes` made to tokenizer.ggml keys; one whose value is `...` is removed."""
    merged = {f"tokenizer.ggml.{key}": value for key, value in {**metadata, **changes}.items()} | others
    return {key: value for key, value in merged.items() if value is not ...}
