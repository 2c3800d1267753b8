"""Files of a Hugging Face folder as bytes, made of what a package holds: the same values give the same bytes."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Damaged(ValueError):
    """A package's file is not of the form that is read here."""


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def safetensors_bytes(tensors: dict[str, NDArray[np.float32]]) -> bytes:
    """The format's header (a length, then JSON filled up with blanks to eight bytes), then the values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, values in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    text = json_bytes(header)
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *(v.astype("<f4").tobytes() for v in tensors.values())])


def added_token(number: int, text: str) -> dict[str, Any]:
    """A special token as tokenizer.json lists it."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": text, **plain}


def between(begin: str, end: str, ids: dict[str, int], middle: tuple[str, ...], second: int = 0) -> dict[str, Any]:
    """tokenizer.json's post-processor: a text, or two with `middle` between them, from `begin` to `end`.

    `second`: the token type of the second text.
    """

    def special(name: str, kind: int = 0) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": kind}}

    first, other = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": second}}
    return {
        "type": "TemplateProcessing",
        "single": [special(begin), first, special(end)],
        "pair": [special(begin), first, *map(special, middle), other, special(end, second)],
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (begin, end)},
    }
