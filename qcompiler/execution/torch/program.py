"""A part of an ONNX graph as a differentiable PyTorch program."""

from collections.abc import Callable, Mapping, Sequence
from typing import Self, TypeVar

import onnx_ir as ir
import torch

from qcompiler.errors import UsageError
from qcompiler.execution.torch.element_types import (
    HALVES,
    Array,
    ElementTypes,
    Value,
    to_torch,
)
from qcompiler.execution.torch.ops import OPS
from qcompiler.execution.torch.plan import Change, Machine, Plan
from qcompiler.execution.torch.weight_cache import WeightCache
from qcompiler.ir.dataflow import all_graphs, constant_of, node_label
from qcompiler.ir.subgraph import Subgraph, subgraph_between
from qcompiler.ir.weights import read_all

Feeds = Mapping[str, torch.Tensor | Array | list[torch.Tensor] | None]
Replacement = torch.Tensor | Change
_T = TypeVar("_T")


class Program:
    """Computes some values of a graph from others, differentiably.

    The graph itself is not copied: a program that is run after its model was rewritten is
    undefined. Quantize and dequantize nodes compute exactly what ONNX says, with gradients that
    pass straight through the rounding (`qcompiler.execution.torch.ops.quantization`).

    A program holds no state between runs but the weights it has loaded. It may be called from
    several threads once they are.

    Attributes:
        input_names: What `feeds` has to hold, in order: the values the graph was cut at, then
            graph inputs that are read as well.
        output_names: What a run returns, in order.
    """

    def __init__(
        self, subgraph: Subgraph, plan: Plan, weights: WeightCache, elements: ElementTypes
    ) -> None:
        """Wrap a compiled plan; users call `from_subgraph`."""
        self._inputs = {str(value.name): value for value in subgraph.inputs}
        self._outputs = {str(value.name): value for value in subgraph.outputs}
        self._plan = plan
        self._weights = weights
        self._elements = elements
        self._constants = {str(value.name): value for value in plan.weights() if value.name}
        constants = set(plan.weights())
        names = [value.name for value in constants]
        self._ambiguous = frozenset(name for name in self._constants if names.count(name) > 1)
        self._slots = {
            str(value.name): slot
            for value, slot in plan.slots.items()
            if value.name and value not in constants
        }
        self.input_names = tuple(self._inputs)
        self.output_names = tuple(self._outputs)

    @classmethod
    def from_subgraph(
        cls,
        model: ir.Model,
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        keep_weights: bool = True,
    ) -> Self:
        """Compile the part of a model between some values and some others.

        Args:
            model: The model; functions of its own must have been inlined.
            inputs: Names of the values to start from; None for the graph's inputs. Graph inputs
                that the part reads as well, such as a mask, are added at the end.
            outputs: Names of the values to compute; None for the graph's outputs.
            device: Where it runs.
            dtype: float32, bfloat16 or float16, in place of the model's own float type; None
                computes in the model's types. In a model of 16-bit weights, what was cast to
                float32 for its precision stays float32.
            keep_weights: Whether weights stay loaded after their first use. Otherwise each is
                read again in every run, and no more than what one node reads is held.

        Raises:
            ModelError: A node that neither PyTorch nor the reference evaluator can run.
            UsageError: A name that the main graph does not have.
        """
        subgraph = subgraph_between(model, inputs, outputs)
        elements = ElementTypes(dtype, _is_half(model))
        place = torch.device(device)
        machine = Machine(OPS, dict(model.opset_imports), elements, place)
        plan = Plan(subgraph.nodes, subgraph.inputs, subgraph.outputs, machine)
        weights = WeightCache(elements, place, plan.host_weights(), keep=keep_weights)
        return cls(subgraph, plan, weights, elements)

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names of the constants that the program reads, its bodies' included."""
        return tuple(self._constants)

    @property
    def value_names(self) -> tuple[str, ...]:
        """Names of the values that can be captured or replaced: those of the main graph."""
        return tuple(self._slots)

    @property
    def outside_torch(self) -> tuple[str, ...]:
        """Labels of the nodes that run in the reference evaluator, where no gradient passes."""
        return tuple(node_label(node) for node in self._plan.outside_torch())

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the weights that are loaded now."""
        return self._weights.nbytes

    def weight(self, name: str) -> torch.Tensor:
        """Return a constant as the program computes with it, loading it if need be.

        Elements of 4 and 2 bits take one int8 or uint8 each.

        Raises:
            UsageError: The program reads no constant of this name, or several in its bodies.
        """
        tensor = self._weights.get(self._constant(name))
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def release(self) -> None:
        """Forget the loaded weights; the next run reads them again."""
        self._weights.release()

    def __call__(
        self,
        feeds: Feeds,
        *,
        weights: Mapping[str, torch.Tensor] | None = None,
        replace: Mapping[str, Replacement] | None = None,
        capture: Sequence[str] = (),
    ) -> dict[str, torch.Tensor]:
        """Run the program.

        Args:
            feeds: A tensor or array for each of `input_names`; floats are converted to the
                program's type. A sequence is a list, an absent optional None.
            weights: Tensors in place of constants, of any float or integer type that the ops
                can compute with: live codes and scales that gradients are wanted for.
            replace: By value name, a tensor to take in place of the computed value (what only
                led to that is not computed), or a function to apply to it.
            capture: Names of further values to return.

        Returns:
            The outputs and the captured values by name, on the program's device (shapes may be
            on the CPU).

        Raises:
            UsageError: An input is missing, unknown or of another type; a name is unknown.
        """
        arguments = self._arguments(feeds)
        changes: dict[int, Change] = {}
        for name, new in (replace or {}).items():
            slot = _known(self._slots, name, "value")
            if isinstance(new, torch.Tensor):
                arguments[slot] = new.to(self._plan.device) if new.is_floating_point() else new
            elif slot in arguments:
                given = arguments[slot]
                if not isinstance(given, torch.Tensor):
                    message = "only a tensor can be replaced by a function of it"
                    raise UsageError(message, where=name)
                arguments[slot] = new(given)
            else:
                changes[slot] = new
        kept = {_known(self._slots, name, "value"): name for name in capture}
        wanted = [*self._plan.outputs, *kept]
        supply = self._supply(weights)
        slots = self._plan.slots
        live = [slots[v] for v in map(self._constants.get, weights or ()) if v in slots]
        schedule = self._plan.schedule(wanted, arguments, [*changes, *live])
        results = self._plan.run(schedule, arguments, supply, changes=changes, kept=kept)
        names = dict(zip(self._plan.outputs, self.output_names, strict=True))
        ordered = [(name, results[slot]) for slot, name in (names | kept).items()]
        return dict(ordered)  # type: ignore[arg-type]

    def _constant(self, name: str) -> ir.Value:
        if name in self._ambiguous:
            message = "several constants, in different bodies, have this name"
            raise UsageError(message, where=name, hint="rename them in the model")
        return _known(self._constants, name, "constant")

    def _supply(self, weights: Mapping[str, torch.Tensor] | None) -> Callable[[ir.Value], Value]:
        if not weights:
            return self._weights.get
        live = {self._constant(name): weights[name] for name in weights}

        def supply(value: ir.Value) -> Value:
            tensor = live.get(value)
            return self._weights.get(value) if tensor is None else tensor

        return supply

    def _arguments(self, feeds: Feeds) -> dict[int, Value]:
        defaults = {
            name: to_torch(read_all(value.const_value))
            for name, value in self._inputs.items()
            if name not in feeds and value.const_value is not None
        }
        feeds = defaults | dict(feeds)
        missing = [name for name in self._inputs if name not in feeds]
        unknown = [name for name in feeds if name not in self._inputs]
        if missing or unknown:
            facts = [f"it lacks {', '.join(missing)}"] if missing else []
            facts += [f"there is no {', '.join(unknown)}"] if unknown else []
            message = f"the program's inputs are {', '.join(self._inputs)}; {'; '.join(facts)}"
            raise UsageError(message)
        return {
            self._plan.slots[value]: self._fed(value, feeds[name])
            for name, value in self._inputs.items()
        }

    def _fed(
        self, value: ir.Value, given: torch.Tensor | Array | list[torch.Tensor] | None
    ) -> Value:
        if given is None or value.dtype is ir.DataType.STRING:
            return given
        if isinstance(given, list):
            return [self._fed(value, each) for each in given]
        tensor = given if isinstance(given, torch.Tensor) else to_torch(given)
        if value.dtype is not None and tensor.dtype != (wanted := self._elements.of(value.dtype)):
            if not tensor.is_floating_point() or not wanted.is_floating_point:
                message = f"takes {wanted}, and got {tensor.dtype}"
                raise UsageError(message, where=f"input {value.name}")
            tensor = self._elements.convert(tensor, value.dtype)
        return tensor.to(self._plan.device)


def _known(known: Mapping[str, _T], name: str, kind: str) -> _T:
    if name not in known:
        message = f"the program has no {kind} of this name"
        raise UsageError(message, where=name)
    return known[name]


def _is_half(model: ir.Model) -> bool:
    """Whether more of a model's weights are of 16 bits than of 32."""
    half = full = 0
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            tensor = constant_of(value)
            if tensor is not None and tensor.dtype in HALVES:
                half += tensor.nbytes
            elif tensor is not None and tensor.dtype is ir.DataType.FLOAT:
                full += tensor.nbytes
    return half > full
