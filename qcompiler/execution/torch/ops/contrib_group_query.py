"""GroupQueryAttention (ONNX Runtime, `ContribOperators.md`)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.ops.contrib_rotary import rotated

TABLE = OpTable("com.microsoft")
_INPUTS = 17
"""Inputs of the op; the last ones are absent in most nodes."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Where the tokens of a step stand.

    Attributes:
        counts: Tokens of each sequence after the step, [B].
        start: Tokens before the step where all sequences have as many; None where they may not.
        total: Tokens of the longest sequence after the step.
        positions: Of the new tokens, [B or 1, S].
    """

    counts: Tensor
    start: int | None
    total: int
    positions: Tensor


@TABLE.op("GroupQueryAttention", host=(6,))
def group_query_attention(call: Call, query: Tensor, *inputs: Tensor | None) -> Any:
    """Return causal attention of [B, S, hidden] over new and cached keys and values, and these.

    Inputs after the query: key, value (absent: packed with it), past_key, past_value, seqlens_k,
    total_sequence_length, cos_cache, sin_cache, position_ids, attention_bias, head_sink, k_scale,
    v_scale, q_norm_weight, k_norm_weight, query_seqlens. What lies in the present beyond a
    sequence's tokens, and outputs of padded queries, are unspecified.
    """
    given = [*inputs, *[None] * (_INPUTS - 1 - len(inputs))]
    key, value, past_key, past_value, lengths, total_length = given[:6]
    cosines, sines, position_ids, attention_bias, sinks = given[6:11]
    _refuse_rare_forms(call, given)
    assert lengths is not None
    assert total_length is not None
    q, k, v = _heads(call, query, key, value)
    q, k = _normalized(call, q, k, given[13], given[14])
    tokens = _tokens(lengths, int(total_length.item()), q, past_key)
    if call.integer("do_rotary", 0):
        if cosines is None or sines is None:
            reason = "do_rotary without cos_cache and sin_cache"
            raise call.refuse(reason)
        positions = tokens.positions if position_ids is None else position_ids
        interleaved = bool(call.integer("rotary_interleaved", 0))
        q, k = (
            rotated(each, positions, cosines, sines, interleaved=interleaved) for each in (q, k)
        )
    present_key = _present(k, past_key, tokens)
    present_value = _present(v, past_value, tokens)
    keys, values = (each[:, :, : tokens.total] for each in (present_key, present_value))
    output = _attend(call, (q, keys, values), tokens, attention_bias, sinks)
    return (output.transpose(1, 2).flatten(2), present_key, present_value)[: call.outputs]


def _refuse_rare_forms(call: Call, given: list[Tensor | None]) -> None:
    quantized = {call.text(f"{name}_quant_type", "NONE") for name in "kv"} != {"NONE"}
    forms = {
        "a quantized cache": quantized or given[11] is not None or given[12] is not None,
        "sliding_window_cache": bool(call.integer("sliding_window_cache", 0)),
        "query_seqlens": given[15] is not None,
        "the output of scores": call.wants(3),
    }
    found = [form for form, is_there in forms.items() if is_there]
    if found:
        reason = f"{', '.join(found)} not supported"
        raise call.refuse(reason)


def _heads(
    call: Call, query: Tensor, key: Tensor | None, value: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as [B, heads, S, size]."""
    count, shared = call.integer("num_heads"), call.integer("kv_num_heads")
    if key is None or value is None:
        packed = torch.unflatten(query, -1, (count + 2 * shared, -1)).transpose(1, 2)
        q, k, v = torch.split(packed, [count, shared, shared], 1)
        return q, k, v
    if key.dim() != query.dim() or key.shape[1] != query.shape[1]:
        reason = f"keys of shape {list(key.shape)} for queries of shape {list(query.shape)}"
        raise call.refuse(reason)
    k, v = (torch.unflatten(each, -1, (shared, -1)).transpose(1, 2) for each in (key, value))
    return torch.unflatten(query, -1, (count, -1)).transpose(1, 2), k, v


