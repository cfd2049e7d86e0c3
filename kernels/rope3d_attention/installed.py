"""Whether a package of somebody else is here, with the functions and parameters that are called."""

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lacking(module: str, package: str, needs: Mapping[str, Sequence[str]]) -> str | None:
    """What keeps us from calling ``module``, or ``None``.

    needs: the functions that are called, and parameters that each must have.
    """
    try:
        if find_spec(module) is None:
            return f"{package} is not installed"
    except (ImportError, AttributeError, ValueError):  # a parent that is absent, or does not load
        return f"{package} is not installed"
    try:
        library = import_module(module)
    except Exception as error:  # native code of another torch or another GPU may raise anything
        return f"{package} does not load: {type(error).__name__}: {error}".splitlines()[0]
    for function, names in needs.items():
        called = getattr(library, function, None)
        if called is None:
            return f"this version of {package} has no {function}"
        if missing := set(names) - set(_parameters(called)):
            return f"{function} of this version of {package} takes no {', '.join(sorted(missing))}"
    return None


def _parameters(function: Any) -> list[str]:
    """Names of the parameters of a function, or of an operator of ``torch.library``."""
    schema = getattr(getattr(function, "_opoverload", function), "_schema", None)
    if schema is not None:
        return [argument.name for argument in schema.arguments]
    return list(inspect.signature(function).parameters)
