"""Data for training and evaluation: named sets, cleaning, splitting and packing. Needs `pip install 'millis[data]'`."""

from millis.data.catalogue import SETS, NamedSet
from millis.data.cleaning import Settings, clean, clean_rows
from millis.data.named import Stored, entries, pull, rows
from millis.data.packing import documents, pack
from millis.data.private import mask
from millis.data.read import Reader
from millis.data.report import Report
from millis.data.sides import share, side
from millis.data.splitting import Split, split

__all__ = [
    "SETS",
    "NamedSet",
    "Reader",
    "Report",
    "Settings",
    "Split",
    "Stored",
    "clean",
    "clean_rows",
    "documents",
    "entries",
    "mask",
    "pack",
    "pull",
    "rows",
    "share",
    "side",
    "split",
]
