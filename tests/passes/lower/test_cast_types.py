"""Casting a float32 graph to 16 bits, with islands where these do not do."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.calibration.quality import Reference
from qcompiler.errors import ParityError, UsageError
from qcompiler.execution.sessions import open_session
from qcompiler.ir.float_types import COMPUTE_TYPE, TYPE_REASON, ComputeType
from qcompiler.ir.load import load_model
from qcompiler.ir.shapes import infer_shapes
from qcompiler.ir.weights import WeightStore, read_slice
from qcompiler.options import CompileOptions
from qcompiler.passes.lower import cast_constants, cast_types
from qcompiler.passes.lower.cast_emulation import emulated
from qcompiler.passes.lower.cast_measure import Extremes
from qcompiler.passes.lower.cast_types import CastTypes, CastTypesOptions
from qcompiler.pipeline import make_plan, pipeline
from qcompiler.quant.selector import Selector
from qcompiler.rewriting.base import PassContext, PassResult
from qcompiler.rewriting.manager import PassManager
from qcompiler.rewriting.stages import Stage
from tests.support.graphs import (
    Array,
    body_of,
    build,
    externalize,
    initializer,
    node_named,
    op_types,
    random_array,
)
from tests.support.parity import run_model
from tests.support.real_models import real_model
from tests.support.rewrites import assert_idempotent, run_pass

F16, BF16, F32 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT
WEIGHT = random_array(32, 32, seed=1) / 6


def samples(*calls: Feeds) -> Samples:
    def read() -> Iterator[Feeds]:
        yield from (dict(call) for call in calls)

    return Samples("test", False, len(calls), read)


def data(*shape: int, scale: float = 1.0, seed: int = 7, name: str = "x") -> Feeds:
    return {name: (random_array(*shape, seed=seed) * scale).astype(np.float32)}


def cast(
    model: ir.Model, folder: Path, *calls: Feeds, kind: str = "float16", **options: Any
) -> PassResult:
    """Run the pass; the model that it leaves must load and pass ONNX's checker."""
    given = samples(*calls) if calls else None
    options.setdefault("samples", given)
    result = run_pass(CastTypes(CastTypesOptions(ComputeType(kind), **options)), model, folder)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    if kind == "float16":
        with open_session(model, optimize=True, threads=1):
            pass
    return result


def worst_error(before: ir.Model, after: ir.Model, feeds: Feeds) -> float:
    """Return the largest error of an output over its largest value, values rounded as stored."""
    expected, found = run_model(before, feeds), run_model(emulated(after), feeds)
    assert list(expected) == list(found)
    errors = []
    for name, truth in expected.items():
        if truth.dtype.kind != "f":
            continue
        assert np.isfinite(found[name]).all() or not np.isfinite(truth).all(), name
        assert found[name].shape == truth.shape
        peak = float(np.abs(truth).max(initial=0)) or 1.0
        errors.append(float(np.abs(found[name] - truth).max(initial=0)) / peak)
    return max(errors)


def casts(model: ir.Model) -> list[tuple[str, str]]:
    """Return what each Cast of the graph reads, and the type it makes."""
    return [
        (str(node.inputs[0].name), ir.DataType(node.attributes["to"].as_int()).name)
        for node in model.graph.all_nodes()
        if node.op_type == "Cast" and node.inputs[0] is not None
    ]


def float32_nodes(result: PassResult) -> dict[str, str]:
    return {skip.node: skip.reason for skip in result.skips}


MLP = """g (float[N, 32] x) => (float[N, 32] y) {
    [fc1] a = MatMul(x, w) [act] r = Relu(a) [fc2] y = MatMul(r, w) }"""


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


NORM = """g (float[N, 32] x) => (float[N, 32] y) {
    [sq] p = Pow(x, two) [mean] m = ReduceMean<keepdims=1>(p, axes) [eps] e = Add(m, tiny)
    [root] s = Sqrt(e) [div] n = Div(x, s) [scale] k = Mul(n, gamma) [fc] y = MatMul(k, w) }"""
NORM_WEIGHTS = {
    "two": np.float32(2),
    "axes": np.array([-1]),
    "tiny": np.float32(1e-12),
    "gamma": 1 + 0.1 * random_array(32),
    "w": WEIGHT,
}


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


def test_islands_that_the_user_asks_for(tmp_path: Path) -> None:
    model = build(MLP, {"w": WEIGHT})
    result = cast(model, tmp_path, exclude=(Selector(name="fc?"),))
    assert float32_nodes(result) == {
        "fc1": "it was asked for by name=fc?",
        "fc2": "it was asked for by name=fc?",
        "act": "it stands between float32 ops, and in 16 bits would take more Casts",
    }
    assert casts(model) == []
    by_op = build(MLP, {"w": WEIGHT})
    assert set(float32_nodes(cast(by_op, tmp_path, exclude=(Selector(op_type="Relu"),)))) == {"act"}
    assert len(casts(by_op)) == 4
    with pytest.raises(UsageError, match="means no node"):
        cast(build(MLP, {"w": WEIGHT}), tmp_path, exclude=(Selector(name="fc3"),))


def test_a_long_way_between_islands_is_worth_two_casts(tmp_path: Path) -> None:
    chain = " ".join(f"v{i + 1} = Relu(v{i})" for i in range(6))
    text = f"g (float[N, 8] x) => (float[N, 8] y) {{ v0 = Exp(x) {chain} y = Exp(v6) }}"
    long = build(text)
    cast(long, tmp_path)
    assert casts(long) == [("v0", "FLOAT16"), ("v6", "FLOAT")]
    short = build(text.replace(chain, "v6 = Relu(v0)"))
    cast(short, tmp_path)
    assert casts(short) == []


def test_what_only_moves_numbers_joins_for_nothing(tmp_path: Path) -> None:
    moves = " ".join(f"v{i + 1} = Transpose(v{i})" for i in range(6))
    text = f"g (float[8, 8] x) => (float[8, 8] y) {{ v0 = Exp(x) {moves} y = Exp(v6) }}"
    model = build(text)
    cast(model, tmp_path)
    assert casts(model) == []


def test_one_cast_serves_all_readers(tmp_path: Path) -> None:
    text = """g (float[N, 32] x) => (float[N, 32] y) {
        a = MatMul(x, w) e1 = Exp(a) e2 = Pow(a, a) e3 = Exp(a)
        s = Sum(e1, e2, e3) b = MatMul(a, w) y = Add(s, b) }"""
    model = build(text, {"w": WEIGHT / 10})
    cast(model, tmp_path, data(2, 32, scale=0.1))
    assert [name for name, _ in casts(model)].count("a") == 1
    assert len(casts(model)) == 3


def test_casts_of_the_source_are_not_repeated(tmp_path: Path) -> None:
    """A cast to float16 of what is float16 now, and one back."""
    text = """g (float[N, 32] x) => (float[N, 32] y) {
        a = MatMul(x, w) [down] b = Cast<to=10>(a) [r] c = Relu(b) [up] d = Cast<to=1>(c)
        [exp] y = Exp(d) }"""
    model = build(text, {"w": WEIGHT / 10})
    result = cast(model, tmp_path, data(2, 32))
    assert casts(model) == [("x", "FLOAT16"), ("c", "FLOAT")]
    assert "down" in [rewrite.node for rewrite in result.rewrites if "eliminate" in rewrite.rule]


def test_inputs_and_outputs_can_be_16_bits(tmp_path: Path) -> None:
    model = build(MLP, {"w": WEIGHT})
    cast(model, tmp_path, data(4, 32), keep_io=False)
    assert casts(model) == []
    assert [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)] == [F16, F16]


def test_an_input_out_of_range_stays_float32(tmp_path: Path) -> None:
    model = build(
        "g (float[N, 32] x) => (float[N, 32] y) { n = Tanh(x) y = MatMul(n, w) }", {"w": WEIGHT}
    )
    cast(model, tmp_path, data(4, 32, scale=1e6), keep_io=False)
    assert model.graph.inputs[0].dtype == F32
    assert model.graph.outputs[0].dtype == F16


def test_an_output_that_others_read_keeps_its_name(tmp_path: Path) -> None:
    text = """g (float[N, 32] x) => (float[N, 32] a, float[N, 32] y) {
        a = MatMul(x, w) y = MatMul(a, w) }"""
    before, after = build(text, {"w": WEIGHT}), build(text, {"w": WEIGHT})
    cast(after, tmp_path, data(2, 32))
    assert [value.name for value in after.graph.outputs] == ["a", "y"]
    assert len(casts(after)) == 3
    assert worst_error(before, after, data(2, 32)) < 2e-3


BRANCHES = """g (bool c, float[N, 32] x) => (float[N, 32] y) {
    a = MatMul(x, w)
    [if] b = If (c) <
        then_branch = t () => (float[N, 32] o1) { [then] o1 = Exp(a) },
        else_branch = e () => (float[N, 32] o2) { [else] o2 = MatMul(a, w) } >
    y = MatMul(b, w) }"""


@pytest.mark.parametrize("condition", [True, False])
def test_branches_return_one_type(condition: bool, tmp_path: Path) -> None:
    before, after = build(BRANCHES, {"w": WEIGHT}), build(BRANCHES, {"w": WEIGHT})
    feeds = {"c": np.array(condition), **data(4, 32)}
    result = cast(after, tmp_path, feeds)
    assert set(float32_nodes(result)) == {"then"}
    # One value is cast for the branch, one in it for what it returns.
    assert casts(after) == [
        ("x", "FLOAT16"),
        ("a", "FLOAT"),
        ("o1", "FLOAT16"),
        ("y.float16", "FLOAT"),
    ]
    assert {body_of(after, name).outputs[0].dtype for name in "te"} == {F16}
    assert worst_error(before, after, feeds) < 3e-3


LOOP = """g (int64 n, float[N, 32] x) => (float[N, 32] y, float[M, N, 32] all) {
    keep = Constant<value = bool {1}>()
    [loop] s, all = Loop (n, keep, x) <body = body
        (int64 i, bool go, float[N, 32] h) => (bool again, float[N, 32] next, float[N, 32] out)
        { again = Identity(go) [in] a = MatMul(h, w) [act] out = Tanh(a)
          [grow] next = Mul(out, factor) } >
    y = MatMul(s, w) }"""


@pytest.mark.parametrize(("factor", "kept"), [(2.0, set()), (1e5, {"grow", "in", "loop"})])
def test_carried_values_keep_one_type(factor: float, kept: set[str], tmp_path: Path) -> None:
    weights = {"w": WEIGHT, "factor": np.float32(factor)}
    before, after = build(LOOP, weights), build(LOOP, weights)
    feeds = {"n": np.array(3), **data(4, 32)}
    result = cast(after, tmp_path, feeds)
    assert kept <= set(float32_nodes(result))
    body = body_of(after, "body")
    carried = [body.inputs[2], body.outputs[1], node_named(after, "loop").outputs[0]]
    assert {value.dtype for value in carried} == {F32 if kept else F16}
    assert worst_error(before, after, feeds) < 4e-3
    none = {"n": np.array(0), **data(4, 32)}
    assert worst_error(before, after, none) < 4e-3


def test_scan_bodies(tmp_path: Path) -> None:
    text = """g (float[T, 32] x, float[32] h) => (float[32] last, float[T, 32] y) {
        last, y = Scan <num_scan_inputs = 1, body = body (float[32] s, float[32] v)
            => (float[32] s2, float[32] o) { a = Add(s, v) s2 = MatMul(a, w) o = Exp(s2) } >(h, x)
        }"""
    before, after = build(text, {"w": WEIGHT / 3}), build(text, {"w": WEIGHT / 3})
    feeds = {**data(5, 32), **data(32, name="h")}
    cast(after, tmp_path, feeds)
    body = body_of(after, "body")
    assert [value.dtype for value in body.outputs] == [F32, F32]
    (product,) = (node for node in body if node.op_type == "MatMul")
    assert product.outputs[0].dtype == F16
    assert worst_error(before, after, feeds) < 5e-3


def quantized(opset: int = 21) -> tuple[str, dict[str, Any]]:
    text = """g (float[N, 32] x) => (float[N, 32] y) {
        h = MatMul(x, v) [q] a = QuantizeLinear(h, xs, xz) [dq] b = DequantizeLinear(a, xs, xz)
        [dw] w = DequantizeLinear<axis=1>(codes, ws) [mm] m = MatMul(b, w) y = Relu(m) }"""
    codes = np.random.default_rng(0).integers(-127, 128, (32, 32)).astype(np.int8)
    weights = {"xs": np.float32(0.03), "xz": np.int8(0), "codes": codes}
    return text, weights | {"ws": np.full(32, 2e-3, np.float32), "v": WEIGHT}


def test_scales_follow_the_type(tmp_path: Path) -> None:
    text, weights = quantized()
    before, after = build(text, weights), build(text, weights)
    assert cast(after, tmp_path, data(4, 32)).skips == ()
    assert op_types(after).count("Cast") == 2
    assert {initializer(after, name).dtype for name in ("xs", "ws")} == {np.dtype(np.float16)}
    assert (initializer(after, "codes") == weights["codes"]).all()
    assert worst_error(before, after, data(4, 32)) < 2e-2  # one code of 127 may round elsewhere


def test_one_scale_is_one_number_in_both_types(tmp_path: Path) -> None:
    text, weights = quantized()
    model = build(text, weights)
    cast(model, tmp_path, exclude=(Selector(name="q"),))
    narrow, wide = initializer(model, "xs.float16"), initializer(model, "xs")
    assert [narrow.dtype.name, wide.dtype.name] == ["float16", "float32"]
    assert narrow.astype(np.float32) == wide != np.float32(0.03)


def test_scales_too_small_for_float16_stay_float32(tmp_path: Path) -> None:
    text, weights = quantized()
    weights["ws"] = np.full(32, 3e-6, np.float32)
    model = build(text, weights)
    reasons = float32_nodes(cast(model, tmp_path, data(4, 32)))
    assert "ws" in reasons["dw"]
    assert initializer(model, "ws").dtype == np.float32


def test_scales_are_float32_before_opset_19(tmp_path: Path) -> None:
    text, weights = quantized()
    model = build(text, weights, opset=17)
    reasons = float32_nodes(cast(model, tmp_path, data(4, 32)))
    assert reasons["dq"] == "DequantizeLinear-13 does not take float16"
    assert casts(model) == [
        ("x", "FLOAT16"),
        ("h", "FLOAT"),
        ("b", "FLOAT16"),
        ("w", "FLOAT16"),
        ("y.float16", "FLOAT"),
    ]


@pytest.mark.parametrize("opset", [13, 18, 21, 23, 24])
def test_opsets(opset: int, tmp_path: Path) -> None:
    text = """g (float[N, 32] x) => (float[N, 32] y) {
        a = MatMul(x, w) b = Softmax(a) [pow] c = Pow(b, two) y = Clip(c, low, high) }"""
    weights = {"w": WEIGHT, "two": np.float32(2), "low": np.float32(0), "high": np.float32(1)}
    before, after = build(text, weights, opset=opset), build(text, weights, opset=opset)
    assert "pow" in float32_nodes(cast(after, tmp_path, data(4, 32)))
    assert worst_error(before, after, data(4, 32)) < 4e-3


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    text = """g (int64[N] ids) => (float[N, 64] y, float[N, 32] e) {
        [emb] h = Gather(table, ids) t = Transpose(table) y = MatMul(h, t) [exp] e = Exp(h) }"""
    model = externalize(build(text, {"table": random_array(64, 32)}), tmp_path)
    cast(model, tmp_path, {"ids": np.arange(5)})
    assert list(model.graph.initializers) == ["table"]
    assert model.graph.initializers["table"].dtype == F16


def test_a_weight_read_in_both_types_is_there_in_both(tmp_path: Path) -> None:
    text = "g (float[N, 32] x) => (float[N, 32] y) { a = MatMul(x, w) [p] y = MatMul(a, w) }"
    model = build(text, {"w": WEIGHT})
    cast(model, tmp_path, exclude=(Selector(name="p"),))
    assert {name: value.dtype for name, value in model.graph.initializers.items()} == {
        "w": F32,
        "w.float16": F16,
    }


def test_weights_are_read_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No slice is larger than the budget's share, whatever the weight."""
    text = "g (float[N, 4] x) => (float[N, 300000] y) { y = MatMul(x, w) }"
    weight = random_array(4, 300_000)
    model = externalize(build(text, {"w": weight}), tmp_path)
    sizes: list[int] = []

    def watched(*arguments: Any) -> Array:
        found = read_slice(*arguments)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(cast_constants, "read_slice", watched)
    options = CastTypesOptions(memory_budget=1 << 22)
    run_pass(CastTypes(options), model, tmp_path)
    assert max(sizes) <= 1 << 18
    assert (initializer(model, "w") == weight.astype(np.float16)).all()


