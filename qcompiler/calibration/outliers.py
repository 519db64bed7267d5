"""Which channels of an activation hold values so large that all others lose their resolution.

Transformers have them: a few channels that are tens of times larger than the rest on some tokens
(Dettmers et al. 2022, LLM.int8(), section 3). One scale for the whole tensor is then as coarse as
these few need. Kept in float, as that paper does, they cost one column each of the product.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

_DECIBELS_PER_CHANNEL: Final = 1.0
"""What a channel must gain to be taken out."""
_LEAST_GAIN: Final = 4.0
"""What all of them must gain beyond that: a second product and an Add are not for free."""
_LARGEST_SHARE: Final = 16
"""At most one channel in so many."""


def outlier_channels(
    minimum: npt.NDArray[Any], maximum: npt.NDArray[Any], limit: int
) -> tuple[int, ...]:
    """Choose the channels to leave in float.

    Without its k largest channels a tensor has the range of the others; rounding noise falls with
    the square of the range. The k with the best gain is chosen, each channel weighed at 1 dB.

    Args:
        minimum: `[channels]`, the smallest value of each.
        maximum: `[channels]`, the largest value of each.
        limit: The most channels to choose.

    Returns:
        Ascending channel numbers; none where the gain is below 4 dB.
    """
    lows, highs = np.minimum(minimum, 0.0), np.maximum(maximum, 0.0)
    order = np.argsort(-np.maximum(highs, -lows), kind="stable")
    most = min(limit, len(order) // _LARGEST_SHARE)
    whole = float(highs.max(initial=0.0) - lows.min(initial=0.0))
    best, chosen = _LEAST_GAIN, 0
    for count in range(1, most + 1):
        rest = order[count:]
        width = float(highs[rest].max() - lows[rest].min())
        if width <= 0.0:
            break
        gain = 20 * np.log10(whole / width) - _DECIBELS_PER_CHANNEL * count
        if gain > best:
            best, chosen = gain, count
    return tuple(sorted(int(channel) for channel in order[:chosen]))
