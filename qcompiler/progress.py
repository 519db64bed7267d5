"""How long work tells its caller that it is alive."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[float], None]
"""Called with the amount of work done since the last call, in the unit of the task's total."""


class Progress(Protocol):
    """A place to show tasks with a known amount of work."""

    def task(self, description: str, total: float) -> AbstractContextManager[Advance]:
        """Open a task of `total` units; the context manager yields its `Advance`."""
        ...


class SilentProgress:
    """Shows nothing: the default of the Python API."""

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        """Yield a function that ignores what it is told."""
        yield lambda amount: None