def overflow() -> ir.Model:
    """Return a model whose product overflows in float16 and not in what the samples showed."""
    text = """g (float[N, 8] x) => (float[N, 8] y) {
        [a] a = MatMul(x, w) [b] b = Mul(a, a2) [c] y = Div(b, a) }"""
    return build(text.replace("a2", "k"), {"w": np.eye(8, dtype=np.float32), "k": np.float32(30)})


def test_islands_grow_until_the_samples_are_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges taken away, only the run in 16 bits shows the overflow."""
    monkeypatch.setattr(cast_types, "force_by_range", lambda *_: None)
    model = overflow()
    feeds = {"x": np.full((2, 8), 3000, np.float32)}
    reasons = float32_nodes(cast(model, tmp_path, feeds))
    assert "b held an infinity when it was tried in float16" in reasons["b"]
    assert worst_error(overflow(), model, feeds) < 2e-3


def test_islands_grow_inside_of_bodies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What overflows first is found, though in the second round of the Loop all else is NaN."""
    monkeypatch.setattr(cast_types, "force_by_range", lambda *_: None)
    text = LOOP.replace("next = Mul(out, factor)", "[mm] m = MatMul(b, w) [t] next = Tanh(m)")
    text = text.replace("[grow]", "u = Mul(out, factor) [up] b = Mul(u, factor)")
    weights = {"w": WEIGHT, "factor": np.float32(6e4)}
    before, after = build(text, weights), build(text, weights)
    feeds = {"n": np.array(3), **data(4, 32)}
    reasons = float32_nodes(cast(after, tmp_path, feeds))
    assert "b held an infinity" in reasons["up"]
    assert "m held an infinity" in reasons["t"]
    assert not {"in", "MatMul_y"} & set(reasons)
    assert worst_error(before, after, {**feeds, "n": np.array(1)}) < 4e-3


def test_division_by_what_becomes_0(tmp_path: Path) -> None:
    text = "g (float[N, 2] x) => (float[N, 2] y) { h = MatMul(x, w) [div] y = Div(h, d) }"
    weights = {"w": np.eye(2, dtype=np.float32), "d": np.array([1, 1e-9], np.float32)}
    reasons = float32_nodes(cast(build(text, weights), tmp_path))
    assert reasons["div"] == "d holds 1e-09, which float16 makes 0, and it is divided by"


def test_a_long_softmax_is_a_sum(tmp_path: Path) -> None:
    text = "g (float[N, 4] x) => (float[N, 4096] y) { h = MatMul(x, w) [soft] y = Softmax(h) }"
    reasons = float32_nodes(cast(build(text, {"w": random_array(4, 4096)}), tmp_path))
    assert reasons["soft"] == "it adds up 4096 exponentials"


def test_onnx_runtime_alone_would_not_show_the_overflow(tmp_path: Path) -> None:
    """Why values are rounded by Casts: without kernels, float32 goes on from op to op."""
    text = "g (float16[2] x) => (float16[2] y) { a = Mul(x, x) y = Sqrt(a) }"
    model = build(text)
    infer_shapes(model)
    feeds = {"x": np.array([300, 2], np.float16)}
    assert np.isfinite(run_model(model, feeds)["y"]).all()
    assert np.isinf(run_model(emulated(model), {"x": np.array([300, 2], np.float32)})["y"][0])


def test_gives_up_with_the_value_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cast_types, "spoiled_values", lambda *_: {"b": "NaN"})
    model = overflow()
    with pytest.raises(ParityError, match="b: holds NaN in float16 on the samples") as failure:
        cast(model, tmp_path, data(2, 8))
    assert "exclude" in (failure.value.hint or "")
    assert op_types(model) == ["MatMul", "Mul", "Div"]


def test_islands_reach_farther_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = " ".join(f"[m{i}] v{i} = MatMul(v{i - 1}, w)" for i in range(1, 11))
    text = f"g (float[N, 32] x) => (float[N, 32] y) {{ v0 = MatMul(x, w) {chain} y = Relu(v10) }}"
    answers = [{"v9": "NaN"}] * 4 + [{}]
    monkeypatch.setattr(cast_types, "spoiled_values", lambda *_: answers.pop(0))
    kept = float32_nodes(cast(build(text, {"w": WEIGHT}), tmp_path, data(4, 32)))
    assert not answers
    assert {name for name in kept if name.startswith("m")} == {f"m{i}" for i in range(5, 11)}


