"""Finding a user's function by `module:function`."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcompiler.errors import UsageError


def import_function(reference: str, *, where: str, example: str) -> Callable[..., Any]:
    """Import a function from the current folder or from where Python finds modules.

    Args:
        reference: `module:function`.
        where: What asks for it, for messages: an option.
        example: A reference as it could be, for messages.

    Raises:
        UsageError: It is none, the module cannot be imported, or has no such function.
    """
    module_name, separator, function_name = reference.partition(":")
    if not separator or not module_name or not function_name:
        message = f"{reference!r} is not of the form module:function"
        raise UsageError(message, where=where, hint=f"for example {example}")
    with _importable_from(Path.cwd()):
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # importing runs the user's code
            message = f"cannot import {module_name}: {type(error).__name__}: {error}"
            raise UsageError(message, where=f"{where} {reference}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        message = f"{module_name} has no function {function_name}"
        raise UsageError(message, where=where, hint=f"it has {', '.join(names) or 'none'}")
    found: Callable[..., Any] = function
    return found


@contextmanager
def _importable_from(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
