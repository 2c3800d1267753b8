"""One file an engine: what a worker runs, under the interpreter that has the engine."""
