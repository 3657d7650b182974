"""One function per check: its docstring is the advice, its finding carries the measurement."""
