"""How far a reconstructed window is from the float one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_IMAGE_RANK = 4


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What is added up.

    Attributes:
        squared: Weight of the squared error, over the mean square of the target.
        kl: Weight of the Kullback-Leibler divergence of the softmax over channels, in nats.
    """

    squared: float = 1.0
    kl: float = 0.0


def window_loss(
    found: Tensor, target: Tensor, terms: LossTerms, keep: Tensor | None = None
) -> Tensor:
    """Return how far a value is from what it should be, a float32 scalar.

    Args:
        found: What the quantized window gives.
        target: What the float window gives, of the same shape.
        terms: What counts how much.
        keep: Bool `[batch, tokens]`: which tokens count, where values are
            `[batch, tokens, ..., channels]`; otherwise it is not consulted.
    """
    if keep is not None and found.dim() > 2 and found.shape[:2] == keep.shape:
        found, target = found[keep], target[keep]
    found, target = found.to(torch.float32), target.to(torch.float32)
    total = found.new_zeros(())
    if terms.squared:
        power = target.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
        total = total + terms.squared * functional.mse_loss(found, target) / power
    if terms.kl:
        total = total + terms.kl * divergence(found, target)
    return total


def divergence(found: Tensor, target: Tensor) -> Tensor:
    """Return the mean of KL(softmax(target) || softmax(found)) over all but the channels."""
    axis = 1 if found.dim() == _IMAGE_RANK else -1
    expected = functional.log_softmax(target, axis)
    given = functional.log_softmax(found, axis)
    return (expected.exp() * (expected - given)).sum(axis).mean()


def total_loss(
    found: Sequence[Tensor],
    targets: Sequence[Sequence[Tensor]],
    terms: LossTerms,
    keep: Tensor | None,
    calls: int = 1,
) -> Tensor:
    """Return the mean over calls and over several targets of the sum over several outputs.

    Every call counts by itself, so that it makes no difference which calls are joined.

    Args:
        found: Outputs.
        targets: What they should be, once for every branch.
        terms: What counts how much.
        keep: Which tokens count.
        calls: How many calls were joined along the first axis of all of these.
    """
    if calls > 1:
        shares = zip(*(_split(each, calls) for each in (found, *targets)), strict=True)
        masks = [None] * calls if keep is None else keep.chunk(calls)
        parts = zip(shares, masks, strict=True)
        return torch.stack([total_loss(own, rest, terms, m) for (own, *rest), m in parts]).mean()
    losses = [
        window_loss(one, other, terms, keep)
        for branch in targets
        for one, other in zip(found, branch, strict=True)
    ]
    return torch.stack(losses).sum() / len(targets)


def _split(outputs: Sequence[Tensor], calls: int) -> list[tuple[Tensor, ...]]:
    """Return the outputs of each call."""
    return list(zip(*(each.chunk(calls) for each in outputs), strict=True))
