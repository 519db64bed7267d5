"""If, Loop and Scan: nodes that hold graphs (ONNX operators, `Operators.md`)."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompiler.execution.torch.call import Body, Call
from qcompiler.execution.torch.element_types import Value
from qcompiler.execution.torch.op_table import OpTable

TABLE = OpTable()
_ENDLESS = (1 << 63) - 1


@TABLE.op("If", host=(0,), all_types=True)
def if_(_call: Call, condition: Tensor, *, then_branch: Body, else_branch: Body) -> Any:
    """Run one branch."""
    return tuple(then_branch() if condition.item() else else_branch())


@TABLE.op("Loop", host=(0, 1), all_types=True)
def loop(
    call: Call,
    trips: Tensor | None = None,
    condition: Tensor | None = None,
    *carried: Value,
    body: Body,
) -> Any:
    """Run the body up to `trips` times, or until it returns a false condition.

    A false condition ends the loop whether or not the node has one as an input, as in ONNX
    Runtime and the reference evaluator; the operator's text has it ignored without one.

    Returns the carried values, then each scanned output stacked along a new first axis.
    """
    limit = _ENDLESS if trips is None else int(trips.item())
    going = condition is None or bool(condition.item())
    state: list[Value] = list(carried)
    scanned: list[list[Any]] = [[] for _ in range(call.outputs - len(state))]
    iteration = 0
    while going and iteration < limit:
        # The spec wants both as scalars, whatever shape the model gave.
        keep, *results = body(torch.tensor(iteration), torch.tensor(going), *state)
        assert isinstance(keep, Tensor)
        going = bool(keep.item())
        state = results[: len(state)]
        for column, value in zip(scanned, results[len(state) :], strict=True):
            column.append(value)
        iteration += 1
    return (*state, *(_stacked(call, len(state) + at, all_) for at, all_ in enumerate(scanned)))


@TABLE.op("Scan", since=8, host=(0,), all_types=True)
def scan_batches(call: Call, lengths: Tensor | None, *inputs: Tensor, body: Body) -> Any:
    """Run the body along axis 1 of each scanned input, for every index of axis 0 anew.

    What a scanned output has beyond the length of its sequence is undefined; here it is zero.
    """
    count = call.integer("num_scan_inputs")
    initial, sources = inputs[: len(inputs) - count], inputs[len(inputs) - count :]
    backward = call.integers("directions", [0] * count)
    if lengths is not None and any(backward):
        reason = "backwards over sequences of different lengths is not supported"
        raise call.refuse(reason)
    longest = sources[0].shape[1]
    results = []
    for batch in range(sources[0].shape[0]):
        steps = longest if lengths is None else int(lengths[batch].item())
        slices = _slices([source[batch, :steps] for source in sources], [0] * count, backward)
        state, columns = _iterate(call, body, [each[batch] for each in initial], slices)
        padded = [_padded_column(column, longest) for column in columns]
        results.append([*state, *padded])
    return tuple(torch.stack(column) for column in zip(*results, strict=True))


def _padded_column(column: list[Tensor], length: int) -> Tensor:
    missing = [torch.zeros_like(column[0])] * (length - len(column))
    return torch.stack([*column, *missing])


@TABLE.op("Scan", since=9, all_types=True)
def scan(call: Call, *inputs: Tensor, body: Body) -> Any:
    """Run the body along one axis of each scanned input."""
    count = call.integer("num_scan_inputs")
    initial, sources = inputs[: len(inputs) - count], inputs[len(inputs) - count :]
    axes = call.integers("scan_input_axes", [0] * count)
    slices = _slices(sources, axes, call.integers("scan_input_directions", [0] * count))
    state, columns = _iterate(call, body, initial, slices)
    zeros = [0] * len(columns)
    stacked = []
    for output, (column, axis, turned) in enumerate(
        zip(
            columns,
            call.integers("scan_output_axes", zeros),
            call.integers("scan_output_directions", zeros),
            strict=True,
        ),
        len(state),
    ):
        stacked.append(_stacked(call, output, column[::-1] if turned else column, axis))
    return (*state, *stacked)


def _slices(
    sources: Sequence[Tensor], axes: Sequence[int], backward: Sequence[int]
) -> list[tuple[Tensor, ...]]:
    unbound = [source.unbind(axis) for source, axis in zip(sources, axes, strict=True)]
    return [
        items[::-1] if turned else items for items, turned in zip(unbound, backward, strict=True)
    ]


def _iterate(
    call: Call, body: Body, initial: Iterable[Value], slices: Sequence[tuple[Tensor, ...]]
) -> tuple[list[Any], list[list[Any]]]:
    """Return the last state, and what the body returned besides in every iteration."""
    state: list[Value] = list(initial)
    columns: list[list[Any]] = [[] for _ in range(call.outputs - len(state))]
    for items in zip(*slices, strict=True):
        results = body(*state, *items)
        state = results[: len(state)]
        for column, value in zip(columns, results[len(state) :], strict=True):
            column.append(value)
    return state, columns


def _stacked(call: Call, output: int, values: list[Any], axis: int = 0) -> Value:
    """Return scanned values as one tensor; of an empty scan, only what is declared is known."""
    if values and isinstance(values[0], np.ndarray):
        return np.stack(values, axis)
    if values:
        return torch.stack(values, axis)
    declared = call.node.outputs[output]
    sizes = [0] if declared.shape is None else list(declared.shape)
    shape = [size if isinstance(size, int) else 0 for size in sizes]
    shape[axis] = 0
    dtype = torch.float32 if declared.dtype is None else call.elements.of(declared.dtype)
    return torch.zeros(shape, dtype=dtype, device=call.device)
