"""The threshold of entropy calibration.

Defined by S. Migacz, "8-bit Inference with TensorRT" (GTC 2017), and followed by ONNX Runtime's
entropy calibration: of a histogram of magnitudes with uniform bins, take the first i. The reference
P is these bins with everything beyond them added to the last; the candidate Q is the same bins,
without what is beyond, merged into as many groups as there are codes and spread evenly over the
bins of a group that are not empty. The i of least KL(P || Q) is chosen, and its upper end is the
threshold.

Here Q is never built: within a group it is constant, so that the divergence needs only the sums of
groups. Not every i is tried. Zeros are left out: every grid has them, so they say nothing about
the range.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.histogram import F64, Histogram

_BINS: Final = 2048
_EMPTY: Final = 2.0**-48
"""Share of all values below which a count is what rounding left."""
_LENGTHS: Final = 480
"""About how many lengths i are tried, of those from the number of codes to all bins."""


def entropy_threshold(histogram: Histogram, codes: int) -> float:
    """Return the magnitude to clip at.

    Args:
        histogram: Of the values.
        codes: How many codes there are for magnitudes, such as 128 for int8.

    Returns:
        At most the largest magnitude; that itself when nothing speaks for less.
    """
    largest = max(-histogram.minimum, histogram.maximum)
    counts = _magnitudes(histogram, largest)
    stride = max(1, (_BINS - codes) // _LENGTHS)
    lengths = np.arange(_BINS, codes - 1, -stride)[::-1]
    if not len(lengths) or not counts.any():
        return largest
    best = int(lengths[np.argmin(_divergences(counts, lengths, codes))])
    return largest * best / _BINS


def _magnitudes(histogram: Histogram, largest: float) -> F64:
    """Return the counts of magnitudes above 0 in uniform bins; a bin is spread where it is wide."""
    lower, upper = histogram.edges
    counts = histogram.counts
    positive, negative = upper > 0, lower < 0
    return _uniform(lower[positive], upper[positive], counts[positive], largest) + _uniform(
        -upper[negative][::-1], -lower[negative][::-1], counts[negative][::-1], largest
    )


def _uniform(lower: F64, upper: F64, counts: npt.NDArray[np.int64], largest: float) -> F64:
    """Return the counts of ascending, disjoint bins in uniform ones."""
    if not len(counts):
        return np.zeros(_BINS)
    up_to = np.cumsum(counts).astype(np.float64)
    places = np.stack([lower, upper], axis=1).ravel()
    heights = np.stack([up_to - counts, up_to], axis=1).ravel()
    at_edges = np.interp(np.linspace(0, largest, _BINS + 1), places, heights)
    at_edges[0] = 0.0
    result: F64 = np.diff(at_edges)
    return np.where(result > _EMPTY * up_to[-1], result, 0.0)


def _divergences(counts: F64, lengths: npt.NDArray[np.int64], codes: int) -> F64:
    """Return KL(P || Q) for each length, infinite where Q has nothing at P's last bin."""
    mass = np.concatenate([[0.0], np.cumsum(counts)])
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    terms = np.concatenate([[0.0], np.cumsum(_x_log_x(counts))])
    total, inside = mass[-1], mass[lengths]
    last = counts[lengths - 1]
    beyond = total - inside
    # Σ P log P, where the last bin also holds what is beyond.
    own = terms[lengths - 1] + _x_log_x(last + beyond)
    bounds = lengths[:, None] * np.arange(codes + 1) // codes
    sums = np.diff(mass[bounds], axis=1)
    spread = np.diff(filled[bounds], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(sums > 0, np.log(sums / spread), 0.0)
        cross = np.add.reduce(sums * logs, axis=1) + beyond * logs[:, -1]
        result = own - total * np.log(total) - cross + total * np.log(inside)
    return np.where((last > 0) | (beyond <= 0), result, np.inf)


def _x_log_x(values: F64) -> F64:
    return values * np.log(np.where(values > 0, values, 1.0))
