"""A weight of any layout as rows of input channels, one row per output channel."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qcompiler.ir.dataflow import int_attribute
from qcompiler.ir.quantizable import Site
from qcompiler.quant.granularity import Granularity, PerBlock, PerTensor, scale_shape

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class WeightRows:
    """How the elements of a weight, and its scales, lie as rows.

    A row is what one output channel sums over, in the order of the kernel's sum, which keeps the
    elements of a scale group side by side and pairs of neighbouring codes next to each other.

    | weight                        | order     | rows         | scales, blocks of B along C      |
    |-------------------------------|-----------|--------------|----------------------------------|
    | MatMul `[K, N]`               | (1, 0)    | `[N, K]`     | `[N, ceil(K / B)]`               |
    | Gemm transB=1 `[N, K]`        | (0, 1)    | `[N, K]`     | `[N, ceil(K / B)]`               |
    | Conv `[M, C, kH, kW]`         | (0, 2, 3, 1) | `[M, kH kW C]` | `[M, kH kW ceil(C / B)]`    |
    | vector `[K]`                  | (0,)      | `[1, K]`     | `[1, ceil(K / B)]`               |

    Per axis there is one scale in a row; per tensor, each row has a copy of the one scale.

    Attributes:
        shape: Of the weight.
        order: Its axes: output channels (if it has that axis), then all that is summed over.
        has_outputs: Whether the first of `order` is the axis of output channels.
        granularity: How elements share scales.
        groups: Into how many equal parts the rows fall that read different data: the groups of a
            convolution.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    has_outputs: bool
    granularity: Granularity
    groups: int = 1

    @classmethod
    def of(cls, site: Site, granularity: Granularity) -> Self:
        """Return the rows of a site's weight."""
        output = site.axes.output
        order = site.reduction_axes if output is None else (output, *site.reduction_axes)
        groups = int_attribute(site.node, "group", 1) if site.row.op_type == "Conv" else 1
        return cls(site.shape, order, output is not None, granularity, groups)

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.shape[self.order[0]] if self.has_outputs else 1

    @property
    def width(self) -> int:
        """Number of elements in a row."""
        return prod(self.shape) // max(1, self.count)

    def rows(self, values: Array) -> Array:
        """Return a tensor of the weight's shape as `[count, width]`."""
        return values.transpose(self.order).reshape(self.count, -1)

    def restored(self, rows: Array) -> Array:
        """Return rows as a contiguous tensor of the weight's shape."""
        return self._turned_back(rows, self.shape)

    def scale_rows(self, scale: Array) -> Array:
        """Return a scale or zero point as `[count, groups in a row]`."""
        if isinstance(self.granularity, PerTensor):
            return np.repeat(scale.reshape(1, 1), self.count, axis=0)
        if not isinstance(self.granularity, PerBlock):
            return scale.reshape(self.count, 1)
        return scale.transpose(self.order).reshape(self.count, -1)

    def restored_scale(self, rows: Array) -> Array:
        """Undo `scale_rows`; per tensor, rows must have kept the same scale."""
        if isinstance(self.granularity, PerTensor):
            rows = rows[:1]
        shape = scale_shape(self.shape, self.granularity)
        if not isinstance(self.granularity, PerBlock):
            return rows.reshape(shape)
        return self._turned_back(rows, shape)

    def scale_index(self) -> npt.NDArray[np.int64]:
        """Return which scale of its row each element has, `[width]`, ascending."""
        if not isinstance(self.granularity, PerBlock):
            return np.zeros(self.width, np.int64)
        extent, size = self.shape[self.granularity.axis], self.granularity.block_size
        blocks = -(-extent // size)
        within = np.arange(extent) // size
        places = self.width // max(1, extent)
        return (np.arange(places)[:, np.newaxis] * blocks + within).reshape(-1)

    def _turned_back(self, rows: Array, shape: Sequence[int]) -> Array:
        turned = rows.reshape([shape[axis] for axis in self.order])
        return np.ascontiguousarray(turned.transpose(np.argsort(self.order)))
