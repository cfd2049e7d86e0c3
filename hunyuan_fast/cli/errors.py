"""Errors that reach the user as one line and an exit status."""

USAGE, FAILURE, INTERRUPTED, TERMINATED = 2, 1, 130, 143


class UsageError(Exception):
    """The command line asks for something that cannot be right on any machine: exit status 2."""


class CommandError(Exception):
    """The command line is fine, but the machine, a file or the model is not: exit status 1."""
