"""Results of single nodes with constant inputs."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.execution.constant_nodes import CannotComputeError, compute_results, infer_results
from qcompiler.ir.weights import WeightStore
from tests.support.graphs import random_array

_OPSETS = {"": 21}


def _node(op_type: str, inputs: int, outputs: int = 1, **attributes: int) -> ir.Node:
    values = [ir.Value(name=f"i{index}") for index in range(inputs)]
    made = ir.node(op_type, values, attributes=attributes, num_outputs=outputs)
    for index, output in enumerate(made.outputs):
        output.name = f"o{index}"
    ir.Graph(values, list(made.outputs), nodes=[made])
    return made


def test_types_and_shapes_are_known_before_anything_is_computed() -> None:
    tensors = [ir.tensor(random_array(3, 1)), ir.tensor(random_array(1, 1 << 12))]
    (result,) = infer_results(_node("Mul", 2), tensors, _OPSETS)
    assert result is not None
    assert (result.dtype, result.shape, result.nbytes) == (ir.DataType.FLOAT, (3, 4096), 49152)


def test_a_size_that_depends_on_values_is_unknown() -> None:
    (result,) = infer_results(_node("NonZero", 1), [ir.tensor(random_array(3))], _OPSETS)
    assert result is not None
    assert result.shape is None
    assert result.nbytes is None


def test_several_results_and_large_inputs(tmp_path: Path) -> None:
    values = random_array(64, 64)
    node = _node("Split", 1, outputs=2, num_outputs=2)
    tensors = compute_results(node, [ir.tensor(values)], _OPSETS, WeightStore(tmp_path))
    found = [tensor.numpy() for tensor in tensors if tensor is not None]
    assert np.array_equal(np.concatenate(found), values)


def test_sequences_are_refused(tmp_path: Path) -> None:
    node = _node("SplitToSequence", 1)
    with pytest.raises(CannotComputeError, match="not a tensor"):
        compute_results(node, [ir.tensor(random_array(4))], _OPSETS, WeightStore(tmp_path))


def test_a_faulty_node_is_refused_with_the_runtimes_words(tmp_path: Path) -> None:
    tensors = [ir.tensor(random_array(2, 3)), ir.tensor([7])]
    with pytest.raises(CannotComputeError, match="ONNX Runtime cannot run it: "):
        compute_results(_node("Gather", 2), tensors, _OPSETS, WeightStore(tmp_path))
