"""A graph as a list of steps over numbered slots, compiled once and run often."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import onnx_ir as ir
import torch

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.element_types import SCARCE, ElementTypes, Value
from qcompiler.execution.torch.fusions import Fusions
from qcompiler.execution.torch.op_table import Op, OpIndex
from qcompiler.execution.torch.outside_torch import OutsideTorch
from qcompiler.execution.torch.steps import NOTHING, Schedule, Step, needed_steps
from qcompiler.ir.dataflow import captured_values, constant_of, standard_domain

_ELSEWHERE: Final = SCARCE | {ir.DataType.STRING}

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Machine:
    """What every plan of a program shares.

    Attributes:
        index: The ops that can run.
        opsets: Versions the model imports.
        elements: PyTorch types of the program.
        device: Where it runs.
    """

    index: OpIndex
    opsets: Mapping[str, int]
    elements: ElementTypes
    device: torch.device

    def version(self, domain: str) -> int:
        """Return the opset version of a domain."""
        name = standard_domain(domain)
        names = ("", "ai.onnx") if not name else (name,)
        return max(self.opsets.get(each, 0) for each in names) or 1


class Plan:
    """Nodes in order, with the slots of what they read and write.

    Attributes:
        slots: The slot of every value.
        steps: One per node.
    """

    def __init__(
        self,
        nodes: Iterable[ir.Node],
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        machine: Machine,
        *,
        is_body: bool = False,
    ) -> None:
        """Compile nodes.

        Args:
            nodes: In graph order.
            inputs: Values that are given when the plan runs.
            outputs: Values that are asked for.
            machine: What all plans of the program share.
            is_body: Whether this is the body of a node; nothing is fused there.

        Raises:
            ModelError: An op that nothing here can run.
        """
        self._machine = machine
        self.slots: dict[ir.Value, int] = {}
        self.inputs = [self._slot(value) for value in inputs]
        self.steps = [
            self._step(node) for node in nodes if node.op_type != "Constant" or _is_odd(node)
        ]
        self.outputs = [self._slot(value) for value in outputs]
        self._loose_weights = [
            (self.slots[value], value)
            for value in outputs
            if constant_of(value) is not None and value not in inputs
        ]
        self._fusions = Fusions([] if is_body else self.steps, self.slots)
        self._schedules: dict[object, Schedule] = {}

    @property
    def device(self) -> torch.device:
        """Where the plan runs."""
        return self._machine.device

    def outside_torch(self) -> Iterable[ir.Node]:
        """Yield the nodes that run without gradient, those of bodies too."""
        for step in self.steps:
            if isinstance(step.function, OutsideTorch):
                yield step.call.node
            for _, body, _ in step.bodies:
                yield from body.outside_torch()

    def weights(self) -> Iterable[ir.Value]:
        """Yield the constants that steps read, those of bodies too; some more than once."""
        for step in self.steps:
            yield from (value for _, value in step.weights)
            for _, body, _ in step.bodies:
                yield from body.weights()
        yield from (value for _, value in self._loose_weights)

    def host_weights(self) -> Iterable[ir.Value]:
        """Yield constants that every reader, in bodies too, reads as Python numbers."""
        kinds: dict[ir.Value, bool] = {}
        for value, is_host in self._weight_uses():
            kinds[value] = kinds.get(value, True) and is_host
        yield from (value for value, is_host in kinds.items() if is_host)

    def _weight_uses(self) -> Iterable[tuple[ir.Value, bool]]:
        """Yield every constant that is read, and whether as Python numbers."""
        for step in self.steps:
            values = dict(step.weights)
            for position, slot in enumerate(step.inputs):
                if slot in values:
                    yield values[slot], position in step.host
            for _, body, _ in step.bodies:
                yield from body._weight_uses()
        yield from ((value, False) for _, value in self._loose_weights)

    def schedule(
        self, wanted: Iterable[int], given: Iterable[int], changed: Iterable[int] = ()
    ) -> Schedule:
        """Return the steps that compute some slots from others, with what each may forget.

        Args:
            wanted: Slots to compute.
            given: Slots that are there before the first step.
            changed: Slots of which the value, or the constant, will be another one.
        """
        key = (frozenset(wanted), frozenset(given), frozenset(changed))
        if key not in self._schedules:
            steps = self._fusions.applied(self.steps, key[0] | key[1] | key[2])
            self._schedules[key] = needed_steps(steps, key[0], key[1])
        return self._schedules[key]

    def run(
        self,
        schedule: Schedule,
        arguments: Mapping[int, Value],
        weights: Callable[[ir.Value], Value],
        *,
        changes: Mapping[int, Change] | None = None,
        kept: Mapping[int, str] | None = None,
    ) -> dict[int, Value]:
        """Run steps.

        Args:
            schedule: Of this plan.
            arguments: Values of the slots that are given.
            weights: Returns the tensor of a constant.
            changes: What to do to the value of a slot before anybody reads it.
            kept: Slots whose values are returned, besides the plan's outputs.

        Returns:
            Values by slot.
        """
        frame: list[Value] = [None] * (len(self.slots) + 1)
        wanted = {*self.outputs, *(kept or ())}
        results = {slot: value for slot, value in arguments.items() if slot in wanted}
        for slot, value in arguments.items():
            frame[slot] = value
        for step, done in schedule:
            for slot, weight in step.weights:
                if slot not in arguments:
                    frame[slot] = weights(weight)
            self._run_step(step, frame, weights)
            _settle(step, frame, arguments, changes or {})
            results.update((slot, frame[slot]) for slot in step.outputs if slot in wanted)
            for slot in done:
                frame[slot] = None
        for slot, weight in self._loose_weights:
            results.setdefault(slot, weights(weight))
        return results

    def _run_step(
        self, step: Step, frame: list[Value], weights: Callable[[ir.Value], Value]
    ) -> None:
        arguments = [frame[slot] for slot in step.inputs]
        places = [getattr(each, "is_cpu", None) for each in arguments]
        if places != step.places:
            step.places = places
            step.moves = _moves(arguments, step.host, self._machine.device)
        for position, device in step.moves:
            tensor = arguments[position]
            assert isinstance(tensor, torch.Tensor)
            arguments[position] = tensor.to(device)
        if step.bodies:
            bodies = {
                name: partial(_run_body, plan, [frame[slot] for slot in captured], weights)
                for name, plan, captured in step.bodies
            }
            result = step.function(step.call, *arguments, **bodies)
        else:
            result = step.function(step.call, *arguments)
        if type(result) is tuple:
            for slot, value in zip(step.outputs, result, strict=False):
                frame[slot] = value
            frame[NOTHING] = None
        elif step.outputs:
            frame[step.outputs[0]] = result

    def _slot(self, value: ir.Value) -> int:
        return self.slots.setdefault(value, len(self.slots))

    def _step(self, node: ir.Node) -> Step:
        machine = self._machine
        version = machine.version(node.domain)
        call = Call(node, version, machine.elements, machine.device)
        row = _row_for(node, machine.index.find(node.domain, node.op_type, version))
        function = row.function if row is not None else OutsideTorch(call, machine.opsets)
        inputs = tuple(
            NOTHING if value is None or not value.name else self._slot(value)
            for value in node.inputs
        )
        bodies = tuple(self._bodies(node)) if row is not None else ()
        weights = {
            self.slots[value]: value
            for value in node.inputs
            if value is not None and constant_of(value) is not None
        }
        outputs = tuple(self._slot(value) if value.name else NOTHING for value in node.outputs)
        host = row.host if row is not None else frozenset(range(len(inputs)))
        return Step(call, function, inputs, outputs, tuple(weights.items()), bodies, host)

    def _bodies(self, node: ir.Node) -> Iterable[tuple[str, "Plan", tuple[int, ...]]]:
        # Constants are no captures: a body asks for those itself.
        captured = [value for value in captured_values(node) if constant_of(value) is None]
        for attribute in node.attributes.values():
            if attribute.type is not ir.AttributeType.GRAPH:
                continue
            body = attribute.as_graph()
            inputs = [*body.inputs, *captured]
            plan = Plan(body, inputs, body.outputs, self._machine, is_body=True)
            yield attribute.name, plan, tuple(self._slot(value) for value in captured)


def _settle(
    step: Step, frame: list[Value], arguments: Mapping[int, Value], changes: Mapping[int, Change]
) -> None:
    """Put in place of a step's results what the caller wants there."""
    for slot in step.outputs:
        if slot in arguments:
            # Another output of the node was asked for; what was given stays.
            frame[slot] = arguments[slot]
        elif slot in changes:
            value = frame[slot]
            if not isinstance(value, torch.Tensor):
                reason = "only a tensor can be replaced by a function of it"
                raise step.call.refuse(reason)
            frame[slot] = changes[slot](value)


