"""Schemes for whole weights: the least damage within a size and a time, both by tables."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from qcompiler.ir.provenance import origins_of
from qcompiler.ir.quantizable import Site
from qcompiler.options import requested_recipe
from qcompiler.quant.islands import quantized_bits
from qcompiler.quant.knapsack import Option, choose_options
from qcompiler.quant.recipe import Recipe, Rule
from qcompiler.quant.scheme import QScheme
from qcompiler.quant.selector import Selector
from qcompiler.search.assigned import Assigned

_RULE: Final = "search"
_TRIES: Final = 24
"""Weights of time against damage that are tried: a factor of 2 each, then halves between."""

Chosen = Mapping[str, QScheme | None]
"""Schemes by name of the weight; None is float."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What one weight could get.

    Attributes:
        scheme: The scheme; None is float.
        bits: What it takes.
        damage: Predicted, to first order.
        more_ms: Milliseconds beyond float's time; 0 where that was not measured.
    """

    scheme: QScheme | None
    bits: int
    damage: float
    more_ms: float


@dataclass(frozen=True)
class Mix:
    """The weights that can have schemes of their own.

    Attributes:
        base: The smallest scheme, which all other weights keep.
        choices: By name of the weight.
        stored: Whether bits are those of containers.
    """

    base: Assigned
    choices: Mapping[str, Sequence[Choice]]
    stored: bool

    @cached_property
    def fixed_bits(self) -> int:
        """Bits of the weights that have no choice."""
        every = self.base.bits(stored=self.stored)
        schemes = self.base.schemes()
        return every - sum(
            scheme_bits(self.base.sites[name], schemes[name], stored=self.stored)
            for name in self.choices
        )

    @property
    def least_bits(self) -> int:
        """Bits of all weights where each gets what takes least."""
        return self.fixed_bits + sum(min(c.bits for c in each) for each in self.choices.values())

    def choose(self, bits: int, most_ms: float | None) -> Chosen | None:
        """Return the least damage within a size and a time.

        The size is kept exactly. Time is given a price that is raised until it is kept (a Lagrange
        multiplier), which is optimal up to what lies off the convex hull.

        Args:
            bits: Of all weights, at most.
            most_ms: Milliseconds beyond float's time, None for no limit.

        Returns:
            The schemes; None where none are small or fast enough.
        """
        free = self._at_price(bits, 0.0)
        if free is None or self._fits(free, most_ms):
            return free
        damages = sum(max(c.damage for c in each) for each in self.choices.values())
        times = sum(max(abs(c.more_ms) for c in each) for each in self.choices.values())
        price = damages / max(times, 1e-9) / 2 ** (_TRIES // 2)
        low, best = 0.0, None
        for _ in range(_TRIES):
            found = self._at_price(bits, price)
            if found is not None and self._fits(found, most_ms):
                best = found
                break
            low, price = price, 2 * price
        high = price
        for _ in range(_TRIES // 4 if best is not None else 0):
            middle = (low + high) / 2
            found = self._at_price(bits, middle)
            if found is not None and self._fits(found, most_ms):
                best, high = found, middle
            else:
                low = middle
        return best

    def more_ms(self, chosen: Chosen) -> dict[str, float]:
        """Return the milliseconds beyond float's time by node, all others as the base has them."""
        times = dict(self.base.more_ms)
        for name, scheme in chosen.items():
            node = self.base.sites[name].node.name or ""
            times[node] = next(c.more_ms for c in self.choices[name] if c.scheme == scheme)
        return times

    def recipe(self, chosen: Chosen) -> Recipe:
        """Return a recipe with a rule for every weight that has another scheme than the base's."""
        recipe = requested_recipe(self.base.options, self.base.plan.target)
        planned = self.base.schemes()
        rules = [
            Rule(
                Selector(name=f"/{re.escape(origin)}/"),
                scheme,
                f"the least damage to the task within the search's bounds, not {self.base.name}",
                _RULE,
            )
            for name, scheme in chosen.items()
            if scheme != planned[name]
            for origin in origins_of(self.base.sites[name].node)
        ]
        return replace(recipe, rules=(*rules, *recipe.rules))

    def _at_price(self, bits: int, price: float) -> Chosen | None:
        lists = list(self.choices.values())
        fastest = [min(c.more_ms for c in each) for each in lists]
        options = [
            [Option(c.bits, c.damage + price * (c.more_ms - least)) for c in each]
            for each, least in zip(lists, fastest, strict=True)
        ]
        found = choose_options(options, bits - self.fixed_bits)
        if found is None:
            return None
        return {
            name: each[at].scheme
            for (name, each), at in zip(self.choices.items(), found, strict=True)
        }

    def _fits(self, chosen: Chosen, most_ms: float | None) -> bool:
        return most_ms is None or sum(self.more_ms(chosen).values()) <= most_ms


def scheme_bits(site: Site, scheme: QScheme | None, *, stored: bool) -> int:
    """Return the bits that the weight of a site takes with a scheme."""
    width = site.tensor.dtype.bitwidth
    if scheme is None:
        return site.tensor.size * width
    spec = scheme.weight_spec(site.granularity(scheme))
    return quantized_bits(site.shape, spec, width, stored=stored)


def choices_of(
    uniform: Sequence[Assigned], *, stored: bool
) -> dict[str, list[tuple[QScheme | None, int, float]]]:
    """Return what each weight could get: what it has in any of the models, and float.

    Returns:
        By name of the weight: scheme, bits, and milliseconds beyond float's time.
    """
    found: dict[str, dict[QScheme | None, tuple[int, float]]] = {}
    for each in uniform:
        for name, scheme in each.schemes().items():
            site = each.sites[name]
            bits = scheme_bits(site, scheme, stored=stored)
            more = each.more_ms.get(site.node.name or "", 0.0)
            found.setdefault(name, {}).setdefault(scheme, (bits, more))
    for name, options in found.items():
        site = uniform[0].sites[name]
        options.setdefault(None, (site.tensor.size * site.tensor.dtype.bitwidth, 0.0))
    return {
        name: [(scheme, *entry) for scheme, entry in options.items()]
        for name, options in found.items()
    }
