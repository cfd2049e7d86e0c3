"""What a generated file remembers: every parameter, and the command that makes it again."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

PROGRAM_KEY, VERSION_KEY = "program", "version"
PROGRAM = "hunyuan-fast"


def record(**parameters: Any) -> dict[str, Any]:
    """Metadata of one file; parameters that are None are left out."""
    from hunyuan_fast import __version__

    given = {name: value for name, value in parameters.items() if value is not None}
    return {PROGRAM_KEY: PROGRAM, VERSION_KEY: __version__, **given}


def repeat_command(metadata: Mapping[str, Any], flags: Sequence[str]) -> str:
    """The ``generate`` command that makes the file again, quoted for a POSIX shell.

    Args:
        metadata: what ``record`` returned, read back from a file that may be anybody's.
        flags: the parameters that are options of ``generate``.
    """
    words = []
    for name in flags:
        if name in metadata:
            words += [f"--{name}", quote(str(metadata[name]))]
    prompt = quote(str(metadata.get("prompt", "")))
    return " ".join([PROGRAM, "generate", *words, "--", prompt])


def quote(word: str) -> str:
    """``word`` for a shell, without characters that a terminal would act on."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{_visible(escaped)}'"


def printable(text: str) -> str:
    """``text`` with control characters spelled out, safe to print from a foreign file."""
    return text if text.isprintable() else _visible(text)


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
