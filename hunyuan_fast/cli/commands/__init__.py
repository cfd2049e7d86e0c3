"""One module per command: its docstring is its help, ``run(argv)`` does it."""
