"""Attention with a recurrent state in place of keys (ONNX operators, `Operators.md`)."""

import math
from typing import Final

import torch
from torch import Tensor

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable

TABLE = OpTable()
_NEEDS: Final = {
    "linear": (False, False),
    "gated": (True, False),
    "delta": (False, True),
    "gated_delta": (True, True),
}
"""By update rule, whether it takes a decay and an update rate."""


@TABLE.op("LinearAttention", since=27)
def linear_attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: Tensor | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what queries [B, T, heads * size] read from a state that every token writes to.

    The state, [B, shared heads, key size, value size], is kept in float32 or better, and returned
    in the type of the one given.
    """
    rule = call.text("update_rule", "gated_delta")
    _check(call, rule, decay, beta)
    count, shared = call.integer("q_num_heads"), call.integer("kv_num_heads")
    exact = torch.promote_types(query.dtype, torch.float32)
    # [B, shared heads, queries of each, T, size], the others without the third axis.
    queries = torch.unflatten(_heads(query, count, exact), 1, (shared, -1))
    keys, values = _heads(key, shared, exact), _heads(value, shared, exact)
    fading = None if decay is None else _heads(decay, shared, exact).exp().unsqueeze(-1)
    rates = None if beta is None else _heads(beta, beta.shape[-1], exact)
    state = keys.new_zeros(*keys.shape[:2], keys.shape[-1], values.shape[-1])
    state = state if past is None else past.to(exact)
    read = []
    for t in range(query.shape[1]):
        if fading is not None:
            state = state * fading[:, :, t]
        written = values[:, :, t]
        if rates is not None:
            known = torch.matmul(keys[:, :, t].unsqueeze(-2), state).squeeze(-2)
            written = rates[:, :, t] * (written - known)
        state = state + keys[:, :, t].unsqueeze(-1) * written.unsqueeze(-2)
        read.append(torch.matmul(queries[:, :, :, t], state))
    scale = call.number("scale", 0.0) or 1 / math.sqrt(keys.shape[-1])
    output = torch.stack(read, 1).flatten(2) * scale
    return output.to(query.dtype), state.to(query.dtype if past is None else past.dtype)


def _check(call: Call, rule: str, decay: Tensor | None, beta: Tensor | None) -> None:
    if rule not in _NEEDS:
        reason = f"update_rule is {rule!r}"
        raise call.refuse(reason)
    for name, needed, given in zip(("decay", "beta"), _NEEDS[rule], (decay, beta), strict=True):
        if needed != (given is not None):
            reason = f"update_rule {rule!r} {'needs' if needed else 'has no'} {name}"
            raise call.refuse(reason)


def _heads(packed: Tensor, count: int, exact: torch.dtype) -> Tensor:
    """Return [B, T, heads * size] as [B, heads, T, size]."""
    return torch.unflatten(packed.to(exact), -1, (count, -1)).transpose(1, 2)
