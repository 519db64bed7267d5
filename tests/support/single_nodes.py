"""Graphs of a single node, written from the arrays that go into it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.support.graphs import Array
from tests.support.torch_programs import agrees_with_runtime, gradients_agree

_TYPES = {"float32": "float", "float64": "double"}


def node_text(
    op: str, inputs: Mapping[str, Any], *, outputs: str = "y", weights: Sequence[str] = ()
) -> str:
    """Return a graph of one node of com.microsoft, in ONNX text.

    Args:
        op: The op with its attributes: `"Gelu"`, `"FastGelu<alpha=1.0>"`; `":Softmax"` is of the
            standard domain.
        inputs: Arrays by name in the order of the node's inputs; None for an absent one.
        outputs: Names of the outputs, separated by commas; empty for an absent one.
        weights: Inputs of the node that are initializers, and no inputs of the graph.
    """
    declared = ", ".join(
        f"{_type_of(value)} {name}"
        for name, value in inputs.items()
        if value is not None and name not in weights
    )
    given = ", ".join("" if value is None else name for name, value in inputs.items())
    # ONNX Runtime's shape inference takes an absent input at the end for a present one.
    given = given.rstrip(", ")
    results = ", ".join(name for name in outputs.split(",") if name)
    node = op.removeprefix(":") if op.startswith(":") else f"com.microsoft.{op}"
    return (
        '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n'
        f"g ({declared}) => ({results}) {{ {outputs} = {node} ({given}) }}"
    )


def matches_runtime(
    op: str,
    inputs: Mapping[str, Any],
    *,
    tolerance: float,
    outputs: str = "y",
    weights: Sequence[str] = (),
) -> None:
    """Fail unless one node gives the same in PyTorch and in ONNX Runtime.

    Args:
        op: As `node_text` takes it.
        inputs: Likewise.
        tolerance: Largest allowed `|error| / max(1, |expected|)`; 0 asks for equal values.
        outputs: As `node_text` takes it.
        weights: Likewise.
    """
    agrees_with_runtime(
        node_text(op, inputs, outputs=outputs, weights=weights),
        {k: v for k, v in inputs.items() if v is not None and k not in weights},
        {name: inputs[name] for name in weights},
        tolerance=tolerance,
    )


def has_gradients(
    op: str, inputs: Mapping[str, Any], *, outputs: str = "y", weights: Sequence[str] = ()
) -> None:
    """Fail unless the gradients of one node to its float inputs agree with numeric derivatives.

    Args:
        op: As `node_text` takes it.
        inputs: Likewise; float32 arrays are taken as float64.
        outputs: As `node_text` takes it.
        weights: Likewise.
    """
    exact = {name: _double(value) for name, value in inputs.items()}
    gradients_agree(
        node_text(op, exact, outputs=outputs, weights=weights),
        {k: v for k, v in exact.items() if v is not None and k not in weights},
        {name: exact[name] for name in weights},
    )


def _type_of(value: Array) -> str:
    shape = ",".join(str(size) for size in value.shape)
    return f"{_TYPES.get(value.dtype.name, value.dtype.name)}[{shape}]"


def _double(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return value.astype(np.float64)
    return value
