"""Choosing one option for each of many things, so that all fit a budget: exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_ROUNDING: Final = 1e-12


@dataclass(frozen=True, slots=True)
class Option:
    """Something that a thing can be given.

    Attributes:
        cost: What it takes of the budget.
        damage: What it does, to be made small in sum.
    """

    cost: int
    damage: float


def choose_options(things: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """Return which option each thing gets so that damage is least, None where nothing fits.

    The multiple-choice knapsack problem, solved exactly: of all sums over the first things the
    undominated are kept, less those of which even the fractional solution of the rest is worse
    than the best whole solution known (Dyer et al. 1984; Pisinger 1995). Of equal solutions the
    same is always returned.

    Args:
        things: The options of each.
        budget: What the chosen options may cost together.
    """
    if sum(min(option.cost for option in options) for options in things) > budget:
        return None
    rests = _fractional_rests(things)
    # Sums of floats are rounded, and that must not drop the solution that is known.
    worst = sum(max(option.damage for option in options) for options in things)
    best = _greedy(things, budget) + _ROUNDING * worst
    costs, damages = np.zeros(1, np.int64), np.zeros(1, np.float64)
    history: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []
    for at, options in enumerate(things):
        cost = np.array([option.cost for option in options], np.int64)
        damage = np.array([option.damage for option in options])
        whole = (costs[:, None] + cost).reshape(-1)
        harm = (damages[:, None] + damage).reshape(-1)
        least = harm + rests[at + 1].least_damage(budget - whole)
        order = np.lexsort((np.arange(len(whole)), harm, whole))
        order = order[least[order] <= best]
        undominated = np.minimum.accumulate(np.concatenate([[np.inf], harm[order]]))[:-1]
        order = order[harm[order] < undominated]
        history.append((order // len(options), order % len(options)))
        costs, damages = whole[order], harm[order]
    at_state = int(np.argmin(damages))
    chosen: list[int] = []
    for parents, picks in reversed(history):
        chosen.append(int(picks[at_state]))
        at_state = int(parents[at_state])
    return chosen[::-1]


@dataclass(frozen=True, slots=True)
class _Rest:
    """The fractional solution of some things: damage as a convex function of the budget."""

    costs: Floats
    damages: Floats

    def least_damage(self, budget: npt.NDArray[np.int64]) -> Floats:
        found = np.interp(budget, self.costs, self.damages)
        return np.where(budget < self.costs[0], np.inf, found)


def _hull(options: Sequence[Option]) -> list[tuple[int, int, float]]:
    """Return (option, cost, damage) of the lower convex hull, by rising cost."""
    ordered = sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].damage, i))
    hull: list[tuple[int, int, float]] = []
    for index in ordered:
        cost, damage = options[index].cost, options[index].damage
        if hull and damage >= hull[-1][2]:
            continue
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], cost, damage):
            hull.pop()
        hull.append((index, cost, damage))
    return hull


def _is_above(
    first: tuple[int, int, float], middle: tuple[int, int, float], cost: int, damage: float
) -> bool:
    """Whether the middle of three points lies on or above the line between the others."""
    one = (middle[2] - first[2]) * (cost - first[1])
    return one >= (damage - first[2]) * (middle[1] - first[1])


def _steps(things: Sequence[Sequence[Option]]) -> list[tuple[float, int, int, int, float]]:
    """Return (damage per cost, thing, option, more cost, more damage) of hulls, steepest first."""
    found = []
    for at, options in enumerate(things):
        hull = _hull(options)
        for (_, cost, damage), (index, dearer, better) in pairwise(hull):
            slope = (better - damage) / (dearer - cost)
            found.append((slope, at, index, dearer - cost, better - damage))
    return sorted(found)


def _fractional_rests(things: Sequence[Sequence[Option]]) -> list[_Rest]:
    """Return the fractional solution of the things from each one on."""
    steps = _steps(things)
    hulls = [_hull(options)[0] for options in things]
    rests = []
    for start in range(len(things) + 1):
        cost = sum(hull[1] for hull in hulls[start:])
        damage = sum(hull[2] for hull in hulls[start:])
        later = [step for step in steps if step[1] >= start]
        rests.append(
            _Rest(
                np.cumsum([cost, *(step[3] for step in later)]).astype(np.float64),
                np.cumsum([damage, *(step[4] for step in later)]),
            )
        )
    return rests


def _greedy(things: Sequence[Sequence[Option]], budget: int) -> float:
    """Return the damage of a solution: the steepest steps that fit."""
    left = budget - sum(_hull(options)[0][1] for options in things)
    damage = sum(_hull(options)[0][2] for options in things)
    stopped: set[int] = set()
    for _, at, _, cost, change in _steps(things):
        if at in stopped or cost > left:
            stopped.add(at)
            continue
        left -= cost
        damage += change
    return damage
