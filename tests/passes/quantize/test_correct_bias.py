"""Mean errors of quantized ops go into their biases, where that helps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import Feeds
from qcompiler.calibration.observers import Observer
from qcompiler.ir.provenance import BIAS_CORRECTED
from qcompiler.options import CalibrationOptions, CompileOptions
from qcompiler.passes.lower.decompose_gemm import DecomposeGemm
from qcompiler.passes.lower.lower_dynamic_quantization import LowerDynamicQuantization
from qcompiler.passes.quantize.bias_twins import Twins
from qcompiler.passes.quantize.insert_qdq import InsertQdq
from qcompiler.pipeline import pass_named, pipeline, quantizing_passes
from qcompiler.plan import CalibrationData, make_plan
from qcompiler.rewriting.base import PassContext, PassResult
from qcompiler.targets.onnxruntime import ONNXRUNTIME
from tests.support.bias_models import (
    correct_bias,
    errors_at,
    gemms,
    parts,
    planned,
    quantized,
    samples,
    shifted_rows,
)
from tests.support.graphs import initializer, node_named, op_types, random_array
from tests.support.rewrites import assert_idempotent, only_skip, reasons, run_pass

Array = npt.NDArray[Any]
CALLS = shifted_rows(8, 24, 32)
W, B = random_array(32, 16, seed=1) / 6, random_array(16, seed=2)


def padded_conv(node: str = "[op] y = Conv<pads=[1, 1, 1, 1]>(x, w, b)") -> ir.Model:
    weights = {"w": random_array(12, 4, 3, 3, seed=1) / 6, "b": random_array(12, seed=2)}
    kept = {name: value for name, value in weights.items() if f", {name}" in node}
    return planned(f"g (float[n, 4, 6, 6] x) => (float[n, 12, 6, 6] y) {{ {node} }}", kept)


def dequantized(model: ir.Model, name: str) -> Array:
    """Return a weight per output channel, as a quantized model holds it, in float64."""
    codes, scale = (initializer(model, f"{name}.{part}") for part in ("codes", "scale"))
    return codes.astype(np.float64) * scale.astype(np.float64)


# rewrites


def test_every_bias_is_corrected(tmp_path: Path) -> None:
    model = gemms()
    before = op_types(model)
    result = run_pass(correct_bias(CALLS), model, tmp_path)
    assert [rewrite.node for rewrite in result.rewrites] == ["op1", "op2", "op3"]
    assert "held-out SQNR of its result" in result.rewrites[0].detail
    assert op_types(model) == before
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert set(model.graph.initializers) == {
        *("w1", "b1.corrected", "w2", "b2.corrected", "w3", "y.corrected")
    }
    assert node_named(model, "op2").attributes["beta"].as_float() == 1.0


def test_mean_errors_vanish_where_they_were_measured(tmp_path: Path) -> None:
    """Acceptance check 4: |E err| about 0 on calibration data, down 1.5x and more elsewhere."""
    source, model = gemms(), gemms()
    run_pass(correct_bias(CALLS), model, tmp_path)
    plain, corrected = quantized(source, tmp_path), quantized(model, tmp_path)
    choosing, _ = parts(CALLS)
    fresh = shifted_rows(8, 24, 32, seed=500)
    for name in ("a", "c", "y"):
        noise = errors_at(source, plain, name, choosing).std()
        assert np.abs(errors_at(source, plain, name, choosing).mean(0)).max() > 0.1 * noise
        assert np.abs(errors_at(source, corrected, name, choosing).mean(0)).max() < 1e-5 * noise
        before, after = (errors_at(source, each, name, fresh) for each in (plain, corrected))
        assert np.abs(before.mean(0)).mean() > 1.5 * np.abs(after.mean(0)).mean()
        assert (after**2).mean() < 1.01 * (before**2).mean()


@pytest.mark.parametrize(
    "node",
    [
        "[op] y = Conv<pads=[1, 1, 1, 1]>(x, w, b)",
        "[op] y = Conv<pads=[1, 1, 1, 1]>(x, w)",
    ],
)
def test_channels_of_convolutions(node: str, tmp_path: Path) -> None:
    calls = [{"x": 1 + random_array(3, 4, 6, 6, seed=seed)} for seed in range(8)]
    source, model = padded_conv(node), padded_conv(node)
    assert len(run_pass(correct_bias(calls), model, tmp_path).rewrites) == 1
    error = errors_at(source, quantized(model, tmp_path), "y", parts(calls)[0], axis=1)
    assert np.abs(error.mean(0)).max() < 1e-5 * error.std()


def test_groups_of_a_transposed_convolution(tmp_path: Path) -> None:
    def model() -> ir.Model:
        return planned(
            """g (float[n, 4, 5, 5] x) => (float[n, 6, 7, 7] y) {
                [op] y = ConvTranspose<group=2>(x, w) }""",
            {"w": random_array(4, 3, 3, 3, seed=1) / 6},
        )

    calls = [{"x": 1 + random_array(3, 4, 5, 5, seed=seed)} for seed in range(8)]
    source, after = model(), model()
    run_pass(correct_bias(calls), after, tmp_path)
    assert initializer(after, "y.corrected").shape == (6,)
    error = errors_at(source, quantized(after, tmp_path), "y", parts(calls)[0], axis=1)
    assert np.abs(error.mean(0)).max() < 1e-5 * error.std()


def test_a_product_without_a_bias_gets_an_add(tmp_path: Path) -> None:
    text = """g (float[b, t, 32] x) => (float[b, t, 16] y, float[b, t, 16] z) {
        [op] y = MatMul(x, w)
        z = Relu(y) }"""
    source, model = planned(text, {"w": W}), planned(text, {"w": W})
    node_named(model, "op").outputs[0].metadata_props["qcompiler.range"] = "[0, 1]"
    calls = shifted_rows(8, 2, 12, 32)
    run_pass(correct_bias(calls), model, tmp_path)
    assert op_types(model) == ["MatMul", "Add", "Relu"]
    total = node_named(model, "y.biased").outputs[0]
    assert total is model.graph.outputs[0]
    assert total.metadata_props == {"qcompiler.range": "[0, 1]"}
    assert not node_named(model, "op").outputs[0].metadata_props
    error = errors_at(source, quantized(model, tmp_path), "y", parts(calls)[0])
    assert np.abs(error.mean(0)).max() < 1e-5 * error.std()


def test_the_add_behind_a_product_is_its_bias(tmp_path: Path) -> None:
    text = """g (float[n, 32] x) => (float[n, 16] y) {
        [op] t = MatMul(x, w)
        [add] y = Add(b, t) }"""
    model = planned(text, {"w": W, "b": B})
    run_pass(correct_bias(CALLS), model, tmp_path)
    assert op_types(model) == ["MatMul", "Add"]
    assert [value.name for value in node_named(model, "add").inputs if value] == [
        "b.corrected",
        "t",
    ]


def test_a_bias_that_is_read_elsewhere_stays_there(tmp_path: Path) -> None:
    text = """g (float[n, 32] x) => (float[n, 16] y) {
        [op] t = Gemm(x, w, b)
        y = Mul(t, b) }"""
    model = planned(text, {"w": W, "b": B})
    run_pass(correct_bias(CALLS), model, tmp_path)
    assert (initializer(model, "b") == B).all()
    assert not (initializer(model, "b.corrected") == B).all()


def test_padding_does_not_count(tmp_path: Path) -> None:
    text = """g (float[b, t, 32] x, int64[b, t] mask) => (float[b, t, 16] y) {
        [op1] h = MatMul(x, w1)
        k = Transpose<perm=[0, 2, 1]>(h)
        s = MatMul(h, k)
        f = Cast<to=1>(mask)
        one = Constant<value_float=1.0>()
        big = Constant<value_float=-30000.0>()
        hidden = Sub(one, f)
        bias = Mul(hidden, big)
        axes = Constant<value_ints=[1]>()
        wide = Unsqueeze(bias, axes)
        masked = Add(s, wide)
        p = Softmax(masked)
        o = MatMul(p, h)
        [op2] y = MatMul(o, w2) }"""
    weights = {"w1": random_array(32, 32, seed=1) / 20, "w2": random_array(32, 16, seed=2) / 6}
    calls: list[Feeds] = []
    for index, feeds in enumerate(shifted_rows(8, 2, 10, 32)):
        mask = np.ones((2, 10), np.int64)
        mask[0, 5 + index % 4 :] = 0
        feeds["x"][mask == 0] = -40  # what padding is embedded as
        calls.append({"x": feeds["x"], "mask": mask})
    source, model = planned(text, weights), planned(text, weights)
    run_pass(correct_bias(calls), model, tmp_path)
    after = quantized(model, tmp_path)
    choosing, _ = parts(calls)
    counted = np.concatenate([feeds["mask"].reshape(-1) != 0 for feeds in choosing])
    error = errors_at(source, after, "h", choosing)
    assert np.abs(error[counted].mean(0)).max() < 1e-5 * error[counted].std()
    assert np.abs(error.mean(0)).max() > 0.1 * error[counted].std()


@pytest.mark.parametrize(
    ("dtype", "step"), [(np.float16, 2**-10), (ml_dtypes.bfloat16, 2**-7)], ids=["half", "brain"]
)
def test_16_bit_models(dtype: Any, step: float, tmp_path: Path) -> None:
    """Biases are as exact as their type, though no kernel on a CPU takes bfloat16."""
    kind = "float16" if dtype is np.float16 else "bfloat16"
    text = f"g ({kind}[n, 32] x) => ({kind}[n, 16] y) {{ [op] y = Gemm(x, w, b) }}"
    model = planned(text, {"w": W.astype(dtype), "b": B.astype(dtype)})
    calls = [{"x": feeds["x"].astype(dtype)} for feeds in CALLS]
    weight = dequantized(quantized(model, tmp_path), "w")
    rows = np.concatenate([feeds["x"].astype(np.float64) for feeds in parts(calls)[0]])
    wanted = B.astype(dtype) - rows.mean(0) @ (weight - W.astype(dtype).astype(np.float64))
    result = run_pass(correct_bias(calls), model, tmp_path)
    assert [rewrite.node for rewrite in result.rewrites] == ["op"]
    bias = model.graph.initializers["b.corrected"].const_value
    assert bias is not None
    assert bias.numpy().dtype == dtype
    distance = np.abs(bias.numpy().astype(np.float64) - wanted)
    assert (distance < 2 * step * np.maximum(1.0, np.abs(wanted))).all()


def test_a_float16_model_with_ops_in_a_row(tmp_path: Path) -> None:
    calls = [{"x": feeds["x"].astype(np.float16)} for feeds in CALLS]
    source, model = gemms(half=True), gemms(half=True)
    run_pass(correct_bias(calls), model, tmp_path)
    plain, corrected = quantized(source, tmp_path), quantized(model, tmp_path)
    for name in ("a", "c", "y"):
        before, after = (errors_at(source, m, name, parts(calls)[0]) for m in (plain, corrected))
        assert np.abs(after.mean(0)).mean() < np.abs(before.mean(0)).mean() / 20


def test_infinite_outputs_do_not_stand_in_the_way(tmp_path: Path) -> None:
    text = """g (float[n, 32] x) => (float[n, 16] y) {
        [op] t = Gemm(x, w, b)
        y = Add(t, hidden) }"""
    hidden = np.where(np.arange(16) < 3, -np.inf, 0).astype(np.float32)
    model = planned(text, {"w": W, "b": B, "hidden": hidden})
    assert len(run_pass(correct_bias(CALLS), model, tmp_path).rewrites) == 1


def test_what_does_not_fit_in_memory_goes_to_files(tmp_path: Path) -> None:
    inside, outside = gemms(), gemms()
    run_pass(correct_bias(CALLS), inside, tmp_path)
    run_pass(correct_bias(CALLS, memory_budget=0), outside, tmp_path)
    for name in ("b1", "b2", "y"):
        one, other = (initializer(m, f"{name}.corrected") for m in (inside, outside))
        assert (one == other).all()
    assert not list(tmp_path.iterdir())


def test_calibrated_activations(tmp_path: Path) -> None:
    """Integer data, weights and biases: errors of all of them, also of those before."""
    calibration = CalibrationOptions("random", observer=Observer.MIN_MAX, outlier_channels=0)
    options = CompileOptions(scheme="w8a8", calibration=calibration, never_slower=False)
    plan = make_plan(options)
    plan = replace(plan, data=CalibrationData(samples(CALLS), lambda: ""))
    model = gemms()
    for rewrite in pipeline(plan):
        if rewrite.name == "correct-bias":
            break
        run_pass(rewrite, model, tmp_path)
    source = model.clone()
    passes = tuple(quantizing_passes(plan))
    result = run_pass(correct_bias(CALLS, passes), model, tmp_path)
    corrected = [node_named(source, rewrite.node) for rewrite in result.rewrites]
    assert len(corrected) >= 2
    after = quantized(model, tmp_path, passes)
    lowered = quantized(model, tmp_path, (*passes, pass_named("quantize-biases", plan)))
    for node in corrected:
        name = node.outputs[0].name or ""
        error = errors_at(source, after, name, parts(CALLS)[0])
        assert np.abs(error.mean(0)).max() < 1e-4 * error.std()
        # Biases are rounded to codes there, and a few codes of data change with that.
        error = errors_at(source, lowered, name, parts(CALLS)[0])
        assert np.abs(error.mean(0)).max() < 0.05 * error.std()


def test_dynamic_activations(tmp_path: Path) -> None:
    """Biases of a Gemm that is split before its data is quantized."""
    quantize = (InsertQdq(), DecomposeGemm(), LowerDynamicQuantization())
    source, model = gemms("w8a8-dynamic:sym"), gemms("w8a8-dynamic:sym")
    result = run_pass(correct_bias(CALLS, quantize), model, tmp_path)
    assert {rewrite.node for rewrite in result.rewrites} >= {"op1"}
    error = errors_at(source, quantized(model, tmp_path, quantize), "a", parts(CALLS)[0])
    assert np.abs(error.mean(0)).max() < 1e-3 * error.std()


def test_an_if_between_ops(tmp_path: Path) -> None:
    """Its bodies read what lies outside; the condition is an input."""
    text = """g (float[n, 32] x, bool c) => (float[n, 16] y) {
        [op1] a = MatMul(x, w1)
        h = If (c) <then_branch = s () => (float[n, 32] p) { p = Mul(a, gain) },
                    else_branch = t () => (float[n, 32] q) { q = Add(a, x) }>
        [op2] y = MatMul(h, w2) }"""
    weights = {"w1": random_array(32, 32, seed=1) / 6, "w2": W, "gain": random_array(32)}
    calls: list[Feeds] = [
        {**feeds, "c": np.array(call % 2 == 0)} for call, feeds in enumerate(CALLS)
    ]
    source, model = planned(text, weights), planned(text, weights)
    assert len(run_pass(correct_bias(calls), model, tmp_path).rewrites) == 2
    for name in ("a", "y"):
        error = errors_at(source, quantized(model, tmp_path), name, parts(calls)[0])
        assert np.abs(error.mean(0)).max() < 1e-4 * error.std()


# refuses


def test_a_correction_that_does_not_hold_is_dropped(tmp_path: Path) -> None:
    """The calls that judge have the opposite mean."""
    model = planned(
        "g (float[n, 32] x) => (float[n, 16] y) { [op] y = Gemm(x, w, b) }", {"w": W, "b": B}
    )
    calls = [{"x": -feeds["x"] if call > 5 else feeds["x"]} for call, feeds in enumerate(CALLS)]
    skip = only_skip(run_pass(correct_bias(calls), model, tmp_path))
    assert "does not make the held-out error of its result smaller: mean squared" in skip.reason
    assert (initializer(model, "b") == B).all()


def few_active_rows() -> tuple[ir.Model, list[Feeds]]:
    """Return a model whose first op errs by 1 on rows that its Relu hides, and little on others."""
    weight, zeros = random_array(32, 4, seed=1), np.zeros(4, np.float32)
    model = planned(
        """g (float[n, 32] x) => (float[n, 4] y) {
            [op1] a = Gemm(x, w, b)
            h = Relu(a)
            [op2] y = Gemm(h, v, c) }""",
        {"w": weight, "b": zeros, "v": np.eye(4, dtype=np.float32), "c": zeros},
    )
    difference = dequantized(quantized(model, Path()), "w") - weight
    both = np.concatenate([weight, difference], axis=1).T
    hidden = np.linalg.lstsq(both, np.repeat([-10.0, 1.0], 4), rcond=None)[0]
    active = np.linalg.lstsq(both, np.repeat([10.0, -0.1], 4), rcond=None)[0]
    rows = np.stack([hidden] * 9 + [active]).astype(np.float32)
    return model, [{"x": rows + random_array(10, 32, seed=call) / 100} for call in range(8)]


def test_a_correction_that_harms_what_comes_next_is_dropped(tmp_path: Path) -> None:
    model, calls = few_active_rows()
    result = run_pass(correct_bias(calls), model, tmp_path)
    (skip,) = (skip for skip in result.skips if skip.node == "op1")
    assert "makes the held-out noise of the results that depend on its own larger" in skip.reason
    before, after = node_named(model, "op1").metadata_props[BIAS_CORRECTED].split(" -> ")
    assert float(after) > float(before)


TIED = """g (float[n, 32] x) => (float[n, 16] y, float[n, 16] z) {
    [op] y = Gemm(x, w, b)
    t = Neg(x)
    [op2] z = Gemm(t, w, b) }"""
COMPUTED = """g (float[n, 32] x, float[16] b) => (float[n, 16] y) {
    [op] y = Gemm(x, w, b) }"""
MATRIX = "g (float[24, 32] x) => (float[24, 16] y) { [op] y = Gemm(x, w, b) }"
IN_BODY = """g (float[n, 32] x, bool c) => (float[n, 16] y) {
    y = If (c) <then_branch = a () => (float[n, 16] p) { [op] p = Gemm(x, w, b) },
                else_branch = d () => (float[n, 16] q) { [op2] q = Gemm(x, w2, b) }> }"""
RECURRENT = """g (float[s, n, 32] x) => (float[s, 1, n, 16] y) {
    [op] y = LSTM<hidden_size=16>(x, w, r) }"""


@pytest.mark.parametrize(
    ("text", "weights", "reason"),
    [
        (TIED, {"w": W, "b": B}, "is read elsewhere too"),
        (COMPUTED, {"w": W}, "the bias is computed at run time"),
        (MATRIX, {"w": W, "b": random_array(24, 16)}, "not one number per output channel"),
        (IN_BODY, {"w": W, "w2": W + 1, "b": B}, "in an If, Loop or Scan body cannot be measured"),
        (
            RECURRENT,
            {"w": random_array(1, 64, 32), "r": random_array(1, 64, 16)},
            "what its biases are added to is not in the graph",
        ),
    ],
    ids=["tied", "computed", "matrix", "body", "recurrent"],
)
def test_refuses(text: str, weights: dict[str, Array], reason: str, tmp_path: Path) -> None:
    model = planned(text, weights)
    result = run_pass(correct_bias(CALLS), model, tmp_path)
    assert result.rewrites == ()
    assert result.skips
    assert all(reason in text for text in reasons(result))


STATIC = "w8a8:sym"


@pytest.mark.parametrize(
    ("shape", "scheme", "rows", "outliers", "reason"),
    [
        ("b, t", STATIC, ONNXRUNTIME.added_biases, None, "only to matrices and results of fixed"),
        ("n", STATIC, ONNXRUNTIME.added_biases, "[3]", "what outlier channels or a second term"),
        ("n", "w4a16:sym", (), None, "ONNX Runtime would not add one in its kernel"),
    ],
    ids=["dynamic-shape", "outliers", "target"],
)
def test_no_add_that_costs_time(
    shape: str, scheme: str, rows: Any, outliers: str | None, reason: str, tmp_path: Path
) -> None:
    text = f"g (float[{shape}, 32] x) => (float[{shape}, 16] y) {{ [op] y = MatMul(x, w) }}"
    model = planned(text, {"w": W}, scheme)
    if outliers is not None:
        model.graph.inputs[0].metadata_props["qcompiler.outlier_channels"] = outliers
    target = replace(ONNXRUNTIME, added_biases=rows)
    skip = only_skip(run_pass(correct_bias(CALLS, target=target), model, tmp_path))
    assert reason in skip.reason


def test_a_value_that_is_no_tensor_between_ops(tmp_path: Path) -> None:
    text = """g (float[n, 32] x) => (float[n, 16] y) {
        [op1] a = Gemm(x, w1, b1)
        s = SequenceConstruct(a, x)
        zero = Constant<value_int=0>()
        c = SequenceAt(s, zero)
        [op2] d = Gemm(c, w2, b1)
        one = Constant<value_int=1>()
        e = SequenceAt(s, one)
        f = Add(d, e)
        [op3] y = Gemm(f, w3, b3) }"""
    weights = {
        "w1": random_array(32, 32, seed=1),
        "w2": random_array(32, 32, seed=3),
        "w3": W,
        "b1": random_array(32),
        "b3": B,
    }
    result = run_pass(correct_bias(CALLS), planned(text, weights), tmp_path)
    assert result.rewrites == ()
    reason = "s, between ops with biases, is not known to hold numbers"
    assert reasons(result) == [reason] * 3


def test_ops_that_stay_in_float_are_not_looked_at(tmp_path: Path) -> None:
    model = planned(
        "g (float[n, 32] x) => (float[n, 16] y) { y = Gemm(x, w, b) }", {"w": W, "b": B}
    )
    result = run_pass(correct_bias(CALLS), model, tmp_path)
    assert (result.rewrites, result.skips) == ((), ())


class Rename(InsertQdq):
    """A pass that loses the name of a value."""

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Quantize, and rename."""
        result = super().run(model, context)
        node_named(model, "op2").outputs[0].name = "other"
        return result


