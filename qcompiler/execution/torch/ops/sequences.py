"""Sequences and optionals (ONNX operators, `Operators.md`).

A sequence is a list, an optional its element or None.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompiler.execution.torch.call import Body, Call
from qcompiler.execution.torch.element_types import Value
from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.ops.moving import moves_elements

TABLE = OpTable()
Sequence = list[Any]


@TABLE.op("SequenceConstruct", since=11, all_types=True)
def sequence_construct(_call: Call, *inputs: Value) -> Sequence:
    """Return the inputs as a sequence."""
    return list(inputs)


@TABLE.op("SequenceEmpty", since=11, all_types=True)
def sequence_empty(_call: Call) -> Sequence:
    """Return a sequence of nothing."""
    return []


@TABLE.op("SequenceAt", since=11, host=(1,), all_types=True)
def sequence_at(call: Call, sequence: Sequence, position: Tensor) -> Value:
    """Return one element."""
    element: Value = sequence[_position(call, position, len(sequence), len(sequence) - 1)]
    return element


@TABLE.op("SequenceInsert", since=11, host=(2,), all_types=True)
def sequence_insert(
    call: Call, sequence: Sequence, element: Value, position: Tensor | None = None
) -> Sequence:
    """Return the sequence with an element more, at the end unless a position is given."""
    count = len(sequence)
    at = count if position is None else _position(call, position, count, count)
    return [*sequence[:at], element, *sequence[at:]]


@TABLE.op("SequenceErase", since=11, host=(1,), all_types=True)
def sequence_erase(call: Call, sequence: Sequence, position: Tensor | None = None) -> Sequence:
    """Return the sequence without one element, the last unless a position is given."""
    count = len(sequence)
    at = count - 1 if position is None else _position(call, position, count, count - 1)
    return [*sequence[:at], *sequence[at + 1 :]]


@TABLE.op("SequenceLength", since=11, all_types=True)
def sequence_length(_call: Call, sequence: Sequence) -> Tensor:
    """Return how many elements there are."""
    return torch.tensor(len(sequence))


def _position(call: Call, position: Tensor, count: int, last: int) -> int:
    """Return a position counted from the start; it may be up to `last`."""
    at = int(position.item())
    if not -count <= at <= last:
        reason = f"position {at} is outside of a sequence of {count}"
        raise call.refuse(reason)
    return at + count if at < 0 else at


@TABLE.op("SplitToSequence", since=11, host=(1,), all_types=True)
@moves_elements()
def split_to_sequence(call: Call, x: Tensor, split: Tensor | None = None) -> Sequence:
    """Return the pieces of x along an axis: of given sizes, of one size, or of one element."""
    axis = call.integer("axis", 0)
    if split is None:
        return list(torch.split(x, 1, axis) if call.integer("keepdims", 1) else x.unbind(axis))
    return list(torch.split(x, split.tolist(), axis))


@TABLE.op("ConcatFromSequence", since=11, all_types=True)
def concat_from_sequence(call: Call, sequence: Sequence) -> Value:
    """Return the elements joined along an axis, a new one if `new_axis`."""
    axis, is_new = call.integer("axis"), bool(call.integer("new_axis", 0))
    if any(isinstance(each, np.ndarray) for each in sequence):
        joined: Value = np.stack(sequence, axis) if is_new else np.concatenate(sequence, axis)
        return joined
    if len({each.device for each in sequence}) > 1:  # shapes, say, that were left on the CPU
        sequence = [each.to(call.device) for each in sequence]
    return torch.stack(sequence, axis) if is_new else torch.cat(sequence, axis)


@TABLE.op("SequenceMap", since=17, all_types=True)
def sequence_map(call: Call, first: Sequence, *others: Value, body: Body) -> Any:
    """Return sequences of what the body makes of each element; tensors are the same for all."""
    columns: list[Sequence] = [[] for _ in range(call.outputs)]
    for at, element in enumerate(first):
        inputs = [each[at] if isinstance(each, list) else each for each in others]
        for column, result in zip(columns, body(element, *inputs), strict=True):
            column.append(result)
    return tuple(columns)


@TABLE.op("Optional", since=15, all_types=True)
def optional(_call: Call, element: Value = None) -> Value:
    """Return the element as an optional; without one, an empty optional."""
    return element


@TABLE.op("OptionalGetElement", since=15, all_types=True)
def optional_get_element(call: Call, element: Value) -> Value:
    """Return the element of an optional."""
    if element is None:
        reason = "the optional is empty"
        raise call.refuse(reason)
    return element


@TABLE.op("OptionalHasElement", since=15, all_types=True)
def optional_has_element(_call: Call, element: Value = None) -> Tensor:
    """Return whether there is an element."""
    return torch.tensor(element is not None)
