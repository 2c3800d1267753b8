"""Limits of control groups, on made-up trees of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from millis.cgroup import cpu_quota, memory_left_bytes


def tree(folder: Path, groups: str, files: dict[str, str]) -> tuple[Path, Path]:
    """/proc/self/cgroup and /sys/fs/cgroup with these files."""
    told, mount = folder / "cgroup", folder / "mount"
    told.write_text(groups)
    mount.mkdir()
    for name, text in files.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(text + "\n")
    return told, mount


V2 = "0::/user.slice/app.service\n"
V1 = "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2, {"user.slice/app.service/cpu.max": "150000 100000"}, 2),
        (V2, {"user.slice/cpu.max": "300000 100000", "user.slice/app.service/cpu.max": "400000 100000"}, 3),
        (V2, {"user.slice/app.service/cpu.max": "max 100000", "cpu.max": "10000 100000"}, 1),
        (V2, {"elsewhere/cpu.max": "100000 100000"}, None),
        (V2, {"cpu.max": "words"}, None),
        (V2, {"cpu.max": "100000 0"}, None),
        ("0::/../other\n", {"cpu.max": "100000 100000"}, None),
        ("nonsense", {"cpu.max": "100000 100000"}, None),
        (V1, {"cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "250000",
              "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000"}, 3),
        (V1, {"cpu/docker/cpu.cfs_quota_us": "50000", "cpu/docker/cpu.cfs_period_us": "100000",
              "cpu/docker/abc/cpu.cfs_quota_us": "-1", "cpu/docker/abc/cpu.cfs_period_us": "100000"}, 1),
        (V1, {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),  # the path is the host's
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("0::/a\n", {"unified/a/cpu.max": "100000 100000"}, 1),
    ],
)  # fmt: skip
def test_the_tightest_quota_counts(groups: str, files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    assert cpu_quota(*tree(tmp_path, groups, files)) == expected


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2, {"user.slice/app.service/memory.max": "5000", "user.slice/app.service/memory.current": "1000"}, 4000),
        (V2, {"user.slice/memory.max": "6000", "user.slice/memory.current": "5500",
              "user.slice/app.service/memory.max": "5000", "user.slice/app.service/memory.current": "1000"}, 500),
        (V2, {"memory.max": "1000", "memory.current": "5000"}, 0),
        (V2, {"memory.max": "max", "memory.current": "5000"}, None),
        (V1, {"memory/docker/abc/memory.limit_in_bytes": "5000",
              "memory/docker/abc/memory.usage_in_bytes": "77"}, 4923),
        (V1, {"memory/memory.limit_in_bytes": "5000"}, None),
        (V2, {"memory.max": "5000", "memory.current": "4000", "memory.stat": "anon 1\ninactive_file 2500"}, 3500),
        (V2, {"memory.max": "5000", "memory.current": "4000", "memory.stat": "inactive_file 4001"}, 5000),
        (V2, {"memory.max": "5000", "memory.current": "4000", "memory.stat": "inactive_file"}, 1000),
        (V1, {"memory/memory.limit_in_bytes": "5000", "memory/memory.usage_in_bytes": "4000",
              "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 2500"}, 3500),
    ],
)  # fmt: skip
def test_the_first_limit_that_is_reached_counts(
    groups: str, files: dict[str, str], expected: int | None, tmp_path: Path
) -> None:
    assert memory_left_bytes(*tree(tmp_path, groups, files)) == expected


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "none", tmp_path) is None and memory_left_bytes(tmp_path / "none", tmp_path) is None
