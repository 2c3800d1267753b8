"""Data for training and evaluation: named sets, cleaning, splitting and packing. Needs `pip install 'millis[data]'`."""

from millis.data.catalogue import SETS, NamedSet
from millis.data.named import Stored, entries, pull, rows

__all__ = ["SETS", "NamedSet", "Stored", "entries", "pull", "rows"]
