"""The command `millis`, also as `python -m millis`; Ctrl-C while it is still being imported ends it quietly, too."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs one command and ends the process with its exit code."""
    try:
        _speak_utf8()
        from millis.cli import main as run

        run()
    except KeyboardInterrupt:
        print("millis: interrupted", file=sys.stderr)
        sys.exit(130)


def _speak_utf8() -> None:
    """Where the locale knows ASCII only, starts anew in Python's UTF-8 mode, which whoever set PYTHONUTF8=0 turned off.

    Arguments, file names, standard streams and other processes of ours are then UTF-8, all of them.
    """
    if sys.getfilesystemencoding() == "ascii" and sys.executable and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    main()
