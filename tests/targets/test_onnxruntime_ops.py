"""The types of Q/DQ nodes that the table allows, by really loading them in ONNX Runtime."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.execution.sessions import open_session
from qcompiler.pipeline import PASSES
from qcompiler.targets.onnxruntime_ops import LOWERED_OPS
from qcompiler.targets.registry import TARGETS
from tests.support.graphs import build, random_array

_FORMS = {form.op[1]: form for form in LOWERED_OPS}
_INPUT, _SCALE = _FORMS["DequantizeLinear"].inputs[:2]
_OUTPUT = _FORMS["QuantizeLinear"].inputs[2]
_WITHOUT_CPU_KERNEL = "BFLOAT16"


def constant(dtype: ir.DataType, *shape: int) -> ir.TensorProtocol:
    return ir.tensor(np.ones(shape).astype(dtype.numpy()), dtype=dtype)


@pytest.mark.parametrize("scale", [name for name in _SCALE if name != _WITHOUT_CPU_KERNEL])
@pytest.mark.parametrize("codes", _INPUT)
def test_dequantizes(codes: str, scale: str) -> None:
    weights = {"q": constant(ir.DataType[codes], 4, 4), "s": constant(ir.DataType[scale])}
    text = f"g () => ({scale.lower()}[4, 4] y) {{ y = DequantizeLinear(q, s) }}"
    model = build(text, weights, opset=25)
    model.ir_version = 13
    with open_session(model, optimize=False, threads=1) as session:
        assert (session.run({})["y"] == 1).all()


@pytest.mark.parametrize("scale", [name for name in _SCALE if name != _WITHOUT_CPU_KERNEL])
@pytest.mark.parametrize("codes", _OUTPUT)
def test_quantizes(codes: str, scale: str) -> None:
    dtype = ir.DataType[scale]
    zero = ir.tensor(np.zeros(()).astype(ir.DataType[codes].numpy()), dtype=ir.DataType[codes])
    weights = {"s": constant(dtype), "z": zero}
    text = f"""g ({scale.lower()}[4] x) => ({scale.lower()}[4] y) {{
        q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }}"""
    model = build(text, weights, opset=25)
    model.ir_version = 13
    with open_session(model, optimize=False, threads=1) as session:
        assert (session.run({"x": np.ones(4, dtype.numpy())})["y"] == 1).all()


def test_lowering_names_passes() -> None:
    for target in TARGETS.values():
        assert set(target.lowering) <= set(PASSES)
        assert len(set(target.lowering)) == len(target.lowering)


@pytest.mark.parametrize("dtype", _FORMS["Conv"].inputs[0])
def test_convolves(dtype: str) -> None:
    element = ir.DataType[dtype]
    form = f"{dtype.lower()}[1, 3, 1, 4]"
    text = f"g ({form} x) => ({dtype.lower()}[1, 2, 1, 4] y) {{ y = Conv(x, w) }}"
    model = build(text, {"w": constant(element, 2, 3, 1, 1)})
    with open_session(model, optimize=False, threads=1) as session:
        assert (session.run({"x": np.ones((1, 3, 1, 4), element.numpy())})["y"] == 3).all()


def test_scattered_products_are_added() -> None:
    added = random_array(2, 4)
    weights = {"places": np.array([[0], [0]]), "added": added}
    text = """g (float[2, 4] x) => (float[2, 4] y) {
        y = ScatterND<reduction="add">(x, places, added) }"""
    with open_session(build(text, weights), optimize=False, threads=1) as session:
        found = session.run({"x": np.ones((2, 4), np.float32)})["y"]
    np.testing.assert_allclose(found[0], 1 + added.sum(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(found[1], 1)
