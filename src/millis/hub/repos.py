"""Model bytes out of hub repositories, through huggingface_hub: a pinned catalogue file, or a whole model by its id.

Every fetch begins with one request that is not repeated, so that a machine without a network knows within seconds;
what the library then downloads it resumes by itself, inside a folder that is never taken for a model.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from millis.hub import store
from millis.hub.catalogue import Entry, HubFile
from millis.hub.progress import Progress, counted, folder_bytes
from millis.types import MillisError, PullError

PROBE_S = 5.0
SCRATCH = "hub"
WHOLE_MODEL = re.compile(r"[\w-][\w.-]*\.(safetensors|json|jinja|model|spm|txt)", re.ASCII)
MODULE = re.compile(r"[0-9]{1,2}_[A-Za-z]{1,40}/config\.json", re.ASCII)  # of sentence-transformers
GGUF = re.compile(r"[\w-][\w.-]*\.gguf", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch(source: HubFile, entry: Entry, progress: Progress) -> None:
    """Brings the entry's file, and what lies beside it, to their final paths. The caller holds the entry's lock.

    Raises PullError for what the hub says or sends, OSError for what the disk does.
    """
    scratch = store.model_folder(entry.name) / SCRATCH
    with _explained(str(source)):
        _check_offer(source, entry)
        store.check_space(scratch.parent, max(0, entry.size_bytes - folder_bytes(scratch)))
        scratch.mkdir(exist_ok=True)
        progress.start(entry.size_bytes, entry.name)
        for other in store.missing_beside(entry):
            small = _download(source.repo, other.file, source.revision, scratch).read_bytes()
            try:
                store.keep_beside(entry, other, small)
            except ValueError as error:
                raise PullError(f"{source} sent another file than the catalogue's: {error}") from None
        with counted(progress, scratch, entry.size_bytes):
            path = _download(source.repo, source.file, source.revision, scratch)
    got = store.hash_file(path)
    if got != entry.sha256:
        shutil.rmtree(scratch)
        raise PullError(f"{source} sent {source.file} with SHA-256 {got}, not {entry.sha256}; it was discarded")
    store.commit(path, store.final_path(entry))
    shutil.rmtree(scratch, ignore_errors=True)


def _check_offer(source: HubFile, entry: Entry) -> None:
    """Asks for the file's size and, where the hub knows it, SHA-256, before any of it is sent."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(source.repo, source.file, revision=source.revision, endpoint=_endpoint())
    offer = get_hf_file_metadata(url, timeout=PROBE_S)
    same_size = offer.size in (None, entry.size_bytes)
    same_hash = not SHA256.fullmatch(offer.etag or "") or offer.etag == entry.sha256
    if not (same_size and same_hash):
        raise PullError(f"{source} holds another {source.file} than the catalogue; it was not fetched")


def fetch_model(
    repo: str, file: str | None, target: Path, progress: Progress, check: Callable[[Path], object] | None = None
) -> None:
    """Brings a repository's model to the folder `target`: its safetensors with their configuration, or a GGUF file.

    check: is shown the whole model, and raises a MillisError where it cannot be read; then it gets no name that counts.
    The caller holds the lock of `target`. Raises PullError and OSError as `fetch` does.
    """
    part = target.with_name(target.name + ".part")
    with _explained(f"hub repository {repo}"):
        revision, offers = _list(repo)
        chosen = choose(repo, offers, file)
        total = sum(offer.size_bytes for offer in chosen.values())
        part.mkdir(parents=True, exist_ok=True)
        store.check_space(part, max(0, total - folder_bytes(part)))
        progress.start(total, repo)
        for name, offer in chosen.items():
            with counted(progress, part, offer.size_bytes):
                _check_file(_download(repo, name, revision, part), offer)
    if check is not None:
        try:
            check(part if "config.json" in chosen else part / next(iter(chosen)))
        except MillisError as error:
            raise PullError(f"hub repository {repo} is not kept, for Millis cannot read it: {error}") from None
    shutil.rmtree(part / ".cache", ignore_errors=True)
    store.commit(part, target)


@dataclass(frozen=True, slots=True)
class Offer:
    """A file that a repository lists; the hub gives a SHA-256 for large files only."""

    size_bytes: int
    sha256: str | None


def _list(repo: str) -> tuple[str, dict[str, Offer]]:
    """The repository's current commit and its files."""
    from huggingface_hub import HfApi

    info = HfApi(endpoint=_endpoint()).model_info(repo, timeout=PROBE_S, files_metadata=True)
    offers = {
        item.rfilename: Offer(item.size or 0, item.lfs.sha256 if item.lfs else None) for item in info.siblings or []
    }
    return info.sha or "main", offers


def choose(repo: str, offers: Mapping[str, Offer], file: str | None) -> dict[str, Offer]:
    """Which of the files make the model; raises PullError where that is not clear. Only plain names, and
    the settings of sentence-transformers' modules in folders of their own."""
    ggufs = sorted(filter(GGUF.fullmatch, offers))
    if file is not None:
        if file not in ggufs:
            raise PullError(f"{repo} has no {file}; its GGUF files: {', '.join(ggufs) or 'none'}")
        return {file: offers[file]}
    model = {name: offer for name, offer in offers.items() if WHOLE_MODEL.fullmatch(name)}
    if "modules.json" in model:
        model |= {name: offer for name, offer in offers.items() if MODULE.fullmatch(name)}
    if "config.json" in model and any(name.endswith(".safetensors") for name in model):
        return model
    if len(ggufs) == 1:
        return {ggufs[0]: offers[ggufs[0]]}
    if ggufs:
        raise PullError(f"{repo} has several GGUF files; ask for one, as {repo}:{ggufs[0]}, of: {', '.join(ggufs)}")
    raise PullError(f"{repo} has neither config.json with safetensors nor a GGUF file, so Millis cannot read it")


def _check_file(path: Path, offer: Offer) -> None:
    if path.stat().st_size == offer.size_bytes and offer.sha256 in (None, store.hash_file(path)):
        return
    path.unlink()
    raise PullError(f"{path.name} is not what the hub lists; it was discarded, try again")


def _download(repo: str, file: str, revision: str, folder: Path) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(
        hf_hub_download(repo, file, revision=revision, local_dir=folder, etag_timeout=PROBE_S, endpoint=_endpoint())
    )


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT")  # read now: the library reads it once, when it is imported


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns whatever the library raises into one line, and keeps its progress bars off the terminal meanwhile.

    The library passes on errors of the HTTP client that it is built on, which changes between its versions;
    so every exception is caught, except ours and the disk's.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    except PullError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in store.DISK_ERRORS:
            raise
        raise PullError(f"{what}: {_reason(error)}") from error
    finally:
        if hide:
            enable_progress_bars()


def _reason(error: Exception) -> str:
    known = {
        "GatedRepoError": "its owner gives access by agreement only; agree on its page and log in with: hf auth login",
        "RepositoryNotFoundError": "there is none of that name, or it is private",
        "RevisionNotFoundError": "it has no such revision",
        "RemoteEntryNotFoundError": "it has no such file",
        "EntryNotFoundError": "it has no such file",
        "ConnectError": "no connection",
        "ConnectTimeout": "no answer within the time limit",
        "ReadTimeout": "no answer within the time limit",
    }
    name = type(error).__name__
    text = " ".join(str(error).split())[:200]
    return known.get(name) or (f"{name}: {text}" if text else name)
