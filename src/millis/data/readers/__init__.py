"""From the files of a source to rows: one function per named set."""
