"""Weights without an integer kernel, decoded once."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.execution.kernels import inspect_kernels
from qcompiler.passes.lower.decode_at_load import DecodeAtLoad
from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock, PerTensor
from tests.support.coded import CodedWeight, coded_weight
from tests.support.graphs import build, node_named, op_types
from tests.support.parity import assert_parity
from tests.support.rewrites import assert_idempotent, only_skip, run_pass


def conv(weight: CodedWeight, *, op: str = "Conv", dtype: str = "float") -> ir.Model:
    text = f"""g ({dtype}[1, 8, 6, 6] x) => ({dtype}[1, 8, h, v] y) {{
        {weight.dequantize("wd", node="dq")}
        [site] y = {op}(x, wd) }}"""
    return build(text, weight.weights)


def lstm(weights: tuple[CodedWeight, CodedWeight]) -> ir.Model:
    text = f"""g (float[t, 1, 16] x) => (float[t, 1, 1, 8] y) {{
        {weights[0].dequantize("wd")} {weights[1].dequantize("rd")}
        [site] y = LSTM<hidden_size=8>(x, wd, rd) }}"""
    return build(text, {**weights[0].weights, **weights[1].weights})


def recurrent_weights() -> tuple[CodedWeight, CodedWeight]:
    return (
        coded_weight((1, 32, 16), PerAxis(1), bits=8, signed=True),
        coded_weight((1, 32, 8), PerAxis(1), bits=8, signed=True, name="r"),
    )


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("granularity", [PerAxis(0), PerAxis(1), PerTensor()])
def test_convolutions_decode_to_equal_bits(
    op: str, signed: bool, granularity: Granularity, tmp_path: Path
) -> None:
    weight = coded_weight((8, 8, 3, 3), granularity, bits=8, signed=signed)
    after = conv(weight, op=op)
    run_pass(DecodeAtLoad(), after, tmp_path)
    assert "DequantizeLinear" not in op_types(after)
    assert_parity(conv(weight, op=op), after, tolerance=0)


def test_float16_may_stay_in_float32(tmp_path: Path) -> None:
    weight = coded_weight(
        (8, 8, 3, 3), PerAxis(0), bits=8, signed=True, scale_type=ir.DataType.FLOAT16
    )
    after = conv(weight, dtype="float16")
    run_pass(DecodeAtLoad(), after, tmp_path)
    assert_parity(conv(weight, dtype="float16"), after, tolerance=2e-3)


def test_runtime_folds_it_away(tmp_path: Path) -> None:
    model = conv(coded_weight((8, 8, 3, 3), PerAxis(0), bits=8, signed=False))
    path = tmp_path / "m.onnx"
    ir.save(model, path)
    before = inspect_kernels(path, ["site"], memory_limit=1 << 30).kernels["site"].name
    run_pass(DecodeAtLoad(), model, tmp_path)
    ir.save(model, path)
    after = inspect_kernels(path, ["site"], memory_limit=1 << 30).kernels["site"].name
    assert before == "float Conv after DequantizeLinear"
    assert after == "float Conv, weights decoded at load"


def test_both_weights_of_a_recurrence(tmp_path: Path) -> None:
    after = lstm(recurrent_weights())
    result = run_pass(DecodeAtLoad(), after, tmp_path)
    assert [rewrite.node for rewrite in result.rewrites] == ["site", "site"]
    assert_parity(lstm(recurrent_weights()), after, tolerance=0)
    ir.save(after, tmp_path / "m.onnx")
    found = inspect_kernels(tmp_path / "m.onnx", ["site"], memory_limit=1 << 30)
    assert found.kernels["site"].name == "float LSTM, weights decoded at load"


@pytest.mark.parametrize("outside", [True, False])
def test_weights_of_a_body(outside: bool, tmp_path: Path) -> None:
    weight = coded_weight((8, 8, 3, 3), PerAxis(0), bits=8, signed=True)
    text = f"""g (bool c, float[1, 8, 6, 6] x) => (float[1, 8, h, v] y) {{
        y = If (c) <
            then_branch = yes () => (float[1, 8, h, v] t) {{
                {weight.dequantize("wd")}
                [site] t = Conv(x, wd) }},
            else_branch = no () => (float[1, 8, h, v] e) {{ e = Identity(x) }}
        > }}"""
    place = "" if outside else "yes/"
    weights = {f"{place}{name}": tensor for name, tensor in weight.weights.items()}
    after = build(text, weights)
    run_pass(DecodeAtLoad(), after, tmp_path)
    ir.save(after, tmp_path / "m.onnx")
    found = inspect_kernels(tmp_path / "m.onnx", ["site"], memory_limit=1 << 30)
    assert found.kernels["site"].name == "float Conv, weights decoded at load"
    feeds = {"c": np.array(True), "x": np.ones((1, 8, 6, 6), np.float32)}
    before = build(text, {f"{place}{name}": tensor for name, tensor in weight.weights.items()})
    assert_parity(before, after, tolerance=0, feeds=feeds)


def test_product_with_its_weight_on_the_left(tmp_path: Path) -> None:
    weight = coded_weight((16, 64), PerAxis(0), bits=8, signed=True)

    def left() -> ir.Model:
        text = f"""g (float[64, n] x) => (float[16, n] y) {{
            {weight.dequantize("wd")}
            [site] y = MatMul(wd, x) }}"""
        return build(text, weight.weights)

    after = left()
    run_pass(DecodeAtLoad(), after, tmp_path)
    assert op_types(after) == ["Cast", "Mul", "MatMul"]
    assert_parity(left(), after, tolerance=0)


def test_leaves_alone_what_has_an_integer_kernel(tmp_path: Path) -> None:
    weight = coded_weight((64, 16), PerAxis(1), bits=8, signed=True)
    text = f"""g (float[n, 64] x) => (float[n, 16] y) {{
        {weight.dequantize("wd")} [site] y = MatMul(x, wd) }}"""
    result = run_pass(DecodeAtLoad(), build(text, weight.weights), tmp_path)
    assert (result.rewrites, result.skips) == ((), ())


def test_refuses_blocks(tmp_path: Path) -> None:
    model = conv(coded_weight((8, 16, 3, 3), PerBlock(1, 16), bits=4, signed=True))
    skip = only_skip(run_pass(DecodeAtLoad(), model, tmp_path))
    assert (skip.node, "at each run" in skip.reason) == ("site", True)


def test_refuses_bfloat16(tmp_path: Path) -> None:
    model = conv(coded_weight((8, 8, 3, 3), PerAxis(0), bits=8, signed=True))
    dequantized = model.graph.node("dq").outputs[0]
    dequantized.type = ir.TensorType(ir.DataType.BFLOAT16)
    assert "bfloat16" in only_skip(run_pass(DecodeAtLoad(), model, tmp_path)).reason


def test_refuses_a_weight_that_is_an_output(tmp_path: Path) -> None:
    model = conv(coded_weight((8, 8, 3, 3), PerAxis(0), bits=8, signed=True))
    model.graph.outputs.append(model.graph.node("dq").outputs[0])
    assert "output of the model" in only_skip(run_pass(DecodeAtLoad(), model, tmp_path)).reason


def test_is_idempotent(tmp_path: Path) -> None:
    weight = coded_weight((8, 8, 3, 3), PerAxis(0), bits=8, signed=False)
    assert_idempotent(DecodeAtLoad(), conv(weight), tmp_path)


@pytest.mark.parametrize(
    ("op", "scheme", "decoded"),
    [
        ("Conv", "w8a8:sym", False),
        ("Conv", "w8a16:sym", True),
        ("ConvTranspose", "w8a16:sym", True),
    ],
)
def test_only_calibrated_ops_keep_the_codes_of_dequantized_data(
    op: str, scheme: str, decoded: bool, tmp_path: Path
) -> None:
    weight = coded_weight((8, 8, 3, 3), PerAxis(0), bits=8, signed=True)
    text = f"""g (float[1, 8, 6, 6] x) => (float[1, 8, h, v] y) {{
        q = QuantizeLinear(x, xs, xz) d = DequantizeLinear(q, xs, xz)
        {weight.dequantize("wd")} [site] y = {op}(d, wd) }}"""
    constants = {"xs": np.float32(0.05), "xz": np.uint8(128)}
    model = build(text, {**weight.weights, **constants})
    node_named(model, "site").metadata_props["qcompiler.scheme"] = scheme
    run_pass(DecodeAtLoad(), model, tmp_path)
    assert (op_types(model).count("DequantizeLinear") == 1) == decoded
