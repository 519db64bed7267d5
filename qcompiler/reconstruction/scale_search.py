"""The scale that leaves the least output error once errors have been made up for."""

from typing import Final

import torch
from torch import Tensor

from qcompiler.quant.scheme import QSpec

_RATIOS: Final = tuple(1 - 0.05 * step for step in range(15))
"""Shares of the whole range that are tried; each is then replaced by its least-squares scale."""


class ScaleSearch:
    """Chooses the scale of each group of weights.

    Of all that a group's rounding costs after compensation, element j has the part
    `(w_j - q_j)^2 / U[j, j]^2` (see `compensation`), so that these squares are what a scale makes
    small. For given codes the best scale is a quotient of two sums, and scales compare by the
    square of the first over the second. Zero points are those of the whole range.
    """

    def __init__(self, spec: QSpec, dtype: torch.dtype) -> None:
        """Prepare a search.

        Args:
            spec: Integer type and symmetry.
            dtype: The type that scales are stored in.
        """
        self._qmin, self._qmax = spec.qtype.qmin, spec.qtype.qmax
        self._symmetric = spec.symmetric
        self._dtype = dtype

    def __call__(self, values: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, float32 `[groups, rows]`.

        Args:
            values: float32 `[groups, n, rows]`; the n elements of a row share a scale.
            importance: `[groups, n]`, what the squared error of an element counts.
        """
        whole, zero = self._whole_range(values)
        low, high = (self._qmin - zero)[:, None], (self._qmax - zero)[:, None]
        weighted = values * importance[:, :, None]
        best, most = whole, torch.zeros_like(whole)
        for ratio in _RATIOS:
            steps = (values / (whole * ratio)[:, None]).round_().clamp_(low, high)
            product = (weighted * steps).sum(dim=1)
            square = torch.einsum("gnr,gn->gr", steps.square_(), importance)
            gain = product.square() / square.clamp(min=torch.finfo(torch.float32).tiny)
            better = (gain > most) & (product > 0)
            best = torch.where(better, product / square, best)
            most = torch.where(better, gain, most)
        return self._stored(best), zero

    def _whole_range(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the grid that just holds all values."""
        low, high = values.amin(dim=1).clamp(max=0), values.amax(dim=1).clamp(min=0)
        if self._symmetric:
            middle = (self._qmin + self._qmax + 1) // 2
            down, up = self._qmin - middle, self._qmax - middle
            scale = self._stored(torch.maximum(high / up, low / down))
            return scale, torch.full_like(scale, middle)
        scale = self._stored((high - low) / (self._qmax - self._qmin))
        return scale, (self._qmin - low / scale).round_().clamp_(self._qmin, self._qmax)

    def _stored(self, scale: Tensor) -> Tensor:
        """Round scales to the type that stores them, and keep them usable."""
        limits = torch.finfo(self._dtype)
        kept = scale.clamp(limits.tiny, limits.max).to(self._dtype).to(torch.float32)
        return torch.where(scale == 0, torch.ones_like(kept), kept)
