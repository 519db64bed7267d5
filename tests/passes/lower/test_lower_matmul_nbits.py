"""Products that ONNX Runtime does not fuse by itself."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.execution.kernels import inspect_kernels
from qcompiler.passes.lower.lower_embeddings import LowerEmbeddings
from qcompiler.passes.lower.lower_matmul_nbits import LowerMatMulNBits, MatMulNBitsOptions
from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock
from qcompiler.rewriting.base import Pass
from tests.support.coded import CodedWeight, coded_weight, opset_for
from tests.support.graphs import build, node_named, op_types
from tests.support.parity import assert_parity
from tests.support.rewrites import assert_idempotent, only_skip, run_pass

EXACT_ACTIVATIONS = LowerMatMulNBits(MatMulNBitsOptions(accuracy_level=1))
TOLERANCE = 1e-5
"""Float reassociation in a sum of up to 576 products."""


def model_of(body: str, weight: CodedWeight, bits: int, header: str) -> ir.Model:
    model = build(f"g {header} {{ {body} }}", weight.weights, opset=opset_for(bits))
    model.ir_version = 13
    return model


def tied(weight: CodedWeight, bits: int) -> ir.Model:
    rows, columns = weight.values().shape
    body = f"""{weight.dequantize("wd")}
        [emb] e = Gather(wd, ids)
        wt = Transpose<perm=[1, 0]>(wd)
        [head] y = MatMul(x, wt)"""
    header = f"(int64[b] ids, float[b, {columns}] x) => (float[b, {columns}] e, float[b, {rows}] y)"
    return model_of(body, weight, bits, header)


def transposed(weight: CodedWeight, bits: int, dtype: str = "float") -> ir.Model:
    rows, columns = weight.values().shape
    body = f"""{weight.dequantize("wd")}
        wt = Transpose<perm=[1, 0]>(wd)
        [head] y = MatMul(x, wt)"""
    return model_of(body, weight, bits, f"({dtype}[b, {columns}] x) => ({dtype}[b, {rows}] y)")


def plain(weight: CodedWeight, bits: int) -> ir.Model:
    rows, columns = weight.values().shape
    body = f"{weight.dequantize('wd')} [head] y = MatMul(x, wd)"
    return model_of(body, weight, bits, f"(float[b, {rows}] x) => (float[b, {columns}] y)")


def both(model: ir.Model, folder: Path) -> None:
    run_pass(LowerEmbeddings(), model, folder)
    run_pass(EXACT_ACTIVATIONS, model, folder)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("order", ["embeddings first", "products first"])
def test_tied_table_is_stored_once(bits: int, signed: bool, order: str, tmp_path: Path) -> None:
    weight = coded_weight((40, 96), PerBlock(1, 32), bits=bits, signed=signed)
    after = tied(weight, bits)
    passes: list[Pass] = [LowerEmbeddings(), EXACT_ACTIVATIONS]
    for rewrite in passes if order == "embeddings first" else reversed(passes):
        run_pass(rewrite, after, tmp_path)
    assert sorted(op_types(after)) == ["GatherBlockQuantized", "MatMulNBits", "Reshape"]
    tables = [name for name, value in after.graph.initializers.items() if _nbytes(value) > 800]
    assert tables == ["w.bytes"]
    assert_parity(tied(weight, bits), after, tolerance=TOLERANCE, dims={"b": 3})


def _nbytes(value: ir.Value) -> int:
    assert value.const_value is not None
    return value.const_value.nbytes


@pytest.mark.parametrize("columns", [64, 96, 576])
@pytest.mark.parametrize("zero_point", [True, False])
def test_tied_8_bit_scale_per_row_is_repeated(
    columns: int, zero_point: bool, tmp_path: Path
) -> None:
    weight = coded_weight(
        (40, columns), PerAxis(0), bits=8, signed=not zero_point, zero_point=zero_point
    )
    after = tied(weight, 8)
    both(after, tmp_path)
    assert "MatMulNBits" in op_types(after)
    assert_parity(tied(weight, 8), after, tolerance=TOLERANCE, dims={"b": 3})


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("signed", [True, False])
def test_blocks_behind_a_transpose(bits: int, signed: bool, tmp_path: Path) -> None:
    weight = coded_weight((33, 64), PerBlock(1, 32), bits=bits, signed=signed)
    after = transposed(weight, bits)
    run_pass(EXACT_ACTIVATIONS, after, tmp_path)
    assert op_types(after) == ["Reshape", "MatMulNBits"]
    assert_parity(transposed(weight, bits), after, tolerance=TOLERANCE)


@pytest.mark.parametrize("granularity", [PerAxis(1), PerBlock(0, 32)])
@pytest.mark.parametrize("reduction", [64, 100])
@pytest.mark.parametrize("signed", [True, False])
def test_2_bit_outputs_that_the_runtime_gets_wrong(
    granularity: Granularity, reduction: int, signed: bool, tmp_path: Path
) -> None:
    weight = coded_weight((reduction, 33), granularity, bits=2, signed=signed)
    after = plain(weight, 2)
    run_pass(EXACT_ACTIVATIONS, after, tmp_path)
    assert op_types(after) == ["Reshape", "MatMulNBits"]
    assert_parity(plain(weight, 2), after, tolerance=TOLERANCE)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("granularity", [PerAxis(1), PerBlock(0, 32)])
def test_weight_of_two_products_is_stored_once(
    bits: int, granularity: Granularity, tmp_path: Path
) -> None:
    weight = coded_weight((64, 64), granularity, bits=bits, signed=False)

    def shared() -> ir.Model:
        body = f"{weight.dequantize('wd')} [a] t = MatMul(x, wd) [c] y = MatMul(t, wd)"
        return model_of(body, weight, bits, "(float[b, 64] x) => (float[b, 64] y)")

    after = shared()
    run_pass(EXACT_ACTIVATIONS, after, tmp_path)
    assert op_types(after).count("MatMulNBits") == 2
    products = [node_named(after, name) for name in ("a", "c")]
    codes = {product.inputs[1].producer().inputs[0] for product in products}  # type: ignore[union-attr]
    assert len(codes) == 1
    assert_parity(shared(), after, tolerance=TOLERANCE)


def test_product_in_a_body_with_weights_outside(tmp_path: Path) -> None:
    weight = coded_weight((64, 64), PerBlock(0, 32), bits=4, signed=True)
    text = f"""g (bool c, float[b, 64] x) => (float[b, 64] y) {{
        y = If (c) <
            then_branch = yes () => (float[b, 64] t) {{
                {weight.dequantize("wd")}
                [inner] t = MatMul(x, wd) }},
            else_branch = no () => (float[b, 64] e) {{ e = Identity(x) }}
        > }}"""
    after = build(text, weight.weights)
    run_pass(EXACT_ACTIVATIONS, after, tmp_path)
    assert op_types(after) == ["If", "Reshape", "MatMulNBits", "Identity"]
    feeds = {"c": np.array(True), "x": np.ones((2, 64), np.float32)}
    assert_parity(build(text, weight.weights), after, tolerance=TOLERANCE, feeds=feeds)
    ir.save(after, tmp_path / "m.onnx")
    found = inspect_kernels(tmp_path / "m.onnx", ["inner"], memory_limit=1 << 30)
    assert found.failure is None
    assert found.kernels["inner"].name == "MatMulNBits (4-bit)"


def test_gemm_bias_moves_into_the_kernel(tmp_path: Path) -> None:
    weight = coded_weight((64, 33), PerBlock(0, 32), bits=2, signed=True)
    text = f"{weight.dequantize('wd')} [head] y = Gemm(x, wd, c)"
    header = "(float[b, 64] x) => (float[b, 33] y)"

    def gemm() -> ir.Model:
        model = model_of(text, weight, 2, header)
        bias = ir.tensor(np.linspace(-1, 1, 33, dtype=np.float32), name="c")
        head = node_named(model, "head")
        value = ir.Value(name="c", const_value=bias, shape=ir.Shape([33]))
        value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.register_initializer(value)
        head.replace_input_with(2, value)
        return model

    after = gemm()
    run_pass(EXACT_ACTIVATIONS, after, tmp_path)
    assert op_types(after) == ["Reshape", "MatMulNBits"]
    assert_parity(gemm(), after, tolerance=TOLERANCE)


def test_float16_activations(tmp_path: Path) -> None:
    weight = coded_weight(
        (32, 64), PerBlock(1, 32), bits=4, signed=True, scale_type=ir.DataType.FLOAT16
    )
    after = transposed(weight, 4, "float16")
    run_pass(EXACT_ACTIVATIONS, after, tmp_path)
    assert_parity(transposed(weight, 4, "float16"), after, tolerance=5e-3)


def test_default_accuracy_rounds_activations_to_8_bits(tmp_path: Path) -> None:
    weight = coded_weight((32, 64), PerBlock(1, 32), bits=4, signed=True)
    after = transposed(weight, 4)
    run_pass(LowerMatMulNBits(), after, tmp_path)
    assert_parity(transposed(weight, 4), after, tolerance=2e-2)


@pytest.mark.parametrize(
    ("shape", "granularity", "bits", "reason"),
    [
        ((33, 100), PerBlock(1, 32), 4, "do not divide"),
        ((33, 96), PerBlock(1, 48), 4, "powers of two"),
        ((33, 96), PerBlock(1, 8), 4, "powers of two"),
        ((48, 64), PerBlock(0, 16), 4, "along the output channels"),
        ((33, 100), PerAxis(0), 4, "no block size"),
        ((33, 96), PerAxis(0), 4, "packed zero points"),
    ],
)
def test_refuses_what_the_kernel_cannot_read(
    shape: tuple[int, ...], granularity: Granularity, bits: int, reason: str, tmp_path: Path
) -> None:
    weight = coded_weight(shape, granularity, bits=bits, signed=False)
    model = transposed(weight, bits)
    assert reason in only_skip(run_pass(LowerMatMulNBits(), model, tmp_path)).reason


def test_refuses_dynamic_activations(tmp_path: Path) -> None:
    model = transposed(coded_weight((32, 64), PerBlock(1, 32), bits=8, signed=True), 8)
    node_named(model, "head").metadata_props["qcompiler.scheme"] = "w8a8-dynamic:sym"
    assert "run time" in only_skip(run_pass(LowerMatMulNBits(), model, tmp_path)).reason


@pytest.mark.parametrize("bits", [8, 4])
def test_leaves_alone_what_the_runtime_fuses(bits: int, tmp_path: Path) -> None:
    model = plain(coded_weight((64, 32), PerBlock(0, 32), bits=bits, signed=True), bits)
    result = run_pass(LowerMatMulNBits(), model, tmp_path)
    assert (result.rewrites, result.skips) == ((), ())


def test_is_idempotent(tmp_path: Path) -> None:
    model = tied(coded_weight((40, 96), PerBlock(1, 32), bits=4, signed=True), 4)
    assert_idempotent(LowerMatMulNBits(), model, tmp_path)


@pytest.mark.parametrize(("scheme", "lowered"), [("w8a8:sym", False), ("w8a16:sym", True)])
def test_dequantized_data_is_left_to_the_scheme(scheme: str, lowered: bool, tmp_path: Path) -> None:
    """ONNX Runtime would make an integer product of it, whose free 8-bit codes may saturate."""
    weight = coded_weight((64, 16), PerAxis(1), bits=8, signed=True)
    text = f"""g (float[b, 64] x) => (float[b, 16] y) {{
        q = QuantizeLinear(x, xs, xz) d = DequantizeLinear(q, xs, xz)
        {weight.dequantize("wd")} [fc] y = MatMul(d, wd) }}"""
    constants = {"xs": np.float32(0.05), "xz": np.uint8(128)}
    model = build(text, {**weight.weights, **constants})
    node_named(model, "fc").metadata_props["qcompiler.scheme"] = scheme
    run_pass(LowerMatMulNBits(), model, tmp_path)
    assert ("MatMulNBits" in op_types(model)) == lowered