def _normalized(
    call: Call, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return heads divided by their root mean square, where there are weights for that."""
    if q_weight is None or k_weight is None:
        return q, k
    epsilon = call.number("qk_norm_epsilon", 1e-6)
    size = (q.shape[-1],)
    return (
        functional.rms_norm(q, size, q_weight, call.number("q_norm_epsilon", epsilon)),
        functional.rms_norm(k, size, k_weight, call.number("k_norm_epsilon", epsilon)),
    )


def _tokens(lengths: Tensor, total: int, q: Tensor, past: Tensor | None) -> Tokens:
    batch, _, length, _ = q.shape
    counts = lengths.reshape(-1).to(torch.int64) + 1
    steps = torch.arange(length, device=q.device)
    start: int | None = None
    if past is None or not past.shape[2] or length == total:
        start = 0
    elif batch == 1:
        start = total - length
    if start is not None:
        return Tokens(counts, start, total, (steps + start).unsqueeze(0))
    starts = (counts - length).clamp(min=0)
    return Tokens(counts, None, total, starts.unsqueeze(1) + steps)


def _present(new: Tensor, past: Tensor | None, tokens: Tokens) -> Tensor:
    """Return the cache after the step, [B, heads, max(past, total), size]."""
    room = max(tokens.total, 0 if past is None else past.shape[2])
    length = new.shape[2]
    if tokens.start is None:
        assert past is not None
        base = functional.pad(past, (0, 0, 0, room - past.shape[2]))
        places = tokens.positions[:, None, :, None].expand_as(new)
        return base.scatter(2, places, new)
    parts = [new] if past is None or not tokens.start else [past[:, :, : tokens.start], new]
    after = room - tokens.start - length
    if after and past is not None and past.shape[2] == room:
        parts.append(past[:, :, room - after :])
    elif after:
        parts.append(new.new_zeros(*new.shape[:2], after, new.shape[3]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _attend(
    call: Call,
    heads: tuple[Tensor, Tensor, Tensor],
    tokens: Tokens,
    attention_bias: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return attention, [B, heads, S, size]."""
    q, keys, values = heads
    scale = call.number("scale", 0.0) or 1 / math.sqrt(q.shape[-1])
    window = call.integer("local_window_size", -1)
    causal = bool(call.integer("causal", 1))
    smooth = sinks is not None or call.integer("smooth_softmax", 0) == 1
    cap = call.number("softcap", 0.0)
    # Padding comes after every token, where nothing causal looks.
    plain = causal and attention_bias is None and (window <= 0 or window >= tokens.total)
    native = plain and tokens.start == 0 and q.shape[2] == tokens.total
    single = plain and tokens.start is not None and q.shape[2] == 1
    summand = None
    if not (native or single) or smooth or cap:
        allowed = _allowed(tokens, window, causal=causal)
        base = q.new_zeros(()) if attention_bias is None else attention_bias
        summand = base.masked_fill(~allowed, -torch.inf)
    if smooth or cap:
        return _capped(heads, summand, sinks, scale=scale, cap=cap, smooth=smooth)
    return functional.scaled_dot_product_attention(
        q,
        keys,
        values,
        summand,
        is_causal=summand is None and native,
        scale=scale,
        enable_gqa=q.shape[1] != keys.shape[1],
    )


def _allowed(tokens: Tokens, window: int, *, causal: bool) -> Tensor:
    """Return which keys each query sees, [B or 1, 1, S, total]."""
    keys = torch.arange(tokens.total, device=tokens.positions.device)
    if not causal:
        return (keys < tokens.counts.unsqueeze(1))[:, None, None]
    places = tokens.positions[:, None, :, None]
    allowed = keys <= places
    return allowed & (keys > places - window) if window > 0 else allowed


def _capped(
    heads: tuple[Tensor, Tensor, Tensor],
    summand: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    cap: float,
    smooth: bool,
) -> Tensor:
    """Return attention with scores squeezed into a range, or a sink that takes a share of it.

    A smooth softmax has one more score, zero or the head's own, whose share is lost.
    """
    q, keys, values = heads
    batch, count, length, _ = q.shape
    shared = keys.shape[1]
    exact = torch.promote_types(q.dtype, torch.float32)
    grouped = q.reshape(batch, shared, count // shared, length, -1).flatten(2, 3)
    scores = torch.matmul(grouped.to(exact), keys.to(exact).mT) * scale
    scores = scores.reshape(batch, count, length, -1)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if summand is not None:
        scores = scores + summand
    if smooth:
        extra = scores.new_zeros(count) if sinks is None else sinks.to(exact)
        extra = extra.reshape(1, count, 1, 1).expand(batch, count, length, 1)
        shares = torch.softmax(torch.cat((scores, extra), -1), -1)[..., :-1]
    else:
        shares = torch.softmax(scores, -1)
    shares = shares.reshape(batch, shared, -1, shares.shape[-1])
    output = torch.matmul(shares.to(values.dtype), values)
    return output.reshape(batch, count, length, -1)
