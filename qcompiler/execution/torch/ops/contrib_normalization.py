"""Normalizations that ONNX Runtime fuses with what leads to them (its `ContribOperators.md`)."""

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable

TABLE = OpTable("com.microsoft")


@TABLE.op("SkipLayerNormalization")
def skip_layer_normalization(
    call: Call,
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
) -> Any:
    """Return `x + skip + bias` with mean 0 and variance 1 over its last axis, scaled and shifted.

    The skip is broadcast to x. Further outputs are mean, 1 / standard deviation, and the sum.
    """
    total = _total(x, skip, bias)
    epsilon = call.number("epsilon", 1e-12)
    y = functional.layer_norm(total, gamma.shape, gamma, beta, epsilon)
    if call.outputs == 1:
        return y
    mean = inverse = None
    if call.wants(1) or call.wants(2):
        variance, mean = torch.var_mean(_exact(total), -1, correction=0, keepdim=True)
        inverse = (variance + epsilon).rsqrt()
    return y, mean, inverse, total


@TABLE.op("SkipSimplifiedLayerNormalization")
def skip_simplified_layer_normalization(
    call: Call, x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None
) -> Any:
    """Return `x + skip + bias` divided by its root mean square over the last axis, and scaled.

    Further outputs are a mean (of nothing: absent), 1 / root mean square, and the sum.
    """
    if call.wants(1):
        reason = "it has no mean to return"
        raise call.refuse(reason)
    total = _total(x, skip, bias)
    epsilon = call.number("epsilon", 1e-12)
    y = functional.rms_norm(total, gamma.shape, gamma, epsilon)
    if call.outputs == 1:
        return y
    return y, None, _inverse_rms(total, (-1,), epsilon) if call.wants(2) else None, total


@TABLE.op("SimplifiedLayerNormalization")
def simplified_layer_normalization(call: Call, x: Tensor, scale: Tensor) -> Any:
    """Return x divided by its root mean square over the axes from `axis` on, and scaled.

    The second output is 1 / root mean square.
    """
    first = call.integer("axis", -1) % x.dim()
    shape = x.shape[first:]
    epsilon = call.number("epsilon", 1e-5)
    if scale.shape == shape and scale.dtype == x.dtype:
        y = functional.rms_norm(x, shape, scale, epsilon)
    else:
        y = (functional.rms_norm(x, shape, None, epsilon) * scale).to(scale.dtype)
    if not call.wants(1):
        return y
    return y, _inverse_rms(x, tuple(range(first, x.dim())), epsilon)


@TABLE.op("EmbedLayerNormalization")
def embed_layer_normalization(
    call: Call,
    tokens: Tensor,
    segments: Tensor | None,
    words: Tensor,
    places: Tensor,
    segment_table: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Any:
    """Return the layer normalization of summed embeddings, [B, S, hidden].

    Further outputs are how many tokens of each sequence the mask keeps (0 without a mask), and
    the sum of the embeddings.
    """
    if positions is None:
        where = places[: tokens.shape[1]].unsqueeze(0)
    else:
        where = functional.embedding(positions, places)
    total = functional.embedding(tokens, words) + where
    if segments is not None and segment_table is not None:
        total = total + functional.embedding(segments, segment_table)
    y = functional.layer_norm(total, gamma.shape, gamma, beta, call.number("epsilon", 1e-12))
    if call.outputs == 1:
        return y
    if mask is None:
        counts = torch.zeros(tokens.shape[0], dtype=torch.int32, device=tokens.device)
    else:
        counts = mask.sum(1).to(call.elements.of(ir.DataType.INT32))
    return y, counts, total


def _total(x: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
    total = x + skip
    return total if bias is None else total + bias


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse_rms(x: Tensor, axes: tuple[int, ...], epsilon: float) -> Tensor:
    return (_exact(x).square().mean(axes, keepdim=True) + epsilon).rsqrt()
