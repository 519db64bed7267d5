"""Choosing islands over all weights of a model at once, from scores that lie in files.

No weight gets a share of its own: what is best for its cost anywhere comes first, until the room
is used up.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompiler.reconstruction.tensor_files import TensorFiles

Mask = npt.NDArray[np.bool_]
Channels = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]

_HALF: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class ElementCut:
    """Which single elements are chosen: those above a threshold, and some that are equal to it.

    Attributes:
        threshold: The bits of a float32; elements with larger ones are chosen.
        ties: By weight, how many elements equal to it are chosen, from the first on.
    """

    threshold: int
    ties: Mapping[str, int]

    def mask(self, name: str, scores: Scores) -> Mask:
        """Return which elements of a weight are chosen."""
        bits = _bits(scores)
        found = bits > self.threshold
        found[np.flatnonzero(bits == self.threshold)[: self.ties.get(name, 0)]] = True
        return found.reshape(scores.shape)


def choose_elements(files: TensorFiles, names: Sequence[str], wanted: int) -> ElementCut:
    """Choose the elements with the largest scores, exactly, one weight in memory at a time.

    Elements whose score is 0 are never chosen.

    Args:
        files: Scores by weight, none below 0.
        names: The weights, in the order that ties are resolved in.
        wanted: How many elements.
    """
    upper = np.zeros(_HALF, np.int64)
    for name in names:
        bits = _bits(files.get(name))
        upper += np.bincount(bits[bits > 0] >> 16, minlength=_HALF)
    bin_of, above = _last_bin(upper, wanted)
    lower = np.zeros(_HALF, np.int64)
    for name in names:
        bits = _bits(files.get(name))
        inside = bits[(bits >> 16 == bin_of) & (bits > 0)]
        lower += np.bincount(inside & (_HALF - 1), minlength=_HALF)
    place, more = _last_bin(lower, wanted - above)
    threshold = bin_of << 16 | place
    left = wanted - above - more
    ties: dict[str, int] = {}
    for name in names:
        equal = int(np.count_nonzero(_bits(files.get(name)) == threshold)) if threshold else 0
        ties[name] = min(left, equal)
        left -= ties[name]
    return ElementCut(threshold, ties)


@dataclass(frozen=True, slots=True, eq=False)
class ChannelScores:
    """What the input channels of one weight are worth, and cost.

    Attributes:
        name: The weight.
        scores: float64 `[K]`.
        cost: Of one channel.
        fixed: Of the weight's first channels, beside their own.
        unit: Channels are taken so many at a time.
    """

    name: str
    scores: npt.NDArray[np.float64]
    cost: int
    fixed: int = 0
    unit: int = 1


def choose_channels(weights: Sequence[ChannelScores], room: int) -> dict[str, Channels]:
    """Choose the channels with the largest score per cost; ascending numbers, by weight.

    Within a weight they are taken by falling score, so that this is the fractional solution up to
    what does not fit at the end; smaller units behind it are taken where they still fit.

    Args:
        weights: All weights.
        room: What all chosen channels may cost.
    """
    units: list[tuple[float, int, int, int]] = []
    orders = [np.argsort(-weight.scores, kind="stable") for weight in weights]
    for at, (weight, order) in enumerate(zip(weights, orders, strict=True)):
        for start in range(0, len(order), weight.unit):
            part = weight.scores[order[start : start + weight.unit]]
            cost = len(part) * weight.cost + (0 if start else weight.fixed)
            units.append((-float(part.sum()) / cost, at, start, cost))
    chosen: dict[int, list[int]] = {}
    full: set[int] = set()
    for density, at, start, cost in sorted(units):
        # Behind a unit that did not fit no later one of its weight is taken: order is by score.
        if density == 0 or at in full or cost > room:
            full.add(at)
            continue
        room -= cost
        chosen.setdefault(at, []).extend(orders[at][start : start + weights[at].unit].tolist())
    return {weights[at].name: np.array(sorted(found), np.int64) for at, found in chosen.items()}


def shares_of_channels(
    weights: Sequence[ChannelScores], fractions: Sequence[float]
) -> dict[float, float]:
    """Return what part of all scores the best channels hold, by their part of all elements."""
    total = sum(float(weight.scores.sum()) for weight in weights)
    elements = sum(len(weight.scores) * weight.cost for weight in weights)
    found = {}
    for fraction in fractions:
        chosen = choose_channels(weights, int(fraction * elements))
        held = sum(
            float(weight.scores[chosen[weight.name]].sum())
            for weight in weights
            if weight.name in chosen
        )
        found[fraction] = held / total if total else 0.0
    return found


def share_of_elements(files: TensorFiles, sizes: Mapping[str, int], fraction: float) -> float:
    """Return what part of all scores the best elements hold, by their part of all elements."""
    cut = choose_elements(files, list(sizes), int(fraction * sum(sizes.values())))
    held = total = 0.0
    for name, scores in _each(files, sizes):
        total += float(scores.sum(dtype=np.float64))
        held += float(scores[cut.mask(name, scores)].sum(dtype=np.float64))
    return held / total if total else 0.0


def _each(files: TensorFiles, names: Mapping[str, Any]) -> Iterator[tuple[str, Scores]]:
    for name in names:
        yield name, files.get(name)


def _last_bin(counts: npt.NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """Return the first of the falling bins that is not wanted whole, and what lies above it.

    That is bin 0 where everything is wanted.
    """
    above = np.cumsum(counts[::-1])
    whole = int(np.searchsorted(above, wanted, side="right"))
    if whole == len(counts):
        return 0, int(above[-1]) - int(counts[0])
    return len(counts) - 1 - whole, int(above[whole - 1]) if whole else 0


def _bits(scores: Scores) -> npt.NDArray[np.uint32]:
    """Return the bits of scores, which have their order as none is below 0."""
    return np.ascontiguousarray(scores, np.float32).reshape(-1).view(np.uint32)
