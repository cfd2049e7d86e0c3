"""Print the parameters stored in a generated file and the command that makes it again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from hunyuan_fast.cli.errors import CommandError
from hunyuan_fast.cli.parsing import parse
from hunyuan_fast.cli.record import PROGRAM, PROGRAM_KEY, printable, repeat_command


@dataclass(frozen=True)
class Options:
    """What ``hunyuan-fast info`` takes."""

    file: Positional[Path]
    """An mp4 or PNG written by hunyuan-fast."""
    debug: bool = False
    """Show the traceback of an error."""


def run(argv: Sequence[str]) -> None:
    """Read the metadata of one file and print it."""
    options = parse(Options, argv, "info", __doc__)
    from hunyuan_fast.data.video import read_metadata

    metadata = read_metadata(options.file)
    if metadata.get(PROGRAM_KEY) != PROGRAM:
        raise CommandError(f"{options.file} holds no parameters: hunyuan-fast did not write it")
    width = max(map(len, metadata))
    for name, value in metadata.items():
        print(f"{printable(name):<{width}}  {printable(str(value))}")
    if metadata.get("command") == "generate":
        from hunyuan_fast.cli.commands.generate import RECORDED_FLAGS

        print(f"\n{repeat_command(metadata, RECORDED_FLAGS)}")
