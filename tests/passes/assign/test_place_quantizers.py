"""Which values are quantized: marks on nodes and values."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.provenance import annotate
from qcompiler.passes.assign.place_quantizers import PlaceOptions, PlaceQuantizers
from qcompiler.targets.onnxruntime import ONNXRUNTIME
from tests.support.calibrated import conv_weight as cw
from tests.support.graphs import build, node_named, serialized
from tests.support.parity import assert_parity
from tests.support.rewrites import assert_idempotent, run_pass

PADS = "pads=[1,1,1,1]"
SHAPE = "float[N,8,8,8]"
WEIGHTS: dict[str, Any] = {f"w{i}": cw(8, 8, 3, 3, seed=i) for i in range(1, 4)}


def place() -> PlaceQuantizers:
    return PlaceQuantizers(PlaceOptions(ONNXRUNTIME.placement))


def conv(output: str, data: str, weight: str) -> str:
    return f"[{output}_op] {output} = Conv<{PADS}>({data}, {weight})"


def model(
    body: str, outputs: str = f"{SHAPE} y", extra: dict[str, Any] | None = None, inputs: str = ""
) -> ir.Model:
    """Return a model whose Convs have static activations, and whose values have types."""
    made = build(f"g ({SHAPE} x{inputs}) => ({outputs}) {{ {body} }}", WEIGHTS | (extra or {}))
    used = {value.name for node in made.graph.all_nodes() for value in node.inputs if value}
    for name in list(made.graph.initializers):
        if name not in used:
            del made.graph.initializers[name]
    for node in made.graph:
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            annotate(node, scheme="w8a8:sym")
        for value in node.outputs:
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    return made


def marked(made: ir.Model) -> set[str]:
    values = [*made.graph.inputs, *(v for node in made.graph for v in node.outputs)]
    return {v.name or "" for v in values if "qcompiler.quantizer" in v.metadata_props}


def fact(made: ir.Model, name: str, key: str) -> str | None:
    return node_named(made, name).metadata_props.get(f"qcompiler.{key}")


C1, C2 = conv("a", "x", "w1"), conv("y", "m", "w2")


def run(body: str, folder: Path, **options: Any) -> ir.Model:
    made = model(body, **options)
    run_pass(place(), made, folder)
    return made


def test_marks_a_chain(tmp_path: Path) -> None:
    made = run(f"{C1} [r] m = Relu(a) {C2}", tmp_path)
    assert marked(made) == {"x", "m", "y"}
    assert made.graph.inputs[0].metadata_props["qcompiler.quantizer"] == "uint8:asym"
    assert fact(made, "a_op", "placement") == "conv"
    assert fact(made, "r", "placement") == "clipping"
    assert json.loads(fact(made, "a_op", "quantized_inputs") or "") == [0]
    assert json.loads(fact(made, "r", "quantized_inputs") or "") == []
    assert {fact(made, name, "region") for name in ("a_op", "r", "y_op")} == {"0"}
    assert "QLinearConv" in (fact(made, "a_op", "placement_reason") or "")


FLOAT_BETWEEN = f"{C1} [t] m = Tanh(a) {C2}"


def test_regions_end_at_float_ops(tmp_path: Path) -> None:
    made = run(FLOAT_BETWEEN, tmp_path)
    assert (fact(made, "a_op", "region"), fact(made, "y_op", "region")) == ("0", "1")
    assert "no integer kernel" in (fact(made, "t", "placement_reason") or "")


def test_carried_values_share_the_scale(tmp_path: Path) -> None:
    body = f"""{C1} [s] s, t = Split<axis=2, num_outputs=2>(a) [u] u = Transpose(s)
        [c] m = Concat<axis=2>(t, u) {C2}"""
    made = run(body.replace("Transpose(s)", "Transpose<perm=[0,1,2,3]>(s)"), tmp_path)
    shares = {
        value.name: value.metadata_props.get("qcompiler.shares")
        for node in made.graph
        for value in node.outputs
    }
    assert (shares["s"], shares["t"], shares["u"], shares["m"]) == ("a", "a", "s", None)


def test_products_need_no_quantized_result(tmp_path: Path) -> None:
    matrix = np.ones((8, 8), np.float32)
    made = model("[mm] y = MatMul(x, w)", extra={"w": matrix})
    run_pass(place(), made, tmp_path)
    assert marked(made) == {"x"}


RESIDUAL = f"{C1} {conv('b', 'x', 'w3')} [add] s = Add(a, b) [r] m = Relu(s) {C2}"


def test_residual_add(tmp_path: Path) -> None:
    made = run(RESIDUAL, tmp_path)
    assert marked(made) == {"x", "a", "b", "m", "y"}
    assert json.loads(fact(made, "add", "quantized_inputs") or "") == [0, 1]


@pytest.mark.parametrize(
    ("body", "node", "reason"),
    [
        (f"{C1} [n] t = Tanh(a) [c] m = Concat<axis=2>(a, t) {C2}", "c", "computed in float"),
        (f"[n] m = MaxPool<kernel_shape=[1,1]>(x) {C2}", "n", "its input x is computed in float"),
        (f"{C1} [n] m = Add(a, k) {C2}", "n", "a constant in float"),
        (f"{C1} [n] m = Relu(a) [z] z = Tanh(a) {C2}", "n", "a is read by others too"),
        (f"[n] m = Relu(x) {C2}", "n", "no integer kernel computes what it clips"),
        (f"{C1} [n] y = Relu(a) [t] m = Sigmoid(a)", "t", "nothing that works on integers reads"),
        (f"{C1} [n] m = Clip(a, half, k) {C2}", "n", "codes end at 0 only"),
        (f"{C1} [n] m = Clip(a, , k) {C2}", "n", "codes end at 0 only"),
        (f"{C1} [n] m = Softmax(a) {C2}", "n", "more decades than 8 bits"),
    ],
)
def test_refuses(body: str, node: str, reason: str, tmp_path: Path) -> None:
    extra = {"k": np.array(1.0, np.float32), "half": np.array(-0.5, np.float32)}
    made = model(body, extra=extra)
    if "y = Relu" in body:
        made = model(body, outputs=f"{SHAPE} y, {SHAPE} m", extra=extra)
    result = run_pass(place(), made, tmp_path)
    (skip,) = [skip for skip in result.skips if skip.node == node]
    assert reason in skip.reason
    assert reason in (fact(made, node, "placement_reason") or "")
    assert fact(made, node, "placement") is None


def test_a_clip_with_a_computed_bound_stays(tmp_path: Path) -> None:
    made = run(
        f"{C1} [n] m = Clip(a, z, hi) {C2}",
        tmp_path,
        extra={"z": np.array(0, np.float32)},
        inputs=", float hi",
    )
    assert fact(made, "n", "placement") is None


def test_a_pool_that_returns_indices_stays(tmp_path: Path) -> None:
    body = f"{C1} [n] m, i = MaxPool<kernel_shape=[2,2]>(a) {C2}"
    made = model(body, outputs=f"{SHAPE} y, int64[N,8,h,w] i")
    node_named(made, "n").outputs[1].type = ir.TensorType(ir.DataType.INT64)
    run_pass(place(), made, tmp_path)
    assert "i" not in marked(made)
    assert fact(made, "n", "placement") is None


@pytest.mark.parametrize("attributes", ["ceil_mode=1", "dilations=[2,2]", "dilations=[1,1]"])
def test_pools_with_a_wrong_kernel_stay(attributes: str, tmp_path: Path) -> None:
    made = run(f"{C1} [n] m = AveragePool<kernel_shape=[2,2],{attributes}>(a) {C2}", tmp_path)
    assert (fact(made, "n", "placement") is None) == ("1,1" not in attributes)


@pytest.mark.parametrize(("mode", "placed"), [("nearest", True), ("linear", False), ("", True)])
def test_resize_by_mode(mode: str, placed: bool, tmp_path: Path) -> None:
    text = f'<mode="{mode}">' if mode else ""
    sizes = {"k": np.array([1, 1, 2, 2], np.float32)}
    made = run(f"{C1} [n] m = Resize{text}(a,,k) {C2}", tmp_path, extra=sizes)
    assert (fact(made, "n", "placement") is not None) == placed


def test_other_schemes_place_nothing(tmp_path: Path) -> None:
    made = model(f"{C1} [r] m = Relu(a) {C2}")
    for name in ("a_op", "y_op"):
        annotate(node_named(made, name), scheme="w8a16:sym")
    result = run_pass(place(), made, tmp_path)
    assert (result.rewrites, marked(made)) == ((), set())


def test_other_float_types_are_left_alone(tmp_path: Path) -> None:
    made = model(RESIDUAL)
    for node in made.graph:
        if node.op_type not in ("Conv",):
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    run_pass(place(), made, tmp_path)
    assert fact(made, "add", "placement") is None


def test_a_clipped_value_that_a_body_reads_is_not_absorbed(tmp_path: Path) -> None:
    body = f"""{C1} [r] m = Relu(a) {C2} z = If (c) <
        then_branch = yes () => ({SHAPE} t) {{ t = Neg(a) }},
        else_branch = no () => ({SHAPE} e) {{ e = Tanh(a) }} >"""
    made = run(body, tmp_path, outputs=f"{SHAPE} y, {SHAPE} z", inputs=", bool c")
    assert "read by others" in (fact(made, "r", "placement_reason") or "")
    assert marked(made) == {"x", "a", "m", "y"}


def test_keeps_numerics(tmp_path: Path) -> None:
    after = model(RESIDUAL)
    run_pass(place(), after, tmp_path)
    assert_parity(model(RESIDUAL), after, tolerance=0)


def test_a_second_run_gives_the_same_marks(tmp_path: Path) -> None:
    made = model(RESIDUAL)
    run_pass(place(), made, tmp_path)
    once = serialized(made)
    run_pass(place(), made, tmp_path)
    assert serialized(made) == once
    assert_idempotent(place(), model("y = Tanh(x)"), tmp_path)


def test_forgets_what_is_no_longer_so(tmp_path: Path) -> None:
    made = model(RESIDUAL)
    run_pass(place(), made, tmp_path)
    for name in ("a_op", "b_op", "y_op"):
        annotate(node_named(made, name), scheme="float")
    run_pass(place(), made, tmp_path)
    assert marked(made) == set()
    assert fact(made, "add", "placement") is None
