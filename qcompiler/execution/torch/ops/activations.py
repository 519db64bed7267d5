"""Activation functions, softmax, dropout (ONNX operators, `Operators.md`)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable

TABLE = OpTable()


@TABLE.op("Relu")
def relu(_call: Call, x: Tensor) -> Tensor:
    """Return `max(x, 0)`."""
    return torch.relu(x)


@TABLE.op("LeakyRelu")
def leaky_relu(call: Call, x: Tensor) -> Tensor:
    """Return x, or `alpha * x` below zero."""
    return functional.leaky_relu(x, call.number("alpha", 0.01))


@TABLE.op("Elu")
def elu(call: Call, x: Tensor) -> Tensor:
    """Return x, or `alpha * (exp(x) - 1)` below zero."""
    return functional.elu(x, call.number("alpha", 1.0))


@TABLE.op("Celu", since=12)
def celu(call: Call, x: Tensor) -> Tensor:
    """Return x, or `alpha * (exp(x / alpha) - 1)` below zero."""
    return functional.celu(x, call.number("alpha", 1.0))


@TABLE.op("Selu")
def selu(call: Call, x: Tensor) -> Tensor:
    """Return `gamma * elu(x, alpha)`."""
    # The defaults are float32 numbers in ONNX.
    alpha = call.number("alpha", 1.67326319217681884765625)
    return functional.elu(x, alpha) * call.number("gamma", 1.05070102214813232421875)


@TABLE.op("Gelu", since=20)
def gelu(call: Call, x: Tensor) -> Tensor:
    """Return x times the normal distribution's function of x, or its approximation by tanh."""
    approximate = call.text("approximate", "none")
    if approximate not in ("none", "tanh"):
        reason = f"approximate is {approximate!r}, not none or tanh"
        raise call.refuse(reason)
    return functional.gelu(x, approximate=approximate)


@TABLE.op("Sigmoid")
def sigmoid(_call: Call, x: Tensor) -> Tensor:
    """Return `1 / (1 + exp(-x))`."""
    return torch.sigmoid(x)


@TABLE.op("HardSigmoid")
def hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    """Return `alpha * x + beta`, limited to [0, 1]."""
    line = x * call.number("alpha", 0.2) + call.number("beta", 0.5)
    return line.clamp(0, 1)


@TABLE.op("HardSwish", since=14)
def hard_swish(_call: Call, x: Tensor) -> Tensor:
    """Return `x * hard_sigmoid(x)` with alpha 1/6 and beta 0.5."""
    return functional.hardswish(x)


@TABLE.op("Softplus")
def softplus(_call: Call, x: Tensor) -> Tensor:
    """Return `log(1 + exp(x))`."""
    # PyTorch returns x beyond the threshold; past 40 that is exact in float64.
    return functional.softplus(x, threshold=40)


@TABLE.op("Softsign")
def softsign(_call: Call, x: Tensor) -> Tensor:
    """Return `x / (1 + |x|)`."""
    return functional.softsign(x)


@TABLE.op("Swish", since=24)
def swish(call: Call, x: Tensor) -> Tensor:
    """Return `x * sigmoid(alpha * x)`."""
    alpha = call.number("alpha", 1.0)
    return functional.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@TABLE.op("SwiGLU", since=28)
def swiglu(call: Call, gate: Tensor, value: Tensor) -> Tensor:
    """Return `swish(gate) * value`; both have the same shape."""
    if gate.shape != value.shape:
        reason = f"shapes {list(gate.shape)} and {list(value.shape)} differ"
        raise call.refuse(reason)
    gated: Tensor = swish(call, gate)
    return gated * value


@TABLE.op("Mish", since=18)
def mish(_call: Call, x: Tensor) -> Tensor:
    """Return `x * tanh(softplus(x))`."""
    return functional.mish(x)


@TABLE.op("PRelu")
def prelu_by_channel(_call: Call, x: Tensor, slope: Tensor) -> Tensor:
    """Return x, or `slope * x` below zero; one slope, or one per index of axis 1."""
    after = 0 if slope.numel() == 1 else x.dim() - 2
    return torch.where(x < 0, x * slope.reshape([-1, *[1] * after]), x)


@TABLE.op("PRelu", since=7)
def prelu(_call: Call, x: Tensor, slope: Tensor) -> Tensor:
    """Return x, or `slope * x` below zero; the slope is broadcast to x."""
    if slope.numel() == 1 and x.is_floating_point():
        return functional.prelu(x, slope.reshape(1))
    return torch.where(x < 0, x * slope, x)


@TABLE.op("ThresholdedRelu", since=10)
def thresholded_relu(call: Call, x: Tensor) -> Tensor:
    """Return x where it is above alpha, zero elsewhere."""
    return functional.threshold(x, call.number("alpha", 1.0), 0.0)


@TABLE.op("Shrink", since=9)
def shrink(call: Call, x: Tensor) -> Tensor:
    """Return `x + bias` below -lambd, `x - bias` above lambd, zero between."""
    bias, limit = call.number("bias", 0.0), call.number("lambd", 0.5)
    outer = torch.where(x > limit, x - bias, torch.zeros_like(x))
    return torch.where(x < -limit, x + bias, outer).to(x.dtype)


def _hardmax(x: Tensor, dim: int) -> Tensor:
    """Return one at the first largest element, zero elsewhere."""
    largest = x.argmax(dim, keepdim=True)
    return torch.zeros_like(x).scatter(dim, largest, 1.0)


def _normalize(function: Callable[..., Tensor], call: Call, x: Tensor) -> Tensor:
    """Apply a softmax along one axis (opset 13 on)."""
    return function(x, dim=call.integer("axis", -1))


def _normalize_rest(function: Callable[..., Tensor], call: Call, x: Tensor) -> Tensor:
    """Apply a softmax over all axes from one on (before opset 13)."""
    axis = call.integer("axis", 1)
    if axis < 0:
        axis += x.dim()
    if axis == x.dim() - 1:
        return function(x, dim=-1)
    rows = x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
    return function(rows, dim=1).reshape(x.shape)


_SOFTMAXES: dict[str, Callable[..., Any]] = {
    "Softmax": functional.softmax,
    "LogSoftmax": functional.log_softmax,
    "Hardmax": _hardmax,
}
for _name, _function in _SOFTMAXES.items():
    TABLE.op(_name)(partial(_normalize_rest, _function))
    TABLE.op(_name, since=13)(partial(_normalize, _function))


@TABLE.op("Dropout")
def dropout_by_attribute(call: Call, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """Return x as inference does; before opset 7 an attribute asks for that."""
    if not call.integer("is_test", 0):
        reason = "is_test is 0: it would drop values at random, as in training"
        raise call.refuse(reason)
    return _kept(call, x)


@TABLE.op("Dropout", since=7, host=(1, 2))
def dropout(
    call: Call, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Return x as inference does, with a mask that keeps everything."""
    share = 0.5 if ratio is None else ratio.item()
    if training is not None and training.item() and share:
        reason = "training_mode is true: it would drop values at random"
        raise call.refuse(reason)
    return _kept(call, x)


def _kept(call: Call, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    if not call.wants(1):
        return x
    mask = torch.bool if call.version >= 10 else x.dtype
    return x, torch.ones_like(x, dtype=mask)
