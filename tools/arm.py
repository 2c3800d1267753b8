"""Builds the native module for AArch64 and runs tests of it under qemu: python tools/arm.py [what pytest is to run].

Everything lies under build/arm: Debian's Python for arm64 (unpacked, not installed), the packages that the tests
need, the module. Only the cross compiler and qemu must be there before; what is missing is named with its remedy.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "arm"
SYSROOT, SITE, PACKAGE, PYTHON = BUILD / "root", BUILD / "site", BUILD / "package", BUILD / "python"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
NEEDED = {
    COMPILER: "apt install g++-aarch64-linux-gnu",
    EMULATOR: "apt install qemu-user",
    "apt-get": "a Debian system: the arm64 Python comes from its archive",
    "dpkg-deb": "apt install dpkg",
}
# Of requirements-dev.lock. PyTorch is left out: no build of it for arm64 comes without a GPU's libraries.
TEST_PACKAGES = ("gguf", "iniconfig", "pluggy", "pytest", "pytest-timeout", "requests", "urllib3", "regex")
TEST_PACKAGES += ("certifi", "charset-normalizer", "sentencepiece")

# A processor a kind of products, so that no kernel can use an instruction that its ISA does not promise.
KERNELS = ["tests/test_kernels.py", "tests/test_ops.py", "tests/test_attention.py"]
REST = [
    "tests/test_isas.py",
    "tests/test_build.py",
    "tests/test_pool.py",
    "tests/test_sampler.py",
    "tests/test_engine.py",
]
# The emulator itself needs memory and threads, and does not pass limits of them on as a system does; and hundreds of
# tokens of a whole model take it many minutes.
NOT_RUN = [
    "tests/test_pool.py::test_too_many_threads_are_said",
    "tests/test_pool.py::test_no_memory_in_a_thread_is_a_memory_error",
    "tests/test_pool.py::test_who_computes_which_panel_is_chance_and_changes_nothing",
]
RUNS = {"cortex-a72": KERNELS, "neoverse-n1": KERNELS, "max": KERNELS + REST}


def run(command: Sequence[str | Path], **environment: str) -> None:
    """Ends this program with the command's status where it fails."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env={**os.environ, **environment})
    if done.returncode:
        sys.exit(f"failed ({done.returncode}): {' '.join(map(str, command))}")


def check_tools() -> None:
    missing = [f"  {tool}: {remedy}" for tool, remedy in NEEDED.items() if not shutil.which(tool)]
    if missing:
        sys.exit(
            "test-arm needs what this machine lacks; it installs nothing outside build/arm itself\n"
            + "\n".join(missing)
        )


def unpack_python() -> None:
    """Fetches Python for arm64 and its libraries from the archives this system trusts; its own packages stay as are."""
    if SYSROOT.exists():
        return
    apt = BUILD / "apt"
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    settings = {"APT::Architecture": "arm64", "APT::Architectures": "arm64", "Dir::State": apt / "state"}
    settings |= {"Dir::State::status": apt / "status", "Dir::Cache": apt / "cache", "Debug::NoLocking": "true"}
    options = [f"-o{key}={value}" for key, value in settings.items()]
    print("fetching Python for arm64 into build/arm", flush=True)
    run(["apt-get", *options, "-qq", "update"])
    wanted = ["python3", "libpython3-dev", "libstdc++6"]
    run(["apt-get", *options, "-qq", "-y", "--no-install-recommends", "--download-only", "install", *wanted])
    fresh = BUILD / "root.new"
    shutil.rmtree(fresh, ignore_errors=True)
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        run(["dpkg-deb", "-x", package, fresh])
    fresh.rename(SYSROOT)


def python_name() -> str:
    """Such as python3.11: what Debian's python3 is a link to."""
    return os.readlink(SYSROOT / "usr" / "bin" / "python3")


def write_interpreter() -> None:
    """A script that is the arm64 Python: also to processes that tests start, which find it as sys.executable."""
    home = SYSROOT / "usr"
    variables = f"PYTHONHOME={home},PYTHONPATH={PACKAGE}:{SITE}"
    line = f'exec {EMULATOR} -L "{SYSROOT}" -E "{variables}" -0 "$0" "{home}/bin/{python_name()}" "$@"'
    PYTHON.write_text(f"#!/bin/sh\n{line}\n")
    PYTHON.chmod(PYTHON.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


def install_packages() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    lines += [
        line
        for line in (ROOT / "requirements-dev.lock").read_text().splitlines()
        if line.split("==")[0] in TEST_PACKAGES
    ]
    wanted, stamp = "\n".join(lines), BUILD / "requirements.txt"
    if SITE.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(SITE, ignore_errors=True)
    stamp.unlink(missing_ok=True)
    fresh = BUILD / "requirements.new"
    fresh.write_text(wanted)
    print("installing packages for arm64 into build/arm", flush=True)
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(36, 16, -1)]
    version = f"--python-version={python_name().removeprefix('python')}"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps", "--target", SITE]
    run([*pip, *platforms, version, "--only-binary=:all:", "-r", fresh])
    fresh.rename(stamp)


def build() -> None:
    """Compiles the module; the package beside it is a copy, so that src/ keeps the module of this machine."""
    nanobind = subprocess.check_output([sys.executable, "-m", "nanobind", "--cmake_dir"], text=True).strip()
    settings = {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64", "CMAKE_CXX_COMPILER": COMPILER}
    settings |= {"Python_EXECUTABLE": str(PYTHON), "nanobind_DIR": nanobind, "MILLIS_WERROR": "ON"}
    settings["Python_INCLUDE_DIR"] = str(SYSROOT / "usr" / "include" / python_name())
    settings["CMAKE_CXX_FLAGS"] = f"-idirafter {SYSROOT}/usr/include"  # pyconfig.h of the architecture
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    module = BUILD / "module"
    run(["cmake", "-S", ROOT, "-B", module, "-G", "Ninja", *(f"-D{k}={v}" for k, v in settings.items())], PATH=path)
    run(["ninja", "-C", module], PATH=path)
    shutil.rmtree(PACKAGE, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "src" / "millis", PACKAGE / "millis", ignore=ignored)
    for built in (module / "native").glob("_native*.so"):
        shutil.copy(built, PACKAGE / "millis")


def main(arguments: list[str]) -> None:
    check_tools()
    BUILD.mkdir(parents=True, exist_ok=True)
    unpack_python()
    write_interpreter()
    install_packages()
    build()
    print("not run under emulation: " + ", ".join(NOT_RUN))
    for processor, tests in RUNS.items():
        print(f"tests on an emulated {processor}", flush=True)
        pytest = [PYTHON, "-m", "pytest", "-q", "-o", f"cache_dir={BUILD / 'cache'}"]
        pytest += [f"--deselect={test}" for test in NOT_RUN]
        run([*pytest, *(arguments or tests)], QEMU_CPU=processor)


if __name__ == "__main__":
    main(sys.argv[1:])
