"""How large the typical values of an activation are, for a scale that must cover the largest."""

from typing import Any

import numpy as np
import numpy.typing as npt


def median_magnitude(
    values: npt.NDArray[Any], counts: npt.NDArray[np.int64] | None = None
) -> float:
    """Return the median of the magnitudes of values that are not zero; inf where there is none.

    Zeros do not count, since every scale represents them exactly: of what a Relu returns most may
    be zero, and the others large.

    Args:
        values: The values, of any shape, float; with `counts`, each different one once.
        counts: `[n]`, how many there are of each of `[n]` values.
    """
    size = np.abs(values).reshape(-1)
    if counts is None:
        size = size[size > 0]
        return float(np.median(size)) if size.size else float("inf")
    order = np.argsort(size, kind="stable")
    below = np.cumsum(np.where(size > 0, counts, 0)[order])
    if not below.size or below[-1] == 0:
        return float("inf")
    return float(size[order][np.searchsorted(below, below[-1] / 2)])
