"""The one error of reading and writing weights."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used: the message names the file, the first wrong key, the remedy."""