def _run_body(
    plan: Plan, captured: Sequence[Value], weights: Callable[[ir.Value], Value], *inputs: Value
) -> list[Value]:
    arguments = dict(zip(plan.inputs, [*inputs, *captured], strict=True))
    schedule = plan.schedule(plan.outputs, plan.inputs)
    results = plan.run(schedule, arguments, weights)
    return [results[slot] for slot in plan.outputs]


def _row_for(node: ir.Node, row: Op | None) -> Op | None:
    """Return the row, unless the node works on elements that PyTorch cannot compute with."""
    if row is None or row.all_types:
        return row
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    return None if any(value.dtype in _ELSEWHERE for value in values) else row


def _is_odd(node: ir.Node) -> bool:
    """Whether a Constant node is not known as a constant: its value is no plain tensor."""
    return constant_of(node.outputs[0]) is None


def _moves(
    arguments: Sequence[Value], host: frozenset[int], device: torch.device
) -> tuple[tuple[int, torch.device], ...]:
    """Return which arguments a node needs elsewhere, and where.

    What is read as numbers goes to the CPU. A node that only has values of the CPU besides stays
    there: arithmetic on shapes.
    """
    cpu = torch.device("cpu")
    tensors = {at: each for at, each in enumerate(arguments) if isinstance(each, torch.Tensor)}
    data = [tensor for at, tensor in tensors.items() if at not in host]
    place = device if any(tensor.device.type != "cpu" for tensor in data) else cpu
    wanted = {at: cpu if at in host else place for at in tensors}
    return tuple(
        (at, wanted[at]) for at, each in tensors.items() if each.device.type != wanted[at].type
    )
