"""Cells of recurrent ops, one step at a time, in every form (ONNX operators, `Operators.md`)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call

Activation = Callable[[Tensor], Tensor]
State = tuple[Tensor, ...]
"""What a cell hands on, [batch, H] each: the hidden state, and an LSTM's cell state."""
Cell = Callable[[Tensor, State], State]
"""Takes the input's share of a step, [batch, gates * H], and the state."""


@dataclass(frozen=True, slots=True)
class Kind:
    """An activation function with up to two parameters.

    Attributes:
        function: Of the values, alpha and beta.
        takes: How many of these parameters it has.
        alpha: Default; None if it has to be given.
        beta: Likewise.
    """

    function: Callable[[Tensor, float, float], Tensor]
    takes: int = 0
    alpha: float | None = 0.0
    beta: float | None = 0.0


_KINDS: Final[Mapping[str, Kind]] = {
    "relu": Kind(lambda x, _a, _b: torch.relu(x)),
    "tanh": Kind(lambda x, _a, _b: torch.tanh(x)),
    "sigmoid": Kind(lambda x, _a, _b: torch.sigmoid(x)),
    "softsign": Kind(lambda x, _a, _b: functional.softsign(x)),
    "softplus": Kind(lambda x, _a, _b: functional.softplus(x)),
    "leakyrelu": Kind(lambda x, alpha, _b: functional.leaky_relu(x, alpha), 1, 0.01),
    "elu": Kind(lambda x, alpha, _b: functional.elu(x, alpha), 1, 1.0),
    "thresholdedrelu": Kind(lambda x, alpha, _b: x.masked_fill(x < alpha, 0), 1, 1.0),
    "affine": Kind(lambda x, alpha, beta: alpha * x + beta, 2, None, None),
    "scaledtanh": Kind(lambda x, alpha, beta: alpha * torch.tanh(beta * x), 2, None, None),
    "hardsigmoid": Kind(lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1), 2, 0.2, 0.5),
}


@dataclass(frozen=True, slots=True)
class Form:
    """What a node's attributes say about its cell.

    Attributes:
        activations: One for each of f, g and h that the op has.
        clip: Bound of what goes into an activation, or None.
        input_forget: Whether an LSTM forgets as much as it does not take in.
        linear_before_reset: Whether a GRU resets after the product with the hidden state.
    """

    activations: tuple[Activation, ...]
    clip: float | None = None
    input_forget: bool = False
    linear_before_reset: bool = False

    def bounded(self, x: Tensor) -> Tensor:
        """Return what an activation is applied to."""
        return x if self.clip is None else x.clamp(-self.clip, self.clip)


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of one direction.

    Attributes:
        recurrent: [gates * H, H].
        bias: [gates * H] of the recurrent product, or None.
        peephole: [3 * H] of an LSTM, or None.
    """

    recurrent: Tensor
    bias: Tensor | None = None
    peephole: Tensor | None = None


def activations_of(call: Call, names: list[str], count: int) -> Iterator[tuple[Activation, ...]]:
    """Yield the activations of each direction, of `count` functions.

    Only functions with parameters take from the lists of these, as in ONNX Runtime.
    """
    alphas = iter(call.numbers("activation_alpha", ()))
    betas = iter(call.numbers("activation_beta", ()))
    made = []
    for name in names:
        kind = _KINDS.get(name.lower())
        if kind is None:
            reason = f"there is no activation {name}; known are {', '.join(sorted(_KINDS))}"
            raise call.refuse(reason)
        alpha = next(alphas, kind.alpha) if kind.takes else 0.0
        beta = next(betas, kind.beta) if kind.takes > 1 else 0.0
        if alpha is None or beta is None:
            reason = f"the activation {name} has no default for alpha and beta"
            raise call.refuse(reason)
        made.append(_activation(kind, alpha, beta))
    for start in range(0, len(made) - count + 1, count):
        yield tuple(made[start : start + count])


def _activation(kind: Kind, alpha: float, beta: float) -> Activation:
    return lambda x: kind.function(x, alpha, beta)


def lstm_cell(form: Form, weights: Weights) -> Cell:
    """Return the step of an LSTM whose gates are input, output, forget and cell."""
    f, g, h = form.activations
    peepholes: tuple[Tensor | None, ...] = (None, None, None)
    if weights.peephole is not None:
        peepholes = weights.peephole.chunk(3)

    def gate(x: Tensor, peephole: Tensor | None, memory: Tensor) -> Tensor:
        return f(form.bounded(x if peephole is None else x + peephole * memory))

    def step(share: Tensor, state: State) -> State:
        hidden, memory = state
        gates = share + functional.linear(hidden, weights.recurrent, weights.bias)
        into, out, forget, candidate = gates.chunk(4, -1)
        taken = gate(into, peepholes[0], memory)
        kept = 1 - taken if form.input_forget else gate(forget, peepholes[2], memory)
        memory = kept * memory + taken * g(form.bounded(candidate))
        return gate(out, peepholes[1], memory) * h(memory), memory

    return step


def gru_cell(form: Form, weights: Weights) -> Cell:
    """Return the step of a GRU whose gates are update, reset and hidden."""
    f, g = form.activations
    size = weights.recurrent.shape[-1]
    parts = [2 * size, size]
    gating, producing = torch.split(weights.recurrent, parts)
    gating_bias, producing_bias = (
        (None, None) if weights.bias is None else torch.split(weights.bias, parts)
    )

    def step(share: Tensor, state: State) -> State:
        (hidden,) = state
        gates, candidate = torch.split(share, parts, -1)
        gates = f(form.bounded(gates + functional.linear(hidden, gating, gating_bias)))
        update, reset = gates.chunk(2, -1)
        if form.linear_before_reset:
            product = reset * functional.linear(hidden, producing, producing_bias)
        else:
            product = functional.linear(reset * hidden, producing, producing_bias)
        candidate = g(form.bounded(candidate + product))
        return ((1 - update) * candidate + update * hidden,)

    return step


def rnn_cell(form: Form, weights: Weights) -> Cell:
    """Return the step of a plain recurrence."""
    (f,) = form.activations

    def step(share: Tensor, state: State) -> State:
        product = functional.linear(state[0], weights.recurrent, weights.bias)
        return (f(form.bounded(share + product)),)

    return step


def unroll(
    cell: Cell, shares: Tensor, state: State, alive: Tensor | None, *, backward: bool
) -> tuple[Tensor, State]:
    """Run a cell over a batch of sequences.

    Args:
        cell: The step.
        shares: Of the inputs, [T, batch, gates * H].
        state: To start with.
        alive: bool, [T, batch, 1]: which sequences have a step there; None for all.
        backward: Whether the last step comes first.

    Returns:
        Hidden states, [T, batch, H], zero after the end of a sequence; and the last state.
    """
    outputs = []
    steps = range(shares.shape[0])
    for t in reversed(steps) if backward else steps:
        after = cell(shares[t], state)
        if alive is None:
            state = after
            outputs.append(state[0])
        else:
            pairs = zip(after, state, strict=True)
            state = tuple(torch.where(alive[t], new, old) for new, old in pairs)
            outputs.append(torch.where(alive[t], state[0], 0))
    if backward:
        outputs.reverse()
    if alive is not None:
        # As ONNX Runtime has it for a sequence without steps.
        state = tuple(torch.where(alive[0], each, 0) for each in state)
    return torch.stack(outputs), state
