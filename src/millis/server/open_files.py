"""How many files a server may have open, for every connection is one: its own limit is raised as far as it needs."""

from __future__ import annotations

import contextlib
import logging
import resource

log = logging.getLogger("millis.server")
OTHERS = 128  # beside connections: models, indexes, streams, lines to engines


def connections(wanted: int) -> int:
    """Of so many connections, how many may be open at once. A limit that cannot be raised so far is logged."""
    needed = wanted + OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _least(soft, needed) < needed:
        with contextlib.suppress(OSError, ValueError):  # some systems have a lower limit still
            resource.setrlimit(resource.RLIMIT_NOFILE, (_least(hard, needed), hard))
    files = _least(resource.getrlimit(resource.RLIMIT_NOFILE)[0], needed)
    if files == needed:
        return wanted
    found = max(1, files - OTHERS)
    log.warning(
        "this process may open %d files: %d connections at once instead of the %d of --max-connections; "
        "raise its hard limit (ulimit -Hn, LimitNOFILE)",
        *(files, found, wanted),
    )
    return found


def _least(limit: int, needed: int) -> int:
    return needed if limit == resource.RLIM_INFINITY else min(limit, needed)
