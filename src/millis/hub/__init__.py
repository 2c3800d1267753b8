"""Models by name: the catalogue, fetching, and where they are on disk."""

from millis.hub.catalogue import CATALOGUE, Entry
from millis.hub.names import find, pull, resolve
from millis.hub.progress import Progress, Silent
from millis.hub.store import Stored, entries, home, packed_path

__all__ = [
    "CATALOGUE",
    "Entry",
    "Progress",
    "Silent",
    "Stored",
    "entries",
    "find",
    "home",
    "packed_path",
    "pull",
    "resolve",
]
