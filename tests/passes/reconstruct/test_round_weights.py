"""Codes that make up for each other's errors, in the graph that insert-qdq makes."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompiler.errors import ModelError
from qcompiler.ir.provenance import QUANTIZED_INPUTS, QUANTIZER, RANGE, annotate, facts_of
from qcompiler.passes.quantize.insert_activation_qdq import InsertActivationQdq
from qcompiler.passes.quantize.insert_qdq import InsertQdq
from qcompiler.passes.reconstruct.round_weights import RoundWeights, RoundWeightsOptions
from qcompiler.quant.arithmetic import dequantize
from qcompiler.quant.granularity import PerAxis, PerBlock
from qcompiler.rewriting.base import PassResult
from tests.reconstruction.test_compensation import correlated, reference
from tests.support.graphs import (
    body_of,
    build,
    initializer,
    node_named,
    op_types,
    random_array,
    serialized,
)
from tests.support.parity import run_model
from tests.support.reconstruction import samples_of
from tests.support.rewrites import assert_idempotent, reasons, run_pass

Array = npt.NDArray[Any]

_MLP = """g (float[N, 64] x) => (float[N, 16] y) {
    [up] h = MatMul(x, w)
    [act] r = Relu(h)
    [down] y = MatMul(r, v)
}"""


def _weights(dtype: npt.DTypeLike = np.float32) -> dict[str, Array]:
    return {"w": random_array(64, 48, dtype=dtype), "v": random_array(48, 16, seed=1, dtype=dtype)}


def _planned(
    text: str, weights: Mapping[str, Any], schemes: Mapping[str, str], **facts: int
) -> ir.Model:
    model = build(text, weights, opset=25)
    for name, scheme in schemes.items():
        annotate(node_named(model, name), scheme=scheme, **facts)
    return model


def _calls(dtype: npt.DTypeLike = np.float32) -> list[dict[str, Any]]:
    data = correlated(300, 64) / 10
    return [{"x": part.astype(dtype)} for part in np.split(data, 3)]


def _rounding(calls: list[dict[str, Any]], **options: Any) -> RoundWeights:
    return RoundWeights(RoundWeightsOptions(samples_of(calls), (InsertQdq(),), **options))


def _restored(model: ir.Model, weight: str, granularity: PerAxis | PerBlock) -> Array:
    """Return what the codes of a weight stand for."""
    parts = model.graph.initializers
    point = f"{weight}.zero_point"
    zero = initializer(model, point).astype(np.uint8) if point in parts else None
    code_type = np.int8 if zero is None else np.uint8
    codes = initializer(model, f"{weight}.codes").astype(code_type)
    return dequantize(codes, initializer(model, f"{weight}.scale"), zero, granularity)


def _output_error(model: ir.Model, calls: list[dict[str, Any]], weights: dict[str, Array]) -> float:
    truth = build(_MLP, weights, opset=25)
    return sum(
        float(np.square(run_model(model, feeds)["y"] - run_model(truth, feeds)["y"]).sum())
        for feeds in calls
    )


@pytest.mark.parametrize(
    "scheme",
    [
        *("w8a16:sym", "w8a16:tensor:sym", "w4a16:asym", "w4a16:b16:sym", "w3a16:b32:asym"),
        *("w2a16:b16:asym", "w2a16:sym"),
    ],
)
def test_the_model_is_nearer_to_float_with_the_same_nodes(scheme: str, tmp_path: Path) -> None:
    schemes = {"up": scheme, "down": scheme}
    plain = _planned(_MLP, _weights(), schemes)
    run_pass(InsertQdq(), plain, tmp_path)
    rounded = _planned(_MLP, _weights(), schemes)
    result = run_pass(_rounding(_calls()), rounded, tmp_path)
    assert [r.node for r in result.rewrites if r.rule == "round-weights"] == ["up", "down"]
    for one, other in zip(plain.graph.all_nodes(), rounded.graph.all_nodes(), strict=True):
        assert (one.op_type, one.name) == (other.op_type, other.name)
        assert [v and v.name for v in one.inputs] == [v and v.name for v in other.inputs]
    for name, value in plain.graph.initializers.items():
        new = rounded.graph.initializers[name]
        assert value.const_value is not None
        assert new.const_value is not None
        assert (value.const_value.dtype, value.const_value.shape) == (
            new.const_value.dtype,
            new.const_value.shape,
        )
    held_out = [{"x": feeds["x"][::-1] * np.float32(1.1)} for feeds in _calls()]
    errors = [_output_error(model, held_out, _weights()) for model in (plain, rounded)]
    assert errors[1] < 0.85 * errors[0]


def _agrees(found: Array, expected: Array, start: Array) -> None:
    """Fail unless rows `[N, K]` are as expected, or as they were; few may be."""
    different = (found != expected).any(axis=1)
    np.testing.assert_array_equal(found[different], start[different])
    assert different.mean() < 0.2


def _codes(model: ir.Model, weight: str) -> Array:
    """Return the codes of a weight that is stored `[K, N]` as `[N, K]`."""
    return initializer(model, f"{weight}.codes").astype(np.int64).T


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_codes_are_those_of_the_textbook(static: bool, act_order: bool, tmp_path: Path) -> None:
    model = _planned(_MLP, _weights(), {"up": "w4a16:b16:asym", "down": "w4a16:b16:asym"})
    start = _planned(_MLP, _weights(), {"up": "w4a16:b16:asym", "down": "w4a16:b16:asym"})
    run_pass(InsertQdq(), start, tmp_path)
    run_pass(_rounding(_calls(), static_scales=static, act_order=act_order), model, tmp_path)
    same = np.array_equal(initializer(model, "w.scale"), initializer(start, "w.scale"))
    assert same == static
    data = np.concatenate([feeds["x"] for feeds in _calls()])
    for weight, rows in _weights().items():
        hessian = 2 * data.astype(np.float64).T @ data
        order = np.argsort(-np.diag(hessian), kind="stable").tolist() if act_order else None
        scale = np.repeat(initializer(model, f"{weight}.scale").astype(np.float64), 16, axis=0).T
        zero = np.repeat(initializer(model, f"{weight}.zero_point").astype(float), 16, axis=0).T
        expected = reference(rows.T, hessian, scale, zero, (0, 15), 0.01, order)
        found = _codes(model, weight)
        # Rows that keep their start codes keep their scales too.
        _agrees(found, expected, _codes(start, weight))
        # What the second product reads comes from the first one's codes.
        data = np.maximum(data @ ((found - zero) * scale).T.astype(np.float32), 0)


def test_data_is_what_its_own_codes_stand_for(tmp_path: Path) -> None:
    schemes = {"up": "w8a8:sym", "down": "w8a8:sym"}
    marks = {QUANTIZER: "uint8:asym", RANGE: "[-1.0, 1.5]"}
    model, start = (_planned(_MLP, _weights(), schemes) for _ in range(2))
    for each in (model, start):
        node_named(each, "up").metadata_props[QUANTIZED_INPUTS] = "[0]"
        each.graph.inputs[0].metadata_props.update(marks)
    insert = (InsertActivationQdq(), InsertQdq())
    for rewrite in insert:
        run_pass(rewrite, start, tmp_path)
    run_pass(RoundWeights(RoundWeightsOptions(samples_of(_calls()), insert)), model, tmp_path)
    step = np.float32(2.5 / 255)
    zero = np.rint(1 / step)
    data = np.concatenate([feeds["x"] for feeds in _calls()])
    rounded = (np.clip(np.rint(data / step) + zero, 0, 255) - zero) * step
    assert np.abs(rounded - data).max() > 1
    hessian = 2 * rounded.astype(np.float64).T @ rounded
    scale = initializer(start, "w.scale").astype(np.float64)[:, np.newaxis] * np.ones((1, 64))
    expected = reference(_weights()["w"].T, hessian, scale, 0 * scale, (-128, 127), 0.01)
    _agrees(_codes(model, "w"), expected, _codes(start, "w"))


def test_quality_is_written_on_the_node(tmp_path: Path) -> None:
    model = _planned(_MLP, _weights(), {"up": "w4a16:b16:sym", "down": "w4a16:b16:sym"})
    result = run_pass(_rounding(_calls()), model, tmp_path)
    facts = facts_of(node_named(model, "up"))
    weight = _weights()["w"].astype(np.float64)
    error = _restored(model, "w", PerBlock(0, 16)) - weight
    quality = 10 * np.log10(np.square(weight).sum() / np.square(error).sum())
    assert float(facts["weight_sqnr_db"]) == pytest.approx(quality, abs=1e-3)
    data = np.concatenate([feeds["x"] for feeds in _calls()])
    product = np.square(data @ weight).sum() / np.square(data @ error).sum()
    assert float(facts["product_sqnr_db"]) == pytest.approx(10 * np.log10(product), abs=1e-3)
    (detail,) = [r.detail for r in result.rewrites if r.rule != "insert-qdq" and r.node == "up"]
    assert f"-> {float(facts['product_sqnr_db']):.1f} dB" in detail


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_floats_keep_their_type(dtype: npt.DTypeLike, tmp_path: Path) -> None:
    name = ir.DataType.from_numpy(np.dtype(dtype))
    text = _MLP.replace("float", str(name).lower())
    model = _planned(text, _weights(dtype), {"up": "w4a16:b16:asym", "down": "w4a16:asym"})
    result = run_pass(_rounding(_calls(dtype)), model, tmp_path)
    assert len(result.rewrites) == 4
    for weight in ("w", "v"):
        scale = model.graph.initializers[f"{weight}.scale"]
        assert scale.const_value is not None
        assert scale.const_value.dtype == name
    wide = _planned(
        _MLP,
        {key: value.astype(np.float32) for key, value in _weights(dtype).items()},
        {"up": "w4a16:b16:asym", "down": "w4a16:asym"},
    )
    run_pass(_rounding([{"x": c["x"].astype(np.float32)} for c in _calls(dtype)]), wide, tmp_path)
    codes = [initializer(m, "w.codes").astype(np.int8) for m in (model, wide)]
    # Scales are rounded to 16 bits, which moves a code now and then and then its successors.
    assert (np.abs(codes[0] - codes[1]) <= 1).mean() > 0.95


@pytest.mark.parametrize("act_order", [False, True])
def test_pairs_of_codes_keep_their_limit(act_order: bool, tmp_path: Path) -> None:
    weights = _weights()
    weights["w"] = np.abs(weights["w"])
    schemes = {"up": "w8a8:sym", "down": "w8a8:sym"}
    model = _planned(_MLP, weights, schemes, pair_limit=128)
    run_pass(_rounding(_calls(), act_order=act_order), model, tmp_path)
    codes = initializer(model, "w.codes").astype(np.int64)
    assert (codes[0::2] + codes[1::2]).max() == 128
    assert "product_sqnr_db" in facts_of(node_named(model, "up"))


@pytest.mark.parametrize(
    ("op", "shape", "channels"),
    [
        ("Conv<pads = [1, 1, 1, 1]>", (8, 6, 3, 3), 6),
        ("Conv<group = 2>", (8, 3, 3, 3), 6),
        ("Conv<group = 6>", (12, 1, 3, 3), 6),
    ],
)
@pytest.mark.parametrize("scheme", ["w4a16:sym", "w3a16:asym", "w4a16:b16:asym"])
def test_convolutions_are_rounded(
    op: str, shape: tuple[int, ...], channels: int, scheme: str, tmp_path: Path
) -> None:
    text = f"g (float[N, C, H, W] x) => (float[N, M, P, Q] y) {{ [conv] y = {op}(x, w) }}"
    weight = random_array(*shape)
    images = np.cumsum(random_array(5, channels, 9, 9, seed=1), axis=3)
    calls = [{"x": images[:3]}, {"x": images[3:]}]
    plain = _planned(text, {"w": weight}, {"conv": scheme})
    run_pass(InsertQdq(), plain, tmp_path)
    model = _planned(text, {"w": weight}, {"conv": scheme})
    run_pass(_rounding(calls), model, tmp_path)
    feeds = {"x": images}
    truth = run_model(build(text, {"w": weight}), feeds)["y"]
    errors = [np.square(run_model(each, feeds)["y"] - truth).sum() for each in (plain, model)]
    assert errors[1] < 0.8 * errors[0]


def test_tied_weights_have_one_set_of_codes(tmp_path: Path) -> None:
    text = """g (float[N, 64] x) => (float[N, 64] z) {
        [one] a = MatMul(x, w)
        [act] b = Relu(a)
        [turn] t = Transpose<perm = [1, 0]>(v)
        [middle] c = MatMul(b, t)
        [act2] d = Relu(c)
        [two] z = MatMul(d, w)
    }"""
    weights = {"w": random_array(64, 64), "v": random_array(64, 64, seed=1)}
    schemes = dict.fromkeys(("one", "middle", "two"), "w4a16:sym")
    model = _planned(text, weights, schemes)
    result = run_pass(_rounding(_calls(), static_scales=True), model, tmp_path)
    assert [r.node for r in result.rewrites if r.rule == "round-weights"] == [
        "one",
        "two",
        "middle",
    ]
    start = _planned(text, weights, schemes)
    run_pass(InsertQdq(), start, tmp_path)
    data = np.concatenate([feeds["x"] for feeds in _calls()]).astype(np.float64)
    # Its data at the second place comes from start codes: only then is there any.
    later = np.maximum(data @ _restored(start, "w", PerAxis(1)), 0)
    later = np.maximum(later @ _restored(start, "v", PerAxis(0)).T, 0)
    hessian = 2 * (data.T @ data + later.T @ later)
    scale = initializer(model, "w.scale").astype(np.float64)[:, np.newaxis]
    scale = np.broadcast_to(scale, (64, 64))
    expected = reference(weights["w"].T, hessian, scale, 0 * scale, (-8, 7), 0.01)
    _agrees(_codes(model, "w"), expected, _codes(start, "w"))


def test_padding_does_not_count(tmp_path: Path) -> None:
    text = """g (float[N, T, 64] x, int64[N, T] attention_mask) => (float[N, T, 48] y) {
        [up] y = MatMul(x, w)
    }"""
    weights = {"w": _weights()["w"]}
    data = correlated(40, 64).reshape(4, 10, 64).astype(np.float32)
    mask = np.ones((4, 10), np.int64)
    mask[:, 7:] = 0
    found = []
    for noise in (0, 100):
        data[:, 7:] = noise
        model = _planned(text, weights, {"up": "w4a16:sym"})
        run_pass(_rounding([{"x": data, "attention_mask": mask}]), model, tmp_path)
        found.append(initializer(model, "w.codes"))
    np.testing.assert_array_equal(found[0], found[1])
    blind = _planned(text, weights, {"up": "w4a16:sym"})
    calls = [{"x": data, "attention_mask": mask}]
    run_pass(_rounding(calls, padding_mask=None), blind, tmp_path)
    assert (initializer(blind, "w.codes") != found[0]).any()


def test_a_block_may_be_seen_with_float_weights(tmp_path: Path) -> None:
    text = """g (float[N, 64] x) => (float[N, 64] y) {
        [up] h = MatMul(x, w)
        [act] r = Relu(h)
        [down] d = MatMul(r, v)
        [join] y = Add(d, x)
        [end] z = MatMul(y, u)
    }"""
    weights = {"w": random_array(64, 48), "v": random_array(48, 64), "u": random_array(64, 4)}
    # The residual around both products makes one block of them.
    text = text.replace("[up] h = MatMul(x, w)", "[in] i = MatMul(x, e)\n[up] h = MatMul(i, w)")
    text = text.replace("Add(d, x)", "Add(d, i)").replace("(float[N, 64] y)", "(float[N, 4] z)")
    weights["e"] = np.eye(64, dtype=np.float32)
    codes = []
    for sequential in (True, False):
        model = _planned(text, weights, {"up": "w2a16:b16:asym", "down": "w4a16:sym"})
        annotate(node_named(model, "in"), scheme="float", reason="a test")
        run_pass(_rounding(_calls(), true_sequential=sequential), model, tmp_path)
        codes.append([initializer(model, f"{name}.codes") for name in "wv"])
    np.testing.assert_array_equal(codes[0][0], codes[1][0])
    assert (codes[0][1] != codes[1][1]).any()
    data = np.maximum(np.concatenate([c["x"] for c in _calls()]) @ weights["w"], 0)
    hessian = 2 * data.T.astype(np.float64) @ data
    scale = initializer(model, "v.scale").astype(np.float64)[:, np.newaxis] * np.ones((1, 48))
    expected = reference(weights["v"].T, hessian, scale, 0 * scale, (-8, 7), 0.01)
    start = _planned(text, weights, {"down": "w4a16:sym"})
    run_pass(InsertQdq(), start, tmp_path)
    _agrees(codes[1][1].astype(np.int64).T, expected, _codes(start, "v"))


def test_channels_that_are_all_zero_stay_so(tmp_path: Path) -> None:
    weights = _weights()
    weights["w"][[5, 40]] = 0
    model = _planned(_MLP, weights, {"up": "w4a16:sym", "down": "w4a16:sym"})
    run_pass(_rounding(_calls()), model, tmp_path)
    assert not initializer(model, "w.codes").astype(np.int8)[[5, 40]].any()


def test_channels_whose_nearest_codes_are_better_keep_them(tmp_path: Path) -> None:
    # Every weight is on the grid already: there is nothing to make up for.
    weights = _weights()
    weights["w"] = np.rint(np.clip(weights["w"] * 3, -8, 7)).astype(np.float32)
    weights["w"][0], weights["w"][1] = -8, 7
    model = _planned(_MLP, weights, {"up": "w4a16:sym"})
    annotate(node_named(model, "down"), scheme="float", reason="a test")
    result = run_pass(_rounding(_calls(), static_scales=True), model, tmp_path)
    assert [r.rule for r in result.rewrites] == ["insert-qdq"]
    (reason,) = reasons(result)
    assert "no other codes leave more than" in reason


def _reasons(
    text: str, weights: Mapping[str, Any], calls: list[dict[str, Any]], folder: Path
) -> tuple[ir.Model, PassResult]:
    model = build(text, weights, opset=25)
    for node in model.graph.all_nodes():
        if node.name:
            annotate(node, scheme="w8a16:sym")
    before = model.clone()
    result = run_pass(_rounding(calls), model, folder)
    run_pass(InsertQdq(), before, folder)
    assert serialized(before) == serialized(model)
    return model, result


def test_a_table_keeps_the_nearest_codes(tmp_path: Path) -> None:
    text = "g (int64[N] i) => (float[N, 8] y) { [look] y = Gather(w, i) }"
    calls = [{"i": np.arange(4)}]
    _, result = _reasons(text, {"w": random_array(16, 8)}, calls, tmp_path)
    assert "looked up" in reasons(result)[0]


def test_what_lies_in_a_body_keeps_its_codes(tmp_path: Path) -> None:
    text = """g (bool c, float[N, 8] x) => (float[N, 4] y) {
        y = If(c) <
            then_branch = then () => (float[N, 4] a) { [mm] a = MatMul(x, w) },
            else_branch = other () => (float[N, 4] b) { [mm2] b = MatMul(x, v) }
        >
    }"""
    weights = {"then/w": random_array(8, 4), "v": random_array(8, 4)}
    calls = [{"c": np.array(True), "x": random_array(3, 8)}]
    model, result = _reasons(text, weights, calls, tmp_path)
    assert [skip.node for skip in result.skips] == ["mm", "mm2"]
    assert all("body of another node" in reason for reason in reasons(result))
    assert next(node.op_type for node in body_of(model, "then")) == "DequantizeLinear"


def test_what_no_sample_reaches_keeps_its_codes(tmp_path: Path) -> None:
    calls = [{"x": np.zeros((0, 64), np.float32)}]
    _, result = _reasons(_MLP.replace("[act] ", ""), _weights(), calls, tmp_path)
    assert reasons(result) == ["no sample reaches it"] * 2


def test_a_recurrent_op_keeps_its_codes(tmp_path: Path) -> None:
    text = (
        "g (float[S, B, 4] x) => (float[S, 1, B, 5] y) { [rnn] y = LSTM<hidden_size=5>(x, w, r) }"
    )
    weights = {"w": random_array(1, 20, 4), "r": random_array(1, 20, 5)}
    _, result = _reasons(text, weights, [{"x": random_array(3, 2, 4)}], tmp_path)
    assert [skip.node for skip in result.skips] == ["rnn.W", "rnn.R"]


def test_data_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    calls = _calls()
    calls[1]["x"][3, 5] = np.nan
    model = _planned(_MLP, _weights(), {"up": "w4a16:sym", "down": "w4a16:sym"})
    with pytest.raises(ModelError, match=r"up \(MatMul\): .* NaN or infinity"):
        run_pass(_rounding(calls), model, tmp_path)


def test_a_model_without_planned_weights_is_left_alone(tmp_path: Path) -> None:
    model = build(_MLP, _weights())

    def refuse() -> Any:
        raise AssertionError

    samples = samples_of([])
    object.__setattr__(samples, "read", refuse)
    rewrite = RoundWeights(RoundWeightsOptions(samples, (InsertQdq(),)))
    assert run_pass(rewrite, model, tmp_path) == PassResult()
    assert op_types(model) == ["MatMul", "Relu", "MatMul"]


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    model = _planned(_MLP, _weights(), {"up": "w4a16:b16:asym", "down": "w8a16:sym"})
    assert_idempotent(_rounding(_calls()), model, tmp_path)


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    made = []
    for limit in (2 << 30, 0):
        model = _planned(_MLP, _weights(), {"up": "w4a16:b16:asym", "down": "w8a16:sym"})
        run_pass(_rounding(_calls(), memory_budget=limit), model, tmp_path)
        made.append(serialized(model))
    assert made[0] == made[1]


def test_not_having_pytorch_shows_when_the_pass_is_made() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from qcompiler.errors import UsageError\n"
        "from qcompiler.passes.reconstruct.round_weights import RoundWeights\n"
        "try:\n    RoundWeights(None)\n"
        "except UsageError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'qcompiler[torch]'" in done.stdout
