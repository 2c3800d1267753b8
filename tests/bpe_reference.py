"""Byte-level BPE written plainly, to check the tokenizer against: published expressions, one merge at a time."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Mapping
from typing import Any

import regex

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def byte_alphabet() -> dict[int, str]:
    """byte → the character that stands for it."""
    shown = set(range(ord("!"), ord("~") + 1)) | set(range(ord("¡"), ord("¬") + 1)) | set(range(ord("®"), ord("ÿ") + 1))
    hidden = sorted(set(range(256)) - shown)
    return {byte: chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)}


class ReferenceBpe:
    """Encodes by the metadata of a GGUF file."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
        self.pre = ggml["pre"]
        self.ids = {token: i for i, token in enumerate(ggml["tokens"])}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(ggml["merges"])}
        self.user_defined = [t for t, kind in zip(ggml["tokens"], ggml["token_type"], strict=True) if kind == 4]
        self.bytes = byte_alphabet()
        self.word = functools.cache(self._word)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, control tokens being text."""
        parts = [text]
        if self.user_defined:
            marks = "|".join(regex.escape(token) for token in sorted(self.user_defined, key=len, reverse=True))
            parts = regex.split(f"({marks})", text)
        ids = []
        for part in parts:
            if part in self.user_defined:
                ids.append(self.ids[part])
            else:
                ids += [i for word in self.split(part) for i in self.word(word)]
        return ids

    def split(self, text: str) -> list[str]:
        if self.pre == "qwen2":
            return regex.findall(QWEN2, unicodedata.normalize("NFC", text))
        if self.pre == "llama-bpe":
            return regex.findall(LLAMA3, text)
        if self.pre == "smollm":  # every digit by itself, first of all
            return [word for part in regex.split(r"(\p{N})", text) for word in regex.findall(GPT2, part)]
        return regex.findall(GPT2, text)

    def _word(self, word: str) -> list[int]:
        symbols = [self.bytes[byte] for byte in word.encode()]
        if self.pre == "llama-bpe" and "".join(symbols) in self.ids:
            return [self.ids["".join(symbols)]]
        symbols = [symbol for symbol in symbols if symbol in self.ids]  # SmolLM2 has no token for some bytes
        while len(symbols) > 1:
            pairs = list(zip(symbols, symbols[1:], strict=False))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            merged, i = [], 0
            while i < len(symbols):
                pair = tuple(symbols[i : i + 2]) == best
                merged.append(symbols[i] + symbols[i + 1] if pair else symbols[i])
                i += 2 if pair else 1
            symbols = merged
        return [self.ids[symbol] for symbol in symbols]
