"""Attention with as many key as query heads (ONNX Runtime, `ContribOperators.md`)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.ops.integer_products import per_column, product_of_steps

TABLE = OpTable("com.microsoft")
_MASKED = -10000.0
"""Added to the scores of masked keys by default: enough to lose, not to vanish."""
_APART = 4
"""Axes of [batch, heads, sequence, head size]."""
_PACKED = 5
"""Axes of [batch, sequence, heads, 2 or 3, head size]."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Queries, keys and values, each [batch, heads, sequence, head size].

    Attributes:
        query: Of this step's tokens.
        key: Of the past ones, too.
        value: Likewise.
        past: How many of the keys come before the first query.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    past: int = 0


@TABLE.op("MultiHeadAttention")
def multi_head_attention(
    call: Call,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    past_length: Tensor | None = None,
    beams: Tensor | None = None,
) -> Any:
    """Return attention of [B, S, hidden] over keys and values, and these with their past.

    Keys and values may be packed together, or with the queries; of four axes, they are a cache
    that nothing is appended to.
    """
    if past_length is not None or beams is not None or call.wants(3):
        reason = "shared buffers, beams and the output of scores are not supported"
        raise call.refuse(reason)
    heads = _split(call, query, key, value, bias)
    heads = _with_past(heads, past_key, past_value)
    output = _attend(call, heads, mask, attention_bias)
    return (output, heads.key, heads.value)[: call.outputs]


def _split(
    call: Call, query: Tensor, key: Tensor | None, value: Tensor | None, bias: Tensor | None
) -> Heads:
    count = call.integer("num_heads")
    if query.dim() == _PACKED:
        parts = query.unbind(3)
    elif key is not None and key.dim() == _PACKED:
        parts = (torch.unflatten(query, -1, (count, -1)), *key.unbind(3))
    elif key is not None and value is not None:
        parts = tuple(
            each if each.dim() == _APART else torch.unflatten(each, -1, (count, -1))
            for each in (query, key, value)
        )
    else:
        reason = f"a query of {query.dim()} axes lacks keys and values"
        raise call.refuse(reason)
    is_cache = key is not None and key.dim() == _APART
    if bias is not None:
        parts = _biased(parts, bias, count, is_cache=is_cache)
    q, k, v = parts
    q = q.transpose(1, 2)
    return Heads(q, k, v) if is_cache else Heads(q, k.transpose(1, 2), v.transpose(1, 2))


def _biased(
    parts: tuple[Tensor, ...], bias: Tensor, count: int, *, is_cache: bool
) -> tuple[Tensor, ...]:
    """Return parts [B, S, heads, size] with their shares of the bias; a cache has had its own."""
    query, key, value = parts
    width = count * query.shape[-1]
    first = query + bias[:width].reshape(count, -1)
    if is_cache:
        return first, key, value
    second, third = bias[width : 2 * width], bias[2 * width :]
    return first, key + second.reshape(count, -1), value + third.reshape(count, -1)


def _with_past(heads: Heads, past_key: Tensor | None, past_value: Tensor | None) -> Heads:
    if past_key is None or past_value is None:
        return heads
    key = torch.cat((past_key, heads.key), 2)
    return Heads(heads.query, key, torch.cat((past_value, heads.value), 2), past_key.shape[2])


@TABLE.op("Attention")
def attention(
    call: Call,
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_length: Tensor | None = None,
) -> Any:
    """Return self-attention of [B, S, input size] with merged projections, and keys and values.

    The past and the present are [2, B, heads, tokens, head size].
    """
    if past_length is not None:
        reason = "past and present that share a buffer are not supported"
        raise call.refuse(reason)
    projected = torch.matmul(x, weights)
    projected = projected if bias is None else projected + bias
    return _self_attention(call, projected, mask, past, attention_bias)


