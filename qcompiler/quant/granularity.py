"""How many elements share one scale."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor.

    Worked shapes: a weight `[256, 1024]` has a scale of shape `[]`.
    """

    def __str__(self) -> str:
        return "per-tensor"


@dataclass(frozen=True, slots=True)
class PerAxis:
    """One scale per index of `axis`.

    Worked shapes: a weight `[256, 1024]` with `axis=1` has a scale of shape `[1024]`.
    """

    axis: int

    def __str__(self) -> str:
        return f"per-axis({self.axis})"


@dataclass(frozen=True, slots=True)
class PerBlock:
    """One scale per `block_size` consecutive elements along `axis` (ONNX opset 21+).

    Worked shapes: a weight `[256, 1024]` with `axis=0, block_size=64` has a scale of shape
    `[4, 1024]`. Where the block size does not divide the axis, the last block is shorter: a
    weight `[576, 1024]` with `block_size=128` has a scale of shape `[5, 1024]`, the last row of
    which covers 64 elements. ONNX allows this (DequantizeLinear-21: `ceil(D / block_size)`);
    a target's table says whether its kernels do.
    """

    axis: int
    block_size: int

    def __str__(self) -> str:
        return f"per-block({self.axis}, {self.block_size})"


Granularity = PerTensor | PerAxis | PerBlock


def scale_shape(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Return the shape of the scale of a tensor of `shape`.

    Raises:
        ValueError: The axis is outside the shape, or the block size is below 1.
    """
    if isinstance(granularity, PerTensor):
        return ()
    axis = granularity.axis
    if not 0 <= axis < len(shape):
        message = f"axis {axis} is outside a tensor of shape {list(shape)}"
        raise ValueError(message)
    if isinstance(granularity, PerAxis):
        return (shape[axis],)
    if granularity.block_size < 1:
        message = f"block size {granularity.block_size} is below 1"
        raise ValueError(message)
    blocks = -(-shape[axis] // granularity.block_size)
    return (*shape[:axis], blocks, *shape[axis + 1 :])
