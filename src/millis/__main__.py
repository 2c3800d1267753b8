"""`python -m millis` is the command `millis`."""

from millis.cli import main

main()
