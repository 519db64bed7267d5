"""Losses of class scores (ONNX operators, `Operators.md`)."""

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable

TABLE = OpTable()
_NO_CLASS: Final = -1
"""Stands for no ignored class: targets cannot be negative otherwise."""


@TABLE.op("NegativeLogLikelihoodLoss", since=12)
def negative_log_likelihood_loss(
    call: Call, logarithms: Tensor, target: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Return the negated log-probabilities, [batch, C, ...], of target classes, [batch, ...].

    Reduced by their sum, by their mean with the targets' weights, or not at all.
    """
    target = target.to(torch.int64)
    ignored = call.integer("ignore_index", _NO_CLASS)
    reduction = call.text("reduction", "mean")
    if weight is None or not (torch.is_grad_enabled() and weight.requires_grad):
        return functional.nll_loss(
            logarithms, target, weight, ignore_index=ignored, reduction=reduction
        )
    # PyTorch's function has no gradient to the weights.
    terms = functional.nll_loss(logarithms, target, ignore_index=ignored, reduction="none")
    is_ignored = target == ignored
    shares = weight[target.masked_fill(is_ignored, 0)].masked_fill(is_ignored, 0)
    weighted = terms * shares
    if reduction == "none":
        return weighted
    return weighted.sum() if reduction == "sum" else weighted.sum() / shares.sum()


@TABLE.op("SoftmaxCrossEntropyLoss", since=12)
def softmax_cross_entropy_loss(
    call: Call, scores: Tensor, target: Tensor, weight: Tensor | None = None
) -> Any:
    """Return the loss of the log-softmax of scores, [batch, C, ...], and this if wanted."""
    logarithms = torch.log_softmax(scores, 1)
    loss = negative_log_likelihood_loss(call, logarithms, target, weight)
    return (loss, logarithms)[: call.outputs] if call.wants(1) else loss
