"""The ops that PyTorch runs, one small function each, grouped by kind."""

from qcompiler.execution.torch.op_table import OpIndex
from qcompiler.execution.torch.ops import (
    constants,
    control_flow,
    products,
    quantization,
)

OPS = OpIndex(module.TABLE for module in (constants, control_flow, products, quantization))
"""Every op there is a function for."""
