"""What each weight gets: the choice of islands for every kind, under one budget."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from qcompiler.ir.provenance import RULE as PLAN_RULE
from qcompiler.ir.provenance import scheme_of
from qcompiler.ir.quantizable import Site
from qcompiler.ir.weights import read_all
from qcompiler.passes.assign.island_subjects import (
    CHANNEL_BITS,
    HALF_BITS,
    Subjects,
    element_bits,
)
from qcompiler.quant.arithmetic import dequantize
from qcompiler.quant.islands import IslandKind, IslandRequest, quantized_bits
from qcompiler.quant.knapsack import Option, choose_options
from qcompiler.quant.ranges import RangeMethod, quantize_tensor
from qcompiler.quant.scheme import QScheme
from qcompiler.reconstruction.island_choice import (
    Channels,
    ChannelScores,
    ElementCut,
    choose_channels,
    choose_elements,
    share_of_elements,
    shares_of_channels,
)
from qcompiler.reconstruction.island_scores import ScoredWeights
from qcompiler.reconstruction.starting_point import CodedWeight
from qcompiler.targets.capability import Resolution, Target, resolve
from qcompiler.targets.site_requests import request_for

_BITS: Final = (2, 3, 4, 8)
_FRACTIONS: Final = (0.0035, 0.01, 0.02)


@dataclass(frozen=True, slots=True)
class IslandPlan:
    """What was chosen, by weight; only the part that belongs to the kind is there.

    Attributes:
        channels: Input channels in islands.
        cut: Single elements in islands.
        schemes: What the whole weight gets, None for float.
        high: What the islands of blocks get.
    """

    channels: Mapping[str, Channels]
    cut: ElementCut | None = None
    schemes: Mapping[str, Resolution | None] | None = None
    high: Mapping[str, Resolution] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Planner:
    """Chooses islands.

    Attributes:
        request: What is asked for.
        subjects: The weights.
        target: What can run.
        scored: Scores of the weights.
        weights: The weights as codes, by name.
        range_method: How ranges are chosen where schemes are tried.
    """

    request: IslandRequest
    subjects: Subjects
    target: Target
    scored: ScoredWeights
    weights: Mapping[str, CodedWeight]
    range_method: RangeMethod

    def plan(self) -> IslandPlan:
        """Choose.

        Raises:
            UsageError: The budget does not hold even the smallest schemes.
        """
        if self.request.kind is IslandKind.NODE:
            return self._whole_weights()
        subjects = self.subjects
        budget = self.request.budget
        room = budget.room(subjects.base_bits, subjects.elements, subjects.island_elements)
        if self.request.kind is IslandKind.WEIGHT:
            each = 1 if budget.fraction is not None else element_bits(subjects.sites)
            return IslandPlan({}, choose_elements(self.scored.scores, subjects.names, room // each))
        if self.request.kind is IslandKind.COLUMN:
            return IslandPlan(choose_channels(self._columns(), room))
        high = {site.weight.name or "": self._high(site) for site in subjects.sites}
        known = {name: found for name, found in high.items() if found is not None}
        return IslandPlan(choose_channels(self._blocks(known), room), high=known)

    def concentration(self) -> dict[str, float]:
        """Return what part of all saliency the best elements and channels would hold.

        Channels that hold much less than as many single weights say that column islands will cost
        accuracy.
        """
        sizes = {site.weight.name or "": site.tensor.size for site in self.subjects.sites}
        found = {
            f"weights {fraction:.2%}": share_of_elements(self.scored.scores, sizes, fraction)
            for fraction in _FRACTIONS[:1]
        }
        channels = [
            ChannelScores(
                site.weight.name or "",
                self._per_channel(site),
                site.tensor.size // site.reduction,
            )
            for site in self.subjects.sites
        ]
        shares = shares_of_channels(channels, _FRACTIONS)
        return found | {f"channels {fraction:.2%}": share for fraction, share in shares.items()}

    def _columns(self) -> list[ChannelScores]:
        counted = self.request.budget.fraction is not None
        found = []
        for site in self.subjects.sites:
            elements = site.tensor.size // site.reduction
            cost = elements if counted else elements * HALF_BITS + CHANNEL_BITS
            name = site.weight.name or ""
            found.append(ChannelScores(name, self._per_channel(site), cost, 0, self.request.unit))
        return found

    def _blocks(self, high: Mapping[str, Resolution]) -> list[ChannelScores]:
        counted = self.request.budget.fraction is not None
        found = []
        for site in self.subjects.sites:
            name = site.weight.name or ""
            if name not in high:
                continue
            scheme = high[name].scheme
            assert scheme is not None
            size = scheme.block_size or site.reduction
            shape = list(site.shape)
            shape[site.axes.reduction] = size
            spec = scheme.weight_spec(site.granularity(scheme))
            bits = quantized_bits(
                tuple(shape), spec, site.tensor.dtype.bitwidth, stored=self._stored
            )
            whole = site.tensor.size // site.reduction * size
            cost = (whole if counted else bits) // size + (0 if counted else CHANNEL_BITS)
            found.append(ChannelScores(name, self._per_channel(site), cost, 0, size))
        return found

    def damages(self, at: int, schemes: Sequence[QScheme | None]) -> list[float]:
        """Return the predicted damage of schemes to the weight of this number."""
        site = self.subjects.sites[at]
        importance = self.scored.importance(self.weights[site.weight.name or ""], at)
        return [self._damage(site, scheme, importance) for scheme in schemes]

    @property
    def _stored(self) -> bool:
        return self.request.budget.nbytes is not None

    def _per_channel(self, site: Site) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        scores = self.scored.scores.get(site.weight.name or "")
        others = tuple(axis for axis in range(scores.ndim) if axis != site.axes.reduction)
        found: np.ndarray[tuple[int], np.dtype[np.float64]]
        found = scores.sum(axis=others, dtype=np.float64)
        return found

    def _high(self, site: Site) -> Resolution | None:
        """Return what islands of blocks get: the next bits of twice as many or more."""
        scheme = scheme_of(site.node)
        assert scheme is not None
        if scheme.block_size is None or scheme.block_size >= site.reduction:
            return None
        for bits in _BITS:
            if bits >= 2 * scheme.weight_bits:
                found = self._resolved(site, bits, scheme.block_size)
                size = None if found is None or not found.scheme else found.scheme.block_size
                if size == scheme.block_size:
                    return found
        return None

    def _resolved(self, site: Site, bits: int, block_size: int | None) -> Resolution | None:
        """Return what the target runs a site at with so many bits, None where it cannot."""
        wanted = QScheme(bits, block_size=block_size)
        resolution = resolve(self.target, request_for(site, wanted, tied=False, in_body=False))
        found = resolution.scheme
        return resolution if found is not None and found.weight_bits == bits else None

    def _whole_weights(self) -> IslandPlan:
        """Give whole weights their bits: the exact solution over predicted damage."""
        schemes: list[list[Resolution | None]] = []
        options: list[list[Option]] = []
        for at, site in enumerate(self.subjects.sites):
            known = list(self._choices(site))
            schemes.append([found for found, _ in known])
            weight = self.weights[site.weight.name or ""]
            importance = self.scored.importance(weight, at)
            options.append(
                [
                    Option(cost, self._damage(site, found.scheme if found else None, importance))
                    for found, cost in known
                ]
            )
        others = self.subjects.base_bits - sum(
            quantized_bits(w.rows.shape, w.spec, w.tensor.dtype.bitwidth, stored=self._stored)
            for w in (self.weights[site.weight.name or ""] for site in self.subjects.sites)
        )
        smallest = others + sum(min(each.cost for each in choices) for choices in options)
        room = self.request.budget.room(smallest, self.subjects.elements, 0)
        chosen = choose_options(options, room + smallest - others)
        assert chosen is not None
        return IslandPlan(
            {},
            schemes={
                name: choices[at]
                for name, choices, at in zip(self.subjects.names, schemes, chosen, strict=True)
            },
        )

    def _choices(self, site: Site) -> Iterator[tuple[Resolution | None, int]]:
        """Yield what a weight can have, and what each takes; float at the end.

        No weight gets fewer bits than it has: damage is predicted to first order, and what others
        would gain by the bits of one was measured not to make up for what that one loses.
        """
        planned = scheme_of(site.node)
        assert planned is not None
        width = site.tensor.dtype.bitwidth
        for bits in (each for each in _BITS if each >= planned.weight_bits):
            # At 8 bits one scale for an output channel is enough.
            found = self._resolved(site, bits, None if bits == 8 else planned.block_size)
            if bits == planned.weight_bits:
                found = Resolution(planned, site.node.metadata_props.get(PLAN_RULE, ""), "")
            if found is not None and found.scheme is not None:
                spec = found.scheme.weight_spec(site.granularity(found.scheme))
                yield found, quantized_bits(site.shape, spec, width, stored=self._stored)
        yield None, site.tensor.size * width

    def _damage(
        self,
        site: Site,
        scheme: QScheme | None,
        importance: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    ) -> float:
        """Return the predicted damage of a scheme: what errors count, to first order."""
        if scheme is None:
            return 0.0
        spec = scheme.weight_spec(site.granularity(scheme))
        values = read_all(site.tensor)
        kind = np.dtype(site.tensor.dtype.numpy())
        coded = quantize_tensor(values, spec, self.range_method, kind)
        restored = dequantize(coded.codes, coded.scale, coded.zero_point, spec.granularity)
        error = restored.astype(np.float32) - values.astype(np.float32)
        return self.scored.damage(importance, error)
