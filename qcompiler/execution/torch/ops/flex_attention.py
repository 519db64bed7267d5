"""Attention whose scores and shares graphs of its own change (ONNX operators, preview)."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Body, Call
from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.ops.attention import Heads, score, weigh

TABLE = OpTable("ai.onnx.preview")


@TABLE.op("FlexAttention")
def flex_attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score_mod: Body | None = None,
    prob_mod: Body | None = None,
) -> Tensor:
    """Return attention, [batch, heads, S, value size], with scores and shares that bodies change.

    Bodies see them in the type that `softmax_precision` names: by default float32, or float64 for
    inputs of that type.
    """
    heads = Heads(query, key, value)
    exact = torch.promote_types(query.dtype, torch.float32)
    precision = exact
    if call.has("softmax_precision"):
        precision = call.elements.of(call.element_type("softmax_precision"))
    scale = call.number("scale", 1 / math.sqrt(query.shape[-1]))
    if score_mod is None and prob_mod is None and precision == exact:
        return functional.scaled_dot_product_attention(
            query, key, value, scale=scale, enable_gqa=heads.is_grouped
        )
    scores = _changed(score(heads, scale).to(precision), score_mod)
    shares = _changed(torch.softmax(scores, -1), prob_mod)
    exact_heads = Heads(query, key, value.to(precision))
    return weigh(exact_heads, shares).to(value.dtype)


def _changed(values: Tensor, body: Body | None) -> Any:
    return values if body is None else body(values)[0]
