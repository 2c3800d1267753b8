"""Texts through the `tokenizers` library; long ones let other threads run meanwhile, without Python's lock (GIL)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

LONG_CHARACTERS = 4096  # takes milliseconds; a short text might wait longer for the lock than it takes


def encoding(backend: Backend, text: str, *, offsets: bool = False) -> Encoding:
    """What the library makes of `text`, without what its post-processor adds. offsets: they are needed, too."""
    if len(text) <= LONG_CHARACTERS:
        return backend.encode(text, add_special_tokens=False)
    batch = backend.encode_batch if offsets else backend.encode_batch_fast
    return batch([text], add_special_tokens=False)[0]  # of batches alone it lets go of the lock
