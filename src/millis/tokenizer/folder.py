"""The tokenizer of a Hugging Face folder: tokenizer.json run by the `tokenizers` library, and what stands beside it.

Beside it: tokenizer_config.json (special tokens, add_bos_token, chat_template), chat_template.jinja (wins over the
former) and generation_config.json, or else config.json, for the ids that end an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from millis.tokenizer.detokenize import Spelling
from millis.tokenizer.encoding import encoding
from millis.tokenizer.special import Edges, Matcher
from millis.tokenizer.vocabulary import END_NAMES
from millis.types import FormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_MAX_FILE_BYTES = 256 << 20
_MAX_TEMPLATE_BYTES = 1 << 20


class FolderEncoder:
    """Text → ids by the library; special tokens in the text stay text."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()

    def __call__(self, text: str) -> list[int]:
        return list(encoding(self._backend, text).ids)

    def around(self) -> tuple[list[int], list[int]]:
        """The ids that the file's post-processor puts before and after a text."""
        bare, full = self("a"), list(self._backend.encode("a", add_special_tokens=True).ids)
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []

    def between(self, prefix: list[int], suffix: list[int]) -> list[int] | None:
        """The ids that it puts between two texts that are read together; None where it knows no such pairs."""
        bare, full = self("a"), list(self._backend.encode("a", "a", add_special_tokens=True).ids)
        begin, end = len(prefix) + len(bare), len(full) - len(suffix) - len(bare)
        whole = full == [*prefix, *bare, *full[begin:end], *bare, *suffix]
        return full[begin:end] if whole and end > begin else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """What the folder's files say, checked."""

    encoder: Callable[[str], list[int]]
    spelling: Spelling
    control: Matcher
    control_tokens: Mapping[str, int]
    prefix: list[int]
    suffix: list[int]
    bos: int | None
    ends: frozenset[int]
    special: Mapping[str, str]  # bos_token and eos_token, for the template
    template: str | None
    between: list[int] | None = None  # of two texts that are read together
    later: Callable[[str], list[int]] | None = None  # of text behind a special token, where that is another


def read_folder(path: Path) -> Folder:
    """Read the tokenizer files of folder `path`; FormatError names the file that is missing or malformed."""
    backend = _backend(path / "tokenizer.json")
    config = read_object(path / "tokenizer_config.json")
    encoder = FolderEncoder(backend)
    added = backend.get_added_tokens_decoder()
    control = {token.content: i for i, token in added.items() if token.special and token.content}
    edges = {
        token.content: Edges(left=token.lstrip, right=token.rstrip, word=token.single_word)
        for token in added.values()
        if token.content in control and (token.lstrip or token.rstrip or token.single_word)
    }
    bos, eos = (_named(config, key, backend) for key in ("bos_token", "eos_token"))
    prefix, suffix = encoder.around()
    return Folder(
        encoder=encoder,
        spelling=_spelling(backend, set(control.values()), set(added)),
        control=Matcher(control, edges),
        control_tokens=control,
        prefix=_with(prefix, bos, config.get("add_bos_token")),
        suffix=_with(suffix, eos, config.get("add_eos_token")),
        bos=bos,
        ends=ends_of(path, eos, control, backend.get_vocab_size()),
        special={name: text for name in ("bos_token", "eos_token") if (text := content(config.get(name)))},
        template=template_of(path, config),
        between=encoder.between(prefix, suffix),
        later=_later(backend),
    )


