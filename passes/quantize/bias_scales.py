"""How small the scales of a weight may be for its op's bias to fit 32 bits."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompiler.ir.dataflow import constant_of, is_op
from qcompiler.ir.quantizable import Site
from qcompiler.ir.weights import read_all

_LARGEST_CODE: Final = 2.0**30
"""Half of what 32 bits hold: the other half is for the sum of products."""


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
    node, row = site.node, site.row
    if row.bias is None or row.data is None or len(node.inputs) <= row.bias:
        return None
    bias, data = constant_of(node.inputs[row.bias]), node.inputs[row.data]
    dequantize = data.producer() if data is not None else None
    if bias is None or dequantize is None or not is_op(dequantize, "DequantizeLinear"):
        return None
    scale = constant_of(dequantize.inputs[1])
    if scale is None or scale.size != 1:
        return None
    beta = node.attributes.get("beta")
    factor = 1.0 if beta is None else abs(beta.as_float())
    values: npt.NDArray[Any] = np.abs(read_all(bias).astype(np.float64)).reshape(-1) * factor
    step = float(read_all(scale).astype(np.float64).reshape(-1)[0])
    least = values / (step * _LARGEST_CODE)
    return np.broadcast_to(least, (site.outputs,)).astype(np.float32)
