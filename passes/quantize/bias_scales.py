"""How small the scales of a weight may be for its op's bias to fit 32 bits."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qcompiler.ir.biases import LARGEST_CODE, bias_of, data_scale
from qcompiler.ir.quantizable import Site


def least_weight_scales(site: Site) -> npt.NDArray[np.float32] | None:
    """Return the least scale of each output channel, None where the bias sets no limit.

    Integer kernels add the bias as int32, in steps of the data's scale times the weight's. Where a
    channel's weights are all but zero these steps are so small that its bias overflows: ONNX
    Runtime 1.32 then returns results without it.

    Args:
        site: An op whose data is quantized, and its weight.

    Returns:
        float32 `[outputs]`; a larger scale costs the weights of such a channel precision that
        they do not need.
    """
    bias, step = bias_of(site.node), data_scale(site.node)
    if bias is None or step is None or len(bias.values) not in (1, site.outputs):
        return None
    least = np.abs(bias.values.astype(np.float64)) / (step * LARGEST_CODE)
    return np.broadcast_to(least, (site.outputs,)).astype(np.float32)


def least_shared_scales(sites: Sequence[Site]) -> npt.NDArray[np.float32] | None:
    """Return the same for a weight that several sites share: the largest of theirs."""
    found = [least for least in map(least_weight_scales, sites) if least is not None]
    return np.maximum.reduce(found) if found else None
