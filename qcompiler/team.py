"""Processes that share one piece of work, and the one process that most work is done by.

All members of a team run the same code on their share of the data, and call the methods of `Team`
in the same order. Nothing here needs PyTorch; what talks to others does (`reconstruction/`).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

_Result = TypeVar("_Result")


class Team(Protocol):
    """The processes of a run, seen from one of them.

    Attributes:
        rank: Number of this process; 0 leads: it alone prints and writes what is kept.
        size: How many there are.
    """

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many processes there are."""
        ...

    def device(self, name: str) -> str:
        """Return which device of its kind this process computes on."""
        ...

    def agree(self, work: Callable[[], _Result]) -> _Result:
        """Do work that may fail; where it fails in one process, it fails in all of them.

        Raises:
            QCompilerError: What the process of the lowest rank that failed raised.
        """
        ...

    def lead(self, work: Callable[[], object]) -> None:
        """Do work in the leading process, however long it takes, while the others wait.

        Raises:
            QCompilerError: What the work raised, in all processes.
        """
        ...

    def add_up(self, tensors: "Sequence[Tensor]") -> None:
        """Replace tensors by their sums over all processes, which are equal in all of them."""
        ...

    def take_over(self, tensors: "Sequence[Tensor]") -> None:
        """Replace tensors by those of the leading process."""
        ...

    def announce(self, task: str) -> None:
        """Tell the others to begin a task; the leading process does."""
        ...

    def dismiss(self) -> None:
        """Wait for a moment until the others are done with what was announced."""
        ...

    def leave(self) -> None:
        """Go at once; others that wait for this process hear of it."""
        ...


class Alone:
    """A team of one."""

    rank = 0
    size = 1

    def device(self, name: str) -> str:
        """Return the name."""
        return name

    def agree(self, work: Callable[[], _Result]) -> _Result:
        """Do the work."""
        return work()

    def lead(self, work: Callable[[], object]) -> None:
        """Do the work."""
        work()

    def add_up(self, tensors: "Sequence[Tensor]") -> None:
        """Leave them."""

    def take_over(self, tensors: "Sequence[Tensor]") -> None:
        """Leave them."""

    def announce(self, task: str) -> None:
        """Tell nobody."""

    def dismiss(self) -> None:
        """Wait for nobody."""

    def leave(self) -> None:
        """Stay."""


def owns(team: Team, call: int) -> bool:
    """Whether a process computes a call: they take turns."""
    return call % team.size == team.rank
