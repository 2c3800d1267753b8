"""Text ↔ token ids for one model, and its chat format.

A tokenizer is immutable and safe to use from many threads. Special tokens in a text are text unless the caller asks
for them; in a chat the template's special tokens are special and those inside the messages are text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millis.tokenizer.chat import Chat
from millis.tokenizer.detokenize import Detokenizer, Spelling, gguf_spelling
from millis.tokenizer.recent import Recent
from millis.tokenizer.special import Matcher
from millis.tokenizer.vocabulary import PREFIX, Kind, read_vocabulary, refuse_normalizer
from millis.types import FormatError, RequestError

if TYPE_CHECKING:
    from millis.models.checkpoint import Checkpoint


class Tokenizer:
    """Made by `from_gguf`, `from_folder` or `load_tokenizer`."""

    def __init__(
        self,
        *,
        encoder: Callable[[str], list[int]],
        spelling: Spelling,
        control: Matcher,
        prefix: Sequence[int],
        suffix: Sequence[int],
        bos: int | None,
        eos: frozenset[int],
        chat: Chat,
        later: Callable[[str], list[int]] | None = None,
        between: Sequence[int] | None = None,
        limit: int | None = None,
    ) -> None:
        self.bos = bos
        self.eos = eos  # every id that ends an answer
        self._encoder = encoder
        self._later = later or encoder  # of text behind a special token
        self._spelling = spelling
        self._control = control
        self._prefix = list(prefix)
        self._suffix = list(suffix)
        self._between = between
        self._chat = chat
        self._limit = limit  # ids the model has an embedding for

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From the key-values of a GGUF file; FormatError names the key that is missing, malformed or unsupported."""
        vocabulary = read_vocabulary(metadata)
        encoder: Callable[[str], list[int]]
        if vocabulary.model == "gpt2":
            from millis.tokenizer.bpe import BpeEncoder

            encoder = BpeEncoder(vocabulary)
        elif vocabulary.model == "llama":
            from millis.tokenizer.spm import SpmEncoder

            refuse_normalizer(metadata)
            encoder = SpmEncoder(vocabulary)
        else:
            raise FormatError(f"{PREFIX}model is {vocabulary.model!r:.60}; Millis reads gpt2 and llama")
        template = metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise FormatError(f"tokenizer.chat_template must be a text, not {type(template).__name__}")
        control = _control_tokens(vocabulary.of_kind(Kind.CONTROL))
        names = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos}
        special = {name: vocabulary.tokens[i] for name, i in names.items() if i is not None}
        return cls(
            encoder=encoder,
            spelling=gguf_spelling(vocabulary),
            control=Matcher(control),
            prefix=[vocabulary.bos] if vocabulary.add_bos and vocabulary.bos is not None else [],
            suffix=[vocabulary.eos] if vocabulary.add_eos and vocabulary.eos is not None else [],
            bos=vocabulary.bos,
            eos=vocabulary.ends,
            chat=Chat(template, special, control),
        )

    @classmethod
    def from_folder(cls, path: Path | str) -> Tokenizer:
        """From a Hugging Face folder with a tokenizer.json, tokenizer.model, spiece.model or source.spm.

        FormatError names the file that is at fault.
        """
        from millis.tokenizer.folder import read_folder
        from millis.tokenizer.model_folder import has_model, read_model_folder
        from millis.tokenizer.spm_folder import has_spm, read_spm_folder

        path = Path(path)
        read = read_spm_folder if has_spm(path) else read_model_folder if has_model(path) else read_folder
        folder = read(path)
        control = _control_tokens(folder.control_tokens)
        return cls(
            encoder=folder.encoder,
            spelling=folder.spelling,
            control=folder.control,
            prefix=folder.prefix,
            suffix=folder.suffix,
            bos=folder.bos,
            eos=folder.ends,
            chat=Chat(folder.template, folder.special, control),
            later=folder.later,
            between=folder.between,
        )

    @property
    def vocab_size(self) -> int:
        """Ids are valid in [0, vocab_size)."""
        return self._spelling.size

    @property
    def control(self) -> frozenset[int]:
        """Ids that are no text: those that `decode` leaves out."""
        return frozenset(token for token in range(self.vocab_size) if token in self._spelling.control)

    @property
    def language_codes(self) -> list[str]:
        """Tokens such as >>fra<< that say, before a text, which language it is to be translated to; most have none."""
        return [token for token in self._spelling.tokens if token.startswith(">>") and token.endswith("<<")]

    @property
    def around(self) -> tuple[list[int], list[int]]:
        """The ids that `encode` puts before and after a text."""
        return list(self._prefix), list(self._suffix)

    def pair(self, first: Sequence[int], second: Sequence[int], room: int | None = None) -> list[int]:
        """The ids of two texts that are read together, given without what stands around them, in at most `room`: the
        second loses its end. RequestError: the files do not say how, or there is no room for the first."""
        if self._between is None:
            raise RequestError("this model's tokenizer does not say how two texts are read together")
        begin = [*self._prefix, *first, *self._between]
        left = len(second) if room is None else room - len(begin) - len(self._suffix)
        if left < 1 <= len(second):
            raise RequestError(f"the first text leaves no room for the second in {room} tokens; shorten it")
        return [*begin, *second[:left], *self._suffix]

    def same_ids(self, other: Tokenizer) -> bool:
        """Whether every id stands for the same token in both."""
        ours, theirs = self._spelling, other._spelling
        return ours.size == theirs.size and list(ours.tokens) == list(theirs.tokens)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was made for conversations; without, `chat_text` and `encode_chat` fail."""
        return self._chat.source is not None

    @property
    def chat_variables(self) -> frozenset[str]:
        """The names that the chat template reads, `tools` among them where it can tell the model of tools."""
        return self._chat.variables()

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of `text`.

        `add_special` adds what the model's files put around a text, usually BOS; `parse_special` reads the spelling of
        a control token as that token. RequestError if `text` holds a lone surrogate.
        """
        _check_text(text)
        ids = self._ids(self._control.split(text) if parse_special else [text])
        return self._checked([*self._prefix, *ids, *self._suffix] if add_special else ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`, without control tokens unless `skip_special` is false; U+FFFD for invalid UTF-8."""
        detokenizer = self.detokenizer(skip_special=skip_special)
        return "".join([detokenizer.push(token) for token in ids]) + detokenizer.flush()

    def detokenizer(self, *, skip_special: bool = True, continues: bool = False) -> Detokenizer:
        """A fresh incremental decoder; `continues` keeps the first token's leading space, for text that goes on."""
        return Detokenizer(self._spelling, skip_special=skip_special, continues=continues)

    def token_bytes(self, token: int) -> bytes:
        """The raw bytes of one token, control tokens included; RequestError if there is no such id."""
        return self._spelling.raw(token)

    def chat_text(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """The conversation as the model's template writes it, up to where the answer begins.

        `messages` are dictionaries with `role` and `content`; `kwargs` are variables of the template (`tools`,
        `add_generation_prompt`, true unless given, …). RequestError names the message and field that is wrong;
        TemplateError says why the template cannot be used.
        """
        return self._chat.text(messages, kwargs)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        """The ids of `chat_text`, where only the template's own special tokens are special."""
        text, sentinel = self._chat.guarded_text(messages, kwargs)
        parts = self._control.split(text)
        return self._checked(self._ids(part.replace(sentinel, "") if isinstance(part, str) else part for part in parts))

    def remembering(self, recent: Recent, owner: Hashable = None) -> Tokenizer:
        """The same tokenizer, which takes from `recent` what was encoded for this owner before, by the same files."""
        other = copy.copy(self)
        other._encoder = recent.encoder(self._encoder, (owner, "first"))
        if self._later is self._encoder:
            other._later = other._encoder
        else:
            other._later = recent.encoder(self._later, (owner, "later"))
        return other

    def _ids(self, parts: Iterable[str | int]) -> list[int]:
        """Of stretches of text, and the special tokens between them."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend((self._later if ids else self._encoder)(part))
        return ids

    def _checked(self, ids: list[int]) -> list[int]:
        if self._limit is not None and max(ids, default=0) >= self._limit:
            raise RequestError(f"the text holds token {max(ids)}, but the model knows only {self._limit} tokens")
        return ids

    def for_model(self, size: int) -> Tokenizer:
        """The same tokenizer for a model whose embedding has `size` rows.

        Rows beyond the vocabulary decode to nothing; tokens beyond the rows are refused when a text needs them, for
        folders of text-only models list image tokens. FormatError if BOS or an ending token is such a token.
        """
        named = [*self.eos, *self._prefix, *self._suffix]
        if max(named, default=0) >= size:
            raise FormatError(f"the tokenizer names token {max(named)}, but the model knows only {size} tokens")
        return Tokenizer(
            encoder=self._encoder,
            spelling=self._spelling.padded(size),
            control=self._control,
            prefix=self._prefix,
            suffix=self._suffix,
            bos=self.bos,
            eos=self.eos,
            chat=self._chat,
            later=self._later,
            between=self._between,
            limit=size,
        )


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint, from its GGUF metadata or from the folder it lies in."""
    if checkpoint.metadata:
        tokenizer = Tokenizer.from_gguf(checkpoint.metadata)
    else:
        folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
        tokenizer = Tokenizer.from_folder(folder)
    return tokenizer.for_model(checkpoint.config.vocab)


def _control_tokens(tokens: Mapping[str, int]) -> dict[str, int]:
    """Those that can be told from text: a token of one character cannot be broken up inside a message."""
    return {token: i for token, i in tokens.items() if len(token) > 1}


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise RequestError(f"a text to encode must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the text holds a lone surrogate at position {error.start}; send valid Unicode") from None


def shortened(ids: Sequence[int], room: int, suffix: Sequence[int]) -> list[int]:
    """At most `room` ids of a text: its beginning, and the `suffix` that belongs behind every text."""
    return list(ids) if len(ids) <= room else [*ids[: room - len(suffix)], *suffix]
