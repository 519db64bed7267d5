"""Q/DQ pairs on marked values, against the NumPy arithmetic of their ranges."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompiler.passes.quantize.insert_activation_qdq import InsertActivationQdq
from tests.support.graphs import body_of, build, initializer, node_named, op_types, random_array
from tests.support.parity import run_model
from tests.support.rewrites import assert_idempotent, only_skip, run_pass

Array = npt.NDArray[Any]
TEXT = "g (float[4, 8] x) => (float[4, 8] y) { [r] h = Relu(x) [s] y = Sigmoid(h) }"


def mark(model: ir.Model, name: str, **facts: str) -> None:
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    (value,) = [value for value in values if value.name == name]
    value.type = ir.TensorType(ir.DataType.FLOAT)
    value.metadata_props["qcompiler.quantizer"] = facts.pop("quantizer", "uint8:asym")
    for key, fact in facts.items():
        value.metadata_props[f"qcompiler.{key}"] = fact


def reads(model: ir.Model, name: str, positions: str = "[0]", *, computes: bool = True) -> None:
    facts = node_named(model, name).metadata_props
    facts["qcompiler.quantized_inputs"] = positions
    if computes:
        facts["qcompiler.placement"] = "conv"


def one(quantizer: str = "uint8:asym", limits: str = "[-1.0, 2.0]") -> ir.Model:
    """Return TEXT with codes of `h`, which only the Sigmoid reads."""
    model = build(TEXT)
    mark(model, "h", range=limits, quantizer=quantizer)
    reads(model, "s")
    return model


def rounded(values: Array, scale: float, zero: int, low: int, high: int) -> Array:
    codes = np.clip(np.rint(values / np.float32(scale)) + zero, low, high)
    result: Array = ((codes - zero) * np.float32(scale)).astype(np.float32)
    return result


@pytest.mark.parametrize(
    ("quantizer", "limits", "scale", "zero", "low", "high"),
    [
        ("uint8:asym", [-1.0, 2.0], 3 / 255, 85, 0, 255),
        ("uint8:asym", [0.0, 6.0], 6 / 255, 0, 0, 255),
        ("uint8:asym", [-3.0, 0.0], 3 / 255, 255, 0, 255),
        ("int8:asym", [-1.0, 2.0], 3 / 255, -43, -128, 127),
        ("int8:sym", [-1.0, 2.0], 2 / 127, 0, -128, 127),
        ("uint8:sym", [-1.0, 2.0], 2 / 127, 128, 0, 255),
    ],
)
def test_rewrites_to_the_reference_arithmetic(
    quantizer: str,
    limits: list[float],
    scale: float,
    zero: int,
    low: int,
    high: int,
    tmp_path: Path,
) -> None:
    model = one(quantizer, json.dumps(limits))
    result = run_pass(InsertActivationQdq(), model, tmp_path)
    assert [rewrite.node for rewrite in result.rewrites] == ["h"]
    assert op_types(model) == ["Relu", "QuantizeLinear", "DequantizeLinear", "Sigmoid"]
    np.testing.assert_allclose(initializer(model, "h.scale"), scale, rtol=1e-6)
    assert initializer(model, "h.zero_point") == zero
    x = random_array(4, 8)
    expected = 1 / (1 + np.exp(-rounded(np.maximum(x, 0), scale, zero, low, high)))
    np.testing.assert_allclose(run_model(model, {"x": x})["y"], expected, rtol=0, atol=1e-6)


def test_a_range_of_zeros_has_a_scale(tmp_path: Path) -> None:
    model = one(limits="[0.0, 0.0]")
    run_pass(InsertActivationQdq(), model, tmp_path)
    assert initializer(model, "h.scale") == 1
    assert initializer(model, "h.zero_point") == 0


SEVERAL = """g (float[4, 8] x) => (float[4, 8] y, float[4, 8] z) {
    [r] h = Relu(x) [s] y = Sigmoid(h) [t] z = Tanh(h) }"""


@pytest.mark.parametrize(("from_codes", "reader"), [(True, "h.dequantized"), (False, "h")])
def test_who_reads_the_codes(from_codes: bool, reader: str, tmp_path: Path) -> None:
    """Others read what was there before, unless the producer works on integers itself."""
    model = build(SEVERAL)
    mark(model, "h", range="[0.0, 2.0]")
    reads(model, "s")
    if from_codes:
        reads(model, "r", "[]")
    run_pass(InsertActivationQdq(), model, tmp_path)
    assert node_named(model, "s").inputs[0].name == "h.dequantized"  # type: ignore[union-attr]
    assert node_named(model, "t").inputs[0].name == reader  # type: ignore[union-attr]


def test_graph_inputs_keep_their_float_readers(tmp_path: Path) -> None:
    model = build(SEVERAL)
    mark(model, "x", range="[-2.0, 2.0]")
    reads(model, "r")
    run_pass(InsertActivationQdq(), model, tmp_path)
    assert op_types(model)[:3] == ["QuantizeLinear", "DequantizeLinear", "Relu"]
    assert [value.name for value in model.graph.inputs] == ["x"]


def test_an_output_keeps_its_name(tmp_path: Path) -> None:
    model = build(TEXT)
    mark(model, "y", range="[0.0, 1.0]")
    reads(model, "s", "[]")
    run_pass(InsertActivationQdq(), model, tmp_path)
    assert [value.name for value in model.graph.outputs] == ["y"]
    producer = model.graph.outputs[0].producer()
    assert producer is not None
    assert producer.op_type == "DequantizeLinear"
    assert node_named(model, "s").outputs[0].name == "y.float"


def test_an_output_that_is_read_too(tmp_path: Path) -> None:
    text = "g (float[4, 8] x) => (float[4, 8] h, float[4, 8] y) { [r] h=Relu(x) [s] y=Sigmoid(h) }"
    model = build(text)
    mark(model, "h", range="[0.0, 1.0]")
    reads(model, "r", "[]")
    reads(model, "s")
    run_pass(InsertActivationQdq(), model, tmp_path)
    found = run_model(model, {"x": random_array(4, 8)})
    assert len(np.unique(found["h"])) < 30
    np.testing.assert_allclose(found["y"], 1 / (1 + np.exp(-found["h"])), atol=1e-6)


def test_bodies_read_the_codes_of_what_integers_compute(tmp_path: Path) -> None:
    text = """g (float[4, 8] x, bool c) => (float[4, 8] y, float[4, 8] z) {
        [r] h = Relu(x) [s] y = Sigmoid(h) z = If (c) <
        then_branch = yes () => (float[4, 8] t) { t = Neg(h) },
        else_branch = no () => (float[4, 8] e) { e = Tanh(h) } > }"""
    model = build(text)
    mark(model, "h", range="[0.0, 2.0]")
    reads(model, "r", "[]")
    reads(model, "s")
    run_pass(InsertActivationQdq(), model, tmp_path)
    for name in ("yes", "no"):
        assert body_of(model, name)[0].inputs[0].name == "h.dequantized"  # type: ignore[union-attr]


def test_a_shared_scale_is_one_initializer(tmp_path: Path) -> None:
    text = """g (float[4, 8] x) => (float[8, 4] y) {
        [r] h = Relu(x) [t] k = Transpose<perm=[1, 0]>(h) [s] y = Sigmoid(k) }"""
    model = build(text)
    mark(model, "h", range="[0.0, 2.0]")
    mark(model, "k", shares="h")
    for name in ("t", "s"):
        reads(model, name)
    run_pass(InsertActivationQdq(), model, tmp_path)
    quantizes = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert len(quantizes) == 2
    assert quantizes[0].inputs[1] is quantizes[1].inputs[1]
    assert "k.scale" not in model.graph.initializers


def test_names_that_are_taken_get_a_number(tmp_path: Path) -> None:
    model = one()
    model.graph.inputs[0].name = "h.scale"
    node_named(model, "s").name = "h.quantized"
    run_pass(InsertActivationQdq(), model, tmp_path)
    assert "h.scale_2" in model.graph.initializers
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)


def test_refuses_values_without_a_range(tmp_path: Path) -> None:
    model = one()
    del node_named(model, "r").outputs[0].metadata_props["qcompiler.range"]
    skip = only_skip(run_pass(InsertActivationQdq(), model, tmp_path))
    assert skip.reason == "h has no range: it was not calibrated"
    assert op_types(model) == ["Relu", "Sigmoid"]


def test_refuses_what_would_share_a_scale_that_is_not_there(tmp_path: Path) -> None:
    model = build(TEXT)
    mark(model, "h", shares="x")
    reads(model, "s")
    assert only_skip(run_pass(InsertActivationQdq(), model, tmp_path)).node == "h"


def test_a_value_nobody_reads_as_codes_gets_no_pair(tmp_path: Path) -> None:
    model = build(TEXT)
    mark(model, "h", range="[0.0, 2.0]")
    run_pass(InsertActivationQdq(), model, tmp_path)
    assert op_types(model) == ["Relu", "Sigmoid"]


def test_is_idempotent(tmp_path: Path) -> None:
    assert_idempotent(InsertActivationQdq(), one(), tmp_path)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_a_scale_has_the_type_of_its_values(dtype: ir.DataType, tmp_path: Path) -> None:
    model = one("int8:sym", "[-1.0, 2.0]")
    value = node_named(model, "r").outputs[0]
    value.type = ir.TensorType(dtype)
    run_pass(InsertActivationQdq(), model, tmp_path)
    scale = model.graph.initializers["h.scale"]
    assert scale.dtype == dtype
    assert float(initializer(model, "h.scale")) == float(np.asarray(2 / 127, dtype.numpy()))
    assert node_named(model, "h.dequantized").outputs[0].dtype == dtype


def test_floats_of_8_bits_have_a_zero_point_of_their_type(tmp_path: Path) -> None:
    model = one("fp8:sym", "[-1.0, 2.0]")
    run_pass(InsertActivationQdq(), model, tmp_path)
    quantize = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    zero_point = quantize.inputs[2]
    assert zero_point is not None
    assert zero_point.dtype == quantize.outputs[0].dtype == ir.DataType.FLOAT8E4M3FN
    assert initializer(model, "h.scale") == np.float32(2 / 448)