def test_values_below_the_range_stay_float32(tmp_path: Path) -> None:
    text = """g (float[N, 8] x) => (float[N, 8] y) {
        [small] a = Mul(x, k) [big] b = Mul(a, l) [fc] y = MatMul(b, w) }"""
    weights = {"k": np.float32(1e-4), "l": np.float32(1e4), "w": random_array(8, 8)}
    before, after = build(text, weights), build(text, weights)
    feeds = data(4, 8, scale=0.01)
    assert {"small", "big"} <= set(float32_nodes(cast(after, tmp_path, feeds)))
    assert worst_error(before, after, feeds) < 2e-3


def test_float32_nan_is_no_fault_of_ours(tmp_path: Path) -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w) a = Div(h, h) y = Relu(a) }"
    model = build(text, {"w": random_array(8, 8)})
    cast(model, tmp_path, {"x": np.zeros((2, 8), np.float32)})
    assert len(casts(model)) == 2


@pytest.mark.parametrize(
    ("name", "kind", "decibels"),
    [
        ("cifar_cnn", "float16", 55),
        ("cifar_cnn", "bfloat16", 40),
        pytest.param("minilm", "float16", 50, marks=pytest.mark.slow),
        pytest.param("minilm", "bfloat16", 33, marks=pytest.mark.slow),
    ],
)
def test_real_models_lose_little(name: str, kind: str, decibels: float, tmp_path: Path) -> None:
    model = load_model(real_model(name))
    passes = pipeline(make_plan(CompileOptions(scheme="float")))
    canonical = itertools.takewhile(lambda each: each.produces.rank <= Stage.CANONICAL.rank, passes)
    PassManager(PassContext(WeightStore(tmp_path))).run(model, list(canonical))
    before = model.clone()
    generator = np.random.default_rng(0)
    ids, pixels = (
        generator.integers(1000, 2000, (2, 12)),
        generator.integers(0, 256, (2, 3, 32, 32)),
    )
    calls: list[Feeds] = [{"images": pixels.astype(np.float32)}]
    if name == "minilm":
        ones = np.ones_like(ids)
        calls = [{"input_ids": ids, "attention_mask": ones, "token_type_ids": 0 * ones}]
    options = CastTypesOptions(ComputeType(kind), samples(*calls))
    result = run_pass(CastTypes(options), model, tmp_path)
    assert [rewrite.rule for rewrite in result.rewrites].count("insert-cast") <= 2
    reference = Reference(before, samples(*calls), memory=1 << 28, most_calls=1)
    assert reference.sqnr_db(emulated(model)) > decibels


def test_constants_that_were_not_lifted_stay_float32(tmp_path: Path) -> None:
    text = """g (float[N, 32] x) => (float[N, 32] y) {
        h = MatMul(x, w) [two] c = Constant<value = float {2.0}>() y = Mul(h, c) }"""
    before, after = build(text, {"w": WEIGHT}), build(text, {"w": WEIGHT})
    assert "two" in float32_nodes(cast(after, tmp_path, data(4, 32)))
    assert worst_error(before, after, data(4, 32)) < 2e-3


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        model = build(NORM, NORM_WEIGHTS)
        cast(model, tmp_path, data(4, 32))
        made.append(ir.to_proto(model).SerializeToString(deterministic=True))
    assert made[0] == made[1]


def test_extremes_say_what_is_new() -> None:
    assert Extremes(nan=True).spoils(Extremes(infinite=True)) == "NaN"
    assert Extremes(infinite=True).spoils(Extremes(infinite=True)) == ""


def test_rounding_is_to_the_nearest(tmp_path: Path) -> None:
    text = "g (float[N, 3] x) => (float[N, 3] y) { h = MatMul(x, w) y = Add(h, b) }"
    values = np.array([1.0009765, 1 / 3, 65503.9], np.float32)
    for kind, dtype in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        model = build(text, {"b": values, "w": np.eye(3, dtype=np.float32)})
        cast(model, tmp_path, kind=kind)
        assert initializer(model, "b").tolist() == values.astype(dtype).tolist()
