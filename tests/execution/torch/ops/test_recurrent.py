"""LSTM, GRU and RNN: fused and step by step, against ONNX Runtime and numeric derivatives."""

from typing import Any

import numpy as np
import pytest
import torch

from qcompiler.errors import ModelError
from tests.support.graphs import Array, random_array
from tests.support.torch_programs import (
    agrees_with_runtime,
    gradients_agree,
    program_of,
    run_program,
)

_TOLERANCE = 2e-6
"""Of |error| / max(1, |expected|): float32 sums in another order, over up to 12 steps."""
_SIZES = (3, 4, 5)
"""Batch, input and hidden size."""
_TINY = (2, 2, 2)
"""The same where every element is varied."""
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_LONG, _SHORT = 12, 4
"""Steps that run fused, and so few that they never do."""


def _feeds(
    op: str,
    steps: int,
    directions: int,
    dtype: type = np.float32,
    sizes: tuple[int, int, int] = _SIZES,
) -> dict[str, Array]:
    batch, size, hidden = sizes
    width = _GATES[op] * hidden
    shapes = {
        "X": (steps, batch, size),
        "W": (directions, width, size),
        "R": (directions, width, hidden),
        "B": (directions, 2 * width),
        "H": (directions, batch, hidden),
        "C": (directions, batch, hidden),
        "P": (directions, 3 * hidden),
    }
    return {
        name: random_array(*shape, dtype=dtype, seed=seed) / 2
        for seed, (name, shape) in enumerate(shapes.items())
    }


def _text(
    op: str, given: str, attributes: str = "", dtype: str = "float", hidden: int = _SIZES[2]
) -> str:
    """Return a graph of one node that takes these inputs, "" for an absent one."""
    names = given.split(",")
    declared = [
        f"int32[N] {name}" if name == "lengths" else f"{dtype}[{', '.join('abcd'[:rank])}] {name}"
        for name in names
        if name
        for rank in [{"B": 2, "P": 2}.get(name, 3)]
    ]
    results = ["Y", "last", "memory"] if op == "LSTM" else ["Y", "last"]
    outputs = ", ".join(
        f"{dtype}[{'k, l, m, n' if name == 'Y' else 'k, l, m'}] {name}" for name in results
    )
    extra = f", {attributes}" if attributes else ""
    listed = ", ".join(name or '""' for name in names)
    return (
        f"g ({', '.join(declared)}) => ({outputs}) "
        f"{{ {', '.join(results)} = {op} <hidden_size = {hidden}{extra}> ({listed}) }}"
    )


def _agrees(
    op: str,
    given: str = "X,W,R,B,lengths,H",
    attributes: str = "",
    *,
    steps: int = _SHORT,
    directions: int = 1,
    lengths: list[int] | None = None,
) -> None:
    feeds = _feeds(op, steps, directions)
    ends = np.array(lengths or [steps] * _SIZES[0], np.int32)
    feeds = {name: ends if name == "lengths" else feeds[name] for name in given.split(",") if name}
    agrees_with_runtime(_text(op, given, attributes), feeds, tolerance=_TOLERANCE, opset=14)


@pytest.mark.parametrize("op", _GATES)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("steps", [1, _SHORT, _LONG])
@pytest.mark.parametrize("given", ["X,W,R", "X,W,R,B,,H"])
def test_directions(op: str, direction: str, steps: int, given: str) -> None:
    given = f"{given},C" if op == "LSTM" and "H" in given else given
    attributes = f'direction = "{direction}"'
    attributes += ", linear_before_reset = 1" if op == "GRU" else ""
    directions = 2 if direction == "bidirectional" else 1
    _agrees(op, given, attributes, steps=steps, directions=directions)


@pytest.mark.parametrize("op", _GATES)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("lengths", [[4, 1, 3], [_LONG, _LONG, _LONG]])
def test_sequences_of_their_own_lengths(op: str, direction: str, lengths: list[int]) -> None:
    directions = 2 if direction == "bidirectional" else 1
    _agrees(
        op,
        attributes=f'direction = "{direction}"',
        steps=max(lengths),
        directions=directions,
        lengths=lengths,
    )


