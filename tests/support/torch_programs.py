"""PyTorch programs of small graphs, checked against ONNX Runtime and numeric derivatives."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from qcompiler.execution.torch import Program
from qcompiler.execution.torch.element_types import STORAGE, to_numpy
from tests.support.graphs import Array, build
from tests.support.parity import run_model


def program_of(text: str, weights: Mapping[str, Any] | None = None, *, opset: int = 21) -> Program:
    """Return the program of a graph in ONNX text; every node of it has to run in PyTorch."""
    program = Program.from_subgraph(build(text, weights, opset=opset))
    assert not program.outside_torch
    return program


def run_program(
    text: str,
    feeds: Mapping[str, Any],
    weights: Mapping[str, Any] | None = None,
    *,
    opset: int = 21,
) -> dict[str, Array]:
    """Run a graph in PyTorch and return its outputs as arrays of their ONNX types."""
    model = build(text, weights, opset=opset)
    program = Program.from_subgraph(model)
    assert not program.outside_torch
    results = program(feeds)
    declared = {str(value.name): value.dtype for value in model.graph.outputs}
    for name, result in results.items():
        # An array would be converted in silence.
        dtype = declared[name]
        assert not isinstance(result, torch.Tensor) or not dtype or result.dtype == STORAGE[dtype]
    return {name: to_numpy(result, declared[name]) for name, result in results.items()}


def agrees_with_runtime(
    text: str,
    feeds: Mapping[str, Array],
    weights: Mapping[str, Any] | None = None,
    *,
    tolerance: float,
    opset: int = 21,
) -> None:
    """Fail unless PyTorch and ONNX Runtime, its optimizations off, give the same outputs.

    Args:
        text: The graph.
        feeds: Its inputs.
        weights: Its initializers.
        tolerance: Largest allowed `|error| / max(1, |expected|)` of an element; 0 asks for
            equal values.
        opset: Version of the standard opset.
    """
    expected = run_model(build(text, weights, opset=opset), feeds)
    found = run_program(text, feeds, weights, opset=opset)
    assert list(found) == list(expected)
    for name, right in expected.items():
        assert (found[name].dtype, found[name].shape) == (right.dtype, right.shape), name
        if tolerance == 0:
            np.testing.assert_array_equal(found[name], right, err_msg=name)
        else:
            np.testing.assert_allclose(
                found[name].astype(np.float64),
                right.astype(np.float64),
                rtol=tolerance,
                atol=tolerance,
                err_msg=name,
            )


def gradients_agree(
    text: str,
    inputs: Mapping[str, Any],
    weights: Mapping[str, Any] | None = None,
    opset: int = 21,
) -> None:
    """Fail unless the gradients to all float64 inputs agree with numeric derivatives.

    Args:
        text: A graph whose differentiable inputs are of type `double`.
        inputs: Arrays by name, away from points without a derivative.
        weights: Initializers, which get no gradient.
        opset: Version of the standard opset.
    """
    program = program_of(text, weights, opset=opset)
    given = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
    live = [name for name, value in given.items() if value.dtype is torch.float64]
    assert live, "no input is of type double"

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = program(given | dict(zip(live, values, strict=True)))
        return tuple(each for each in results.values() if each.is_floating_point())

    arguments = [given[name].requires_grad_() for name in live]
    assert torch.autograd.gradcheck(run, arguments)
