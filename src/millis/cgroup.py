"""What Linux's control groups, version 1 or 2, leave this process: CPUs by quota, memory by limit.

A limit of a group holds for all groups in it, so the process's own and every one above it is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

GROUPS, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cpu_quota(groups: Path = GROUPS, mount: Path = MOUNT) -> int | None:
    """Whole CPUs of the tightest quota, rounded up; None: unlimited or unknown."""
    found = [_numbers(folder / "cpu.max") for folder in _folders(groups, mount, "")]
    for folder in _folders(groups, mount, "cpu"):
        found.append(_numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us"))
    quotas = [-(-pair[0] // pair[1]) for pair in found if len(pair) == 2 and min(pair) > 0]
    return min(quotas, default=None)


def memory_left_bytes(groups: Path = GROUPS, mount: Path = MOUNT) -> int | None:
    """Bytes that may be taken until the first limit is reached; None: unlimited or unknown.

    Pages of files that were not used of late count as used, but the system takes them away when memory is asked for.
    """
    found = []
    for controller, limit, used, cached in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for folder in _folders(groups, mount, controller):
            pair = _numbers(folder / limit) + _numbers(folder / used)
            if len(pair) == 2:
                found.append(max(0, pair[0] - max(0, pair[1] - _statistic(folder / "memory.stat", cached))))
    return min(found, default=None)


def _folders(groups: Path, mount: Path, controller: str) -> Iterator[Path]:
    """The process's group under a controller of version 1, or "" for version 2, then those above it, the root last.

    A container may see its own group as the root and yet be told of its path outside: that leads nowhere, and the root
    is what counts.
    """
    try:
        lines = groups.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        names, _, path = line.partition(":")[2].partition(":")
        if line.count(":") < 2 or controller not in names.split(","):
            continue
        roots = [mount / names, mount / controller] if controller else [mount / "unified", mount]
        inside = Path(path.lstrip("/"))
        if ".." not in inside.parts and (root := next((r for r in roots if r.is_dir()), None)) is not None:
            yield from (root / folder for folder in (inside, *inside.parents))


def _statistic(path: Path, name: str) -> int:
    """The number on the line of that name; 0 where there is none."""
    try:
        lines = path.read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith(name + " ")), 0)
    except (OSError, ValueError, IndexError):
        return 0


def _numbers(path: Path) -> list[int]:
    """The whole numbers that are all a file holds; none where it says "max", something else, or is not there."""
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []
