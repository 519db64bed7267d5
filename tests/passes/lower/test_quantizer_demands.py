"""What TensorRT demands of quantizers and ops, refused before its parser sees the graph."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import TargetError
from qcompiler.passes.lower.quantizer_demands import broken_demand
from qcompiler.passes.lower.verify_target import VerifyTarget, VerifyTargetOptions
from qcompiler.targets.registry import find_target
from qcompiler.targets.rows import Demand
from tests.support.graphs import build, node_named
from tests.support.rewrites import run_pass

IN, OUT = "float[4, 64] x", "float[4, 64] y"
PAIR = "[q] q = QuantizeLinear(x, t, z) [d] y = DequantizeLinear(q, t, z)"
PRODUCT = "[d] w = DequantizeLinear<axis=0, block_size={0}>(c, s) y = MatMul(x, w)"
BASE: dict[str, Any] = {"t": np.array(0.1, np.float32)}


def codes(dtype: str, *shape: int) -> ir.TensorProtocol:
    element = ir.DataType[dtype]
    return ir.tensor(np.ones(shape).astype(element.numpy()), dtype=element)


def refusal(body: str, weights: dict[str, Any], folder: Path, target: str, opset: int = 21) -> str:
    model = build(f"g ({IN}) => ({OUT}) {{ {body} }}", BASE | weights, opset=opset)
    used = {value.name for node in model.graph for value in node.inputs if value}
    for name in [name for name in model.graph.initializers if name not in used]:
        del model.graph.initializers[name]
    with pytest.raises(TargetError) as caught:
        run_pass(VerifyTarget(VerifyTargetOptions(find_target(target))), model, folder)
    assert caught.value.hint
    return str(caught.value)


CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "zero-point": (PAIR, {"z": np.array(3, np.int8)}, "its zero point is not 0"),
    "unsigned": (PAIR, {"z": np.array(0, np.uint8)}, "UINT8"),
    "unsigned-by-default": (
        "[q] q = QuantizeLinear(x, t) [d] y = DequantizeLinear(q, t)",
        {},
        "UINT8",
    ),
    "short-block": (
        PRODUCT.format(48),
        {"c": codes("INT4", 64, 64), "s": np.full((2, 64), 0.1, np.float32)},
        "blocks of 48 do not divide the 64 elements of axis 0",
    ),
    "int4-on-the-left": (
        "[d] w = DequantizeLinear<axis=1, block_size=2>(c, s) y = MatMul(w, x)",
        {"c": codes("INT4", 4, 4), "s": np.full((4, 2), 0.1, np.float32)},
        "its blocks of int4 are the first operand of a product",
    ),
    "2-bit": (
        "[d] w = DequantizeLinear(c, t) y = MatMul(x, w)",
        {"c": codes("INT2", 64, 64)},
        "INT2",
    ),
    "int32-bias": (
        "[d] b = DequantizeLinear(c, t) y = Add(x, b)",
        {"c": np.ones(64, np.int32)},
        "INT32",
    ),
    "dynamic": (
        "[n] q, a, z = DynamicQuantizeLinear(x) y = DequantizeLinear(q, a, z)",
        {},
        "has no DynamicQuantizeLinear (start from the float model)",
    ),
}


@pytest.mark.parametrize("target", ["tensorrt-10", "tensorrt", "tensorrt-rtx", "tensorrt-rtx:sm75"])
@pytest.mark.parametrize("name", CASES)
def test_refuses(name: str, target: str, tmp_path: Path) -> None:
    body, weights, reason = CASES[name]
    opset = 24 if name == "2-bit" else 21
    assert reason in refusal(body, weights, tmp_path, target, opset)


def test_refuses_ops_of_another_runtime(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]> '
    model = build(f"{text} g ({IN}) => ({OUT}) {{ [g] y = com.microsoft.QuickGelu(x) }}")
    with pytest.raises(TargetError, match=r"no com\.microsoft\.QuickGelu .export again without"):
        run_pass(VerifyTarget(VerifyTargetOptions(find_target("tensorrt"))), model, tmp_path)


def test_refuses_types_that_a_processor_does_not_have(tmp_path: Path) -> None:
    weights = {"c": codes("FLOAT8E4M3FN", 64, 64)}
    body = "[d] w = DequantizeLinear(c, t) y = MatMul(x, w)"
    assert "SM80, SM86 has no FLOAT8E4M3FN" in refusal(body, weights, tmp_path, "tensorrt-rtx")
    weights = {"c": codes("INT8", 64, 64)}
    assert "SM75 has no MatMul in FLOAT" in refusal(body, weights, tmp_path, "tensorrt-rtx:sm75")


@pytest.mark.parametrize("target", ["tensorrt-rtx:sm89", "tensorrt-rtx:sm120,sm121"])
def test_takes_float8_where_it_exists(target: str, tmp_path: Path) -> None:
    weights = BASE | {"c": codes("FLOAT8E4M3FN", 64, 64)}
    body = "[d] w = DequantizeLinear(c, t) y = MatMul(x, w)"
    model = build(f"g ({IN}) => ({OUT}) {{ {body} }}", weights)
    options = VerifyTargetOptions(find_target(target))
    assert not run_pass(VerifyTarget(options), model, tmp_path).modified


def test_blocks_lie_along_the_last_two_axes() -> None:
    text = "g (float[8] x) => (float[n] y) { [d] y = DequantizeLinear<axis=1, block_size=2>(c, s) }"
    weights = {"c": codes("INT8", 2, 4, 3, 3), "s": np.full((2, 2, 3, 3), 0.1, np.float32)}
    model = build(text, weights)
    demands = (Demand.WHOLE_BLOCKS, Demand.BLOCKS_ON_LAST_AXES)
    reason = "its blocks lie along axis 1 of 4, and only the last two may have them"
    assert broken_demand(node_named(model, "d"), demands) == reason
    assert broken_demand(node_named(model, "d"), (Demand.WHOLE_BLOCKS,)) == ""


def test_a_computed_zero_point_is_not_known_to_be_0() -> None:
    text = """g (float[8] x, int8[] z) => (float[8] y) {
        [q] q = QuantizeLinear(x, t, z) y = DequantizeLinear(q, t, z) }"""
    model = build(text, BASE)
    fault = broken_demand(node_named(model, "q"), (Demand.ZERO_POINTS_ARE_ZERO,))
    assert fault == "its zero point is computed, and only 0 is legal"
