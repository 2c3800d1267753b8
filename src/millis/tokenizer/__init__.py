"""Text ↔ token ids and chat templates. Knows nothing of models but what their files say of the tokenizer."""

from __future__ import annotations

from millis.tokenizer.detokenize import Detokenizer
from millis.tokenizer.recent import Recent
from millis.tokenizer.tokenizer import Tokenizer, load_tokenizer, shortened

__all__ = ["Detokenizer", "Recent", "Tokenizer", "load_tokenizer", "shortened"]
