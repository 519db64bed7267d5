"""How far two runs of a model are apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.errors import ParityError

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """How far one output is from its reference.

    Attributes:
        name: Name of the output.
        max_abs: Largest `|reference - other|`.
        max_rel: `max_abs / max|reference|`.
        sqnr_db: `10 log10(sum reference^2 / sum (reference - other)^2)`; infinite where equal.
        spoiled: How many elements are finite in the reference and are not any more.
    """

    name: str
    max_abs: float
    max_rel: float
    sqnr_db: float
    spoiled: int = 0


def compare_outputs(
    reference: Mapping[str, Array], other: Mapping[str, Array]
) -> tuple[OutputDifference, ...]:
    """Compare two sets of outputs, in the reference's order.

    Numbers are compared in float64. NaN equals NaN and an infinity equals itself; where one side
    only is NaN or infinite, the difference is infinite. Outputs that are not numbers differ by 0
    or infinity.

    Raises:
        ParityError: The names or a shape differ.
    """
    if set(reference) != set(other):
        missing = sorted(set(reference) ^ set(other))
        message = f"the outputs {', '.join(missing)} exist on one side only"
        raise ParityError(message)
    return tuple(_compare(name, values, other[name]) for name, values in reference.items())


def _compare(name: str, reference: Array, other: Array) -> OutputDifference:
    reference, other = np.asarray(reference), np.asarray(other)
    if reference.shape != other.shape:
        message = f"the output has shapes {list(reference.shape)} and {list(other.shape)}"
        raise ParityError(message, where=name)
    if not _is_number(reference) or not _is_number(other):
        same = bool(np.array_equal(reference, other))
        far = 0.0 if same else np.inf
        return OutputDifference(name, far, far, _decibels(1.0, far))
    truth, value = reference.astype(np.float64), other.astype(np.float64)
    equal = (truth == value) | (np.isnan(truth) & np.isnan(value))
    with np.errstate(invalid="ignore"):
        error = np.where(equal, 0.0, np.abs(truth - value))
    if not np.all(np.isfinite(error)):
        spoiled = int(np.count_nonzero(np.isfinite(truth) & ~np.isfinite(value)))
        return OutputDifference(name, np.inf, np.inf, -np.inf, spoiled)
    finite = np.where(np.isfinite(truth), truth, 0.0)
    return OutputDifference(
        name,
        float(error.max(initial=0.0)),
        _ratio(float(error.max(initial=0.0)), float(np.abs(finite).max(initial=0.0))),
        _decibels(float(np.sum(finite**2)), float(np.sum(error**2))),
    )


def _is_number(values: Array) -> bool:
    return values.dtype != object and values.dtype.kind not in "US"


def _ratio(error: float, peak: float) -> float:
    if error == 0.0:
        return 0.0
    return error / peak if peak else np.inf


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return np.inf
    if noise == np.inf or signal == 0.0:
        return -np.inf
    return float(10 * np.log10(signal / noise))
