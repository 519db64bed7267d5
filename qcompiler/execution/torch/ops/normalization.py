"""Normalizations (ONNX operators, `Operators.md`)."""

import math
from typing import Final

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable

TABLE = OpTable()
_PARAMETERS_PER_CHANNEL: Final = 21
"""Opset from which GroupNormalization has a scale per channel; before, it had one per group."""


@TABLE.op("BatchNormalization", since=7)
def batch_normalization(
    call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor | tuple[Tensor, ...]:
    """Return `scale * (x - mean) / sqrt(variance + epsilon) + bias`, per channel.

    In training mode, mean and variance are the batch's own, and running ones are returned too.
    """
    if call.integer("training_mode", 0):
        return _normalize_batch(call, x, scale, bias, mean, variance)
    if any(call.wants(output) for output in range(1, call.outputs)):
        reason = "it trains, which opsets before 14 do not define well enough to run"
        raise call.refuse(reason)
    if not call.integer("spatial", 1):
        # One set of parameters per element of a sample.
        exact = torch.promote_types(x.dtype, torch.float32)
        inverse = (variance.to(exact) + call.number("epsilon", 1e-5)).rsqrt()
        return ((x - mean) * inverse * scale + bias).to(x.dtype)
    return _normalize(call, x, scale, bias, mean, variance)


@TABLE.op("BatchNormalization")
def first_batch_normalization(
    call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    """Return the same; before opset 7, `is_test` tells that nothing trains."""
    if not call.integer("is_test", 0):
        reason = "it trains (is_test is 0)"
        raise call.refuse(reason)
    result: Tensor = batch_normalization(call, x, scale, bias, mean, variance)
    return result


@TABLE.op("InstanceNormalization")
def instance_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return every channel of every sample with mean 0 and variance 1, scaled and shifted."""
    # PyTorch's function refuses one element a channel, where the variance is zero.
    if math.prod(x.shape[2:]) == 1:
        return bias.reshape(1, -1, *[1] * (x.dim() - 2)).expand(x.shape) + 0 * x
    return functional.instance_norm(x, weight=scale, bias=bias, eps=call.number("epsilon", 1e-5))


@TABLE.op("LayerNormalization", since=17)
def layer_normalization(
    call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Return x with mean 0 and variance 1 over the axes from `axis` on, scaled and shifted.

    The further outputs, mean and 1 / standard deviation, are in the type that `stash_type` names;
    whatever that is, float32 and float64 are computed in their own precision.
    """
    first = call.integer("axis", -1) % x.dim()
    epsilon = call.number("epsilon", 1e-5)
    shape = x.shape[first:]
    if scale.shape == shape and (bias is None or bias.shape == shape):
        y = functional.layer_norm(x, shape, scale, bias, epsilon)
    else:
        y = functional.layer_norm(x, shape, None, None, epsilon) * scale
        y = y if bias is None else y + bias
    if not (call.wants(1) or call.wants(2)):
        return y
    stash = call.elements.of(call.element_type("stash_type", ir.DataType.FLOAT))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    axes = tuple(range(first, x.dim()))
    variance, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
    return y, mean.to(stash), (variance + epsilon).rsqrt().to(stash)


@TABLE.op("GroupNormalization", since=18)
def group_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return x with mean 0 and variance 1 over each group of channels, scaled and shifted."""
    groups = call.integer("num_groups")
    if call.version < _PARAMETERS_PER_CHANNEL:
        channels = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(channels), bias.repeat_interleave(channels)
    return functional.group_norm(x, groups, scale, bias, call.number("epsilon", 1e-5))


@TABLE.op("RMSNormalization", since=23)
def rms_normalization(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    """Return x divided by its root mean square over the axes from `axis` on, and scaled."""
    shape = x.shape[call.integer("axis", -1) % x.dim() :]
    epsilon = call.number("epsilon", 1e-5)
    if scale.shape == shape and scale.dtype == x.dtype:
        return functional.rms_norm(x, shape, scale, epsilon)
    return (functional.rms_norm(x, shape, None, epsilon) * scale).to(scale.dtype)


@TABLE.op("LRN")
def lrn(call: Call, x: Tensor) -> Tensor:
    """Return `x / (bias + alpha / size * sum of squares of the channels around) ** beta`."""
    size = call.integer("size")
    before, after = (size - 1) // 2, size // 2
    squares = functional.pad((x * x).reshape(x.shape[0], 1, x.shape[1], -1), (0, 0, before, after))
    means = functional.avg_pool2d(squares, (size, 1), stride=1).reshape(x.shape)
    divisor = call.number("bias", 1.0) + call.number("alpha", 1e-4) * means
    return x / divisor ** call.number("beta", 0.75)


@TABLE.op("LpNormalization")
def lp_normalization(call: Call, x: Tensor) -> Tensor:
    """Return x divided by its 1-norm or 2-norm along an axis; zero where that is zero."""
    order, axis = call.integer("p", 2), call.integer("axis", -1)
    norm: Tensor = torch.linalg.vector_norm(x, order, axis, keepdim=True)
    return x / norm.masked_fill(norm == 0, 1)


@TABLE.op("MeanVarianceNormalization", since=9)
def mean_variance_normalization(call: Call, x: Tensor) -> Tensor:
    """Return x with mean 0 and variance 1 over some axes."""
    axes = call.integers("axes", [0, 2, 3])
    centred = x - x.mean(axes, keepdim=True)
    # A norm, unlike the square root of a variance, has a gradient where all elements are equal.
    norm: Tensor = torch.linalg.vector_norm(centred, 2, axes, keepdim=True)
    elements = math.prod(x.shape[axis] for axis in axes)
    # The op is a function of others, and this is its constant.
    return centred / (norm / math.sqrt(elements) + 1e-9)


def _normalize(
    call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    epsilon = call.number("epsilon", 1e-5)
    parameters = (scale, bias, mean, variance)
    is_live = torch.is_grad_enabled() and (mean.requires_grad or variance.requires_grad)
    if not is_live and len({each.dtype for each in parameters}) == 1:
        return functional.batch_norm(x, mean, variance, scale, bias, eps=epsilon)
    # PyTorch's function has no gradient to the statistics.
    exact = torch.promote_types(x.dtype, torch.float32)
    shape = (-1, *[1] * (x.dim() - 2))
    factor = scale.to(exact) * (variance.to(exact) + epsilon).rsqrt()
    shift = bias.to(exact) - mean.to(exact) * factor
    return (x.to(exact) * factor.reshape(shape) + shift.reshape(shape)).to(x.dtype)


def _normalize_batch(
    call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    axes = (0, *range(2, x.dim()))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    own_variance, own_mean = torch.var_mean(wide, axes, correction=0)
    y = _normalize(call, x, scale, bias, own_mean, own_variance)
    momentum = call.number("momentum", 0.9)
    new_mean = mean * momentum + own_mean * (1 - momentum)
    new_variance = variance * momentum + own_variance * (1 - momentum)
    return y, new_mean.to(mean.dtype), new_variance.to(variance.dtype)
