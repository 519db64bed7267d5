"""Weights become codes behind DequantizeLinear, with the values of the NumPy reference."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompiler.errors import ModelError
from qcompiler.ir.editing import add_initializer
from qcompiler.ir.provenance import annotate, facts_of
from qcompiler.passes.quantize import insert_qdq
from qcompiler.passes.quantize.insert_qdq import InsertQdq, InsertQdqOptions
from qcompiler.quant.arithmetic import dequantize
from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock, PerTensor
from qcompiler.quant.qtype import qtype_of
from qcompiler.quant.ranges import RangeMethod, quantize_tensor
from qcompiler.quant.scheme import QSpec
from tests.support.graphs import (
    body_of,
    build,
    externalize,
    initializer,
    node_named,
    op_types,
    random_array,
)
from tests.support.parity import run_model
from tests.support.rewrites import assert_idempotent, run_pass

_TEXT = "g (float[N, 64] x) => (float[N, 8] y) { [mm] y = MatMul(x, w) }"


def _planned(text: str, weights: dict[str, Any], **schemes: str) -> ir.Model:
    model = build(text, weights, opset=25)
    for name, scheme in schemes.items():
        annotate(node_named(model, name), scheme=scheme)
    return model


def _reference(
    weight: npt.NDArray[Any], bits: int, symmetric: bool, granularity: Granularity
) -> npt.NDArray[Any]:
    spec = QSpec(qtype_of(bits, signed=symmetric), granularity, symmetric)
    made = quantize_tensor(weight, spec, RangeMethod.WEIGHTED_MSE, weight.dtype)
    return dequantize(made.codes, made.scale, made.zero_point, granularity)


@pytest.mark.parametrize(
    ("scheme", "bits", "symmetric", "granularity"),
    [
        ("w8a16:sym", 8, True, PerAxis(1)),
        ("w8a16:asym", 8, False, PerAxis(1)),
        ("w8a16:tensor:sym", 8, True, PerTensor()),
        ("w4a16:b32:sym", 4, True, PerBlock(0, 32)),
        ("w4a16:b32:asym", 4, False, PerBlock(0, 32)),
        ("w3a16:b16:asym", 3, False, PerBlock(0, 16)),
        ("w2a16:b32:asym", 2, False, PerBlock(0, 32)),
    ],
)
def test_the_graph_computes_with_the_reference_values(
    scheme: str, bits: int, symmetric: bool, granularity: Granularity, tmp_path: Path
) -> None:
    weight = random_array(64, 8)
    model = _planned(_TEXT, {"w": weight}, mm=scheme)
    result = run_pass(InsertQdq(), model, tmp_path)
    assert op_types(model) == ["DequantizeLinear", "MatMul"]
    assert [rewrite.node for rewrite in result.rewrites] == ["mm"]
    x = random_array(5, 64, seed=1)
    expected = x @ _reference(weight, bits, symmetric, granularity)
    # 64 products in another order: float32 rounding only.
    np.testing.assert_allclose(run_model(model, {"x": x})["y"], expected, rtol=1e-5, atol=1e-5)


def test_a_ragged_last_block_is_a_group_of_its_own(tmp_path: Path) -> None:
    weight = random_array(80, 8)
    model = _planned(_TEXT.replace("64", "80"), {"w": weight}, mm="w4a16:b32:asym")
    run_pass(InsertQdq(), model, tmp_path)
    scale = node_named(model, "w.dequantized").inputs[1]
    assert scale is not None
    assert list(scale.shape or ()) == [3, 8]
    expected = _reference(weight, 4, False, PerBlock(0, 32))
    x = np.eye(80, dtype=np.float32)
    np.testing.assert_array_equal(run_model(model, {"x": x})["y"], expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_floats_keep_their_type(dtype: npt.DTypeLike, tmp_path: Path) -> None:
    name = ir.DataType.from_numpy(np.dtype(dtype))
    text = _TEXT.replace("float", str(name).lower())
    model = _planned(text, {"w": random_array(64, 8, dtype=dtype)}, mm="w4a16:b32:asym")
    run_pass(InsertQdq(), model, tmp_path)
    dequantize_node = node_named(model, "w.dequantized")
    assert dequantize_node.inputs[1] is not None
    assert dequantize_node.inputs[1].dtype == name == dequantize_node.outputs[0].dtype


def test_tied_sites_share_one_set_of_codes(tmp_path: Path) -> None:
    text = """g (float[N, 64] x, int64[N] i) => (float[N, 32] y, float[N, 64] e) {
        [lookup] e = Gather(table, i)
        [turn] t = Transpose<perm=[1, 0]>(table)
        [head] y = MatMul(x, t)
    }"""
    weight = random_array(32, 64)
    model = _planned(text, {"table": weight}, lookup="w8a16:sym", head="w8a16:sym")
    run_pass(InsertQdq(), model, tmp_path)
    assert op_types(model).count("DequantizeLinear") == 1
    assert sorted(model.graph.initializers) == ["table.codes", "table.scale"]
    expected = _reference(weight, 8, True, PerAxis(0))
    feeds: dict[str, npt.NDArray[Any]] = {
        "x": np.eye(64, dtype=np.float32),
        "i": np.arange(32),
    }
    found = run_model(model, feeds)
    np.testing.assert_array_equal(found["e"], expected)
    np.testing.assert_array_equal(found["y"], expected.T)


def test_a_weight_read_inside_a_body_is_dequantized_there(tmp_path: Path) -> None:
    text = """g (bool c, float[N, 64] x) => (float[N, 8] y) {
        [if] y = If(c) <
            then_branch = then () => (float[N, 8] a) { [mm] a = MatMul(x, w) },
            else_branch = other () => (float[N, 8] b) { [mm2] b = MatMul(x, v) }
        >
    }"""
    weights = {"w": random_array(64, 8), "other/v": random_array(64, 8, seed=1)}
    model = _planned(text, weights, mm="w4a16:b32:sym", mm2="w8a16:sym")
    run_pass(InsertQdq(), model, tmp_path)
    assert [node.op_type for node in model.graph] == ["If"]
    assert [n.op_type for n in body_of(model, "then")] == ["DequantizeLinear", "MatMul"]
    x = random_array(3, 64, seed=2)
    then = x @ _reference(weights["w"], 4, True, PerBlock(0, 32))
    other = x @ _reference(weights["other/v"], 8, True, PerAxis(1))
    for condition, expected in ((True, then), (False, other)):
        found = run_model(model, {"c": np.array(condition), "x": x})["y"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_an_op_with_two_weights_reports_both(tmp_path: Path) -> None:
    text = (
        "g (float[S, B, 4] x) => (float[S, 1, B, 5] y) { [rnn] y = LSTM<hidden_size=5>(x, w, r) }"
    )
    weights = {"w": random_array(1, 20, 4), "r": random_array(1, 20, 5)}
    model = _planned(text, weights, rnn="w8a16:sym")
    result = run_pass(InsertQdq(), model, tmp_path)
    assert [rewrite.node for rewrite in result.rewrites] == ["rnn.W", "rnn.R"]
    assert facts_of(node_named(model, "rnn"))["weight_bytes_after"] == str(20 * 9 + 2 * 20 * 4)


@pytest.mark.parametrize("scheme", ["w8a16:sym", "w4a16:b32:asym"])
def test_slices_and_threads_change_nothing(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = _TEXT.replace("8]", "96]").replace("64", "256")
    weights = {"w": random_array(256, 96)}
    whole = _planned(text, weights, mm=scheme)
    run_pass(InsertQdq(), whole, tmp_path)
    monkeypatch.setattr(insert_qdq, "SLICE_BYTES", 8192)
    monkeypatch.setattr(insert_qdq, "COLUMN_SLICE_BYTES", 8192)
    sliced = externalize(_planned(text, weights, mm=scheme), tmp_path)
    run_pass(InsertQdq(), sliced, tmp_path, spill_bytes=1)
    for one, other in zip(
        whole.graph.initializers.values(), sliced.graph.initializers.values(), strict=True
    ):
        assert one.const_value is not None
        assert other.const_value is not None
        assert one.const_value.tobytes() == other.const_value.tobytes()


def test_quality_and_size_are_written_on_the_node(tmp_path: Path) -> None:
    model = _planned(_TEXT, {"w": random_array(64, 8)}, mm="w4a16:b32:sym")
    run_pass(InsertQdq(), model, tmp_path)
    facts = facts_of(node_named(model, "mm"))
    assert facts["weight_bytes_after"] == str(64 * 8 // 2 + 2 * 8 * 4)
    assert 15 < float(facts["weight_sqnr_db"]) < 30


def test_the_range_method_is_an_option(tmp_path: Path) -> None:
    weight = random_array(64, 8)
    quality = {}
    for method in RangeMethod:
        model = _planned(_TEXT, {"w": weight}, mm="w2a16:b32:asym")
        run_pass(InsertQdq(InsertQdqOptions(method)), model, tmp_path)
        quality[method] = float(facts_of(node_named(model, "mm"))["weight_sqnr_db"])
    assert quality[RangeMethod.MSE] > quality[RangeMethod.WEIGHTED_MSE]
    assert quality[RangeMethod.WEIGHTED_MSE] > quality[RangeMethod.MIN_MAX] + 0.5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(value: float, tmp_path: Path) -> None:
    weight = random_array(64, 8)
    weight[3, 5] = value
    model = _planned(_TEXT, {"w": weight}, mm="w8a16:sym")
    with pytest.raises(ModelError, match=r"mm \(MatMul\): its weight w cannot be quantized"):
        run_pass(InsertQdq(), model, tmp_path)


def test_float_sites_are_left_alone(tmp_path: Path) -> None:
    model = _planned(_TEXT, {"w": random_array(64, 8)}, mm="float")
    assert run_pass(InsertQdq(), model, tmp_path).rewrites == ()
    assert op_types(model) == ["MatMul"]


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    model = _planned(_TEXT, {"w": random_array(64, 8)}, mm="w8a16:sym")
    assert_idempotent(InsertQdq(), model, tmp_path)


def test_names_that_are_taken_get_a_number(tmp_path: Path) -> None:
    text = """g (float[N, 64] x) => (float[N, 8] y, float[N, 8] z) {
        [mm] y = MatMul(x, w)
        [other] t = MatMul(x, v)
        z = Add(t, s)
    }"""
    weights = {"w": random_array(64, 8), "v": random_array(64, 8, seed=1), "s": random_array(8)}
    model = _planned(text, weights, mm="w8a16:asym")
    node_named(model, "other").name = "w_2.dequantized"
    add_initializer(model.graph, "w.scale", ir.tensor(np.zeros(8, np.float32)))
    model.graph[-1].replace_input_with(1, model.graph.initializers["w.scale"])
    x = random_array(5, 64, seed=2)
    run_pass(InsertQdq(), model, tmp_path)
    dequantize_node = node_named(model, "w_3.dequantized")
    names = [value.name for value in dequantize_node.inputs if value is not None]
    assert names == ["w_3.codes", "w_3.scale", "w_3.zero_point"]
    found = run_model(model, {"x": x})
    expected = x @ _reference(weights["w"], 8, False, PerAxis(1))
    np.testing.assert_allclose(found["y"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["z"], x @ weights["v"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pair_limit", [None, 128])
@pytest.mark.parametrize("shape", [(96, 40), (40, 96)])
def test_slices_of_a_tensor_share_one_scale(
    shape: tuple[int, int],
    pair_limit: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A slice of zeros, whose own scale would be 1, does not decide."""
    weight = random_array(*shape)
    weight[:, :8] = 0
    text = f"g (float[N, {shape[0]}] x) => (float[N, {shape[1]}] y) {{ [mm] y = MatMul(x, w) }}"

    def made() -> ir.Model:
        model = _planned(text, {"w": weight}, mm="w8a16:tensor:sym")
        if pair_limit is not None:
            annotate(node_named(model, "mm"), pair_limit=pair_limit)
        options = InsertQdqOptions(RangeMethod.MIN_MAX)
        run_pass(InsertQdq(options), model, tmp_path)
        return model

    whole = made()
    monkeypatch.setattr(insert_qdq, "COLUMN_SLICE_BYTES", 4096)
    sliced = made()
    for part in ("codes", "scale"):
        np.testing.assert_array_equal(
            initializer(sliced, f"w.{part}"), initializer(whole, f"w.{part}")
        )
    scale = initializer(sliced, "w.scale")
    assert scale.shape == ()
    assert scale <= np.abs(weight).max() / (127 if pair_limit is None else 64) * (1 + 1e-6)
    facts = [facts_of(node_named(model, "mm"))["weight_sqnr_db"] for model in (whole, sliced)]
    assert facts[0] == facts[1]
