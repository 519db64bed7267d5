"""Runs a graph on many calls in step with the correction of some of its values.

Values that are corrected lie on levels: one level depends on those before it. All calls run up to
the values of one level, which may then be shifted before any call goes on from there, so that the
whole takes a single run of the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.execution.segments import Segment, segments_of
from qcompiler.execution.sessions import Session, open_session
from qcompiler.ir.dataflow import inputs_with_captures, is_op
from qcompiler.ir.editing import values_of
from qcompiler.ir.shapes import infer_shapes
from qcompiler.ir.widened import widened
from qcompiler.passes.quantize.bias_shelf import Shelf

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]
Run = Callable[[int], dict[str, Array]]
"""Runs one level of one call, by its number; returns the values of that level."""

_NOT_KEPT: Final = (ir.DataType.STRING, ir.DataType.UNDEFINED)
"""Element types that are not kept between levels."""


def levels_of(graph: ir.Graph, values: Sequence[ir.Value]) -> list[list[ir.Value]]:
    """Divide computed values of a graph into levels: each depends on earlier levels alone."""
    wanted = {value.producer(): value for value in values}
    depth: dict[ir.Node, int] = {}
    found: list[list[ir.Value]] = []
    for node in graph:
        producers = (value.producer() for value in inputs_with_captures(node))
        level = max((depth.get(p, 0) for p in producers if p is not None), default=0)
        if node in wanted:
            found += [[] for _ in range(level + 1 - len(found))]
            found[level].append(wanted[node])
            level += 1
        depth[node] = level
    return found


@dataclass(frozen=True, slots=True)
class Shift:
    """What is added to a value.

    Attributes:
        axis: The axis of channels.
        values: float64 `[channels]`.
    """

    axis: int
    values: F64

    def of(self, array: Array) -> Array:
        """Return the shifted array, in its own type."""
        shape = [1] * array.ndim
        shape[self.axis] = -1
        shifted: Array = (array + self.values.reshape(shape)).astype(array.dtype)
        return shifted


class _NothingToRun(AbstractContextManager["_NothingToRun"]):
    """Stands for the session of a level whose values an earlier one has made."""

    input_names: Final[tuple[str, ...]] = ()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return nothing."""
        return {}

    def __exit__(self, *exception: object) -> None:
        """Leave."""


class LevelledModel:
    """A model that runs level by level.

    ONNX Runtime runs the graph as written; a model of bfloat16 runs in float32.

    Args:
        model: The model; not changed.
        levels: Names of the values of each level.
        inputs: A shelf with the model's inputs, under their names.
        calls: Number of calls.
        label: What tells the model's values on that shelf from those of another one.
        threads: Threads of one operator.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
    """

    def __init__(
        self,
        model: ir.Model,
        levels: Sequence[Sequence[str]],
        inputs: Shelf,
        calls: int,
        *,
        label: str,
        threads: int,
        custom_op_libraries: Sequence[Path] = (),
    ) -> None:
        self._model = _typed(widened(model))
        self._shelf = inputs
        self._calls = calls
        self._label = label
        self._threads = threads
        self._libraries = custom_op_libraries
        self._shifts: dict[str, Shift] = {}
        self._inputs = {value.name for value in self._model.graph.inputs}
        values = _unrounded(self._model.graph)
        self._values = [{name: values[name] for name in level} for level in levels]
        self._segments = _segments(self._model, [list(level.values()) for level in self._values])
        made = [{value.name or "" for value in segment.outputs} for segment in self._segments]
        # What a level reads: inputs of its nodes, and values of it that an earlier one has made.
        self._reads = [
            {value.name or "" for value in (*segment.inputs, *level.values())} - own
            for segment, level, own in zip(self._segments, self._values, made, strict=True)
        ]
        self._read_later = [set[str]().union(*self._reads[i + 1 :]) for i in range(len(levels))]

    @property
    def obstacle(self) -> str | None:
        """Name of a value between two levels that cannot be kept, None where there is none."""
        for value in (value for segment in self._segments[1:] for value in segment.inputs):
            if value.name in self._inputs:
                continue
            if not isinstance(value.type, ir.TensorType) or value.dtype in _NOT_KEPT:
                return value.name
        return None

    @contextmanager
    def level(self, index: int, *, keep: bool = True) -> Iterator[Run]:
        """Load one level.

        Args:
            index: Of the level.
            keep: Whether to go on from there: every call must then run before the next level is
                loaded. Else any call may run any number of times.

        Raises:
            TargetError: ONNX Runtime cannot load it, or (from the yielded function) run it.
        """
        wanted = {name: value.name or "" for name, value in self._values[index].items()}
        with self._session(self._segments[index]) as session:

            def run(call: int) -> dict[str, Array]:
                outputs = session.run({name: self._get(name, call) for name in session.input_names})
                for name in outputs.keys() & self._read_later[index] if keep else ():
                    self._shelf.put(self._key(name), call, outputs[name])
                return {
                    name: outputs[inner] if inner in outputs else self._get(inner, call)
                    for name, inner in wanted.items()
                }

            yield run
        if keep:
            for name in sorted(self._reads[index] - self._read_later[index] - self._inputs):
                self._shelf.drop(self._key(name), self._calls)

    def _session(self, segment: Segment) -> "Session | _NothingToRun":
        if not segment.nodes:
            return _NothingToRun()
        part = segment.as_model(self._model)
        # A session wants a graph of its own, where a segment is a view of another one.
        model = ir.Model(part.graph.clone(), ir_version=part.ir_version)
        return open_session(
            model, optimize=False, threads=self._threads, custom_op_libraries=self._libraries
        )

    def shift(self, level: int, shifts: Mapping[str, Shift]) -> None:
        """Add to values of a level, from there on."""
        names = self._values[level] if shifts else {}
        self._shifts.update({names[name].name or "": shift for name, shift in shifts.items()})

    @contextmanager
    def shifted(self, level: int, shifts: Mapping[str, Shift]) -> Iterator[None]:
        """Add to values of a level for a while."""
        before = dict(self._shifts)
        self.shift(level, shifts)
        try:
            yield
        finally:
            self._shifts = before

    def _get(self, name: str, call: int) -> Array:
        array = self._shelf.get(self._key(name), call)
        shift = self._shifts.get(name)
        return array if shift is None else shift.of(array)

    def _key(self, name: str) -> str:
        # Inputs are the same for all models, and widened as the model is.
        return name if name in self._inputs else f"{self._label}:{name}"


