"""What float values of a model hold on samples, those in bodies of If, Loop and Scan included.

`calibration.collect` gathers statistics of values of the main graph and refuses infinities, which
masks are made of. Here only extremes are wanted, of every value, and where there is NaN.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import Samples
from qcompiler.execution.narrow_floats import emulated
from qcompiler.execution.sessions import open_session
from qcompiler.execution.taps import keep_only
from qcompiler.ir.dataflow import all_graphs, all_nodes, bodies_of, is_op
from qcompiler.ir.editing import add_initializer, fresh_name, value_names
from qcompiler.progress import Advance

_FLOATS: Final = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOAT: Final = ir.DataType.FLOAT


@dataclass(frozen=True, slots=True)
class Extremes:
    """What a value held over all calls.

    Attributes:
        low: Smallest finite number, at most 0.
        high: Largest finite number, at least 0.
        nan: Whether it held NaN.
        infinite: Whether it held an infinity.
    """

    low: float = 0.0
    high: float = 0.0
    nan: bool = False
    infinite: bool = False

    @property
    def peak(self) -> float:
        """Largest finite magnitude."""
        return max(-self.low, self.high)

    def spoils(self, truth: "Extremes") -> str:
        """Return what this holds and the truth does not: "an infinity", "NaN" or ""."""
        if self.infinite and not truth.infinite:
            return "an infinity"
        return "NaN" if self.nan and not truth.nan else ""


@dataclass(frozen=True, slots=True)
class _Measure:
    """One number to learn of a value.

    Attributes:
        chain: Ops from the value to the number; "mask" stands for finite numbers, others 0.
        merge: What makes one number of those of all rounds of a Loop.
    """

    chain: tuple[str, ...]
    merge: str


_QUICK: Final = {
    "high": _Measure(("ReduceMax",), "ReduceMax"),
    "low": _Measure(("ReduceMin",), "ReduceMin"),
    "energy": _Measure(("ReduceSumSquare",), "ReduceSum"),
}
"""Where the energy is finite, so is every number."""
_EXACT: Final = {
    "high": _Measure(("finite", "ReduceMax"), "ReduceMax"),
    "low": _Measure(("finite", "ReduceMin"), "ReduceMin"),
    "nan": _Measure(("IsNaN", "Cast", "ReduceMax"), "ReduceMax"),
    "infinite": _Measure(("IsInf", "Cast", "ReduceMax"), "ReduceMax"),
}


def measure_extremes(
    model: ir.Model,
    samples: Samples,
    advance: Advance,
    *,
    custom_op_libraries: Sequence[Path] = (),
    threads: int | None = None,
) -> dict[str, Extremes]:
    """Run a model on samples and return what its float values held, by name.

    ONNX Runtime runs the graph as written, in float32 with values rounded where they are stored
    in 16 bits. Numbers are reduced inside it. Models with infinities run a second time.

    Args:
        model: The model; not changed.
        samples: The calls; float inputs are cast to the type the model takes.
        advance: Called with 1 after every call of the first run.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
        threads: Threads of one operator; None leaves it to ONNX Runtime.

    Raises:
        TargetError: ONNX Runtime cannot load the model, or run it on a sample.
    """
    wide = emulated(model)
    names = [value.name or "" for value in _measurable(wide)]
    session = (tuple(custom_op_libraries), threads)
    quick = _run(wide, names, _QUICK, samples, advance, session)
    odd = [name for name in names if not np.isfinite(quick[name]["energy"])]
    found = {
        name: Extremes(min(0.0, parts["low"]), max(0.0, parts["high"]))
        for name, parts in quick.items()
        if np.isfinite(parts["energy"])
    }
    if odd:
        for name, parts in _run(wide, odd, _EXACT, samples, lambda _: None, session).items():
            low, high = min(0.0, parts["low"]), max(0.0, parts["high"])
            found[name] = Extremes(low, high, parts["nan"] > 0, parts["infinite"] > 0)
    return found


def _measurable(model: ir.Model) -> Iterable[ir.Value]:
    """Yield the float tensors that nodes and callers give, in graph order."""
    yield from (v for v in model.graph.inputs if v.dtype in _FLOATS and not v.is_initializer())
    for node in all_nodes(model):
        for value in node.outputs:
            if value.dtype in _FLOATS and isinstance(value.type, ir.TensorType) and value.name:
                yield value


def _run(
    model: ir.Model,
    names: Sequence[str],
    measures: Mapping[str, _Measure],
    samples: Samples,
    advance: Advance,
    session: tuple[tuple[Path, ...], int | None],
) -> dict[str, dict[str, float]]:
    """Run all calls and return every measure of every value, over all calls."""
    tapped, outputs = _tapped(model, names, measures)
    found: dict[str, dict[str, float]] = {name: dict.fromkeys(measures, 0.0) for name in names}
    if not names:
        return found
    libraries, threads = session
    with open_session(
        tapped, optimize=False, threads=threads, custom_op_libraries=libraries
    ) as runner:
        for feeds in samples:
            results = runner.run(runner.fitting(feeds))
            for (name, part), output in outputs.items():
                number = _number(results[output])
                found[name][part] = _merged(part, found[name][part], number)
            del results
            advance(1)
    return found


def _number(result: npt.NDArray[Any]) -> float:
    """Return what a tap gave; nothing was reduced where a Loop did not run: 0."""
    return float(result.reshape(-1)[0]) if result.size else 0.0


def _merged(part: str, old: float, new: float) -> float:
    if part == "energy":
        return old + new
    if not np.isfinite(new):
        return old  # of an empty tensor, or with "energy" not finite either
    return min(old, new) if part == "low" else max(old, new)


def _tapped(
    model: ir.Model, names: Sequence[str], measures: Mapping[str, _Measure]
) -> tuple[ir.Model, dict[tuple[str, str], str]]:
    """Return a copy that computes measures of values and no more, and the output of each."""
    copy = model.clone()
    builder = _TapBuilder(copy)
    values = {value.name or "": value for value in _measurable(copy)}
    made: dict[tuple[str, str], ir.Value] = {}
    # Early values last: ONNX Runtime then runs each tap as soon as its value is there.
    for name in reversed(names):
        for part, measure in measures.items():
            made[name, part] = builder.add(values[name], measure)
    keep_only(copy.graph, list(made.values()))
    copy.graph.outputs.extend(made.values())
    return copy, {key: value.name or "" for key, value in made.items()}


class _TapBuilder:
    """Adds reductions to a model, and hands those in bodies out to the main graph."""

    def __init__(self, model: ir.Model) -> None:
        self._main = model.graph
        self._taken = value_names(model)
        self._graph_of: dict[ir.Value, ir.Graph] = {}
        for graph in all_graphs(model):
            self._graph_of.update(dict.fromkeys(graph.inputs, graph))
        self._owner = {body: node for node in all_nodes(model) for body in bodies_of(node)}
        self._finite: dict[ir.Value, ir.Value] = {}

    def add(self, value: ir.Value, measure: _Measure) -> ir.Value:
        """Return a scalar of the main graph."""
        graph = self._place(value)
        made = value
        for op_type in measure.chain:
            if op_type == "finite":
                made = self._finite_part(value)
            else:
                made = self._node(graph, op_type, made)
        while graph is not self._main:
            owner = self._owner[graph]
            made = self._lift(graph, owner, made, measure.merge)
            assert owner.graph is not None
            graph = owner.graph
        return made

    def _place(self, value: ir.Value) -> ir.Graph:
        producer = value.producer()
        graph = self._graph_of[value] if producer is None else producer.graph
        assert isinstance(graph, ir.Graph)
        return graph

    def _finite_part(self, value: ir.Value) -> ir.Value:
        """Return the value with 0 in place of what is not finite."""
        if value not in self._finite:
            graph = self._place(value)
            nan = self._node(graph, "IsNaN", value, dtype=ir.DataType.BOOL)
            infinite = self._node(graph, "IsInf", value, dtype=ir.DataType.BOOL)
            odd = self._node(graph, "Or", nan, infinite, dtype=ir.DataType.BOOL)
            zero = self._constant(graph, 0.0)
            self._finite[value] = self._node(graph, "Where", odd, zero, value)
        return self._finite[value]

    def _constant(self, graph: ir.Graph, number: float) -> ir.Value:
        name = fresh_name("tap:constant", self._taken)
        return add_initializer(graph, name, ir.tensor(np.float32(number), name=name))

    def _lift(self, body: ir.Graph, owner: ir.Node, scalar: ir.Value, merge: str) -> ir.Value:
        """Return, beside the owner of a body, one scalar for all that a scalar in it was."""
        body.outputs.append(scalar)
        owner.resize_outputs(len(owner.outputs) + 1)
        output = owner.outputs[-1]
        output.name = fresh_name(f"{scalar.name}:out", self._taken)
        output.type = ir.TensorType(_FLOAT)
        if not is_op(owner, "If"):
            assert isinstance(owner.graph, ir.Graph)
            return self._node(owner.graph, merge, output)
        for other in bodies_of(owner):
            if other is not body:
                zero = self._constant(other, 0.0)
                other.outputs.append(self._node(other, "Identity", zero))
        return output

    def _node(
        self, graph: ir.Graph, op_type: str, *inputs: ir.Value, dtype: ir.DataType = _FLOAT
    ) -> ir.Value:
        attributes: dict[str, int] = {}
        if op_type.startswith("Reduce"):
            attributes["keepdims"] = 0
        elif op_type == "Cast":
            attributes["to"] = int(_FLOAT)
        elif op_type.startswith("Is"):
            dtype = ir.DataType.BOOL
        name = fresh_name(f"{inputs[0].name}:{op_type}", self._taken)
        made = ir.convenience.convert_attributes(attributes)
        output = ir.Value(name=name, type=ir.TensorType(dtype))
        graph.append(ir.Node("", op_type, list(inputs), made, outputs=[output], name=name))
        return output
