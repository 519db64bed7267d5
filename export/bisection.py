"""The smallest set of parts to leave as they were, so that what failed with all of them works."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from qcompiler.progress import Progress, SilentProgress

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class LeftOut(Generic[Part]):
    """What must be left out.

    Attributes:
        parts: The parts, in the order in which they were given.
        minimal: Whether it fails again with any one of them put back, as far as failures come
            from parts that are there; False where tries ran out.
        tries: How often it was tried.
    """

    parts: tuple[Part, ...]
    minimal: bool
    tries: int


class OutOfTriesError(Exception):
    """No try is left; the search ends with what it has."""


def leave_out_least(
    parts: Sequence[Part],
    works_without: Callable[[tuple[Part, ...]], bool],
    *,
    most_tries: int = 64,
    progress: Progress | None = None,
) -> LeftOut[Part] | None:
    """Find a smallest set of parts without which something works.

    It halves the parts again and again and keeps of each half what the other half does not make
    up for (QuickXplain: Junker, AAAI 2004), which takes about `2 k log2(n / k) + 2 k` tries for
    k culprits among n parts. Leaving out more must not break what worked; where it does, the
    result still works, but may not be smallest.

    Args:
        parts: What can be left out: nodes, or groups of nodes that only make sense together. Of
            several smallest sets, one that keeps earlier parts is preferred.
        works_without: Tries it without the given parts, which are in the order of `parts`.
        most_tries: How often at most; at least 2, the first being with nothing left out.
        progress: Shows tries.

    Returns:
        What to leave out; nothing where it works with all parts; None where it fails without any.
    """
    search = _Search(tuple(parts), works_without, most_tries)
    with (progress or SilentProgress()).task("looking for what fails", most_tries) as advance:
        search.advance = advance
        if search.works(frozenset()):
            return LeftOut((), minimal=True, tries=search.tries)
        everything = frozenset(range(len(search.parts)))
        if not search.works(everything):
            return None
        try:
            found = frozenset(search.culprits(frozenset(), sorted(everything), fresh=False))
            minimal = search.works(found)
        except OutOfTriesError:
            minimal = False
        advance(most_tries - search.tries)
    return LeftOut(search.named(search.smallest), minimal=minimal, tries=search.tries)


@dataclass(slots=True)
class _Search(Generic[Part]):
    """Tries that were made, by the positions of the parts that were left out.

    Attributes:
        parts: All parts.
        works_without: The try.
        most_tries: How many there may be.
        smallest: The smallest set that worked.
    """

    parts: tuple[Part, ...]
    works_without: Callable[[tuple[Part, ...]], bool]
    most_tries: int
    advance: Callable[[float], None] = field(default=lambda amount: None)
    known: dict[frozenset[int], bool] = field(default_factory=dict)
    smallest: frozenset[int] = frozenset()

    @property
    def tries(self) -> int:
        """How many were made."""
        return len(self.known)

    def named(self, positions: frozenset[int]) -> tuple[Part, ...]:
        """Return parts by position, in order."""
        return tuple(self.parts[position] for position in sorted(positions))

    def works(self, left_out: frozenset[int]) -> bool:
        """Try once; what was tried is not tried again.

        Raises:
            OutOfTriesError: It was not, and no try is left.
        """
        if left_out not in self.known:
            if self.tries >= self.most_tries:
                raise OutOfTriesError
            works = self.works_without(self.named(left_out))
            self.known[left_out] = works
            self.advance(1)
            if works and (not self.smallest or len(left_out) < len(self.smallest)):
                self.smallest = left_out
        return self.known[left_out]

    def culprits(
        self, left_out: frozenset[int], candidates: list[int], *, fresh: bool
    ) -> list[int]:
        """Return which candidates must be left out beside those that are.

        Args:
            left_out: What is left out anyway.
            candidates: What remains to be judged; leaving out all of it as well works.
            fresh: Whether `left_out` has grown, so that it may work already.
        """
        if fresh and self.works(left_out):
            return []
        if len(candidates) == 1:
            return candidates
        middle = len(candidates) // 2
        # The later half is left out first, so that of several reasons an early part is kept.
        early, late = candidates[:middle], candidates[middle:]
        from_early = self.culprits(left_out | set(late), early, fresh=True)
        from_late = self.culprits(left_out | set(from_early), late, fresh=bool(from_early))
        return [*from_early, *from_late]
