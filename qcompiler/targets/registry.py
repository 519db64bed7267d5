"""The targets that exist, by name."""

from difflib import get_close_matches
from types import MappingProxyType
from typing import Final

from qcompiler.errors import UsageError
from qcompiler.targets.capability import Target
from qcompiler.targets.onnxruntime import ONNXRUNTIME

TARGETS: Final = MappingProxyType({ONNXRUNTIME.name: ONNXRUNTIME})


def find_target(name: str) -> Target:
    """Return the target called `name`.

    Raises:
        UsageError: There is none; the message gives the nearest names, or all of them.
    """
    found = TARGETS.get(name)
    if found is None:
        nearest = get_close_matches(name, TARGETS, n=3, cutoff=0.4) or sorted(TARGETS)
        message = f"there is no target {name!r}"
        raise UsageError(message, hint=f"known: {', '.join(nearest)}")
    return found
