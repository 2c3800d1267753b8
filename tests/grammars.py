"""Compilers over real vocabularies, and what the tests of grammars ask of an answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from millis.engine.grammar import GrammarCompiler, Matcher
from millis.models.load import read_checkpoint
from millis.tokenizer import Tokenizer, load_tokenizer
from millis.types import Grammar

TEXT = {"type": "string"}
WHOLE = {"type": "integer"}


def record(**properties: Any) -> dict[str, Any]:
    """An object with exactly these properties."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


@cache
def tokenizer_of(path: Path) -> Tokenizer:
    return load_tokenizer(read_checkpoint(path))


@cache
def compiler_of(path: Path) -> GrammarCompiler:
    return GrammarCompiler(tokenizer_of(path))


class Answers:
    """Grammars over one vocabulary, and the texts of their answers."""

    def __init__(self, path: Path) -> None:
        self.tokenizer, self.compiler = tokenizer_of(path), compiler_of(path)

    def schema(self, schema: Any) -> Matcher:
        return self.compiler.compile(Grammar("json_schema", json.dumps(schema)))

    def accept(self, matcher: Matcher, text: str) -> None:
        for token in self.tokenizer.encode(text, add_special=False):
            matcher.accept(token)

    def text(self, tokens: Iterable[int]) -> str:
        ends = self.tokenizer.eos
        return b"".join(self.tokenizer.token_bytes(token) for token in tokens if token not in ends).decode()

    def closed(self, matcher: Matcher) -> str:
        """The text of the closing, which the matcher accepts token by token."""
        closing = matcher.closing()
        assert closing is not None
        for token in closing:
            matcher.accept(token)
        assert matcher.accepting
        return self.text(closing)

    def wander(self, matcher: Matcher, steps: int, seed: int) -> list[int]:
        """Tokens drawn evenly from what the masks allow, forced ones and the end included."""
        random, tokens = np.random.default_rng(seed), list[int]()
        while len(tokens) < steps and not matcher.stopped:
            token = int(random.choice(allowed(matcher)))
            matcher.accept(token)
            tokens.append(token)
        return tokens


def allowed(matcher: Matcher) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))


def validate(text: str, schema: Any) -> Any:
    """The value of a JSON text, which is of the schema by jsonschema's word."""
    value = json.loads(text)
    jsonschema.Draft202012Validator(schema).validate(value)
    return value


Finder = Callable[[str], Path]
