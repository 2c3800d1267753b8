"""Grammars: which tokens may come next so that an answer is JSON of a schema, matches a pattern, or is one of several.

The parsing is llguidance's; which schemas are taken is schema.py's; how an answer is brought to an end without the
model is closing.py's.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from millis.engine.closing import RUN, Closer, Fuel, Hints
from millis.engine.lark import continuations
from millis.engine.pattern import endings, short_match
from millis.engine.schema import (
    JSON_STYLE,
    any_of,
    check_choice,
    check_lark,
    check_pattern,
    check_schema,
    check_size,
    expanded,
    patterns_of,
)
from millis.engine.turn import Lock
from millis.types import Grammar, GrammarError

CACHED = 32  # compiled grammars
HINTS = 16  # patterns of a schema of which a short match is kept
MOST_ENDINGS = 100  # of such a text, that are tried where an answer or a string may not end
RENEWAL = 256  # tokens at least between two renewals of an answer's lexer
WIDE = 256  # characters of a pattern with its repetitions written out, beyond which it is tried
MOST_WALKED = 512  # tokens of a text that it matches, along which it is
STEPS = 100_000  # of the lexer for a token, about 10 ms
LIMITS = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": STEPS,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,  # up to 2 kB each
    "max_grammar_size": 200_000,
    "verbose_errors": False,  # errors must not quote the answer
}


class Vocabulary(Protocol):
    """What a grammar needs to know of a tokenizer; see millis.tokenizer."""

    eos: frozenset[int]
    bos: int | None

    @property
    def vocab_size(self) -> int: ...
    @property
    def control(self) -> frozenset[int]: ...
    def token_bytes(self, token: int) -> bytes: ...
    def encode(self, text: str, *, add_special: bool = True) -> list[int]: ...


class Matcher:
    """How far an answer has come in its grammar. Safe to use from several threads.

    Matchers of one grammar share the states of its lexer, of which there may be only so many. A string of bounded
    length takes a few at each of its characters: where they are used up, a matcher goes on with a lexer of its own.
    """

    def __init__(self, compiler: GrammarCompiler, grammar: Grammar, native: Any, hints: Hints) -> None:
        self._compiler, self._grammar = compiler, grammar
        self._compiled, self._native = native, native.deep_copy()
        self._hints, self._is_json = hints, _is_json(grammar)
        self._tokens: list[int] = []  # of the answer so far
        self._renewed = -RENEWAL  # how many of them there were when the lexer last began anew
        self._turn = threading.Lock()
        self.ended = False  # an end token was accepted

    @property
    def stopped(self) -> bool:
        """Whether the answer is whole and nothing more may follow it. One that was given up is not."""
        with self._turn:
            return self.ended or bool(self._native.is_stopped() and not self._native.is_error())

    @property
    def accepting(self) -> bool:
        """Whether the answer is whole, though it may go on."""
        with self._turn:
            return self.ended or bool(self._native.is_accepting())

    def mask(self) -> NDArray[np.uint32]:
        """[ceil(vocab / 32)] the tokens that may follow: bit t % 32 of word t // 32. GrammarError: a limit."""
        vocab = self._compiler.vocab_size
        with self._turn:
            try:
                return mask_of(self._native, vocab)
            except GrammarError as error:
                self._renew(error)
                return mask_of(self._native, vocab)

    def accept(self, token: int) -> None:
        """Moves behind a token; GrammarError where the grammar does not allow it."""
        with self._turn:
            if token in self._compiler.closer.ends:
                self.ended = True
            if not self._native.consume_token(token):
                self._renew(_failure(self._native))
                if not self._native.consume_token(token):
                    raise _failure(self._native)
            self._tokens.append(token)

    def forced(self) -> list[int]:
        """The tokens that must follow, as the tokenizer writes them; none where the grammar leaves a choice."""
        with self._turn:
            return [] if self.ended else list(self._native.compute_ff_tokens())

    def closing(self) -> list[int] | None:
        """A short completion of the answer, found without the model; None where the search for one was given up.

        Empty where the answer is whole. Accepting these tokens leaves an answer that the grammar accepts.
        """
        found, native = self._close()
        if found is None and native.is_error():
            try:
                with self._turn:
                    self._renew(_failure(native))
            except GrammarError:
                return None
            found, _ = self._close()
        return found

    def _close(self) -> tuple[list[int] | None, Any]:
        """What `closing` returns, and what its search leaves. Others take their turns meanwhile."""
        closer = self._compiler.closer
        with self._turn:
            if self.ended:
                return [], None
            native = self._native.deep_copy()
            text = b"".join(map(closer.spelling, self._tokens)) if self._is_json else None
        if text is not None and self._grammar.kind == "lark":
            text = text[begin.start() :] if (begin := _JSON_BEGINS.search(text)) else text
        return closer.close(native, text, self._hints), native

    def _renew(self, error: GrammarError) -> None:
        """Goes on with a lexer that has no states yet. Raises `error` where that is no remedy."""
        self._compiler.forget(self._grammar, self._compiled)
        if not _LIMIT_MET.search(str(error)) or len(self._tokens) < self._renewed + RENEWAL:
            raise error
        self._compiled, _ = self._compiler.find(self._grammar)
        native = self._compiled.deep_copy()
        if native.try_consume_tokens(self._tokens) < len(self._tokens):
            raise error
        self._native, self._renewed = native, len(self._tokens)

    def copy(self) -> Matcher:
        """An independent matcher at the same place."""
        with self._turn:
            twin = Matcher(self._compiler, self._grammar, self._compiled, self._hints)
            twin._native = self._native.deep_copy()
            twin._tokens, twin._renewed, twin.ended = list(self._tokens), self._renewed, self.ended
            return twin