def test_a_result_that_is_lost(tmp_path: Path) -> None:
    result = run_pass(correct_bias(CALLS, (Rename(),)), gemms(), tmp_path)
    assert "op3" in [rewrite.node for rewrite in result.rewrites]
    (skip,) = (skip for skip in result.skips if skip.node == "op2")
    assert skip.reason == "its result is not a value of the quantized graph"


def test_corrections_that_make_the_outputs_worse_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noises = Twins.noises

    def worse(self: Twins, index: int, *trials: Any) -> list[float]:
        return [
            noise + (100 if index and not trials else 0) for noise in noises(self, index, *trials)
        ]

    monkeypatch.setattr(Twins, "noises", worse)
    result = run_pass(correct_bias(CALLS), gemms(), tmp_path)
    assert result.rewrites == ()
    assert len(result.skips) == 3
    assert all("all corrections together make the held-out" in text for text in reasons(result))


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    model = planned(
        "g (float[n, 32] x) => (float[n, 16] y) { [op] y = Gemm(x, w, b) }", {"w": W, "b": B}
    )
    calls = [{"x": feeds["x"] * (np.inf if call == 2 else 1)} for call, feeds in enumerate(CALLS)]
    skip = only_skip(run_pass(correct_bias(calls), model, tmp_path))
    assert skip.reason == "its result is not finite on some sample"


# is idempotent


def test_idempotent(tmp_path: Path) -> None:
    assert_idempotent(correct_bias(CALLS), gemms(), tmp_path)


def test_what_was_dropped_is_not_tried_again(tmp_path: Path) -> None:
    model, calls = few_active_rows()
    run_pass(correct_bias(calls), model, tmp_path)
    again = run_pass(correct_bias(calls), model, tmp_path)
    assert (again.rewrites, again.skips) == ((), ())