def wide(values: Array) -> Array:
    """Return an array as a levelled model takes it: bfloat16 as float32."""
    return values.astype(np.float32) if values.dtype == ml_dtypes.bfloat16 else values


def _typed(model: ir.Model) -> ir.Model:
    """Return a model whose values have types, as far as they can be inferred."""
    if all(value.type is not None for node in model.graph for value in node.outputs if value.name):
        return model
    copy = model.clone()
    infer_shapes(copy)
    return copy


def _unrounded(graph: ir.Graph) -> Mapping[str, ir.Value]:
    """Return the values of a graph by name; of an output that is rounded, what is rounded."""
    found = {value.name: value for value in values_of(graph) if value.name}
    for output in graph.outputs:
        producer = output.producer()
        quantize = producer.inputs[0] if is_op(producer, "DequantizeLinear") and producer else None
        source = quantize.producer() if quantize is not None else None
        if source is not None and is_op(source, "QuantizeLinear") and source.inputs[0] is not None:
            found[output.name or ""] = source.inputs[0]
    return found


def _segments(model: ir.Model, levels: Sequence[Sequence[ir.Value]]) -> list[Segment]:
    """Return what runs between each level and the one before; every node runs when first needed.

    A node that no level needs is in none.
    """
    level_of: dict[ir.Node | None, int] = {}
    for index, values in enumerate(levels):
        for value in values:
            level_of.setdefault(value.producer(), index)
    groups: list[list[ir.Node]] = [[] for _ in levels]
    for node in reversed(list(model.graph)):
        if node not in level_of:
            continue
        groups[level_of[node]].append(node)
        for value in inputs_with_captures(node):
            producer = value.producer()
            level_of[producer] = min(level_of.get(producer, len(levels)), level_of[node])
    running = iter(segments_of(model.graph, [group[::-1] for group in groups if group]))
    segments = [next(running) if group else Segment((), (), (), ()) for group in groups]
    found = []
    for index, segment in enumerate(segments):
        later = {value for other in segments[index + 1 :] for value in other.inputs}
        later.update(value for level in levels[index:] for value in level)
        made = {value for node in segment.nodes for value in node.outputs}
        asked = (*levels[index], *segment.outputs)
        outputs = dict.fromkeys(value for value in asked if value in made and value in later)
        found.append(replace(segment, outputs=tuple(outputs)))
    return found
