"""How scales lie over a weight of any layout, in PyTorch."""

import torch
from torch import Tensor

from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock


class ScaleGrid:
    """Meets each element of a tensor with its scale.

    | granularity     | weight      | scale      | `split`        | `spread`        |
    |-----------------|-------------|------------|----------------|-----------------|
    | PerAxis(1)      | `[K, N]`    | `[N]`      | `[K, N]`       | `[1, N]`        |
    | PerBlock(0, 64) | `[128, N]`  | `[2, N]`   | `[2, 64, N]`   | `[2, 1, N]`     |
    | PerBlock(0, 64) | `[100, N]`  | `[2, N]`   | `[100, N]`     | `[100, N]`      |
    """

    def __init__(self, shape: tuple[int, ...], granularity: Granularity) -> None:
        """Look at shapes.

        Args:
            shape: Of the tensor.
            granularity: How its elements share scales; axes are not negative.
        """
        self._rank = len(shape)
        self._granularity = granularity
        self._length = 1
        self._block = 0
        self._divides = False
        if isinstance(granularity, PerBlock):
            self._length = shape[granularity.axis]
            self._block = granularity.block_size
            self._divides = self._length % self._block == 0

    def split(self, values: Tensor) -> Tensor:
        """Return a tensor with its blocks on an axis of their own, if it has whole blocks."""
        if isinstance(self._granularity, PerBlock) and self._divides:
            return torch.unflatten(values, self._granularity.axis, (-1, self._block))
        return values

    def join(self, values: Tensor) -> Tensor:
        """Undo `split`."""
        if isinstance(self._granularity, PerBlock) and self._divides:
            axis = self._granularity.axis
            return values.flatten(axis, axis + 1)
        return values

    def spread(self, scale: Tensor) -> Tensor:
        """Return scales or zero points so that they broadcast against what `split` returns."""
        granularity = self._granularity
        if isinstance(granularity, PerBlock):
            if self._divides:
                return scale.unsqueeze(granularity.axis + 1)
            # A broken last block takes repeated scales.
            repeated = scale.repeat_interleave(self._block, granularity.axis)
            return repeated.narrow(granularity.axis, 0, self._length)
        if isinstance(granularity, PerAxis):
            shape = [1] * self._rank
            shape[granularity.axis] = -1
            return scale.reshape(shape)
        return scale.reshape(())


def rounded_to(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 scales as they will be stored; the gradient passes straight through."""
    if dtype is torch.float32:
        return scale
    stored = scale.detach().clamp(max=torch.finfo(dtype).max).to(dtype).to(torch.float32)
    return scale + (stored - scale.detach())
