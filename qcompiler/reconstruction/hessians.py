"""Second moments of what ops multiply, gathered call by call."""

from typing import Final

import torch
from torch import Tensor

_DOUBLE_UP_TO: Final = 8192
"""Width up to which sums and factors are float64; beyond, memory counts more."""


class HessianSum:
    """`2 X^T X` over all rows seen: the Hessian of the squared error of `X W` per output channel.

    Attributes:
        rows: How many rows were added.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._total: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add rows of any float type, `[groups, n, K]`; products are those of float32."""
        wide = rows.to(torch.float32)
        product = wide.mT @ wide
        if self._total is None:
            dtype = torch.float64 if product.shape[-1] <= _DOUBLE_UP_TO else torch.float32
            self._total = torch.zeros_like(product, dtype=dtype)
        self._total += product
        self.rows += rows.shape[1]

    def hessian(self) -> Tensor | None:
        """Return it, `[groups, K, K]`; None without rows."""
        return None if self._total is None or not self.rows else 2 * self._total


def output_error(hessian: Tensor, difference: Tensor) -> Tensor:
    """Return half the second-order output error of every row: the squared error on all samples.

    Args:
        hessian: `[groups, K, K]`.
        difference: `[groups, K, rows]`, of weights.

    Returns:
        `[groups, rows]`, in the type of `difference`.
    """
    product = hessian.to(difference.dtype) @ difference
    return (product * difference).sum(dim=1).clamp(min=0) / 2
