"""Rotary positions as ONNX Runtime's ops take them (its `ContribOperators.md`)."""

import torch
from torch import Tensor

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable

TABLE = OpTable("com.microsoft")
_HEADS_APART = 4
"""Axes of [batch, heads, sequence, head size]."""


@TABLE.op("RotaryEmbedding")
def rotary_embedding(
    call: Call, x: Tensor, positions: Tensor, cosines: Tensor, sines: Tensor
) -> Tensor:
    """Return x, [B, S, heads * size] or [B, heads, S, size], with its heads rotated.

    Positions are [B, S], or one element: that of the first token.
    """
    if call.number("scale", 1.0) != 1.0:
        reason = "scale is set, which no kernel defines"
        raise call.refuse(reason)
    heads = _heads_of(call, x, cosines)
    if positions.numel() == 1:
        length = heads.shape[2]
        positions = positions.reshape(1, 1) + torch.arange(length, device=positions.device)
    interleaved = bool(call.integer("interleaved", 0))
    result = rotated(heads, positions, cosines, sines, interleaved=interleaved)
    return result if x.dim() == _HEADS_APART else result.transpose(1, 2).reshape(x.shape)


def _heads_of(call: Call, x: Tensor, cosines: Tensor) -> Tensor:
    """Return x as [B, heads, S, size]."""
    if x.dim() == _HEADS_APART:
        return x
    count = call.integer("num_heads", 0)
    size = 2 * cosines.shape[1]
    if call.integer("rotary_embedding_dim", 0):
        # Only a part of each head is rotated, so that the tables do not tell its size.
        if not count:
            reason = "rotary_embedding_dim is set without num_heads"
            raise call.refuse(reason)
        size = x.shape[-1] // count
    return torch.unflatten(x, -1, (-1, size)).transpose(1, 2)


def rotated(
    heads: Tensor, positions: Tensor, cosines: Tensor, sines: Tensor, *, interleaved: bool
) -> Tensor:
    """Return heads with pairs of their leading elements rotated by the angles of their positions.

    Args:
        heads: [B, heads, S, size].
        positions: int64, [B or 1, S].
        cosines: [positions, rotated elements / 2].
        sines: Likewise.
        interleaved: Whether a pair is of neighbours, not of elements half of them apart.
    """
    cos = cosines[positions].unsqueeze(1)
    sin = sines[positions].unsqueeze(1)
    width = 2 * cos.shape[-1]
    turning, rest = heads[..., :width], heads[..., width:]
    if interleaved:
        first, second = turning[..., ::2], turning[..., 1::2]
        result = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(
            -2
        )
    else:
        first, second = turning.chunk(2, -1)
        result = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return result if not rest.shape[-1] else torch.cat((result, rest), -1)
