"""Scales that divide the channels of an activation and multiply those of a weight.

Dividing channel i of an activation by s[i] and multiplying channel i of the weights behind it
changes no product, and moves range from one to the other. All functions work on ranges per
channel; which channels they are is not their business.
"""

from enum import StrEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from qcompiler.quant.outlier_detection import ordinary_limit

F64 = npt.NDArray[np.float64]

LARGEST_SCALE: Final = 1e3
"""Scales are kept between this and its reciprocal."""
ALPHAS: Final = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of the activation's range that are tried."""
EXPONENTS: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Exponents that are tried for weights alone."""


EXPONENTS_OF_OUTLIERS: Final = (0.5, 0.7)
"""Those that are tried for channels that are outliers: the paper's, and that of its authors' tool
(Huawei msModelSlim)."""
EXPONENTS_OF_DATA: Final = (0.7,)
"""Those of them that are tried where the data is rounded too: what is typical of a channel then
decides, and a channel that is large on few tokens may stay in float."""


class EqualizationMethod(StrEnum):
    """How the scales of a group of channels are chosen."""

    AUTO = "auto"
    """Each of the others, and no scale at all; what leaves the smallest output error on samples
    that chose nothing is taken."""
    AWEQ = "aweq"
    """The closed form for asymmetric ranges, `sqrt((max x - min x) / (max w - min w))`
    (Li et al. 2023, arXiv 2311.01305)."""
    SMOOTHQUANT = "smoothquant"
    """`max|x|^alpha / max|w|^(1 - alpha)` with a given alpha (Xiao et al. 2022, arXiv 2211.10438).
    With alpha 0.5 and symmetric ranges AWEQ is the same."""
    SMOOTHQUANT_SEARCHED = "smoothquant-searched"
    """The same with the alpha of least output error, group by group."""
    CFP = "cfp"
    """`sqrt(max|x| / limit)` for channels beyond the limit of ordinary ones, 1 for all others
    (coarse-to-fine pre-processing; Ding et al. 2023, CBQ, arXiv 2312.07950); weights beyond such a
    limit are cut off. Nothing is taken that does not leave a smaller output error."""
    AWQ = "awq"
    """`mean|x|^a` with the exponent of least output error, made for weights alone (Lin et al. 2023,
    arXiv 2306.00978)."""


class InsertMul(StrEnum):
    """Where a Mul may be put in front of ops whose data no constant can scale."""

    NEVER = "never"
    NORMS = "norms"
    """Behind a norm whose weight was folded into the ops that read it: it gets one again."""
    ALWAYS = "always"


def balanced_scales(activation: F64, weight: F64, alpha: float = 0.5) -> F64:
    """Return `activation^alpha / weight^(1 - alpha)`, guarded.

    With alpha 0.5 both sides end with the same range in every channel, which makes the product of
    the two largest ranges as small as it can be: for any scales it is at least the largest product
    `activation[i] * weight[i]`, and here it is that.

    Args:
        activation: `[channels]` ranges, or magnitudes, of the activation.
        weight: `[channels]` the same of all weights that multiply it, the largest of them.
        alpha: How much of the activation's range goes over to the weights.

    Returns:
        `[channels]` scales: what to divide the activation by.
    """
    free = (activation > 0) & (weight > 0) & np.isfinite(activation) & np.isfinite(weight)
    scales = np.ones_like(activation)
    scales[free] = activation[free] ** alpha / weight[free] ** (1 - alpha)
    return guarded(scales, free)


def salience_scales(magnitude: F64, exponent: float) -> F64:
    """Return `magnitude^exponent`, guarded.

    Args:
        magnitude: `[channels]` mean magnitudes of the activation.
        exponent: 0 to 1.

    Returns:
        `[channels]` scales.
    """
    free = (magnitude > 0) & np.isfinite(magnitude)
    scales = np.ones_like(magnitude)
    scales[free] = magnitude[free] ** exponent
    return guarded(scales, free)


def outlier_scales(magnitude: F64, exponent: float) -> F64:
    """Return `(magnitude / limit)^exponent` of channels beyond the limit, and exactly 1 of others.

    Args:
        magnitude: `[channels]` largest magnitudes of the activation.
        exponent: 0 to 1.

    Returns:
        `[channels]` scales, from 1 to `LARGEST_SCALE`.
    """
    scales = np.ones_like(magnitude)
    free = np.isfinite(magnitude) & (magnitude > 0)
    if np.any(free):
        limit = ordinary_limit(magnitude[free])
        beyond = free & (magnitude > limit)
        if limit > 0:
            scales[beyond] = (magnitude[beyond] / limit) ** exponent
    return np.minimum(scales, LARGEST_SCALE)


def guarded(scales: F64, free: npt.NDArray[np.bool_]) -> F64:
    """Divide scales by their geometric mean and keep them within 1/1000 to 1000.

    A common factor changes no quantization error, and would only take the constants that absorb
    it towards the end of a half type's range.

    Args:
        scales: `[channels]`, positive.
        free: Which of them count; the others become 1.
    """
    if not np.any(free):
        return np.ones_like(scales)
    result = np.ones_like(scales)
    result[free] = scales[free] / np.exp(np.mean(np.log(scales[free])))
    return np.clip(result, 1 / LARGEST_SCALE, LARGEST_SCALE)


def powers_of_two(scales: F64) -> F64:
    """Return the nearest powers of two: multiplying by them rounds nothing."""
    return np.exp2(np.rint(np.log2(scales)))