@TABLE.op("QAttention")
def qattention(
    call: Call,
    x: Tensor,
    weights: Tensor,
    bias: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    mask: Tensor | None = None,
    x_zero: Tensor | None = None,
    w_zero: Tensor | None = None,
    past: Tensor | None = None,
) -> Any:
    """Return `Attention` of what codes stand for; the weights' parameters may be per column."""
    exact = torch.promote_types(bias.dtype, torch.float32)
    x_zero = None if x_zero is None else x_zero.reshape(())
    steps = product_of_steps(x, x_zero, weights, None if w_zero is None else per_column(w_zero))
    factor = x_scale.reshape(()).to(exact) * per_column(w_scale).to(exact)
    projected = (steps.to(exact) * factor + bias).to(bias.dtype)
    return _self_attention(call, projected, mask, past, None)


def _self_attention(
    call: Call,
    projected: Tensor,
    mask: Tensor | None,
    past: Tensor | None,
    attention_bias: Tensor | None,
) -> Any:
    if call.integer("do_rotary", 0) or call.integer("past_present_share_buffer", 0):
        reason = "do_rotary and past_present_share_buffer are not supported"
        raise call.refuse(reason)
    count = call.integer("num_heads")
    widths = call.integers("qkv_hidden_sizes", [projected.shape[-1] // 3] * 3)
    parts = torch.split(projected, widths, -1)
    q, k, v = (torch.unflatten(part, -1, (count, -1)).transpose(1, 2) for part in parts)
    heads = Heads(q, k, v)
    if past is not None:
        heads = _with_past(heads, past[0], past[1])
    output = _attend(call, heads, mask, attention_bias)
    return (output, torch.stack((heads.key, heads.value))) if call.wants(1) else output


def _attend(call: Call, heads: Heads, mask: Tensor | None, attention_bias: Tensor | None) -> Tensor:
    """Return attention as [B, S, heads * size]."""
    length, total = heads.query.shape[2], heads.key.shape[2]
    causal = bool(call.integer("unidirectional", 0)) and length > 1
    summand = attention_bias
    if mask is not None:
        padding = _padding(call, heads, mask)
        summand = padding if summand is None else summand + padding
    if causal and heads.past + length != total:
        # ONNX Runtime's kernel lets the last query see all of them.
        reason = f"unidirectional with {length} queries for {total - heads.past} new keys"
        raise call.refuse(reason)
    # PyTorch's own flag has the first query stand with the first key.
    native = causal and summand is None and not heads.past
    if causal and not native:
        steps = torch.arange(total, device=heads.query.device)
        ahead = steps > (heads.past + steps[:length]).unsqueeze(1)
        base = heads.query.new_zeros(()) if summand is None else summand
        summand = base.masked_fill(ahead, -torch.inf)
    output = functional.scaled_dot_product_attention(
        heads.query,
        heads.key,
        heads.value,
        summand,
        is_causal=native,
        scale=call.number("scale", 0.0) or None,
    )
    return output.transpose(1, 2).flatten(2)


def _padding(call: Call, heads: Heads, mask: Tensor) -> Tensor:
    """Return what a mask adds to the scores, [B, 1, S or 1, total].

    A mask is 1 for keys to keep, [B, total] or [B, S, total]; how many keys of each sequence to
    keep, [B]; or where they end, followed by where they start, [2 * B].
    """
    batch, total = heads.query.shape[0], heads.key.shape[2]
    steps = torch.arange(total, device=mask.device)
    if mask.dim() == 1 and mask.numel() == batch:
        keep = (steps < mask.unsqueeze(1))[:, None, None]
    elif mask.dim() == 1 and mask.numel() == 2 * batch:
        ends, starts = mask.reshape(2, batch, 1)
        keep = ((steps < ends) & (steps >= starts))[:, None, None]
    elif mask.dim() in (2, 3) and mask.shape[-1] == total:
        keep = (mask != 0).unsqueeze(1)
        keep = keep.unsqueeze(1) if mask.dim() == 2 else keep
    else:
        reason = f"a mask of shape {list(mask.shape)} is not supported"
        raise call.refuse(reason)
    value = call.number("mask_filter_value", _MASKED)
    return torch.zeros_like(keep, dtype=heads.query.dtype).masked_fill(~keep, value)
