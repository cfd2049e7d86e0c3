"""Finds the commands: one per module of ``hunyuan_fast.cli.commands``."""

import ast
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path

from hunyuan_fast.cli import commands


def command_names() -> tuple[str, ...]:
    """The names of all commands, in alphabetical order; what is _ in a module's is - in theirs."""
    modules = pkgutil.iter_modules(commands.__path__)
    return tuple(sorted(module.name.replace("_", "-") for module in modules))


def summary(name: str) -> str:
    """The first line of a command's docstring, read without running its module."""
    spec = importlib.util.find_spec(_module(name))
    assert spec is not None and spec.origin is not None
    doc = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    assert doc, f"the command {name} has no docstring"
    return doc.splitlines()[0]


def load(name: str) -> Callable[[Sequence[str]], None]:
    """The function ``run(argv)`` of a command."""
    run: Callable[[Sequence[str]], None] = importlib.import_module(_module(name)).run
    return run


def takes_several_processes(name: str) -> bool:
    """Whether a command may run under ``torchrun``: its module then has ``PARALLEL = True``."""
    return getattr(importlib.import_module(_module(name)), "PARALLEL", False)


def _module(name: str) -> str:
    return f"{commands.__name__}.{name.replace('-', '_')}"
