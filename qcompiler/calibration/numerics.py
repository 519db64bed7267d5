"""`--verify numerics`: runs the model after every pass and names the first that is wrong."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.samples import Feeds
from qcompiler.errors import ParityError
from qcompiler.execution.outputs import OutputDifference, compare_outputs
from qcompiler.execution.sessions import open_session
from qcompiler.rewriting.base import Numerics, Pass, PassResult


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

    An EXACT pass must not change a bit, a REORDERED one must stay within its tolerance; the
    loss of a LOSSY one is recorded. Outputs must stay finite where they were.
    """

    def __init__(self, feeds: Feeds) -> None:
        self._feeds = feeds
        self._before: dict[str, np.ndarray] | None = None
        self.records: list[NumericsRecord] = []

    def before_pass(self, model: ir.Model, rewrite: Pass) -> None:
        """Run the model as it is, once, before the first pass."""
        if self._before is None:
            self._before = self._run(model)

    def after_pass(self, model: ir.Model, rewrite: Pass, result: PassResult) -> None:
        """Run the model again if the pass changed it, and compare.

        Raises:
            ParityError: The outputs differ by more than the pass declares.
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
            _judge(rewrite, difference)
        self._before = after

    def on_failure(self, rewrite: Pass, error: BaseException) -> str | None:
        """Add nothing."""
        return None

    def _run(self, model: ir.Model) -> dict[str, np.ndarray]:
        return open_session(model, optimize=False).run(self._feeds)


def _judge(rewrite: Pass, difference: OutputDifference) -> None:
    allowed = {
        Numerics.EXACT: 0.0,
        Numerics.REORDERED: rewrite.tolerance or 0.0,
        Numerics.LOSSY: float("inf"),
    }[rewrite.numerics]
    if difference.max_rel <= allowed:
        return
    message = (
        f"changes output {difference.name} by {difference.max_rel:.2e} of its largest value "
        f"(SQNR {difference.sqnr_db:.1f} dB), and declares itself {rewrite.numerics} "
        f"(at most {allowed:.0e})"
    )
    raise ParityError(message, where=f"pass {rewrite.name}", hint="see --dump-ir for both models")
