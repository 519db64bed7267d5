"""Errors of output channels over many calls, as sums, with padding left out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.ir.dataflow import constant_of, is_op
from qcompiler.ir.quantizable import row_of

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]

_CHUNK_BYTES: Final = 8 << 20
_MASKED_OPS: Final = ("Softmax", "Attention", "MultiHeadAttention")
"""What a mask of padding acts on; the last two also in the domain com.microsoft."""
_LOOKUPS: Final = ("Gather", "GatherElements", "GatherND")


def padding_inputs(model: ir.Model, samples: Samples) -> tuple[str, ...]:
    """Return the graph inputs that say which tokens are padding, by their names.

    Such an input has two axes, holds nothing but 0 and 1 in every call, with a 1 in every row,
    and reaches the Softmax of an attention without passing an op with weights. Token types look
    the same and also hold only 0 and 1, but choose rows of a table; a way through the index of a
    lookup does not count.

    Args:
        model: The model.
        samples: The calls, which are read once where an input has the form.
    """
    found = {value.name or "": None for value in model.graph.inputs if _has_form(value)}
    for feeds in samples if found else ():
        for name in [name for name in found if not _holds_mask(feeds[name])]:
            del found[name]
        if not found:
            break
    return tuple(found)


def _has_form(value: ir.Value) -> bool:
    rank = None if value.shape is None else len(value.shape)
    return rank in (None, 2) and _reaches_attention(value)


def _holds_mask(values: Array) -> bool:
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        return False
    return bool(np.isin(values, (0, 1)).all() and (values != 0).any(axis=1).all())


def _reaches_attention(value: ir.Value) -> bool:
    pending, seen = [value], {value}
    while pending:
        for use in pending.pop().uses():
            node = use.node
            if node.op_type in _MASKED_OPS:
                return True
            if (node.op_type in _LOOKUPS and use.idx == 1) or _has_weight(node):
                continue
            pending += [output for output in node.outputs if output not in seen]
            seen.update(node.outputs)
    return False


def _has_weight(node: ir.Node) -> bool:
    row = row_of(node)
    if row is None or is_op(node, *_LOOKUPS):
        return False
    return any(constant_of(node.inputs[w.index]) is not None for w in row.weights)


def rows_that_count(masks: Feeds, shape: Sequence[int], axis: int) -> Array | None:
    """Return which rows of a value are no padding, bool `[batch, tokens]`; None if all count.

    A mask belongs to a value of three axes or more whose channels are the last, where its extents
    are those of the first two. Where several masks fit, it is not known which one is meant, and
    all rows count.

    Args:
        masks: The masks of the call.
        shape: Of the value.
        axis: Its axis of channels.
    """
    if len(shape) < 3 or axis != len(shape) - 1:
        return None
    fitting = [mask for mask in masks.values() if mask.shape == tuple(shape[:2])]
    return fitting[0] != 0 if len(fitting) == 1 else None


@dataclass(slots=True)
class ErrorSums:
    """Sums over the rows of a value, by channel: what quantization adds to it.

    Attributes:
        channels: Number of channels.
        rows: How many rows were added.
        error: float64 `[channels]`, sum of the errors.
        squares: float64 `[channels]`, sum of their squares.
        signal: Sum of the squares of the float value.
    """

    channels: int
    rows: int = 0
    signal: float = 0.0
    error: F64 = field(init=False)
    squares: F64 = field(init=False)

    def __post_init__(self) -> None:
        self.error, self.squares = np.zeros((2, self.channels))

    def add(self, truth: Array, found: Array, axis: int, counts: Array | None) -> None:
        """Add a value of one call.

        Args:
            truth: The value in the float model.
            found: The same in the quantized one, of the same shape.
            axis: The axis of channels.
            counts: bool, over the first two axes: the rows that count; None is all of them.
        """
        if truth.ndim == 1:
            truth, found, axis = truth[None], found[None], 1
        step = max(1, _CHUNK_BYTES // max(1, 8 * prod(truth.shape[1:])))
        for start in range(0, len(truth), step):
            part = slice(start, start + step)
            kept = None if counts is None else counts[part]
            self._add(_rows(truth[part], axis), _rows(found[part], axis), kept)

    def _add(self, truth: F64, found: F64, counts: Array | None) -> None:
        """Add `[entries, rows, channels]` each; `counts` is `[entries, rows]`."""
        if counts is not None:
            # Rows lie in the order of all axes but that of the channels, and the mask has two.
            each = np.repeat(counts, truth.shape[1] // counts.shape[1], axis=1)
            truth, found = truth[each], found[each]
        truth = truth.reshape(-1, self.channels)
        error = found.reshape(-1, self.channels) - truth
        self.rows += len(error)
        self.error += error.sum(axis=0)
        self.squares += np.square(error).sum(axis=0)
        self.signal += float(np.square(truth).sum())

    @property
    def mean(self) -> F64:
        """Mean error of each channel."""
        return self.error / max(1, self.rows)

    def mean_square(self, shift: F64 | None = None) -> float:
        """Return the mean squared error, as it is or with `shift` `[channels]` added to it."""
        total = self.squares.sum()
        if shift is not None:
            total = total + (2 * shift * self.error + self.rows * shift**2).sum()
        return float(total) / max(1, self.rows * self.channels)

    @property
    def mean_signal(self) -> float:
        """Mean square of the float value."""
        return self.signal / max(1, self.rows * self.channels)


def _rows(values: Array, axis: int) -> F64:
    """Return `[entries along the first axis, rows, channels]`, float64."""
    moved = np.moveaxis(values, axis, -1)
    rows: F64 = moved.reshape(len(values), -1, moved.shape[-1]).astype(np.float64)
    return rows
