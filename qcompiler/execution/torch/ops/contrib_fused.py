"""Fused and early float ops of ONNX Runtime (its `ContribOperators.md`)."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.ops.constants import range_
from qcompiler.execution.torch.ops.convolution import conv
from qcompiler.execution.torch.ops.moving import comparable, moves_elements, take
from qcompiler.execution.torch.ops.products import gemm
from qcompiler.execution.torch.ops.shapes import trilu

TABLE = OpTable("com.microsoft")
Activation = Callable[[Tensor], Tensor]

_PLAIN: Final[Mapping[str, Activation]] = {
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Softsign": functional.softsign,
    "Tanh": torch.tanh,
    "HardSwish": functional.hardswish,
}
"""Activations without parameters."""
_PARAMETERS: Final[Mapping[str, int]] = {"LeakyRelu": 1, "HardSigmoid": 2, "Clip": 2}
"""How many parameters an activation of a FusedConv has."""


@TABLE.op("FusedMatMul")
def fused_matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Return `alpha * A' @ B'`.

    `transBatchA` moves the first axis to just before the last, `transA` then swaps the last two;
    vectors are left as they are.
    """
    alpha = call.number("alpha", 1.0)
    product = torch.matmul(_turned(call, a, "A"), _turned(call, b, "B"))
    return product if alpha == 1.0 else product * alpha


def _turned(call: Call, x: Tensor, name: str) -> Tensor:
    if x.dim() == 1:
        return x
    if call.integer(f"transBatch{name}", 0):
        x = x.movedim(0, -2)
    return x.mT if call.integer(f"trans{name}", 0) else x


@TABLE.op("FusedGemm")
def fused_gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Return an activation of `alpha * A' @ B' + beta * C`."""
    return _gemm_activation(call)(gemm(call, a, b, c))


def _gemm_activation(call: Call) -> Activation:
    name = call.text("activation", "")
    alpha = call.number("activation_alpha", 1.0)
    if name in _PLAIN and name != "HardSwish":
        return _PLAIN[name]
    if name == "LeakyRelu":
        slope = call.number("activation_alpha", 0.01)
        return lambda x: functional.leaky_relu(x, slope)
    if name in ("Elu", "Celu"):
        elu = functional.elu if name == "Elu" else functional.celu
        return lambda x: elu(x, alpha)
    if name == "ThresholdedRelu":
        return lambda x: functional.threshold(x, alpha, 0.0)
    if name == "HardSigmoid":
        parts = call.number("activation_alpha", 0.2), call.number("activation_beta", 0.5)
        return lambda x: (x * parts[0] + parts[1]).clamp(0, 1)
    reason = f"activation {name!r} is not supported"
    raise call.refuse(reason)


@TABLE.op("FusedConv")
def fused_conv(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None, summand: Tensor | None = None
) -> Tensor:
    """Return an activation of the sum of a convolution and, if given, a tensor of its shape."""
    result = conv(call, x, weight, bias)
    return _conv_activation(call)(result if summand is None else result + summand)


def _conv_activation(call: Call) -> Activation:
    name = call.text("activation", "none")
    values = call.numbers("activation_params", [])
    if not call.has("activation"):
        return lambda x: x
    if name in _PLAIN and name != "Softsign":
        return _PLAIN[name]
    if len(values) == _PARAMETERS.get(name):
        if name == "LeakyRelu":
            return lambda x: functional.leaky_relu(x, values[0])
        if name == "HardSigmoid":
            return lambda x: (x * values[0] + values[1]).clamp(0, 1)
        return lambda x: x.clamp(*values)
    reason = f"activation {name!r} with {len(values)} parameters is not supported"
    raise call.refuse(reason)


@TABLE.op("Gelu", "BiasGelu")
def gelu(_call: Call, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x + bias` times the normal distribution's function of it."""
    return functional.gelu(x if bias is None else x + bias)


@TABLE.op("FastGelu")
def fast_gelu(_call: Call, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the approximation of GELU by tanh, of `x + bias`."""
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


@TABLE.op("QuickGelu")
def quick_gelu(call: Call, x: Tensor) -> Tensor:
    """Return `x * sigmoid(alpha * x)`."""
    alpha = call.number("alpha", 1.702)
    return functional.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@TABLE.op("BiasSplitGelu")
def bias_split_gelu(_call: Call, x: Tensor, bias: Tensor) -> Tensor:
    """Return the left half of `x + bias` times the GELU of its right half, [N, S, D / 2]."""
    left, right = (x + bias).chunk(2, dim=-1)
    return left * functional.gelu(right)


@TABLE.op("BiasAdd")
def bias_add(_call: Call, x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """Return `x + bias + skip`."""
    return x + bias + skip


@TABLE.op("BiasSoftmax")
def bias_softmax(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    """Return the softmax of `x + bias` over all axes from `axis` on.

    `is_inner_broadcast` only tells which axes of the bias are of one element. ONNX broadcasts it
    either way, so a bias whose shape leaves a choice is refused.
    """
    if bias.dim() not in (x.dim(), 0) and call.integer("is_inner_broadcast"):
        reason = f"is_inner_broadcast with a bias of {bias.dim()} axes for {x.dim()} of the scores"
        raise call.refuse(reason)
    scores = x + bias
    axis = call.integer("axis", 1) % x.dim()
    if axis == x.dim() - 1:
        return functional.softmax(scores, dim=-1)
    return functional.softmax(scores.flatten(axis), dim=-1).reshape(scores.shape)


@TABLE.op("Inverse")
def inverse(_call: Call, x: Tensor) -> Tensor:
    """Return the inverse of every matrix of [..., N, N]."""
    exact = torch.promote_types(x.dtype, torch.float32)
    result: Tensor = torch.linalg.inv(x.to(exact))
    return result.to(x.dtype)


@TABLE.op("ExpandDims", host=(1,), all_types=True)
@moves_elements()
def expand_dims(_call: Call, x: Tensor, axis: Tensor) -> Tensor:
    """Return x with an axis of one element, counted from the end of the result if negative."""
    return x.unsqueeze(int(axis.item()))


@TABLE.op("Range", host=(0, 1, 2))
def sequence(call: Call, start: Tensor, limit: Tensor, delta: Tensor | None = None) -> Tensor:
    """Return `start + i * delta` for every i that stays short of `limit`; delta is 1 if absent."""
    step = torch.ones_like(start) if delta is None else delta
    if not step.item():
        reason = "delta is zero"
        raise call.refuse(reason)
    result: Tensor = range_(call, start, limit, step)
    return result


@TABLE.op("Unique", all_types=True)
def unique(_call: Call, x: Tensor) -> tuple[object, Tensor, Tensor]:
    """Return the distinct elements in the order they occur, who has which, and counts."""
    _, places, counts = torch.unique(comparable(x), return_inverse=True, return_counts=True)
    steps = torch.arange(places.numel(), device=places.device)
    # PyTorch sorts them, and does not tell where each came first.
    first = torch.zeros_like(counts).scatter_reduce(0, places, steps, "amin", include_self=False)
    order = first.argsort()
    return take(x, first[order], 0), order.argsort()[places], counts[order]


TABLE.op("Trilu", host=(1,), all_types=True)(trilu)
