"""Text ↔ token ids and chat templates. Knows nothing of models but what their files say of the tokenizer."""

from __future__ import annotations

from millis.tokenizer.detokenize import Detokenizer
from millis.tokenizer.tokenizer import Tokenizer, load_tokenizer, shortened

__all__ = ["Detokenizer", "Tokenizer", "load_tokenizer", "shortened"]
