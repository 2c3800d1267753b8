"""Draws docs/terminal.svg: runs commands for real in a terminal of their own and renders what they wrote."""

from __future__ import annotations

import os
import pty
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMANDS = (
    'millis run "Give me three tips for a good night\'s sleep." --max-tokens 120',
    'millis run -m qwen2.5-0.5b "我喜欢吃烤鸭，请用一句话介绍这道菜。"',
)
WIDTH = 100
OUT = Path(__file__).parent.parent / "docs" / "terminal.svg"


def record(command: str) -> str:
    """Everything the command writes to its terminal. Raises OSError when it fails."""
    written = bytearray()

    def read(handle: int) -> bytes:
        data = os.read(handle, 4096)
        written.extend(data)
        return data

    binaries = str(Path(sys.executable).parent)
    status = pty.spawn(["sh", "-c", f'stty cols {WIDTH}; PATH="{binaries}:$PATH"; {command}'], read)
    if status != 0:
        raise OSError(f"{command} ended with status {status}")
    return written.decode().replace("\r\n", "\n")


def main() -> None:
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
    for command in COMMANDS:
        record(command)  # once unseen: the model's file is in memory afterwards, as it is in use
        console.print(Text(f"$ {command}", style="bold green"))
        console.print(Text.from_ansi(record(command).strip()))
        console.print()
    svg = console.export_svg(title="millis")
    OUT.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")  # no outer fonts
    print(f"\nwrote {OUT}")


if __name__ == "__main__":
    main()
