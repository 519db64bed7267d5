"""`--verify numerics`: runs the model after every pass and names the first that is wrong."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.samples import Feeds
from qcompiler.errors import ParityError
from qcompiler.execution.narrow_floats import emulated, has_narrow_floats
from qcompiler.execution.outputs import OutputDifference, compare_outputs
from qcompiler.execution.sessions import open_session
from qcompiler.rewriting.base import Numerics, Pass, PassResult

_ROUNDINGS: Final = 4
"""Epsilons of the type that is computed in that a reassociation may cost."""
_EPSILON: Final = {
    ir.DataType.DOUBLE: 2.0**-52,
    ir.DataType.FLOAT: 2.0**-23,
    ir.DataType.FLOAT16: 2.0**-10,
    ir.DataType.BFLOAT16: 2.0**-7,
}
"""Distance from 1 to the next number. Narrower types are codes: nothing is computed in them."""
_HINT: Final = "--dump-ir keeps the models to compare"


@dataclass(frozen=True, slots=True)
class NumericsRecord:
    """How a pass changed one output of the model.

    Attributes:
        name: The pass.
        output: The model output.
        max_abs: Largest absolute difference from the output before the pass.
        max_rel: The same over the largest absolute value before the pass.
        sqnr_db: Signal to difference ratio, dB; infinite where nothing changed.
    """

    name: str
    output: str
    max_abs: float
    max_rel: float
    sqnr_db: float


class VerifyNumerics:
    """A pass hook that compares outputs before and after, in ONNX Runtime without optimization.

    A model with 16-bit floats is run in float32 with every value rounded that it stores in them:
    what ONNX Runtime runs without rounding on a CPU depends on which ops stand side by side.

    An EXACT pass must not change a bit, a REORDERED one must stay within its tolerance (see
    `Pass.tolerance`); the loss of a LOSSY one is recorded. Outputs must stay finite where they
    were, whatever the pass declares.

    Args:
        feeds: The inputs to run on.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
    """

    def __init__(self, feeds: Feeds, custom_op_libraries: Sequence[Path] = ()) -> None:
        self._feeds = feeds
        self._libraries = tuple(custom_op_libraries)
        self._before: dict[str, npt.NDArray[Any]] | None = None
        self._epsilon = 0.0
        self.records: list[NumericsRecord] = []

    def before_pass(self, model: ir.Model, rewrite: Pass) -> None:
        """Run the model as it is, once, before the first pass."""
        self._epsilon = _coarsest_epsilon(model)
        if self._before is None:
            self._before = self._run(model)

    def after_pass(self, model: ir.Model, rewrite: Pass, result: PassResult) -> None:
        """Run the model again if the pass changed it, and compare.

        Raises:
            ParityError: The outputs differ by more than the pass declares, or are not finite
                where they were.
        """
        if not result.modified or self._before is None:
            return
        after = self._run(model)
        for difference in compare_outputs(self._before, after):
            self.records.append(
                NumericsRecord(
                    rewrite.name,
                    difference.name,
                    difference.max_abs,
                    difference.max_rel,
                    difference.sqnr_db,
                )
            )
            _judge(rewrite, difference, self._epsilon)
        self._before = after

    def on_failure(self, rewrite: Pass, error: BaseException) -> str | None:
        """Add nothing."""
        return None

    def _run(self, model: ir.Model) -> dict[str, npt.NDArray[Any]]:
        model = emulated(model) if has_narrow_floats(model) else model
        with open_session(model, optimize=False, custom_op_libraries=self._libraries) as session:
            return session.run(session.fitting(self._feeds))


def _coarsest_epsilon(model: ir.Model) -> float:
    """Return the epsilon of the narrowest float type a model takes, holds or returns."""
    values = [*model.graph.inputs, *model.graph.outputs]
    for graph in model.graphs():
        values.extend(graph.initializers.values())
    return max((_EPSILON.get(value.dtype, 0.0) for value in values if value.dtype), default=0.0)


def _judge(rewrite: Pass, difference: OutputDifference, epsilon: float) -> None:
    if difference.spoiled:
        message = (
            f"makes {difference.spoiled} values of output {difference.name} NaN or infinite, "
            "which were finite before it"
        )
        raise ParityError(message, where=rewrite.label, hint=_HINT)
    allowed = {
        Numerics.EXACT: 0.0,
        Numerics.REORDERED: max(rewrite.tolerance or 0.0, _ROUNDINGS * epsilon),
        Numerics.LOSSY: float("inf"),
    }[rewrite.numerics]
    if difference.max_rel <= allowed:
        return
    message = (
        f"changes output {difference.name} by {difference.max_rel:.2e} of its largest value "
        f"(SQNR {difference.sqnr_db:.1f} dB), and declares itself {rewrite.numerics} "
        f"(at most {allowed:.1e})"
    )
    raise ParityError(message, where=rewrite.label, hint=_HINT)