def mask_of(native: Any, vocab: int) -> NDArray[np.uint32]:
    """The tokens that may follow; GrammarError where there are none."""
    mask = np.frombuffer(native.compute_bitmask(), np.uint32)[: -(-vocab // 32)]
    if native.is_error():
        raise _failure(native)
    return mask


class GrammarCompiler:
    """Makes matchers. The vocabulary is read once, by `prepare` or at the first use; grammars are kept.

    What a grammar may cost is counted, not timed: it takes some 0.4 s at most, where nothing else runs.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokenizer: Any = None
        self._closer: Closer | None = None
        self._cache: OrderedDict[Grammar, tuple[Any, Hints]] = OrderedDict()
        self._turn = Lock()
        self.compiled = 0  # grammars so far, those that were refused, too

    def prepare(self) -> None:
        """Reads the vocabulary, which takes up to a second. GrammarError: llguidance is not installed."""
        with self._turn:
            if self._tokenizer is None:
                library = _library()
                words = _Words(self._vocabulary)
                self._closer = Closer(words.tokens, self._vocabulary.eos, self._vocabulary.control)
                self._tokenizer = library.LLTokenizer(
                    words,
                    n_vocab=self._vocabulary.vocab_size,
                    eos_token=sorted(self._vocabulary.eos),
                    slices=library.LLTokenizer.json_slices(),
                )

    def ready(self, grammar: Grammar) -> bool:
        """Whether `compile` would return at once: the grammar is kept, and counts as used just now."""
        if grammar not in self._cache:  # not under the lock, which `prepare` holds for long
            return False
        with self._turn:
            if grammar in self._cache:
                self._cache.move_to_end(grammar)
            return grammar in self._cache

    @property
    def vocab_size(self) -> int:
        return self._vocabulary.vocab_size

    @property
    def closer(self) -> Closer:
        """Of the vocabulary; there is none before `prepare`."""
        assert self._closer is not None
        return self._closer

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher at the grammar's beginning. GrammarError: it is malformed, not supported, or beyond a limit."""
        check_size(grammar.source, "grammar")
        self.prepare()
        return Matcher(self, grammar, *self.find(grammar))

    def find(self, grammar: Grammar) -> tuple[Any, Hints]:
        """The compiled grammar, to be copied, and what it may need before it can end; see `_hints`."""
        with self._turn:
            found = self._cache.get(grammar)
        if found is None:
            self.compiled += 1
            found = self._native(grammar), self._hints(grammar)
            self._check_patterns(grammar)
            if grammar.kind == "lark" or _is_json(grammar):
                self._check_ends(grammar, *found)
        with self._turn:
            self._cache[grammar] = found
            self._cache.move_to_end(grammar)
            if len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        return found

    def forget(self, grammar: Grammar, native: Any) -> None:
        """Keeps what was compiled no longer, for its lexer has met a limit: the next one begins anew."""
        with self._turn:
            if grammar in self._cache and self._cache[grammar][0] is native:
                del self._cache[grammar]

    def _native(self, grammar: Grammar) -> Any:
        library = _library()
        try:
            source = _source(grammar, library.LLMatcher)
        except ValueError as error:
            raise error if isinstance(error, GrammarError) else GrammarError(_reason(error)) from None
        limits = library.LLParserLimits(**LIMITS)
        native = library.LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        if native.is_error():
            raise _failure(native)
        if not mask_of(native, self.vocab_size).any():  # some limits are met here only
            raise GrammarError("the grammar allows no answer at all")
        return native

    def _check_patterns(self, grammar: Grammar) -> None:
        """GrammarError: a pattern meets a limit in the middle of its short match, and so would an answer."""
        for pattern in [one for one in _patterns(grammar) if expanded(one) > WIDE][:HINTS]:
            alone, text = grammar, short_match(pattern)
            if grammar.kind == "json_schema":
                alone = Grammar("json_schema", json.dumps({"type": "string", "pattern": pattern}))
                text = json.dumps(text, ensure_ascii=False)[:-1]
            native = self._native(alone)
            tokens = self.closer.spelled(text.encode(errors="ignore"))[:MOST_WALKED]
            for at in range(0, len(tokens), RUN):
                native.try_consume_tokens(tokens[at : at + RUN])
                native.compute_bitmask()
            if native.is_error():
                raise _too_wide(pattern)

    def _check_ends(self, grammar: Grammar, native: Any, hints: Hints) -> None:
        """GrammarError for what could not be closed where time runs out, as an endless schema."""
        fuel, start = Fuel(), native.deep_copy()
        if self.closer.close(start, b"" if _is_json(grammar) else None, hints, fuel) is not None:
            return
        if fuel.met_limit and (patterns := _patterns(grammar)):
            raise _too_wide(max(patterns, key=expanded))
        if start.is_error():
            raise _failure(start)
        if grammar.kind == "lark":
            raise GrammarError(
                "no short answer of this grammar was found; is there one that ends? "
                "A pattern takes all that it matches: write what ends it right behind it, or end it by lazy or suffix"
            )
        if fuel.left < 0:
            raise GrammarError("the schema takes too long to compile; give it simpler patterns, or shorter strings")
        raise GrammarError("no short answer of this schema was found; is there one that ends?")

    def _hints(self, grammar: Grammar) -> Hints:
        """What an answer or a string in it may need before it can end."""
        match grammar.kind:
            case "regex":
                return Hints(answers=self._spelled(_endings(grammar.source)))
            case "json_schema":
                texts = [text for one in _patterns(grammar)[:HINTS] for text in _endings(one)]
                return Hints(strings=self._spelled(json.dumps(text, ensure_ascii=False)[1:-1] for text in texts))
            case "lark":
                return Hints(answers=self._spelled(continuations(grammar.source, self._json_text, MOST_ENDINGS)))
            case _:
                return Hints()

    def _spelled(self, texts: Iterable[str]) -> list[list[int]]:
        return [ids for text in texts if (ids := self.closer.spelled(text.encode(errors="ignore")))]

    def _json_text(self, schema: str) -> str:
        """A short answer of a schema."""
        grammar = Grammar("json_schema", schema)
        tokens = self.closer.close(self._native(grammar), b"", self._hints(grammar)) or ()
        return b"".join(map(self.closer.spelling, tokens)).decode(errors="ignore")


class _Words:
    """The vocabulary as llguidance asks for it."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        control = vocabulary.control
        self.eos_token_id = min(vocabulary.eos)
        self.bos_token_id = vocabulary.bos
        self.tokens = [vocabulary.token_bytes(token) for token in range(vocabulary.vocab_size)]
        self.special_token_ids = sorted(control | vocabulary.eos)
        self._encode = vocabulary.encode

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return self._encode(text, add_special=False)


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise GrammarError("answers of a given form need llguidance; pip install 'millis[serve]'") from None
    return llguidance


def _endings(pattern: str) -> list[str]:
    """What a text may lack of a pattern's short matches, each once."""
    matches = (short_match(pattern), short_match(pattern, longest=True))
    return list(dict.fromkeys(text for match in matches for text in endings(match, MOST_ENDINGS)))


def _patterns(grammar: Grammar) -> list[str]:
    """A pattern, or those of a schema's strings."""
    if grammar.kind == "json_schema":
        return patterns_of(json.loads(grammar.source))
    return [grammar.source] if grammar.kind == "regex" else []


def _is_json(grammar: Grammar) -> bool:
    """Whether answers are JSON, or hold some."""
    return grammar.kind in ("json_schema", "json_object") or (grammar.kind == "lark" and "%json" in grammar.source)


def _source(grammar: Grammar, native: Any) -> str:
    """The grammar in llguidance's own words."""
    match grammar.kind:
        case "json_schema":
            schema = json.dumps(check_schema(grammar.source))
            return str(native.grammar_from_json_schema(schema, overrides=JSON_STYLE))
        case "json_object":
            if grammar.source:
                raise GrammarError("json_object takes no source; use json_schema for a schema")
            return str(native.grammar_from_json_schema('{"type": "object"}', overrides=JSON_STYLE))
        case "regex":
            check_size(grammar.source, "pattern")
            check_pattern(grammar.source, "the pattern")
            return str(native.grammar_from_regex(grammar.source))
        case "choice":
            return str(native.grammar_from_regex(any_of(check_choice(grammar.source))))
        case "lark":
            return str(native.grammar_from_lark(check_lark(grammar.source, lambda schema: _check(schema, native))))
        case _:
            raise GrammarError(f"there is no grammar of kind {grammar.kind!r:.40}")


def _check(schema: dict[str, Any], native: Any) -> None:
    """GrammarError where a schema is malformed. What it costs is not looked at: that takes longer."""
    source = native.grammar_from_json_schema(json.dumps(schema), overrides=JSON_STYLE)
    if reason := native.validate_grammar(source):
        raise GrammarError(f"the grammar cannot be used: {_reason(reason)}")


def _failure(native: Any) -> GrammarError:
    return GrammarError(f"the grammar cannot be used: {_reason(native.get_error() or native.stop_reason())}")


def _too_wide(pattern: str) -> GrammarError:
    return GrammarError(
        f"the grammar cannot be used: {pattern:.80} may go on in too many ways at once, over {STEPS:,} steps for a "
        "token; anchor it by ^ and $, repeat less, or let what repeats not hold what ends it: [^,]+, for .+,"
    )


def _reason(error: object) -> str:
    """What of llguidance's words says what is wrong, on one line."""
    text = str(error).strip()
    if found := _PATTERN_ERROR.search(text):
        where = f" in {found['pattern']:.80}" if found["pattern"] else ""
        return f"{found['reason']:.160}{where}"
    line = text.splitlines()[0][:160] if text else "unknown error"
    if line == "NoExtensionBias":
        return "it allows no answer; does a rule or a $ref lead to nothing but itself?"
    if line.startswith("oneOf constraints"):
        return "a value may fit two branches of a oneOf; use anyOf, or a property that tells them apart"
    return f"{line}; make it simpler, its repetitions first" if _LIMIT_MET.search(line) else line


# A pattern of one line stands between the two; a longer one is left out.
_PATTERN_ERROR = re.compile(r"regex parse error:\n(?: {4}(?P<pattern>.*)\n[ ^]*\n)?(?:.*\n)*?error: (?P<reason>.*)")
_JSON_BEGINS = re.compile(rb"[{\[]")  # in a text that is none before
_LIMIT_MET = re.compile("too many|fuel|too large|limit")
