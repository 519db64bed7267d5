"""LSTM, GRU and RNN (ONNX operators, `Operators.md`).

PyTorch's fused functions run the usual forms; all others run step by step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable
from qcompiler.execution.torch.ops.recurrent_cells import (
    Cell,
    Form,
    State,
    Weights,
    activations_of,
    gru_cell,
    lstm_cell,
    rnn_cell,
    unroll,
)

TABLE = OpTable()
_DIRECTIONS: Final = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
"""By name, whether each direction runs backward."""
_FEW_STEPS: Final = 8
"""Up to so many steps, putting the weights in order costs more than the fused function saves."""


@dataclass(frozen=True, slots=True)
class Family:
    """What tells one op from another.

    Attributes:
        cell: Makes a step.
        activations: Default ones.
        order: PyTorch's order of the gates, as positions in ONNX's.
        fused: PyTorch's function by activations.
    """

    cell: Callable[[Form, Weights], Cell]
    activations: tuple[str, ...]
    order: tuple[int, ...]
    fused: dict[tuple[str, ...], Callable[..., tuple[Tensor, ...]]]


_LSTM: Final = Family(
    lstm_cell,
    ("Sigmoid", "Tanh", "Tanh"),
    (0, 2, 3, 1),
    {("sigmoid", "tanh", "tanh"): torch.lstm},
)
_GRU: Final = Family(gru_cell, ("Sigmoid", "Tanh"), (1, 0, 2), {("sigmoid", "tanh"): torch.gru})
_RNN: Final = Family(
    rnn_cell, ("Tanh",), (0,), {("tanh",): torch.rnn_tanh, ("relu",): torch.rnn_relu}
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs of a node, in the layout that has the sequence first.

    Attributes:
        x: [T, batch, input size].
        w: [directions, gates * H, input size].
        r: [directions, gates * H, H].
        bias: [directions, 2 * gates * H], or None.
        state: [directions, batch, H] each.
        peephole: [directions, 3 * H], or None.
        lengths: Of the sequences, where they are not all of T steps.
    """

    x: Tensor
    w: Tensor
    r: Tensor
    bias: Tensor | None
    state: State
    peephole: Tensor | None
    lengths: list[int] | None