def _backend(path: Path) -> Backend:
    from tokenizers import Tokenizer as Backend

    if not path.is_file():
        raise FormatError(
            f"{path} is missing; Millis reads a folder's tokenizer from tokenizer.json, tokenizer.model, spiece.model "
            "or source.spm"
        )
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise FormatError(f"{path} is larger than {_MAX_FILE_BYTES} bytes")
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise FormatError(f"{path} is not a tokenizer: {str(error)[:200]}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the library's own failure, outside Exception
            raise
        raise FormatError(f"{path} is not a tokenizer: {str(error)[:200]}") from None


def _later(backend: Backend) -> FolderEncoder | None:
    """Where a space is put before the first word only, the same without it."""
    from tokenizers import Tokenizer as Backend

    if backend.pre_tokenizer is None or b'"first"' not in backend.pre_tokenizer.__getstate__():
        return None
    content = json.loads(backend.to_str())
    given = content["pre_tokenizer"]
    for step in given.get("pretokenizers", [given]):
        if step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"
    return FolderEncoder(Backend.from_str(json.dumps(content)))


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object, {} where there is no such file. FormatError."""
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise FormatError(f"{path} is larger than {_MAX_FILE_BYTES} bytes")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _named(config: Mapping[str, Any], key: str, backend: Backend) -> int | None:
    """The id of a special token that tokenizer_config.json names, as a text or as {"content": text}."""
    value = content(config.get(key))
    if value is None:
        return None
    token = backend.token_to_id(value) if isinstance(value, str) else None
    if token is None:
        raise FormatError(f"tokenizer_config.json: {key} {value!r:.60} is not a token of tokenizer.json")
    return token


def content(value: Any) -> Any:
    """The text of a token that is named as such or as {"content": text}."""
    return value.get("content") if isinstance(value, dict) else value


def _with(ids: list[int], token: int | None, wanted: object) -> list[int]:
    """`ids` with or without `token`, where the configuration says which; otherwise as the post-processor has it."""
    if token is None or not isinstance(wanted, bool) or wanted == (token in ids):
        return ids
    return [token] if wanted else [i for i in ids if i != token]


def ends_of(path: Path, eos: int | None, control: Mapping[str, int], size: int) -> frozenset[int]:
    """Every id that ends an answer, as the files of a folder have it. FormatError."""
    ends = {control[name] for name in END_NAMES if name in control}
    ends |= {eos} - {None}  # type: ignore[arg-type]
    for name in ("generation_config.json", "config.json"):
        value = read_object(path / name).get("eos_token_id")
        if value is None:
            continue
        found = value if isinstance(value, list) else [value]
        if any(type(token) is not int or not 0 <= token < max(size, 1 << 22) for token in found):
            raise FormatError(f"{path / name}: eos_token_id must hold token ids, not {value!r:.60}")
        return frozenset(ends.union(found))
    return frozenset(ends)


def template_of(path: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template of a folder, in a file of its own or in tokenizer_config.json. FormatError."""
    file = path / "chat_template.jinja"
    if file.is_file():
        if file.stat().st_size > _MAX_TEMPLATE_BYTES:
            raise FormatError(f"{file} is larger than {_MAX_TEMPLATE_BYTES} bytes")
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{file} is not UTF-8") from None
    value = config.get("chat_template")
    if isinstance(value, list):  # several named templates
        value = next((t.get("template") for t in value if isinstance(t, dict) and t.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        raise FormatError(f"tokenizer_config.json: chat_template must be a text, not {type(value).__name__}")
    return value


def _spelling(backend: Backend, control: set[int], added: set[int]) -> Spelling:
    vocabulary = backend.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values(), default=-1) + 1
    if not 0 < size <= len(vocabulary) + (1 << 20):
        raise FormatError(f"tokenizer.json: token ids reach {size - 1} with only {len(vocabulary)} tokens")
    tokens = [""] * size
    for text, number in vocabulary.items():
        tokens[number] = text
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    style = _style(kinds)
    fallback = "ByteFallback" in kinds
    values = {i: b for b in range(256) if fallback and (i := vocabulary.get(f"<0x{b:02X}>")) is not None}
    dropped = style == "wordpiece" or any(
        step.get("type") == "Strip" and step.get("start", 0) > 0
        or step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in steps
    )  # fmt: skip
    return Spelling(
        tokens=tokens,
        style=style,
        control=control,
        literal=control if style == "sentencepiece" else added,  # whose decoder reads added tokens as others
        values=values,
        drop_space=dropped,
        size=size,
    )


def _style(kinds: set[str | None]) -> Literal["byte-level", "sentencepiece", "wordpiece"]:
    if "ByteLevel" in kinds:
        return "byte-level"
    if "WordPiece" in kinds:
        return "wordpiece"
    if kinds & {"Metaspace", "ByteFallback", "Replace"}:
        return "sentencepiece"
    raise FormatError("tokenizer.json: its decoder is none of ByteLevel, Metaspace, ByteFallback and WordPiece")
