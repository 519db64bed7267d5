"""Rotary position embedding (ONNX operators, `Operators.md`)."""

from typing import Final

import torch
from torch import Tensor

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable

TABLE = OpTable()
_APART: Final = 4
"""Axes of [batch, heads, sequence, head size]."""


@TABLE.op("RotaryEmbedding", since=23)
def rotary_embedding(
    call: Call, x: Tensor, cosines: Tensor, sines: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Return heads with pairs of their leading elements rotated by the angles of their positions.

    Heads are [batch, heads, S, size] or [batch, S, heads * size]. The tables are
    [positions, rotated elements / 2], or [batch, S, rotated elements / 2] without `positions`.
    """
    is_apart = x.dim() == _APART
    heads = x if is_apart else torch.unflatten(x, -1, (call.integer("num_heads"), -1))
    # The axis of heads comes before that of the sequence, or after it.
    axis = 1 if is_apart else 2
    cos, sin = (
        (table if positions is None else table[positions]).unsqueeze(axis)
        for table in (cosines, sines)
    )
    width = call.integer("rotary_embedding_dim", 0) or heads.shape[-1]
    if 2 * cos.shape[-1] != width:
        reason = f"tables of {cos.shape[-1]} angles do not fit {width} elements"
        raise call.refuse(reason)
    turning, rest = heads[..., :width], heads[..., width:]
    turned = _rotated(turning, cos, sin, interleaved=call.integer("interleaved", 0) == 1)
    result = torch.cat((turned, rest), -1) if rest.shape[-1] else turned
    return result.reshape(x.shape)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    if interleaved:
        first, second = heads[..., ::2], heads[..., 1::2]
    else:
        first, second = heads.chunk(2, -1)
    turned = first * cos - second * sin, first * sin + second * cos
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
