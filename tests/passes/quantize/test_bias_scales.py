"""Weights of a channel that is all but zero must leave its bias room in 32 bits."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import CompileOptions, compile_model
from qcompiler.execution.sessions import open_session
from qcompiler.ir.quantizable import find_sites
from qcompiler.passes.quantize.bias_scales import least_weight_scales

Array = np.ndarray[Any, np.dtype[Any]]


def conv_with_a_dead_channel(bias: float) -> ir.Model:
    """A 1x1 Conv whose channel 2 has weights a billion times smaller than the others."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((4, 8, 1, 1)).astype(np.float32)
    weight[2] *= 1e-9
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 8, 6, 6]))
    initializers = [
        ir.Value(name=name, const_value=ir.tensor(array, name=name))
        for name, array in (("w", weight), ("b", np.full(4, bias, np.float32)))
    ]
    node = ir.Node("", "Conv", [x, *initializers], name="conv")
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape([1, 4, 6, 6])
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=initializers, opset_imports={"": 21}, name="g"
    )
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("bias", [0.5, -3.0])
def test_a_bias_survives_weights_that_are_all_but_zero(tmp_path: Path, bias: float) -> None:
    """ONNX Runtime 1.32 returns 0 there where the scale is as small as the weights ask for."""
    model = conv_with_a_dead_channel(bias)
    options = CompileOptions(scheme="w8a8", calibration="random:4", never_slower=False)
    result = compile_model(model, options, output=tmp_path / "out.onnx")
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 8, 6, 6)).astype(np.float32)}
    with open_session(result.path, optimize=True) as session:
        found = session.run(feeds)["y"]
    assert [node.kernel for node in result.report.nodes] == ["QLinearConv"]
    np.testing.assert_allclose(found[:, 2], bias, atol=0.05)


def test_the_limit_is_the_bias_in_steps_of_both_scales(tmp_path: Path) -> None:
    model = conv_with_a_dead_channel(1.0)
    (site,) = find_sites(model)[0]
    assert least_weight_scales(site) is None  # the data is float
    codes = ir.Value(name="codes", type=ir.TensorType(ir.DataType.UINT8))
    scale = ir.Value(name="s", const_value=ir.tensor(np.array(0.25, np.float32), name="s"))
    model.graph.register_initializer(scale)
    dequantize = ir.Node("", "DequantizeLinear", [codes, scale])
    site.node.replace_input_with(0, dequantize.outputs[0])
    least = least_weight_scales(site)
    assert least is not None
    np.testing.assert_allclose(least, np.full(4, 1.0 / (0.25 * 2**30)), rtol=1e-6)
