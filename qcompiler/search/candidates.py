"""What is tried: schemes on all weights, islands of columns, and schemes for whole weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from qcompiler.options import CompileOptions
from qcompiler.passes.assign.island_subjects import HALF_BITS
from qcompiler.quant.islands import IslandBudget, IslandKind, IslandRequest, Saliency
from qcompiler.search.assigned import Assigned
from qcompiler.search.mixing import Mix
from qcompiler.search.request import SearchRequest

_SLACK = 1.1
"""The table of single ops does not see what the runtime fuses beyond them, so a prediction decides
only where it is this much above the bound."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One compilation that could be made.

    Attributes:
        name: What reports call it.
        options: What makes it.
        predicted: Its latency relative to float by the table of single ops, None without.
        refusal: Why it is not made; None where it is.
    """

    name: str
    options: CompileOptions
    predicted: float | None = None
    refusal: str | None = None


class Planner:
    """Lists candidates.

    Args:
        request: What is asked for.
        uniform: The model with each of the schemes.
        float_ms: Milliseconds of the float model, None where latency is not asked for.
        mix: Schemes that whole weights can have; None tries none.
    """

    def __init__(
        self,
        request: SearchRequest,
        uniform: Sequence[Assigned],
        float_ms: float | None,
        mix: Mix | None,
    ) -> None:
        self._request = request
        self._elements = uniform[0].elements
        self._uniform = sorted(uniform, key=self.size)
        self._float_ms = float_ms
        self._mix = mix

    def size(self, assigned: Assigned) -> float:
        """Return what all weights take, in the measure of the budget."""
        return self._size_of(assigned.bits(stored=self._request.in_bytes))

    def _size_of(self, bits: int) -> float:
        return bits / 8 if self._request.in_bytes else bits / self._elements

    @property
    def weight_only(self) -> list[Assigned]:
        """Those whose data stays in float, the smallest first."""
        return [each for each in self._uniform if each.weight_only]

    def levels(self) -> list[float]:
        """Return the sizes that islands are tried at: between those of schemes, and the budget.

        Where some schemes leave some weights in float, the smallest mix is smaller than all. A
        scheme alone has nothing above it but 16 bits.
        """
        sizes = [self.size(each) for each in self.weight_only]
        largest = sizes[-1] if len(sizes) > 1 else self._size_of(HALF_BITS * self._elements)
        least = [] if self._mix is None else [self._size_of(self._mix.least_bits)]
        if sizes and least and least[0] < sizes[0]:
            sizes = [*least, *sizes]
        found = [*sizes[:1], *((one + other) / 2 for one, other in pairwise(sizes))]
        cap = self._request.cap
        if cap is not None:
            found = [*(level for level in found if level < cap), cap]
        return [level for level in found if sizes and sizes[0] <= level < largest]

    def uniform(self) -> Iterator[Candidate]:
        """Yield one candidate for each scheme."""
        for each in self._uniform:
            predicted = self.predicted(each.more_ms) if each.weight_only else None
            yield self._judged(each.name, each.options, predicted, self.size(each))

    def columns(self, saliency: Saliency) -> Iterator[Candidate]:
        """Yield islands of input channels up to each level, in the largest scheme below it."""
        for level in self.levels():
            below = [each for each in self.weight_only if self.size(each) < level]
            budget = self._budget(below[-1], level) if below else None
            if budget is None:
                continue
            base = below[-1]
            request = IslandRequest(saliency, budget, IslandKind.COLUMN, self._request.unit)
            name = f"{base.name}, columns to {self.shown(level)}"
            options = replace(base.options, islands=request)
            yield self._judged(name, options, self.predicted(base.more_ms), level)

    def mixes(self) -> Iterator[Candidate]:
        """Yield schemes for whole weights up to each level, those that are one scheme left out."""
        mix, seen = self._mix, [each.schemes() for each in self._uniform]
        for level in self.levels() if mix is not None else ():
            assert mix is not None
            chosen = mix.choose(self._bits(mix.base, level), self._most_ms())
            name = f"whole weights to {self.shown(level)}"
            if chosen is None:
                text = "no choice of schemes is fast enough by the table of single ops"
                yield Candidate(name, mix.base.options, refusal=text)
                continue
            every = {**mix.base.schemes(), **chosen}
            if every in seen:
                continue
            seen.append(every)
            predicted = self.predicted(mix.more_ms(chosen))
            options = replace(mix.base.options, scheme=None, recipe=mix.recipe(chosen))
            yield self._judged(name, options, predicted, level)

    def shown(self, level: float) -> str:
        """Return a size for people."""
        return f"{level:.0f} B" if self._request.in_bytes else f"{level:.2f} bits"

    def predicted(self, more_ms: Mapping[str, float]) -> float | None:
        """Return the latency relative to float by the table of single ops."""
        if self._float_ms is None:
            return None
        return round(1 + sum(more_ms.values()) / self._float_ms, 4)

    def _most_ms(self) -> float | None:
        """Return how many milliseconds beyond float's time the bound allows."""
        limit = self._request.max_latency_ratio
        if limit is None or self._float_ms is None:
            return None
        return (limit - 1) * self._float_ms

    def _bits(self, base: Assigned, level: float) -> int:
        return round(8 * level if self._request.in_bytes else level * base.elements)

    def _budget(self, base: Assigned, level: float) -> IslandBudget | None:
        """Return what islands may cost: their budgets count no weight that stays in float."""
        outside = base.bits(stored=self._request.in_bytes, planned=False)
        room = self._bits(base, level) - outside
        if room <= base.bits(stored=self._request.in_bytes, planned=True):
            return None
        if self._request.in_bytes:
            return IslandBudget(nbytes=room // 8)
        return IslandBudget(average_bits=round(room / base.planned_elements, 6))

    def _judged(
        self, name: str, options: CompileOptions, predicted: float | None, size: float
    ) -> Candidate:
        cap, limit = self._request.cap, self._request.max_latency_ratio
        refusal = None
        if cap is not None and size > cap:
            refusal = f"it takes {self.shown(size)}, and {self.shown(cap)} are allowed"
        elif predicted is not None and limit is not None and predicted > _SLACK * limit:
            refusal = f"{predicted:.2f} of float's time by the table of single ops"
        return Candidate(name, options, predicted, refusal)
