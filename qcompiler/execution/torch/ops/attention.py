"""Attention of queries over keys and values (ONNX operators, `Operators.md`)."""

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable

TABLE = OpTable()
_APART: Final = 4
"""Axes of [batch, heads, sequence, head size]."""
_RAW, _CAPPED, _MASKED, _SHARES = range(4)
"""What the output of scores holds: `qk_matmul_output_mode`."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Queries, keys and values of one step, keys and values with their past.

    Attributes:
        query: [batch, heads, S, size].
        key: [batch, shared heads, T, size], where heads are a multiple of shared heads.
        value: [batch, shared heads, T, value size].
        past: Keys that were there before this step.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    past: int = 0

    @property
    def is_grouped(self) -> bool:
        """Whether several queries share a key."""
        return self.query.shape[1] != self.key.shape[1]


@TABLE.op("Attention", since=23)
def attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor | tuple[Tensor | None, ...]:
    """Return attention over keys and values, these with their past, and the scores if wanted.

    Queries are [batch, heads, S, size] or [batch, S, heads * size], and the output is laid out as
    they are. A query that sees no key has an output of zeros. Scores are computed one by one, in
    the type that `softmax_precision` names, only where the fused function cannot.
    """
    heads = _heads(call, query, key, value)
    heads = _with_past(call, heads, past_key, past_value)
    if lengths is not None and past_key is not None:
        reason = "nonpad_kv_seqlen and past keys exclude each other"
        raise call.refuse(reason)
    scores = None
    if call.wants(3) or _needs_scores(call, heads):
        output, scores = _attend_by_scores(call, heads, mask, lengths)
    else:
        output = _attend(call, heads, mask, lengths)
    if query.dim() != _APART:
        output = output.transpose(1, 2).flatten(2)
    if call.outputs == 1:
        return output
    return (output, heads.key, heads.value, scores)[: call.outputs]


def _heads(call: Call, query: Tensor, key: Tensor, value: Tensor) -> Heads:
    if query.dim() == _APART:
        return Heads(query, key, value)
    shared = call.integer("kv_num_heads")
    counts = (call.integer("q_num_heads"), shared, shared)
    query, key, value = (
        torch.unflatten(part, -1, (count, -1)).transpose(1, 2)
        for part, count in zip((query, key, value), counts, strict=True)
    )
    return Heads(query, key, value)


def _with_past(
    call: Call, heads: Heads, past_key: Tensor | None, past_value: Tensor | None
) -> Heads:
    if past_key is None and past_value is None:
        return heads
    if past_key is None or past_value is None:
        reason = "past_key and past_value belong together"
        raise call.refuse(reason)
    key = torch.cat((past_key, heads.key), 2)
    value = torch.cat((past_value, heads.value), 2)
    return Heads(heads.query, key, value, past_key.shape[2])


def _needs_scores(call: Call, heads: Heads) -> bool:
    """Whether the fused function does not compute what the node asks for."""
    if call.number("softcap", 0.0) > 0 or heads.value.dtype != heads.query.dtype:
        return True
    # The fused function's softmax is in float32 for halves, in the input's type for others.
    exact = torch.promote_types(heads.query.dtype, torch.float32)
    return _softmax_type(call, exact) != exact and call.has("softmax_precision")


def _softmax_type(call: Call, default: torch.dtype) -> torch.dtype:
    if not call.has("softmax_precision"):
        return default
    return call.elements.of(call.element_type("softmax_precision"))


def _attend(call: Call, heads: Heads, mask: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Return attention as [batch, heads, S, value size]."""
    # PyTorch's own flag aligns the first query with the first key.
    native = _is_plainly_causal(call) and mask is None and lengths is None and not heads.past
    summand = None if native else _summand(call, heads, mask, lengths)
    return functional.scaled_dot_product_attention(
        heads.query,
        heads.key,
        heads.value,
        summand,
        is_causal=native,
        scale=_scale(call, heads),
        enable_gqa=heads.is_grouped,
    )


def _scale(call: Call, heads: Heads) -> float:
    return call.number("scale", 1 / math.sqrt(heads.query.shape[-1]))


def _is_plainly_causal(call: Call) -> bool:
    window = call.integer("left_window_size", -1)
    return call.integer("is_causal", 0) == 1 and window < 0


