"""One small call of every kernel for a GPU, in each of its ways; ``python -m tests.sanitize``."""
