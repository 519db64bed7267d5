"""One view of a tensor for every granularity: rows that share a scale, times groups.

A tensor splits into one or two *sections*, each a 5-D view with axes `(r0, r1, g0, g1, g2)`: the
elements along `(r0, r1)` share a scale, each index of `(g0, g1, g2)` is one scale.

| granularity        | tensor           | section                                |
|--------------------|------------------|----------------------------------------|
| PerTensor          | any              | `(1, size, 1, 1, 1)`                   |
| PerAxis(axis)      | `(pre, A, post)` | `(pre, post, 1, A, 1)`                 |
| PerBlock(axis, B)  | `(pre, A, post)` | `(1, B, pre, A // B, post)` and, where |
|                    |                  | B does not divide A, the shorter last  |
|                    |                  | block as `(1, A % B, pre, 1, post)`    |
"""

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any

import numpy as np

from qcompiler.quant.granularity import Granularity, PerBlock, PerTensor, scale_shape

Array = np.ndarray[Any, np.dtype[Any]]
Box = tuple[slice, ...]


def value_sections(values: Array, granularity: Granularity) -> tuple[Array, ...]:
    """Return the sections of `values`; views where its strides allow, as of any contiguous array.

    Raises:
        ValueError: The granularity does not fit the shape.
    """
    scale_shape(values.shape, granularity)
    if isinstance(granularity, PerTensor):
        return (values.reshape(1, -1, 1, 1, 1),)
    axis = granularity.axis
    extent = values.shape[axis]
    pre, post = prod(values.shape[:axis]), prod(values.shape[axis + 1 :])
    cube = values.reshape(pre, extent, post)
    if not isinstance(granularity, PerBlock):
        return (cube.transpose(0, 2, 1)[:, :, np.newaxis, :, np.newaxis],)
    size = granularity.block_size
    blocks, rest = divmod(extent, size)
    sections = []
    if blocks:
        whole = cube[:, : blocks * size].reshape(pre, blocks, size, post)
        sections.append(whole.transpose(2, 0, 1, 3)[np.newaxis])
    if rest:
        sections.append(cube[:, blocks * size :].transpose(1, 0, 2)[np.newaxis, :, :, np.newaxis])
    return tuple(sections)


def scale_sections(
    scale: Array, shape: tuple[int, ...], granularity: Granularity
) -> tuple[Array, ...]:
    """Return the sections of a scale or zero point: `(1, 1, g0, g1, g2)`, to broadcast on values.

    Args:
        scale: Array of shape `scale_shape(shape, granularity)`.
        shape: Shape of the values.
        granularity: How many elements share a scale.

    Raises:
        ValueError: The array has another shape.
    """
    expected = scale_shape(shape, granularity)
    if scale.shape != expected:
        message = (
            f"a scale or zero point of shape {list(scale.shape)} does not fit values of shape "
            f"{list(shape)} {granularity}: it takes {list(expected)}"
        )
        raise ValueError(message)
    if not isinstance(granularity, PerBlock):
        return (scale.reshape(1, 1, 1, -1, 1),)
    axis = granularity.axis
    pre, post = prod(shape[:axis]), prod(shape[axis + 1 :])
    cube = scale.reshape(1, 1, pre, expected[axis], post)
    blocks, rest = divmod(shape[axis], granularity.block_size)
    sections = [cube[:, :, :, :blocks]] if blocks else []
    if rest:
        sections.append(cube[:, :, :, blocks:])
    return tuple(sections)


def boxes(shape: tuple[int, ...], limit: int) -> Iterator[Box]:
    """Split an index space into boxes of at most `limit` elements, last axes kept whole first.

    The split depends on `shape` and `limit` only, and the order is row-major.
    """
    edges = []
    room = limit
    for extent in reversed(shape):
        edges.append(max(1, min(extent, room)))
        room //= edges[-1]
    edges.reverse()
    starts = [range(0, extent, edge) for extent, edge in zip(shape, edges, strict=True)]
    for corner in product(*starts):
        yield tuple(
            slice(at, min(at + edge, extent))
            for at, edge, extent in zip(corner, edges, shape, strict=True)
        )
