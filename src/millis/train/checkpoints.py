"""Checkpoints of a run: written aside, synced, renamed. The last two are kept; damaged ones are removed."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from millis.types import RequestError

_NAME = re.compile(r"step-(\d{9})\.pt")
_KEPT = 2

State = dict[str, Any]  # plain values and tensors only: it is read back without running any code of the file's


class Checkpoints:
    """The folder of one run's checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, state: State) -> None:
        """Puts `state` on disk whole; whatever happens, an earlier checkpoint stays until this one is there.

        RequestError: it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"step-{step:09}.pt"
        part = final.with_suffix(".part")
        try:
            with open(part, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, final)
            _sync_folder(self.folder)
        except (OSError, RuntimeError) as error:  # torch hides what the disk said
            reason = getattr(error, "strerror", None) or "the disk is full, or does not take it"
            raise RequestError(
                f"cannot write the checkpoint {final}: {reason}; free some space there, "
                "then give the same command again"
            ) from None
        finally:
            with suppress(OSError):
                part.unlink()
        for path in [path for path in self.paths() if path != final][_KEPT - 1 :]:
            path.unlink()

    def load(self) -> tuple[State | None, list[Path]]:
        """The newest state that can be read, None without one; and the files that were damaged, which are removed.

        OSError: the disk does not give a file.
        """
        damaged: list[Path] = []
        for path in self.paths():
            try:
                state: State = torch.load(path, map_location="cpu", weights_only=True)
                return state, damaged
            except (OSError, MemoryError):
                raise
            except Exception:  # torch raises many kinds for a damaged file: RuntimeError, EOFError, UnpicklingError …
                path.unlink()
                damaged.append(path)
        return None, damaged

    def clear(self) -> None:
        """Removes them all, with what a killed process left half-written."""
        if self.folder.is_dir():
            for path in [*self.paths(), *self.folder.glob("step-*.part")]:
                path.unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()

    def paths(self) -> list[Path]:
        """Newest first."""
        return sorted((p for p in self.folder.glob("step-*.pt") if _NAME.fullmatch(p.name)), reverse=True)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable, where the file system can."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
