"""Finding the few sizes that do not belong with the others, first coarsely, then finely.

Coarse: what lies beyond the upper quartile by 1.5 times the distance of the quartiles. Fine: among
these, the cut that leaves the widest gap and the most even rest (Ding et al. 2023, CBQ,
arXiv 2312.07950, coarse-to-fine pre-processing).
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

_FENCE: Final = 1.5
"""Distances of the quartiles that a candidate lies beyond the upper one."""
_EVENNESS: Final = 1.0
"""What the variance of the candidates that stay counts, beside the squared gap."""
_ROWS: Final = 256
"""Rows that are sorted at once."""


def ordinary_limit(sizes: npt.NDArray[Any]) -> float:
    """Return the largest size that is no outlier; infinity where there are no outliers.

    Worked example: of 98 sizes up to 1.0 and two of 50.0 the limit is 1.0. Gap and variance are
    compared in units of the candidates' median, since one is a square of the other's unit.

    Args:
        sizes: `[n]`, not negative, n at least 1.
    """
    return float(row_limits(np.asarray(sizes)[np.newaxis])[0])


def row_limits(matrix: npt.NDArray[Any]) -> F64:
    """Return `ordinary_limit` of the sizes of each row.

    Args:
        matrix: `[rows, n]`, of either sign.
    """
    found = np.full(len(matrix), np.inf)
    for start in range(0, len(matrix), _ROWS):
        part = np.sort(np.abs(matrix[start : start + _ROWS].astype(np.float64)), axis=1)
        lower, upper = np.quantile(part, [0.25, 0.75], axis=1)
        fence = upper + _FENCE * (upper - lower)
        first = (part <= fence[:, np.newaxis]).sum(axis=1)
        for row in np.flatnonzero(first < part.shape[1]):
            found[start + row] = _limit_among(part[row, first[row] - 1 :])
    return found


def _limit_among(sizes: F64) -> float:
    """Return where to cut sizes in ascending order, the first of which is no candidate."""
    candidates = sizes[1:]
    scaled = sizes / (np.median(candidates) or 1.0)
    gaps = np.square(np.diff(scaled))
    # Variance of the candidates below each cut; none, and one alone, have none.
    count = np.maximum(np.arange(len(candidates)), 1)
    total = np.concatenate([[0.0], np.cumsum(scaled[1:-1])])
    squares = np.concatenate([[0.0], np.cumsum(np.square(scaled[1:-1]))])
    spread = np.maximum(squares / count - np.square(total / count), 0.0)
    return float(sizes[int(np.argmax(gaps - _EVENNESS * spread))])