def _summand(
    call: Call, heads: Heads, mask: Tensor | None, lengths: Tensor | None
) -> Tensor | None:
    """Return what is added to the scores, broadcastable to them; None for nothing.

    It is never a choice of keys: of that, cuDNN's attention makes an average of all values for a
    query that sees no key, in place of zeros.
    """
    allowed = _allowed(call, heads, lengths)
    zero = heads.query.new_zeros(())
    if mask is None:
        return None if allowed is None else zero.masked_fill(~allowed, -torch.inf)
    missing = heads.key.shape[2] - mask.shape[-1]
    if mask.dtype is torch.bool:
        mask = zero.masked_fill(~mask, -torch.inf)
    elif not mask.is_floating_point():
        reason = f"a mask of {mask.dtype} is neither a choice of keys nor of the queries' type"
        raise call.refuse(reason)
    mask = functional.pad(mask, (0, missing), value=-torch.inf) if missing > 0 else mask
    summand = mask if allowed is None else mask.masked_fill(~allowed, -torch.inf)
    return _with_heads(summand.to(heads.query.dtype))


def _with_heads(mask: Tensor) -> Tensor:
    """Return a mask of two or four axes: others take PyTorch's function off its fast path."""
    return mask if mask.dim() in (2, _APART) else mask[(None,) * (_APART - mask.dim())]


def _allowed(call: Call, heads: Heads, lengths: Tensor | None) -> Tensor | None:
    """Return which keys each query may see, [S, T] or [batch, 1, S or 1, T]; None for all.

    Positions count from the first key, of the past if there is one; with lengths, the last
    query stands at the last key that is no padding.
    """
    causal = call.integer("is_causal", 0) == 1
    before, after = call.integer("left_window_size", -1), call.integer("right_window_size", -1)
    if causal:
        after = 0
    length, total = heads.query.shape[2], heads.key.shape[2]
    device = heads.query.device
    keys = torch.arange(total, device=device)
    if lengths is not None:
        lengths = lengths.reshape(-1, 1, 1, 1)
        allowed: Tensor | None = keys < lengths
        start: Tensor | int = lengths - length
    else:
        allowed, start = None, heads.past
        # One query after all other keys sees every one of them.
        if before < 0 and length == 1 and heads.past == total - 1:
            return None
    if before < 0 and after < 0:
        return allowed
    places = torch.arange(length, device=device).unsqueeze(1) + start
    limits = []
    if after >= 0:
        limits.append(keys <= places + after)
    if before >= 0:
        limits.append(keys >= places - before)
    for limit in limits:
        allowed = limit if allowed is None else allowed & limit
    return allowed


def _attend_by_scores(
    call: Call, heads: Heads, mask: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return attention, [batch, heads, S, value size], and scores, [batch, heads, S, T]."""
    mode = call.integer("qk_matmul_output_mode", _RAW)
    stages = {_RAW: score(heads, _scale(call, heads))}
    cap = call.number("softcap", 0.0)
    scores = stages[_RAW]
    stages[_CAPPED] = scores = cap * torch.tanh(scores / cap) if cap > 0 else scores
    summand = _summand(call, heads, mask, lengths)
    shares, stages[_MASKED] = _shares(scores, summand, _softmax_type(call, scores.dtype))
    stages[_SHARES] = shares.to(heads.query.dtype)
    if mode not in stages:
        reason = f"qk_matmul_output_mode is {mode}"
        raise call.refuse(reason)
    output = weigh(heads, stages[_SHARES].to(heads.value.dtype))
    return output.to(heads.query.dtype), stages[mode]


def score(heads: Heads, scale: float) -> Tensor:
    """Return the products of queries and keys, [batch, heads, S, T]."""
    root = math.sqrt(scale) if scale > 0 else None
    query, key = heads.query, heads.key
    if heads.is_grouped:
        query = torch.unflatten(query, 1, (key.shape[1], -1)).flatten(2, 3)
    if root is None:
        scores = torch.matmul(query, key.mT) * scale
    else:
        # As the operator has it, so that products of halves do not overflow.
        scores = torch.matmul(query * root, (key * root).mT)
    return torch.reshape(scores, (*heads.query.shape[:3], key.shape[2]))


def weigh(heads: Heads, shares: Tensor) -> Tensor:
    """Return the sums of values by their shares, [batch, heads, S, value size]."""
    if heads.is_grouped:
        grouped = torch.unflatten(shares, 1, (heads.value.shape[1], -1)).flatten(2, 3)
        output = torch.matmul(grouped, heads.value)
        return torch.reshape(output, (*shares.shape[:3], heads.value.shape[3]))
    return torch.matmul(shares, heads.value)


def _shares(
    scores: Tensor, summand: Tensor | None, precision: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the softmax of masked scores, all zero for a query without keys, and the scores."""
    if summand is None:
        return torch.softmax(scores, -1, dtype=precision), scores
    masked = scores + summand
    blind = (summand == -torch.inf).all(-1, keepdim=True)
    # Only finite scores have a gradient.
    shares = torch.softmax(masked.masked_fill(blind, 0), -1, dtype=precision)
    return shares.masked_fill(blind, 0), masked
