"""If, Loop and Scan: nodes that hold graphs (ONNX operators, `Operators.md`)."""

from typing import Any

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

    Returns the carried values, then each scanned output stacked along a new first axis.
    """
    limit = _ENDLESS if trips is None else int(trips.item())
    going = condition is None or bool(condition.item())
    state: list[Value] = list(carried)
    scanned: list[list[Tensor]] = [[] for _ in range(call.outputs - len(state))]
    iteration = 0
    while going and iteration < limit:
        # The spec wants both as scalars, whatever shape the model gave.
        keep, *results = body(torch.tensor(iteration), torch.tensor(going), *state)
        assert isinstance(keep, Tensor)
        going = bool(keep.item())
        state = results[: len(state)]
        for column, value in zip(scanned, results[len(state) :], strict=True):
            assert isinstance(value, Tensor)
            column.append(value)
        iteration += 1
    return (*state, *(_stacked(call, len(state) + at, all_) for at, all_ in enumerate(scanned)))


def _stacked(call: Call, output: int, values: list[Tensor]) -> Tensor:
    """Return scanned values as one tensor; of an empty scan, only type and rank are known."""
    if values:
        return torch.stack(values)
    declared = call.node.outputs[output]
    shape = [0] * (len(declared.shape) if declared.shape is not None else 1)
    dtype = torch.float32 if declared.dtype is None else call.elements.of(declared.dtype)
    return torch.zeros(shape, dtype=dtype, device=call.device)


@TABLE.op("Scan", since=9, all_types=True)
def scan(call: Call, *inputs: Tensor, body: Body) -> Any:
    """Run the body along one axis of each scanned input."""
    count = call.integer("num_scan_inputs")
    state: list[Value] = list(inputs[: len(inputs) - count])
    sources = inputs[len(inputs) - count :]
    outputs = call.outputs - len(state)
    axes = call.integers("scan_input_axes", [0] * count)
    slices = [source.unbind(axis) for source, axis in zip(sources, axes, strict=True)]
    backward = call.integers("scan_input_directions", [0] * count)
    slices = [
        items[::-1] if turned else items for items, turned in zip(slices, backward, strict=True)
    ]
    columns: list[list[Tensor]] = [[] for _ in range(outputs)]
    for items in zip(*slices, strict=True):
        results = body(*state, *items)
        state = results[: len(state)]
        for column, value in zip(columns, results[len(state) :], strict=True):
            assert isinstance(value, Tensor)
            column.append(value)
    return (*state, *_scanned(call, columns))


def _scanned(call: Call, columns: list[list[Tensor]]) -> list[Tensor]:
    zeros = [0] * len(columns)
    axes = call.integers("scan_output_axes", zeros)
    backward = call.integers("scan_output_directions", zeros)
    return [
        torch.stack(column[::-1] if turned else column, dim=axis)
        for column, axis, turned in zip(columns, axes, backward, strict=True)
    ]
