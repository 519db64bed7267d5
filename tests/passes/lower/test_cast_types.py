"""Casting a float32 graph to 16 bits: what the rules keep in float32."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import UsageError
from qcompiler.execution.narrow_floats import emulated
from qcompiler.ir.provenance import COMPUTE_TYPE, TYPE_REASON
from qcompiler.passes.lower.cast_types import CastTypes, CastTypesOptions
from qcompiler.quant.compute_type import ComputeType
from tests.support.casting import (
    F32,
    MLP,
    NORM,
    NORM_WEIGHTS,
    WEIGHT,
    cast,
    casts,
    data,
    float32_nodes,
    samples,
    worst_error,
)
from tests.support.graphs import (
    build,
    initializer,
    node_named,
    op_types,
    random_array,
)
from tests.support.parity import run_model
from tests.support.rewrites import assert_idempotent, run_pass


@pytest.mark.parametrize(("kind", "tolerance"), [("float16", 2e-3), ("bfloat16", 1.5e-2)])
def test_casts_a_chain_with_one_cast_at_each_end(
    kind: str, tolerance: float, tmp_path: Path
) -> None:
    before, after = build(MLP, {"w": WEIGHT}), build(MLP, {"w": WEIGHT})
    result = cast(after, tmp_path, data(4, 32), kind=kind)
    assert op_types(after) == ["Cast", "MatMul", "Relu", "MatMul", "Cast"]
    assert casts(after) == [("x", kind.upper()), (f"y.{kind}", "FLOAT")]
    assert [value.dtype for value in (*after.graph.inputs, *after.graph.outputs)] == [F32, F32]
    assert after.graph.initializers["w"].dtype == ir.DataType[kind.upper()]
    assert after.metadata_props[COMPUTE_TYPE] == kind
    assert result.skips == ()
    assert {rewrite.node for rewrite in result.rewrites if rewrite.rule == "cast-types"} == {
        "fc1",
        "act",
        "fc2",
    }
    assert 0 < worst_error(before, after, data(9, 32, seed=3)) < tolerance


def test_works_without_samples(tmp_path: Path) -> None:
    before, after = build(MLP, {"w": WEIGHT}), build(MLP, {"w": WEIGHT})
    cast(after, tmp_path)
    assert len(casts(after)) == 2
    assert worst_error(before, after, data(9, 32)) < 2e-3


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_is_idempotent(kind: str, tmp_path: Path) -> None:
    rewrite = CastTypes(CastTypesOptions(ComputeType(kind), samples(data(4, 32))))
    assert_idempotent(rewrite, build(MLP, {"w": WEIGHT}), tmp_path)
    norm = build(NORM, NORM_WEIGHTS)
    first = run_pass(rewrite, norm, tmp_path)
    assert run_pass(rewrite, norm, tmp_path).skips == first.skips != ()


def test_refuses_a_second_type(tmp_path: Path) -> None:
    model = build(MLP, {"w": WEIGHT})
    cast(model, tmp_path)
    with pytest.raises(UsageError, match="cast to float16 before, and bfloat16"):
        cast(model, tmp_path, kind="bfloat16")


def test_leaves_a_graph_of_integers_alone(tmp_path: Path) -> None:
    model = build("g (int64[N] x) => (int64[N] y) { y = Add(x, x) }")
    assert cast(model, tmp_path).skips == ()
    assert op_types(model) == ["Add"]


def test_a_norm_of_the_input_is_one_island(tmp_path: Path) -> None:
    """The input is float32 anyway, so that Div joins: one Cast behind it instead of two before."""
    before, after = build(NORM, NORM_WEIGHTS), build(NORM, NORM_WEIGHTS)
    result = cast(after, tmp_path, data(4, 32))
    reasons = float32_nodes(result)
    assert set(reasons) == {"sq", "mean", "eps", "root", "div"}
    assert casts(after) == [("n", "FLOAT16"), ("y.float16", "FLOAT")]
    assert "more Casts" in reasons["div"]
    assert "leaves the range" in reasons["sq"]
    assert "adds up" in reasons["mean"]
    assert "small numbers" in reasons["root"]
    assert node_named(after, "sq").metadata_props[TYPE_REASON] == reasons["sq"]
    assert initializer(after, "tiny") == np.float32(1e-12)
    assert worst_error(before, after, data(9, 32)) < 3e-3


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_a_norm_inside_costs_two_casts(kind: str, tmp_path: Path) -> None:
    """One for what is squared, one for the roots, which are few."""
    text = NORM.replace("[sq] p = Pow(x, two)", "x2 = MatMul(x, w) [sq] p = Pow(x2, two)")
    text = text.replace("Div(x, s)", "Div(x2, s)")
    before, after = build(text, NORM_WEIGHTS), build(text, NORM_WEIGHTS)
    result = cast(after, tmp_path, data(4, 32), kind=kind)
    assert set(float32_nodes(result)) == {"sq", "mean", "eps", "root"}
    low = kind.upper()
    assert casts(after) == [("x", low), ("x2", "FLOAT"), ("s", low), (f"y.{kind}", "FLOAT")]
    assert worst_error(before, after, data(9, 32)) < (4e-3 if kind == "float16" else 3e-2)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_an_epsilon_does_not_vanish(kind: str, tmp_path: Path) -> None:
    """Where the data is 0, x / sqrt(0 + epsilon) is 0; with epsilon rounded to 0 it is NaN."""
    text = "g (float[N, 8] x) => (float[N, 8] y) { [add] e = Add(x, tiny) [div] y = Div(x, e) }"
    feeds = {"x": np.zeros((2, 8), np.float32)}
    after = build(text, {"tiny": np.float32(1e-12)})
    result = cast(after, tmp_path, kind=kind)
    assert np.isfinite(run_model(emulated(after), feeds)["y"]).all()
    if kind == "float16":
        assert "tiny holds 1e-12" in float32_nodes(result)["add"]


def test_a_residual_stream_out_of_range_stays_float32(tmp_path: Path) -> None:
    text = """g (float[N, 32] x) => (float[N, 32] y) {
        [in] a = MatMul(x, w) [big] b = Mul(a, factor) [add] c = Add(b, a)
        [norm] n = LayerNormalization(c, gamma) [fc] y = MatMul(n, w) }"""
    weights = {"w": WEIGHT, "factor": np.float32(4e4), "gamma": np.ones(32, np.float32)}
    before, after = build(text, weights), build(text, weights)
    feeds = data(4, 32)
    result = cast(after, tmp_path, feeds)
    assert set(float32_nodes(result)) == {"big", "add", "norm"}
    assert "c reaches" in float32_nodes(result)["norm"]
    assert casts(after) == [
        ("x", "FLOAT16"),
        ("a", "FLOAT"),
        ("n", "FLOAT16"),
        ("y.float16", "FLOAT"),
    ]
    assert worst_error(before, after, feeds) < 3e-3


def test_bfloat16_has_the_range_of_float32(tmp_path: Path) -> None:
    text = "g (float[N, 32] x) => (float[N, 32] y) { b = Mul(x, f) y = MatMul(b, w) }"
    after = build(text, {"w": WEIGHT, "f": np.float32(1e5)})
    assert cast(after, tmp_path, data(4, 32), kind="bfloat16").skips == ()


@pytest.mark.parametrize("margin", [1.0, 8.0])
def test_the_margin_is_for_other_data(margin: float, tmp_path: Path) -> None:
    text = "g (float[N, 32] x) => (float[N, 32] y) { [mul] b = Mul(x, f) [fc] y = MatMul(b, w) }"
    model = build(text, {"w": WEIGHT / 100, "f": np.float32(5000)})
    result = cast(model, tmp_path, data(4, 32), margin=margin)  # up to 5000 * 3.3
    assert set(float32_nodes(result)) == ({"mul", "fc"} if margin == 8 else set())


def test_a_pow_that_overflows(tmp_path: Path) -> None:
    text = """g (float[N, 32] x) => (float[N, 32] y) {
        [pow] p = Pow(x, two) [root] r = Sqrt(p) [fc] y = MatMul(r, w) }"""
    weights = {"two": np.float32(2), "w": WEIGHT}
    feeds = {"x": np.full((2, 32), 300, np.float32)}
    before, after = build(text, weights), build(text, weights)
    result = cast(after, tmp_path, feeds)
    assert set(float32_nodes(result)) == {"pow", "root"}
    assert casts(after) == [("r", "FLOAT16"), ("y.float16", "FLOAT")]
    assert worst_error(before, after, feeds) < 2e-3


def test_a_sum_over_many_elements(tmp_path: Path) -> None:
    text = """g (float[N, 100000] x) => (float[N, 1] y) {
        [abs] a = Abs(x) [sum] s = ReduceSum<keepdims=1>(a, axes) [div] y = Div(s, count) }"""
    weights = {"axes": np.array([-1]), "count": np.float32(1e5)}
    before, after = build(text, weights), build(text, weights)
    feeds = data(2, 100_000)
    result = cast(after, tmp_path, feeds)
    assert {"sum", "div"} <= set(float32_nodes(result))
    assert worst_error(before, after, feeds) < 1e-3


ATTENTION = """g (float[B, 8, 16] q, float[B, 16, 8] k, int64[B, 1, 8] mask) => (float[B, 8, 8] y) {
    [qk] s = MatMul(q, k) [scale] d = Div(s, root)
    [m1] f = Cast<to=1>(mask) [m2] i = Sub(one, f) [m3] b = Mul(i, far)
    [add] a = Add(d, b) [soft] y = Softmax<axis=-1>(a) }"""


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("far", [-3.4028234663852886e38, -1e9, -1e4])
@pytest.mark.parametrize("with_samples", [True, False])
def test_a_mask_out_of_range_masks_all_the_same(
    far: float, kind: str, with_samples: bool, tmp_path: Path
) -> None:
    weights = {"root": np.float32(4), "one": np.float32(1), "far": np.float32(far)}
    feeds = {**data(2, 8, 16, name="q"), **data(2, 16, 8, name="k", seed=2)}
    feeds["mask"] = np.array([[[1] * 5 + [0] * 3], [[1] + [0] * 7]])
    before, after = build(ATTENTION, weights), build(ATTENTION, weights)
    result = cast(after, tmp_path, *([feeds] if with_samples else []), kind=kind)
    assert result.skips == ()
    assert len(casts(after)) == 4  # the mask's own, two inputs, one output
    found = initializer(after, "far").astype(np.float64)
    assert np.isfinite(found)
    tolerance = 3e-3 if kind == "float16" else 2e-2
    assert worst_error(before, after, feeds) < tolerance
    assert not run_model(emulated(after), feeds)["y"][0, :, 5:].any()


def test_a_row_that_is_masked_whole_is_no_nan(tmp_path: Path) -> None:
    weights = {"root": np.float32(4), "one": np.float32(1), "far": np.float32(-3.4e38)}
    feeds = {**data(1, 8, 16, name="q"), **data(1, 16, 8, name="k"), "mask": np.zeros((1, 1, 8))}
    feeds["mask"] = feeds["mask"].astype(np.int64)
    after = build(ATTENTION, weights)
    cast(after, tmp_path, feeds)
    assert np.isfinite(run_model(emulated(after), feeds)["y"]).all()


@pytest.mark.parametrize(
    ("last", "why"),
    [
        ("y = Identity(a)", "an output of the model"),
        ("y = Relu(a)", "no Softmax"),
        ("n = Neg(a) y = Softmax(n)", "a sign that turns"),
        ("h = Softmax(a) k = Exp(a) y = Add(h, k)", "another reader"),
    ],
)
def test_constants_out_of_range_that_do_more_than_mask_stay(
    last: str, why: str, tmp_path: Path
) -> None:
    text = f"g (float[N, 8] x) => (float[N, 8] y) {{ [add] a = Add(x, far) {last} }}"
    after = build(text, {"far": np.array([0] * 7 + [-1e9], np.float32)})
    reasons = float32_nodes(cast(after, tmp_path, data(2, 8)))
    assert "far holds -1e+09, and float16 ends at 65504" in reasons["add"], why
    assert initializer(after, "far").min() == np.float32(-1e9)


def test_infinite_masks_stay_infinite(tmp_path: Path) -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w) a = Add(h, far) s = Softmax(a)"
    text += " y = MatMul(s, w) }"
    weights = {"far": np.array([0] * 7 + [-np.inf], np.float32), "w": random_array(8, 8)}
    before, after = build(text, weights), build(text, weights)
    assert cast(after, tmp_path, data(2, 8)).skips == ()
    assert initializer(after, "far").dtype == np.float16
    assert np.isneginf(initializer(after, "far")[-1])
    assert worst_error(before, after, data(2, 8)) < 2e-3


def test_weights_are_rounded_to_finite_numbers(tmp_path: Path) -> None:
    """65510 rounds to infinity by the rule of nearest."""
    text = "g (float[N, 2] x) => (float[N, 2] y) { y = MatMul(x, w) }"
    after = build(text, {"w": np.array([[3.3e38, 1e-3], [1, 2]], np.float32)})
    cast(after, tmp_path, kind="bfloat16")
    assert np.isfinite(initializer(after, "w").astype(np.float32)).all()
    other = build(text, {"w": np.array([[1e-9, 1e-3], [1, 65504]], np.float32)})
    cast(other, tmp_path)
    assert initializer(other, "w").tolist() == [[0, np.float16(1e-3)], [1, 65504]]


def test_positions_and_angles_stay_float32(tmp_path: Path) -> None:
    text = """g (int64[B, T] p, float[B, T, 4] x) => (float[B, T, 4] y) {
        [cast] f = Cast<to=1>(p) [un] u = Unsqueeze(f, last) [angle] a = Mul(u, freq)
        [cos] c = Cos(a) [in] h = MatMul(x, w) [rot] r = Mul(h, c) [fc] y = MatMul(r, w) }"""
    weights = {"last": np.array([-1]), "freq": np.array([1, 0.1, 0.01, 1e-3], np.float32)}
    weights |= {"w": random_array(4, 4)}
    feeds = {"p": np.arange(5000)[None] % 4099, **data(1, 5000, 4)}
    before, after = build(text, weights), build(text, weights)
    result = cast(after, tmp_path)
    assert set(float32_nodes(result)) == {"cast", "un", "angle", "cos"}
    assert "needs it exactly" in float32_nodes(result)["angle"]
    assert set(casts(after)) == {
        ("p", "FLOAT"),
        ("x", "FLOAT16"),
        ("c", "FLOAT16"),
        ("y.float16", "FLOAT"),
    }
    assert worst_error(before, after, feeds) < 3e-3


def test_large_angles_of_real_data_stay_float32(tmp_path: Path) -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { [fc] a = MatMul(x, w) [sin] y = Sin(a) }"
    weights = {"w": random_array(8, 8) * 30}
    before, after = build(text, weights), build(text, weights)
    assert set(float32_nodes(cast(after, tmp_path, data(4, 8)))) == {"fc", "sin"}
    assert worst_error(before, after, data(4, 8)) < 1e-4


def test_resize_keeps_its_scales(tmp_path: Path) -> None:
    text = """g (float[1, 2, 4, 4] x) => (float[1, 2, 8, 8] y) {
        a = MatMul(x, v) [up] b = Resize<mode="linear">(a, , scales) y = MatMul(b, w) }"""
    weights = {"scales": np.array([1, 1, 2, 2], np.float32)}
    weights |= {"v": random_array(4, 4), "w": random_array(8, 8)}
    before, after = build(text, weights), build(text, weights)
    assert cast(after, tmp_path, data(1, 2, 4, 4)).skips == ()
    assert initializer(after, "scales").dtype == np.float32
    assert worst_error(before, after, data(1, 2, 4, 4)) < 2e-3


@pytest.mark.parametrize(
    ("node", "kind", "reason"),
    [
        ("Celu(x)", "float16", "Celu-12 does not take float16"),
        ('Einsum<equation="ij,ij->ij">(x, x)', "bfloat16", "Einsum-12 does not take bfloat16"),
    ],
)
def test_types_that_onnx_does_not_allow(node: str, kind: str, reason: str, tmp_path: Path) -> None:
    text = f"g (float[N, 8] x) => (float[N, 8] y) {{ a = Relu(x) [op] y = {node} }}"
    result = cast(build(text), tmp_path, data(2, 8), kind=kind)
    assert float32_nodes(result)["op"] == reason


def test_ops_of_other_domains_stay_float32(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[N, 8] x) => (float[N, 8] y) {
        a = Relu(x) [op] b = com.microsoft.QuickGelu(a) y = Relu(b) }"""
    model = build(text)
    node_named(model, "op").outputs[0].type = ir.TensorType(F32)
    result = run_pass(CastTypes(), model, tmp_path)
    assert float32_nodes(result)["op"] == "types of com.microsoft ops are not known"


def test_scatters_that_add_stay_float32(tmp_path: Path) -> None:
    text = """g (float[4, 8] x) => (float[4, 8] y, float[4, 8] z) {
        a = MatMul(x, w) [adds] y = ScatterND<reduction="add">(a, rows, a)
        [writes] s = ScatterND(a, rows, a) z = MatMul(s, w) }"""
    weights = {"w": random_array(8, 8), "rows": np.array([[0], [1], [1], [3]])}
    before, after = build(text, weights), build(text, weights)
    result = cast(after, tmp_path, data(4, 8))
    assert set(float32_nodes(result)) == {"adds"}
    assert "in float32 only" in float32_nodes(result)["adds"]
    assert worst_error(before, after, data(4, 8)) < 2e-3


def test_a_constant_kept_in_16_bits_is_no_island(tmp_path: Path) -> None:
    text = """g (float[4, 8] x) => (float[4, 8] y) {
        [wide] v = Cast<to=1>(w) [fc] y = MatMul(x, v) }"""
    weights = {"w": random_array(8, 8).astype(np.float16)}
    model = build(text, weights)
    assert not float32_nodes(cast(model, tmp_path, data(4, 8)))
