"""`python -m millis` is the command `millis`."""

from millis.cli import main

if __name__ == "__main__":
    main()
