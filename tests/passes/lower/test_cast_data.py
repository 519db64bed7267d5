"""Casting what a graph holds and meets: weights, scales, and values seen on samples."""

import itertools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import Feeds
from qcompiler.calibration.quality import Reference
from qcompiler.errors import ParityError
from qcompiler.execution.narrow_floats import emulated
from qcompiler.ir.load import load_model
from qcompiler.ir.shapes import infer_shapes
from qcompiler.ir.weights import WeightStore, read_slice
from qcompiler.options import CompileOptions
from qcompiler.passes.lower import cast_constants, cast_types
from qcompiler.passes.lower.cast_measure import Extremes
from qcompiler.passes.lower.cast_types import CastTypes, CastTypesOptions
from qcompiler.pipeline import pipeline
from qcompiler.plan import make_plan
from qcompiler.quant.compute_type import ComputeType
from qcompiler.quant.selector import Selector
from qcompiler.rewriting.base import PassContext
from qcompiler.rewriting.manager import PassManager
from qcompiler.rewriting.stages import Stage
from tests.support.casting import (
    F16,
    F32,
    LOOP,
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
    Array,
    build,
    externalize,
    initializer,
    op_types,
    random_array,
)
from tests.support.parity import run_model
from tests.support.real_models import real_model
from tests.support.rewrites import run_pass


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
    cast(model, tmp_path, float32=(Selector(name="q"),))
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
    # No Cast comes between the codes and a product of two of them.
    assert "ws" in reasons["mm"]
    assert not {source for source, _ in casts(model)} & {"b", "w"}


def test_scales_that_float16_holds_well_enough_follow(tmp_path: Path) -> None:
    text, weights = quantized()
    weights["ws"] = np.full(32, 1.7e-5, np.float32)
    before, after = build(text, weights), build(text, weights)
    assert cast(after, tmp_path, data(4, 32)).skips == ()
    assert worst_error(before, after, data(4, 32)) < 2e-2


def test_a_small_scale_of_weights_alone_costs_one_cast(tmp_path: Path) -> None:
    text = """g (float[N, 32] x) => (float[N, 32] y) {
        h = MatMul(x, v) [dw] w = DequantizeLinear<axis=1>(codes, ws) [mm] y = MatMul(h, w) }"""
    _, weights = quantized()
    kept = {name: weights[name] for name in ("codes", "v")}
    model = build(text, kept | {"ws": np.full(32, 3e-6, np.float32)})
    assert set(float32_nodes(cast(model, tmp_path, data(4, 32)))) == {"dw"}
    assert ("w", "FLOAT16") in casts(model)


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
    cast(model, tmp_path, float32=(Selector(name="p"),))
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
    assert "--float32" in (failure.value.hint or "")
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