@TABLE.op("LSTM", host=(4,))
def lstm(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
    memory: Tensor | None = None,
    peephole: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the hidden states of every step, [T, directions, batch, H], and the last states.

    With `layout` 1, the batch comes first everywhere. What comes after the end of a sequence is
    zero.
    """
    return _run(call, _LSTM, (x, w, r, bias), lengths, (hidden, memory), peephole)


@TABLE.op("GRU", host=(4,))
def gru(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the hidden states of every step and the last ones, laid out as an LSTM's."""
    return _run(call, _GRU, (x, w, r, bias), lengths, (hidden,))


@TABLE.op("RNN", host=(4,))
def rnn(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the hidden states of every step and the last ones, laid out as an LSTM's."""
    return _run(call, _RNN, (x, w, r, bias), lengths, (hidden,))


def _run(
    call: Call,
    family: Family,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    lengths: Tensor | None,
    initial: Sequence[Tensor | None],
    peephole: Tensor | None = None,
) -> tuple[Tensor, ...]:
    x, w, r, bias = tensors
    batch_first = call.integer("layout", 0) == 1
    if batch_first:
        x = x.transpose(0, 1)
        initial = [None if each is None else each.transpose(0, 1) for each in initial]
    if not x.shape[0]:
        reason = "a sequence of no steps has no last state"
        raise call.refuse(reason)
    zeros = x.new_zeros(w.shape[0], x.shape[1], r.shape[-1])
    state = tuple(zeros if each is None else each for each in initial)
    steps = None if lengths is None else lengths.tolist()
    if steps == [x.shape[0]] * x.shape[1]:
        steps = None
    inputs = Inputs(x, w, r, bias, state, peephole, steps)
    backward = _DIRECTIONS.get(call.text("direction", "forward"))
    if backward is None or len(backward) != w.shape[0]:
        reason = f"direction {call.text('direction', 'forward')!r} for weights of {w.shape[0]}"
        raise call.refuse(reason)
    fused = _fused_function(call, family, inputs)
    if fused is not None:
        outputs, last = _run_fused(fused, family, inputs, backward)
    else:
        outputs, last = _run_steps(call, family, inputs, backward)
    if batch_first:
        return outputs.movedim(2, 0), *(each.transpose(0, 1) for each in last)
    return outputs, *last


def _activation_names(call: Call, family: Family, directions: int) -> list[str]:
    count = len(family.activations) * directions
    names = call.texts("activations", family.activations * directions)
    if len(names) < count:
        reason = f"{len(names)} activations where {count} are needed"
        raise call.refuse(reason)
    return names[:count]


def _fused_function(
    call: Call, family: Family, inputs: Inputs
) -> Callable[..., tuple[Tensor, ...]] | None:
    """Return PyTorch's function if it computes just what the node asks for."""
    odd = call.has("clip") or call.integer("input_forget", 0) == 1
    is_gru = family is _GRU
    if odd or (is_gru and not call.integer("linear_before_reset", 0)):
        return None
    if inputs.peephole is not None or inputs.lengths is not None:
        return None
    if inputs.x.shape[0] <= _FEW_STEPS:
        return None
    directions, count = inputs.w.shape[0], len(family.activations)
    names = [name.lower() for name in _activation_names(call, family, directions)]
    first = tuple(names[:count])
    return family.fused.get(first) if tuple(names) == first * directions else None


def _run_fused(
    function: Callable[..., tuple[Tensor, ...]],
    family: Family,
    inputs: Inputs,
    backward: tuple[bool, ...],
) -> tuple[Tensor, State]:
    x = inputs.x.flip(0) if backward == (True,) else inputs.x
    state: Any = inputs.state if len(inputs.state) > 1 else inputs.state[0]
    outputs, *last = function(
        x,
        state,
        _fused_weights(inputs, family.order),
        True,
        1,
        0.0,
        torch.is_grad_enabled(),
        len(backward) > 1,
        False,
    )
    outputs = outputs.flip(0) if backward == (True,) else outputs
    return torch.unflatten(outputs, -1, (len(backward), -1)).transpose(1, 2), tuple(last)


def _fused_weights(inputs: Inputs, order: tuple[int, ...]) -> list[Tensor]:
    """Return the weights of each direction, then its biases, with gates in PyTorch's order.

    In memory, which is all one piece, the biases of all directions come last: what cuDNN wants.
    """
    size = inputs.r.shape[-1]
    blocks = [each for pair in zip(inputs.w, inputs.r, strict=True) for each in pair]
    bias = inputs.bias
    if bias is None:
        # Without biases, PyTorch does not see that the rest is one piece, and copies it.
        bias = inputs.w.new_zeros(inputs.w.shape[0], 2 * inputs.w.shape[1])
    blocks += torch.unflatten(bias, -1, (2, -1)).flatten(0, 1).unbind()
    pieces = [torch.split(block, size)[gate].flatten() for block in blocks for gate in order]
    parts = torch.split(torch.cat(pieces), [block.numel() for block in blocks])
    ready = [part.view(block.shape) for part, block in zip(parts, blocks, strict=True)]
    directions = inputs.w.shape[0]
    # Two blocks of weights each, and two of biases.
    return [
        block
        for at in range(0, 2 * directions, 2)
        for start in range(at, len(ready), 2 * directions)
        for block in ready[start : start + 2]
    ]


def _run_steps(
    call: Call, family: Family, inputs: Inputs, backward: tuple[bool, ...]
) -> tuple[Tensor, State]:
    names = _activation_names(call, family, len(backward))
    alive = None
    if inputs.lengths is not None:
        steps = torch.arange(inputs.x.shape[0], device=inputs.x.device)
        ends = torch.tensor(inputs.lengths, device=inputs.x.device)
        alive = (steps.unsqueeze(1) < ends).unsqueeze(-1)
    columns, states = [], []
    kinds = activations_of(call, names, len(family.activations))
    for at, (turned, activations) in enumerate(zip(backward, kinds, strict=True)):
        form = Form(
            activations,
            call.number("clip") if call.has("clip") else None,
            call.integer("input_forget", 0) == 1,
            call.integer("linear_before_reset", 0) != 0,
        )
        bias = (None, None) if inputs.bias is None else inputs.bias[at].chunk(2)
        peephole = None if inputs.peephole is None else inputs.peephole[at]
        cell = family.cell(form, Weights(inputs.r[at], bias[1], peephole))
        shares = functional.linear(inputs.x, inputs.w[at], bias[0])
        start = tuple(each[at] for each in inputs.state)
        column, last = unroll(cell, shares, start, alive, backward=turned)
        columns.append(column)
        states.append(last)
    stacked = tuple(torch.stack(each) for each in zip(*states, strict=True))
    return torch.stack(columns, 1), stacked
