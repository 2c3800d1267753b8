"""The command `millis`, also as `python -m millis`; Ctrl-C while it is still being imported ends it quietly, too."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs one command and ends the process with its exit code."""
    try:
        from millis.cli import main as run

        run()
    except KeyboardInterrupt:
        print("millis: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
