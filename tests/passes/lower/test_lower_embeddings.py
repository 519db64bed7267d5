"""Lookups in tables of codes."""

from pathlib import Path

import onnx_ir as ir
import pytest

from qcompiler.execution.kernels import Kernel, inspect_kernels
from qcompiler.passes.lower.lower_embeddings import LowerEmbeddings
from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock, PerTensor
from tests.support.coded import CodedWeight, coded_weight, opset_for
from tests.support.graphs import build, node_named, op_types
from tests.support.parity import assert_parity
from tests.support.rewrites import assert_idempotent, only_skip, run_pass

ROWS, COLUMNS = 40, 96


def lookup(table: CodedWeight, *, bits: int = 8, axis: int = 0, dtype: str = "float") -> ir.Model:
    text = f"""g (int64[b, t] ids) => ({dtype}[b, t, d] y) {{
        {table.dequantize("wd")}
        [emb] y = Gather<axis={axis}>(wd, ids) }}"""
    model = build(text, table.weights, opset=opset_for(bits))
    model.ir_version = 13
    node_named(model, "emb").metadata_props["qcompiler.scheme"] = "w8a16:asym"
    return model


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("granularity", [PerAxis(0), PerBlock(1, 32), PerBlock(1, 64)])
def test_rewrites_every_form_with_equal_bits(
    bits: int, signed: bool, zero_point: bool, granularity: Granularity, tmp_path: Path
) -> None:
    table = coded_weight(
        (ROWS, COLUMNS), granularity, bits=bits, signed=signed, zero_point=zero_point
    )
    before, after = lookup(table, bits=bits), lookup(table, bits=bits)
    result = run_pass(LowerEmbeddings(), after, tmp_path)
    assert [rewrite.node for rewrite in result.rewrites] == ["emb"]
    assert op_types(after) == ["GatherBlockQuantized"]
    assert_parity(before, after, tolerance=0)


def test_runtime_runs_the_integer_kernel(tmp_path: Path) -> None:
    model = lookup(coded_weight((ROWS, COLUMNS), PerBlock(1, 32), bits=4, signed=False))
    run_pass(LowerEmbeddings(), model, tmp_path)
    ir.save(model, tmp_path / "m.onnx")
    found = inspect_kernels(tmp_path / "m.onnx", ["emb"], memory_limit=1 << 30)
    assert found.kernels == {"emb": Kernel("GatherBlockQuantized (4-bit)", integer=True)}


def test_keeps_name_facts_and_float16(tmp_path: Path) -> None:
    table = coded_weight(
        (ROWS, COLUMNS), PerAxis(0), bits=8, signed=True, scale_type=ir.DataType.FLOAT16
    )
    before, after = lookup(table, dtype="float16"), lookup(table, dtype="float16")
    run_pass(LowerEmbeddings(), after, tmp_path)
    facts = node_named(after, "emb").metadata_props
    assert facts["qcompiler.scheme"] == "w8a16:asym"
    assert facts["qcompiler.origin_op"] == "Gather"
    assert facts["qcompiler.created_by"] == "lower-embeddings"
    assert_parity(before, after, tolerance=0)


def test_unsigned_external_codes_are_not_read(tmp_path: Path) -> None:
    table = coded_weight((ROWS, COLUMNS), PerBlock(1, 32), bits=4, signed=False)
    model = lookup(table)
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "m.onnx")
    source = model.graph.initializers["w"].const_value
    run_pass(LowerEmbeddings(), model, tmp_path)
    made = model.graph.initializers["w.bytes"].const_value
    assert isinstance(source, ir.ExternalTensor)
    assert isinstance(made, ir.ExternalTensor)
    assert (made.offset, made.nbytes) == (source.offset, source.nbytes)
    assert "w" not in model.graph.initializers
    assert_parity(lookup(table), model, tolerance=0)


def test_signed_codes_stream_to_the_store(tmp_path: Path) -> None:
    table = coded_weight((ROWS, COLUMNS), PerAxis(0), bits=8, signed=True)
    model = lookup(table)
    run_pass(LowerEmbeddings(), model, tmp_path, spill_bytes=64)
    assert isinstance(model.graph.initializers["w.bytes"].const_value, ir.ExternalTensor)


@pytest.mark.parametrize(
    ("granularity", "shape", "bits", "axis", "reason"),
    [
        (PerTensor(), (40, 96), 8, 0, "not a matrix of constant"),
        (PerAxis(0), (40, 32, 3), 8, 0, "not a matrix of constant"),
        (PerAxis(0), (40, 96), 8, 1, "looks up columns"),
        (PerBlock(0, 20), (40, 96), 8, 0, "cut across its rows"),
        (PerBlock(1, 48), (40, 96), 8, 0, "not a power of two"),
        (PerBlock(1, 8), (40, 96), 8, 0, "below 16"),
        (PerBlock(1, 32), (40, 95), 4, 0, "do not end on a byte"),
    ],
)
def test_refuses_what_the_kernel_cannot_read(
    granularity: Granularity,
    shape: tuple[int, ...],
    bits: int,
    axis: int,
    reason: str,
    tmp_path: Path,
) -> None:
    table = coded_weight(shape, granularity, bits=bits, signed=True)
    model = lookup(table, bits=bits, axis=axis)
    assert reason in only_skip(run_pass(LowerEmbeddings(), model, tmp_path)).reason


def test_refuses_bfloat16(tmp_path: Path) -> None:
    table = coded_weight(
        (ROWS, COLUMNS), PerAxis(0), bits=8, signed=True, scale_type=ir.DataType.BFLOAT16
    )
    model = lookup(table, dtype="bfloat16")
    node_named(model, "emb").inputs[0].type = ir.TensorType(ir.DataType.BFLOAT16)  # type: ignore[union-attr]
    assert "bfloat16" in only_skip(run_pass(LowerEmbeddings(), model, tmp_path)).reason


def test_leaves_float_tables_alone(tmp_path: Path) -> None:
    text = "g (float[40, 96] w, int64[b] ids) => (float[b, 96] y) { y = Gather(w, ids) }"
    result = run_pass(LowerEmbeddings(), build(text), tmp_path)
    assert (result.rewrites, result.skips) == ((), ())


def test_is_idempotent(tmp_path: Path) -> None:
    table = coded_weight((ROWS, COLUMNS), PerBlock(1, 32), bits=4, signed=True)
    assert_idempotent(LowerEmbeddings(), lookup(table), tmp_path)
