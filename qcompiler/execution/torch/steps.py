"""Steps: the nodes of a plan, ready to run, and which of them a run needs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import onnx_ir as ir
import torch

from qcompiler.execution.torch.call import Call

if TYPE_CHECKING:
    from qcompiler.execution.torch.plan import Plan

NOTHING: Final = -1
"""Slot of an absent input: the last one of every frame, which is always None."""


@dataclass(slots=True)
class Step:
    """One node, ready to run.

    Attributes:
        call: What its function is told.
        function: What runs it.
        inputs: Slots it reads.
        outputs: Slots it writes; `NOTHING` for an absent one.
        weights: Slots among `inputs` that are constants.
        bodies: Plans of its bodies by attribute name, with the outer slots they capture.
        host: Positions of inputs that stay on the CPU.
        moves: Positions of inputs that another device needs, with that device.
        places: Whether each input was on the CPU when `moves` were found; None for what is no
            tensor. Ops decide where a value is, some by how large it is in a run.
    """

    call: Call
    function: Callable[..., Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    weights: tuple[tuple[int, ir.Value], ...]
    bodies: "tuple[tuple[str, Plan, tuple[int, ...]], ...]" = ()
    host: frozenset[int] = frozenset()
    moves: tuple[tuple[int, torch.device], ...] = ()
    places: list[bool | None] | None = None

    @property
    def reads(self) -> Iterable[int]:
        """Slots that have to be there before the step runs."""
        yield from (slot for slot in self.inputs if slot != NOTHING)
        for _, _, captured in self.bodies:
            yield from captured


Schedule = list[tuple[Step, tuple[int, ...]]]
"""Steps in order, each with the slots that nobody reads any more after it."""


def needed_steps(steps: Sequence[Step], wanted: frozenset[int], given: frozenset[int]) -> Schedule:
    """Return the steps that compute some slots from others.

    Constants are forgotten after every step: whoever reads one next asks for it again.
    """
    needed, kept = set(wanted - given), []
    for step in reversed(steps):
        if not needed.isdisjoint(step.outputs):
            kept.append(step)
            needed.update(slot for slot in step.reads if slot not in given)
    kept.reverse()
    last: dict[int, Step] = {}
    done: dict[int, list[int]] = {}
    for step in kept:
        constants = {slot for slot, _ in step.weights if slot not in given}
        done[id(step)] = sorted(constants)
        for slot in (*step.reads, *step.outputs):
            if slot != NOTHING and slot not in constants:
                last[slot] = step
    for slot, step in last.items():
        if slot not in wanted:
            done[id(step)].append(slot)
    return [(step, tuple(done[id(step)])) for step in kept]
