"""What ONNX allows of 16-bit types, and how large they are."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.float_types import HEAVY, MOVING, SENSITIVE, ComputeType, Place, places_of
from qcompiler.ir.shapes import infer_shapes
from tests.support.graphs import build, node_named

F16, BF16 = ComputeType.FLOAT16, ComputeType.BFLOAT16


@pytest.mark.parametrize("compute", list(ComputeType))
def test_limits_are_those_of_the_type(compute: ComputeType) -> None:
    dtype = compute.data_type.numpy()

    def rounded(number: float) -> float:
        with np.errstate(over="ignore"):
            return float(np.float32(number).astype(dtype))

    assert rounded(compute.largest) == compute.largest
    assert np.isinf(rounded(compute.largest * (1 + compute.epsilon / 2)))
    assert rounded(1 + compute.epsilon) == 1 + compute.epsilon
    assert rounded(1 + compute.epsilon / 4) == 1
    assert rounded(compute.smallest) == compute.smallest
    assert rounded(compute.smallest * 0.49) == 0
    almost = compute.smallest_normal * (1 + compute.epsilon)
    assert (rounded(almost), rounded(almost / 4) == almost / 4) == (almost, False)


def test_an_op_is_in_one_table() -> None:
    assert not MOVING & HEAVY
    assert not set(SENSITIVE) & (MOVING | HEAVY)


@pytest.mark.parametrize(
    ("node", "opset", "compute", "inputs", "reason"),
    [
        ("MatMul(x, x)", 21, BF16, "computed computed", ""),
        ("Resize(x, r, s)", 21, F16, "computed float32 float32", ""),
        ("Sum(x, x, x)", 21, F16, "computed computed computed", ""),
        ("Celu(x)", 21, F16, "float32", "Celu-12 does not take float16"),
        ("Relu(x)", 12, BF16, "float32", "Relu-6 does not take bfloat16"),
        ("Relu(x)", 14, BF16, "computed", ""),
    ],
)
def test_places(node: str, opset: int, compute: ComputeType, inputs: str, reason: str) -> None:
    text = f"g (float[2, 2] x, float[0] r, float[2] s) => (float[N, M] y) {{ [op] y = {node} }}"
    model = build(text, opset=opset)
    found = places_of(node_named(model, "op"), opset, compute)
    assert [place.value for place in found.inputs.values()] == inputs.split()
    assert found.reason == reason


@pytest.mark.parametrize("node", ["Cast<to=7>(x)", "Shape(x)", "Size(x)"])
def test_some_inputs_are_read_in_any_type(node: str) -> None:
    model = build(f"g (float[2, 2] x) => (int64[N] y) {{ [op] y = {node} }}")
    found = places_of(node_named(model, "op"), 21, F16)
    assert (list(found.inputs.values()), found.reason) == ([Place.ANY], "")


def test_a_second_output_of_its_own_type() -> None:
    text = """g (float[2, 4] x, float[4] s) => (float[2, 4] y, float[2, 1] m) {
        [op] y, m = LayerNormalization(x, s) }"""
    found = places_of(node_named(build(text), "op"), 21, F16)
    assert list(found.outputs.values()) == [Place.COMPUTED, Place.FLOAT32]


def test_sequences_and_unknown_types_are_left_alone() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "com.acme" : 1]>
        g (float[4] x) => (float[N] y) {
        [seq] s = SequenceConstruct(x, x) [at] z = SequenceAt(s, i)
        [own] u = com.acme.Op(z) [add] y = Add(u, z) }"""
    model = build(text, {"i": 0})
    infer_shapes(model)
    reasons = {n: places_of(node_named(model, n), 21, F16).reason for n in ("seq", "own", "add")}
    assert reasons["seq"] in (
        "it holds a sequence or an optional value",
        "the type of s is not known",
    )
    assert "com.acme" in reasons["own"]
    assert reasons["add"] == "the type of u is not known"
    assert F16.data_type == ir.DataType.FLOAT16