@pytest.mark.parametrize("op", _GATES)
def test_an_empty_sequence_ends_with_zeros(op: str) -> None:
    given = "X,W,R,B,lengths,H,C" if op == "LSTM" else "X,W,R,B,lengths,H"
    _agrees(op, given, lengths=[0, 2, 4])


@pytest.mark.parametrize(
    ("op", "given", "attributes"),
    [
        ("LSTM", "X,W,R,B,lengths,H,C,P", ""),
        ("LSTM", "X,W,R,,,H,C,P", "clip = 0.3"),
        ("LSTM", "X,W,R,B,,H,C,P", "input_forget = 1"),
        ("LSTM", "X,W,R,B,,H,C", "clip = 0.3"),
        ("GRU", "X,W,R,B", "linear_before_reset = 0"),
        ("GRU", "X,W,R", "linear_before_reset = 0"),
        ("GRU", "X,W,R,B,,H", "linear_before_reset = 1, clip = 0.3"),
        ("GRU", "X,W,R,B,,H", "linear_before_reset = 0, clip = 0.3"),
        ("RNN", "X,W,R,B,,H", "clip = 0.3"),
    ],
)
def test_forms_without_a_fused_function(op: str, given: str, attributes: str) -> None:
    _agrees(op, given, attributes, steps=_LONG)


@pytest.mark.parametrize(
    ("op", "activations"),
    [
        ("LSTM", 'activations = ["HardSigmoid", "Softsign", "Softplus"]'),
        ("LSTM", 'activations = ["Sigmoid", "Relu", "Tanh"]'),
        (
            "LSTM",
            'activations = ["HardSigmoid", "LeakyRelu", "Elu"], '
            "activation_alpha = [0.3, 0.4, 0.7], activation_beta = [0.6]",
        ),
        (
            "LSTM",
            'activations = ["Sigmoid", "ThresholdedRelu", "Tanh"], activation_alpha = [0.3]',
        ),
        (
            "LSTM",
            'activations = ["Affine", "ScaledTanh", "Tanh"], '
            "activation_alpha = [0.3, 0.4], activation_beta = [0.6, 0.8]",
        ),
        ("GRU", 'activations = ["HardSigmoid", "Softsign"]'),
        ("GRU", 'linear_before_reset = 1, activations = ["Sigmoid", "Relu"]'),
        ("RNN", 'activations = ["Relu"]'),
        ("RNN", 'activations = ["Sigmoid"]'),
    ],
)
def test_activations(op: str, activations: str) -> None:
    _agrees(op, "X,W,R,B", activations, steps=_LONG)


def test_each_direction_has_its_own_activations() -> None:
    names = 'direction = "bidirectional", activations = ["Tanh", "Relu"]'
    _agrees("RNN", "X,W,R,B", names, steps=_LONG, directions=2)
    names = (
        'direction = "bidirectional", activations = ["LeakyRelu", "LeakyRelu"], '
        "activation_alpha = [0.1, 0.5]"
    )
    _agrees("RNN", "X,W,R,B", names, steps=_LONG, directions=2)


@pytest.mark.parametrize("op", _GATES)
@pytest.mark.parametrize("steps", [_SHORT, _LONG])
def test_batch_first_is_the_same_transposed(op: str, steps: int) -> None:
    given = ["X", "W", "R", "B", "", "H"]
    feeds = {name: value for name, value in _feeds(op, steps, 2).items() if name in given}
    both = 'direction = "bidirectional"'
    first = run_program(_text(op, ",".join(given), both), feeds, opset=14)
    turned = {
        name: value.swapaxes(0, 1) if name in ("X", "H") else value for name, value in feeds.items()
    }
    second = run_program(_text(op, ",".join(given), f"{both}, layout = 1"), turned, opset=14)
    axes = {"Y": (2, 0, 1, 3), "last": (1, 0, 2), "memory": (1, 0, 2)}
    for name, value in first.items():
        found = second[name].transpose(np.argsort(axes[name]))
        np.testing.assert_allclose(found, value, rtol=_TOLERANCE, atol=_TOLERANCE)


