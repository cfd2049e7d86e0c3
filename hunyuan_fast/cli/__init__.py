"""The command ``hunyuan-fast``: parse, call, print. Its work is done by the floors below.

Every module of ``commands/`` is one command; putting a file there is all it takes to add one.
"""

from hunyuan_fast.cli.entry import main

__all__ = ["main"]
