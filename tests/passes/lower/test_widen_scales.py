"""Scales of convolutions of codes in 16 bits become float32, and values stay."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.execution.narrow_floats import emulated
from qcompiler.passes.lower.widen_scales import WidenScales
from qcompiler.quant.granularity import PerAxis, PerTensor
from qcompiler.targets.tensorrt import TENSORRT_11, TENSORRT_RTX
from tests.support.coded import coded_weight
from tests.support.graphs import build, node_named, op_types
from tests.support.parity import assert_parity
from tests.support.rewrites import assert_idempotent, run_pass

TYPES = {"float": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}
SHAPE, RESULT = "[2, 8, 6, 6]", "[2, 8, 4, 4]"


def model(
    body: str = "", *, t: str = "float16", per_tensor: bool = False, outputs: str = ""
) -> ir.Model:
    """Return a convolution of codes by codes, in a type; `d` is its data."""
    dtype = TYPES[t]
    granularity = PerTensor() if per_tensor else PerAxis(0)
    weight = coded_weight((8, 8, 3, 3), granularity, bits=8, signed=True, scale_type=dtype)
    weights: dict[str, Any] = dict(weight.weights)
    weights["s"] = ir.tensor(np.array(0.05, dtype.numpy()), dtype=dtype)
    weights["z"] = np.array(0, np.int8)
    body = body or "[op] y = Conv(d, wd)"
    made = build(
        f"""g ({t}{SHAPE} x) => ({t}{RESULT} y{outputs}) {{
        q = QuantizeLinear(x, s, z) [data] d = DequantizeLinear(q, s, z)
        {weight.dequantize("wd", node="weight")} {body} }}""",
        weights,
        opset=21,
    )
    for node in made.graph:
        for value in node.outputs:
            value.type = ir.TensorType(ir.DataType.INT8 if value.name == "q" else dtype)
    node_named(made, "op").metadata_props["qcompiler.weight_bytes_after"] = "0"
    return made


def same_numbers(before: ir.Model, after: ir.Model) -> None:
    """Compare with every value rounded as it is stored: ONNX Runtime drops some Casts on a CPU."""
    assert_parity(emulated(before), emulated(after), tolerance=0)


def test_rewrites(tmp_path: Path) -> None:
    made = model()
    result = run_pass(WidenScales(), made, tmp_path)
    assert [rewrite.node for rewrite in result.rewrites] == ["op"]
    assert op_types(made).count("Cast") == 2
    for index in (0, 1):
        cast = node_named(made, "op").inputs[index].producer()  # type: ignore[union-attr]
        decoder = cast.inputs[0].producer()  # type: ignore[union-attr]
        scale = decoder.inputs[1]  # type: ignore[union-attr]
        assert (cast.op_type, decoder.op_type) == ("Cast", "DequantizeLinear")  # type: ignore[union-attr]
        assert scale is not None
        assert scale.dtype == ir.DataType.FLOAT
    # The QuantizeLinear keeps the scale of the type that it reads.
    quantize = next(node for node in made.graph if node.op_type == "QuantizeLinear")
    assert quantize.inputs[1] is not None
    assert quantize.inputs[1].dtype == ir.DataType.FLOAT16


def test_keeps_numerics_and_says_what_is_stored(tmp_path: Path) -> None:
    made = model()
    run_pass(WidenScales(), made, tmp_path)
    same_numbers(model(), made)
    stored = node_named(made, "op").metadata_props["qcompiler.weight_bytes_after"]
    assert int(stored) == 8 * 8 * 9 + 8 * 4


TWO = "[op] a = Conv(d, wd) [other] b = Conv(d, wd) y = Add(a, b)"


def test_what_several_read_is_widened_once(tmp_path: Path) -> None:
    made = model(TWO)
    run_pass(WidenScales(), made, tmp_path)
    assert op_types(made).count("Cast") == 2
    same_numbers(model(TWO), made)


LEFT_ALONE = {
    "float32": {"t": "float"},
    "one-scale-for-the-weight": {"per_tensor": True},
    "float-data": {"body": "[op] y = Conv(x, wd) b = Relu(d)", "outputs": f", float16{SHAPE} b"},
    "another-op": {"body": "[op] a = ConvTranspose(d, wd) y = MaxPool<kernel_shape=[5,5]>(a)"},
    "an-output": {"outputs": f", float16{SHAPE} d"},
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_leaves_alone_what_draws_no_warning(name: str, tmp_path: Path) -> None:
    made = model(**LEFT_ALONE[name])  # type: ignore[arg-type]
    assert run_pass(WidenScales(), made, tmp_path).rewrites == ()


def test_is_idempotent(tmp_path: Path) -> None:
    assert_idempotent(WidenScales(), model(), tmp_path)


def test_it_is_for_the_library_that_warns() -> None:
    assert WidenScales.name in TENSORRT_RTX.lowering
    assert WidenScales.name not in TENSORRT_11.lowering