@pytest.mark.parametrize("op", _GATES)
def test_outputs_may_be_absent(op: str) -> None:
    feeds = {name: value for name, value in _feeds(op, _SHORT, 1).items() if name in "XWR"}
    everything = run_program(_text(op, "X,W,R"), feeds, opset=14)
    text = (
        "g (float[a, b, c] X, float[d, e, f] W, float[d, e, h] R) => (float[i, j, k] last) "
        f'{{ "", last = {op} <hidden_size = 5> (X, W, R) }}'
    )
    np.testing.assert_array_equal(run_program(text, feeds, opset=14)["last"], everything["last"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", _GATES)
@pytest.mark.parametrize("steps", [_SHORT, _LONG])
def test_halves_keep_their_type(op: str, dtype: str, steps: int) -> None:
    exact = {name: value for name, value in _feeds(op, steps, 1).items() if name in "XWRB"}
    wanted = run_program(_text(op, "X,W,R,B"), exact, opset=14)
    rounded = {
        name: torch.from_numpy(value).to(getattr(torch, dtype)) for name, value in exact.items()
    }
    found = run_program(_text(op, "X,W,R,B", dtype=dtype), rounded, opset=22)
    # The rounding of every step's state, 2^-9 in bfloat16 and 2^-12 in float16, adds up.
    bound = 0.05 if dtype == "bfloat16" else 0.01
    for name, value in wanted.items():
        assert np.abs(found[name].astype(np.float32) - value).max() < bound


@pytest.mark.parametrize(
    ("op", "given", "attributes"),
    [
        ("LSTM", "X,W,R,B,,H,C", ""),
        ("LSTM", "X,W,R,B,,H,C,P", ""),
        ("LSTM", "X,W,R,B,,H,C", "input_forget = 1"),
        ("GRU", "X,W,R,B,,H", "linear_before_reset = 1"),
        ("GRU", "X,W,R,B,,H", ""),
        ("RNN", "X,W,R,B,,H", ""),
    ],
)
def test_gradients_to_inputs_weights_and_states(op: str, given: str, attributes: str) -> None:
    everything = _feeds(op, 2, 1, np.float64, _TINY)
    feeds = {name: everything[name] for name in given.split(",") if name}
    gradients_agree(_text(op, given, attributes, "double", _TINY[2]), feeds, opset=14)


@pytest.mark.parametrize(
    ("op", "given"), [("LSTM", "X,W,R,B,,H,C"), ("GRU", "X,W,R,B,,H"), ("RNN", "X,W,R,B,,H")]
)
def test_gradients_of_fused_functions(op: str, given: str) -> None:
    everything = _feeds(op, 9, 2, np.float64, _TINY)
    feeds = {name: everything[name] for name in given.split(",") if name}
    attributes = 'direction = "bidirectional"'
    attributes += ", linear_before_reset = 1" if op == "GRU" else ""
    gradients_agree(_text(op, given, attributes, "double", _TINY[2]), feeds, opset=14)


def test_gradients_stop_at_the_end_of_a_sequence() -> None:
    given = "X,W,R,B,lengths,H,C"
    feeds: dict[str, Any] = _feeds("LSTM", 3, 1, np.float64, _TINY)
    del feeds["P"]
    feeds["lengths"] = np.array([3, 1], np.int32)
    gradients_agree(_text("LSTM", given, "", "double", _TINY[2]), feeds, opset=14)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ('activations = ["Gelu", "Tanh", "Tanh"]', "there is no activation Gelu"),
        ('activations = ["Affine", "Tanh", "Tanh"]', "Affine has no default"),
        ('activations = ["Sigmoid", "Tanh"]', "2 activations where 3 are needed"),
        ('direction = "bidirectional"', "direction 'bidirectional' for weights of 1"),
        ('direction = "sideways"', "direction 'sideways'"),
    ],
)
def test_refuses(attributes: str, reason: str) -> None:
    feeds = {name: value for name, value in _feeds("LSTM", _SHORT, 1).items() if name in "XWR"}
    with pytest.raises(ModelError, match=reason):
        program_of(_text("LSTM", "X,W,R", attributes), opset=14)(feeds)


def test_refuses_a_sequence_of_no_steps() -> None:
    feeds = {name: value for name, value in _feeds("GRU", 0, 1).items() if name in "XWR"}
    with pytest.raises(ModelError, match="no last state"):
        program_of(_text("GRU", "X,W,R"), opset=14)(feeds)
