"""How a folder says its encoder-decoder model should write: generation_config.json, or else config.json."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from millis.models.huggingface_config import Settings
from millis.models.mapped import read_json
from millis.types import FormatError

_MAX_JSON_BYTES = 1 << 20
MOST_BEAMS = 16
MOST_LENGTH = 1 << 24
Early = bool | Literal["never"]
# Settings of transformers that would change what is written, and the values with which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (),
    "repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "forced_bos_token_id": (),
    "force_words_ids": (),
    "constraints": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": (),
    "min_new_tokens": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What is known of an answer before it is written. Lengths count tokens, the decoder's first one among them."""

    start: int  # the decoder's first token
    ends: frozenset[int]
    banned: tuple[int, ...] = ()  # never written
    max_length: int | None = None
    min_length: int = 0
    beams: int = 1
    length_penalty: float = 1.0  # power of the length that a finished beam's log-probability is divided by
    early_stopping: Early = False  # True: as soon as there are enough finished beams; False, "never": see beams.py
    no_repeat: int = 0  # no run of so many tokens occurs twice; 0: off
    forced_end: int | None = None  # what is written at max_length
    renormalized: bool = False  # beams are compared as if what is banned had no probability, not merely never chosen


def read_generation(folder: Path, vocab: int) -> Generation:
    """What the files in `folder` say. FormatError names the setting that is malformed or not supported."""
    config = Settings(read_json(folder / "config.json", _MAX_JSON_BYTES))
    file = folder / "generation_config.json"
    found = Settings(read_json(file, _MAX_JSON_BYTES)) if file.is_file() else config
    for key, neutral in _NEUTRAL.items():
        value = found.get(key)
        if value is not None and value not in neutral:
            raise FormatError(f"{file.name} sets {key} to {value!r:.40}, which Millis does not support")
    pad = _token(_either(found, config, "pad_token_id"), "pad_token_id", vocab)
    start = _token(_either(found, config, "decoder_start_token_id"), "decoder_start_token_id", vocab)
    start = pad if start is None else start  # as T5 has it
    ends = _tokens(_either(found, config, "eos_token_id"), "eos_token_id", vocab)
    if start is None or not ends:
        raise FormatError("config.json: decoder_start_token_id and eos_token_id must say how an answer begins and ends")
    made = Generation(
        start=start,
        ends=frozenset(ends),
        banned=_banned(found.get("bad_words_ids"), vocab, ends),
        forced_end=_token(found.get("forced_eos_token_id"), "forced_eos_token_id", vocab),
        renormalized=found.truth("renormalize_logits", False),
    )
    return changed(made, found)


def changed(generation: Generation, settings: Settings) -> Generation:
    """The same with what `settings` says of lengths and beams, as task_specific_params do too. FormatError."""
    longest = settings.get("max_length")
    if settings.get("max_new_tokens") is not None:
        longest = settings.whole("max_new_tokens") + 1
    early = settings.get("early_stopping")
    if early is not None and not isinstance(early, bool) and early != "never":
        raise FormatError(f"early_stopping must be true, false or 'never', not {early!r:.40}")
    made = replace(
        generation,
        max_length=generation.max_length if longest is None else _within("max_length", longest, 2, MOST_LENGTH),
        min_length=_within("min_length", settings.whole("min_length", generation.min_length), 0, MOST_LENGTH),
        beams=_within("num_beams", settings.whole("num_beams", generation.beams), 1, MOST_BEAMS),
        length_penalty=settings.real("length_penalty", generation.length_penalty),
        early_stopping=generation.early_stopping if early is None else early,
        no_repeat=_within(
            "no_repeat_ngram_size", settings.whole("no_repeat_ngram_size", generation.no_repeat), 0, 1 << 10
        ),
    )
    if made.renormalized and (made.min_length > 1 or made.no_repeat):
        raise FormatError("renormalize_logits with min_length or no_repeat_ngram_size is not supported")
    if not -16 <= made.length_penalty <= 16:
        raise FormatError(f"length_penalty must lie in [-16, 16], not {made.length_penalty}")
    return made


def _either(found: Settings, config: Settings, key: str) -> Any:
    value = found.get(key)
    return config.get(key) if value is None else value


def _within(name: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise FormatError(f"{name} must be a whole number in [{low}, {high}], not {value!r:.40}")
    return value


def _token(value: Any, name: str, vocab: int) -> int | None:
    return None if value is None else _within(name, value, 0, vocab - 1)


def _tokens(value: Any, name: str, vocab: int) -> tuple[int, ...]:
    given = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(_within(name, one, 0, vocab - 1) for one in given)


def _banned(words: Any, vocab: int, ends: tuple[int, ...]) -> tuple[int, ...]:
    if words is None:
        return ()
    if not isinstance(words, list) or not all(isinstance(word, list) and len(word) == 1 for word in words):
        raise FormatError("bad_words_ids must list words of one token each; longer ones Millis does not support")
    return tuple(sorted({_within("bad_words_ids", word[0], 0, vocab - 1) for word in words} - set(ends)))
