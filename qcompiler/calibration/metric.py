"""What a user demands of the outputs of a quantized model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import Feeds
from qcompiler.errors import QCompilerError, UsageError
from qcompiler.execution.sessions import open_session
from qcompiler.function_reference import import_function

Run = Callable[[Feeds], dict[str, npt.NDArray[Any]]]
"""Runs a model on one call's inputs; returns its outputs by name."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A user's measure of a model.

    Attributes:
        reference: `module:function`.
        function: Called with a `Run`; returns a number, higher is better, or one for each sample,
            whose mean counts.
    """

    reference: str
    function: Callable[[Run], Any]

    def of(self, model: ir.Model, custom_op_libraries: Sequence[Path] = ()) -> float:
        """Measure a model, which runs without the runtime's optimizations.

        Raises:
            UsageError: The user's function fails, or returns no finite number.
        """
        with open_session(
            model, optimize=False, custom_op_libraries=custom_op_libraries
        ) as session:
            return float(self.scores(session.run).mean())

    def scores(self, run: Run) -> npt.NDArray[np.float64]:
        """Measure whatever `run` runs; returns one score, or one for each sample, `[samples]`.

        Raises:
            UsageError: The user's function fails, or returns no finite numbers.
        """
        with users_metric(self.reference):
            found = np.atleast_1d(np.asarray(self.function(run), dtype=np.float64))
        if found.ndim != 1 or not found.size or not np.isfinite(found).all():
            shown = found.item() if found.size == 1 else found
            message = f"returned {shown}, and a metric is a finite number, or one for each sample"
            raise UsageError(message, where=f"--metric {self.reference}")
        return found


@dataclass(frozen=True, slots=True)
class OutputBound:
    """What must hold of a quantized model; at least one of the two is given.

    Attributes:
        min_sqnr_db: Least SQNR of every float output against the float model, in dB, or None.
        metric: A measure of the user's, or None.
        max_drop: By how much the metric may be below the float model's.
    """

    min_sqnr_db: float | None
    metric: Metric | None = None
    max_drop: float = 0.0

    @property
    def option(self) -> str:
        """The option that asks for it, as a user writes it."""
        if self.min_sqnr_db is not None:
            return f"--min-output-sqnr {self.min_sqnr_db:g}"
        return f"--max-metric-drop {self.max_drop:g}"


def output_bound(
    min_sqnr_db: float | None, metric: str | None, max_drop: float | None
) -> OutputBound | None:
    """Return the bound that options ask for, None where they ask for none.

    Raises:
        UsageError: They do not fit together, or the function does not exist.
    """
    if (metric is None) != (max_drop is None):
        message = "--metric and --max-metric-drop belong together"
        raise UsageError(message, hint="for example --metric my_eval:top1 --max-metric-drop 0.005")
    if max_drop is not None and not (isfinite(max_drop) and max_drop >= 0):
        message = f"{max_drop} is no drop: it must be 0 or more"
        raise UsageError(message, where="--max-metric-drop")
    if min_sqnr_db is not None and not isfinite(min_sqnr_db):
        message = f"{min_sqnr_db} is no number of decibels"
        raise UsageError(message, where="--min-output-sqnr")
    if min_sqnr_db is None and metric is None:
        return None
    return OutputBound(min_sqnr_db, None if metric is None else find_metric(metric), max_drop or 0)


@contextmanager
def users_metric(reference: str) -> Iterator[None]:
    """Turn whatever a user's function raises into a UsageError that names it."""
    try:
        yield
    except QCompilerError:
        raise
    except Exception as error:  # whatever the user's code raises
        message = f"failed with {type(error).__name__}: {error}"
        hint = "--traceback shows where in the function"
        raise UsageError(message, where=f"--metric {reference}", hint=hint) from error


def find_metric(reference: str) -> Metric:
    """Import `module:function` from the current folder or from where Python finds it.

    Raises:
        UsageError: There is no such function.
    """
    function = import_function(reference, where="--metric", example="my_evaluation:accuracy")
    return Metric(reference, function)
