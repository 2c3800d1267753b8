"""Models by name: the catalogue, fetching, and where they are on disk."""

from millis.hub.catalogue import CATALOGUE, Entry
from millis.hub.names import find, pull, resolve
from millis.hub.progress import Progress
from millis.hub.store import Stored, entries, home

__all__ = ["CATALOGUE", "Entry", "Progress", "Stored", "entries", "find", "home", "pull", "resolve"]
