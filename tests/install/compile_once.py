"""A compiler launcher for CMake: what was compiled before is copied, whichever folder it lay in.

    CMAKE_ARGS="-DCMAKE_CXX_COMPILER_LAUNCHER=python;compile_once.py;FOLDER" pip install ...

runs ``python compile_once.py FOLDER c++ ... -c source -o object``. Objects are kept in FOLDER by
the compiler, its flags and the preprocessed source; nothing but paths in debug information may tell
a copy from what would have been compiled.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path


def main(kept: Path, command: list[str]) -> int:
    """Do what the command does, by a copy where one is kept."""
    if "-c" not in command:
        return subprocess.run(command, check=False).returncode
    out = command.index("-o")
    target = command[out + 1]
    # writes the file of dependencies too, where flags ask for one
    plain = [*command[:out], *command[out + 2 :], "-E", "-P"]
    preprocessed = subprocess.run(plain, stdout=subprocess.PIPE, check=False)
    if preprocessed.returncode:
        return preprocessed.returncode
    found = kept / _digest(command, preprocessed.stdout)
    if not found.exists():
        status = subprocess.run(command, check=False).returncode
        if status:
            return status
        mine = found.with_suffix(f".{os.getpid()}")
        shutil.copyfile(target, mine)
        mine.replace(found)
    shutil.copyfile(found, target)
    return 0


def _digest(command: list[str], source: bytes) -> str:
    """What decides about an object: paths do not, and the source has seen the definitions."""
    words = iter(command)
    flags = []
    for word in words:
        if word in ("-o", "-c", "-MT", "-MF", "-isystem", "-I"):
            next(words, None)
        elif not word.startswith(("-I", "-D", "-MD")):
            flags.append(word)
    return hashlib.sha256(repr(flags).encode() + source).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2:]))
