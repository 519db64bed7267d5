"""Runs a graph of 16-bit floats on samples and says which values went wrong, and where first."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.calls import Samples
from qcompiler.calibration.held_out import spread
from qcompiler.execution.sessions import open_session
from qcompiler.ir.dataflow import all_nodes, bodies_of, inputs_with_captures
from qcompiler.passes.lower.cast_apply import Applied
from qcompiler.passes.lower.cast_measure import Extremes, measure_extremes
from qcompiler.progress import Progress
from qcompiler.quant.compute_type import ComputeType

_CALLS_AS_IS = 2
"""Calls on which the runtime runs the graph as it is: that it can is what matters there."""


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """How models are run on samples.

    Attributes:
        samples: The calls.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
        threads: Threads of one operator.
        progress: Where the runs are shown.
    """

    samples: Samples
    custom_op_libraries: tuple[Path, ...]
    threads: int | None
    progress: Progress

    def measure(self, model: ir.Model, what: str) -> dict[str, Extremes]:
        """Return what the values of a model hold on the samples, by name.

        Raises:
            TargetError: ONNX Runtime cannot run the model.
        """
        with self.progress.task(what, len(self.samples)) as advance:
            return measure_extremes(
                model,
                self.samples,
                advance,
                custom_op_libraries=self.custom_op_libraries,
                threads=self.threads,
            )


def spoiled_values(
    model: ir.Model, applied: Applied, truth: Mapping[str, Extremes], options: CheckOptions
) -> dict[str, str]:
    """Return the values that hold NaN or infinities where the float32 graph has none.

    Of those that depend on each other only the first: the others follow from them.

    Args:
        model: The graph of 16-bit floats.
        applied: What made it.
        truth: What the values of the float32 graph hold.
        options: How it is run.

    Returns:
        What they hold, by the names that they have in the float32 graph.

    Raises:
        TargetError: ONNX Runtime cannot run the model.
    """
    known = _former_names(applied)
    found: dict[str, str] = {}
    measured = options.measure(model, "checking 16-bit values")
    for name, extremes in measured.items():
        former = known.get(name, name)
        fault = extremes.spoils(truth.get(former, Extremes()))
        if fault:
            found[name] = fault
    # NaN follows from infinities, and in a Loop comes back to what they follow from.
    causes = {name for name in found if measured[name].infinite} or set(found)
    return {known.get(name, name): found[name] for name in _origins(model, causes)}


def runs_as_it_is(
    model: ir.Model, compute: ComputeType, truth: Mapping[str, Extremes], options: CheckOptions
) -> str:
    """Run a float16 graph without rounding Casts; return the output that is NaN, or "".

    Args:
        model: The graph.
        compute: Its type.
        truth: What the values of the float32 graph hold.
        options: How it is run.

    ONNX Runtime has no bfloat16 on the CPU: such graphs are not run.

    Raises:
        TargetError: ONNX Runtime cannot run the model.
    """
    if compute is not ComputeType.FLOAT16:
        return ""
    libraries = options.custom_op_libraries
    with open_session(
        model, optimize=False, threads=options.threads, custom_op_libraries=libraries
    ) as session:
        for feeds in spread(options.samples, _CALLS_AS_IS):
            for name, values in session.run(session.fitting(feeds)).items():
                was_nan = truth.get(name, Extremes()).nan
                if values.dtype.kind == "f" and not was_nan and np.isnan(values).any():
                    return name
    return ""


def _former_names(applied: Applied) -> dict[str, str]:
    """Return what values that Casts made, or that Casts took the name of, were called before."""
    names: dict[str, str] = {}
    for cast in applied.casts:
        if cast.takes_name:
            names[cast.source] = cast.output
        else:
            names[cast.output] = cast.source
    return names


def _made_inside(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what the nodes in the bodies of a node make."""
    for body in bodies_of(node):
        for inner in body.all_nodes():
            yield from inner.outputs


def _origins(model: ir.Model, found: Collection[str]) -> Sequence[str]:
    """Return those values of which no cause is among them, in graph order."""
    origins = [value.name for value in model.graph.inputs if value.name in found]
    for node in all_nodes(model):
        bad = [value.name for value in node.outputs if value.name in found]
        causes = [*inputs_with_captures(node), *_made_inside(node)]
        if bad and not any(value.name in found for value in causes):
            origins += bad
    return [name for name in origins if name]
