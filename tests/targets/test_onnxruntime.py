"""Every row but those with static activations, by really loading it in ONNX Runtime."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.execution.kernels import Kernel, inspect_kernels
from qcompiler.execution.sessions import open_session
from qcompiler.options import CompileOptions
from qcompiler.pipeline import pass_named
from qcompiler.plan import make_plan
from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock
from qcompiler.quant.qtype import qtype_of
from qcompiler.quant.scheme import Activations
from qcompiler.targets.onnxruntime import ONNXRUNTIME
from qcompiler.targets.rows import Row, WeightUse
from tests.support.coded import CodedWeight, coded_weight, opset_for
from tests.support.graphs import build, node_named
from tests.support.parity import random_feeds, run_model
from tests.support.rewrites import run_pass

REDUCTION, OUTPUTS = 2048, 20
DYNAMIC_CODES = (-64, 64)


@dataclass(frozen=True)
class Case:
    """One corner of a row."""

    row: Row
    op: str
    use: WeightUse
    bits: int
    block_size: int | None
    symmetric: bool
    float_type: str

    def __str__(self) -> str:
        block = "channel" if self.block_size is None else f"b{self.block_size}"
        symmetry = "sym" if self.symmetric else "asym"
        use = self.use.replace(" ", "-")
        return f"{self.row.rule}-{self.op}-{use}-{self.bits}-{block}-{symmetry}-{self.float_type}"


def cases() -> Iterator[Case]:
    for row in ONNXRUNTIME.rows:
        if "BFLOAT16" in row.float_types or row.activations is Activations.STATIC:
            continue
        blocks: list[int | None] = [None] if row.per_channel else []
        blocks += [*row.block_sizes[:2], *row.block_sizes[-1:]]
        for _, op in row.ops:
            for use in row.uses:
                if not _drawable(op, use):
                    continue
                for bits in sorted(
                    {qtype_of(b, signed=True).storage_bits for b in row.weight_bits}
                ):
                    for index, block in enumerate(blocks):
                        symmetric = row.symmetric[index % len(row.symmetric)]
                        float_type = row.float_types[index // 2 % len(row.float_types)]
                        yield Case(row, op, use, bits, block, symmetric, float_type)


def _drawable(op: str, use: WeightUse) -> bool:
    """Whether `graph_of` draws an op with such a weight; the rest is the same kernel."""
    if op in ("MatMul", "Gemm"):
        return (op, use) != ("Gemm", WeightUse.LEFT)
    return use is WeightUse.PLAIN and op != "FusedMatMul"


def granularity_of(case: Case, reduction_axis: int, output_axis: int) -> Granularity:
    if case.block_size is None:
        return PerAxis(output_axis)
    return PerBlock(reduction_axis, case.block_size)


def weight_of(case: Case, shape: tuple[int, ...], granularity: Granularity) -> CodedWeight:
    dynamic = case.row.activations is Activations.DYNAMIC
    return coded_weight(
        shape,
        granularity,
        bits=case.bits,
        signed=case.symmetric,
        scale_type=ir.DataType[case.float_type],
        code_range=DYNAMIC_CODES if dynamic else None,
    )


def graph_of(case: Case) -> ir.Model:
    """Return a Q/DQ model whose op is called "site" (and the lookup of its table "lookup")."""
    dtype = {"FLOAT": "float", "FLOAT16": "float16"}[case.float_type]
    if case.op in ("Conv", "ConvTranspose"):
        weight = weight_of(case, (16, 16, 3, 3), granularity_of(case, 1, 0))
        text = f"({dtype}[1, 16, 8, 8] x) => ({dtype}[1, 16, h, v] y)"
        body = f"[site] y = {case.op}(x, wd)"
    elif case.op in ("LSTM", "GRU", "RNN"):
        gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[case.op]
        weight = weight_of(case, (1, gates * 32, 32), granularity_of(case, 2, 1))
        text = f"({dtype}[t, 1, 32] x) => ({dtype}[t, 1, 1, 32] y)"
        body = f"[site] y = {case.op}<hidden_size=32>(x, wd, wd)"
    elif case.op == "Gather":
        weight = weight_of(case, (OUTPUTS, REDUCTION), granularity_of(case, 1, 0))
        text = f"(int64[b] ids) => ({dtype}[b, {REDUCTION}] y)"
        body = "[site] y = Gather(wd, ids)"
    else:
        return product_of(case, dtype)
    return finish(case, weight, text, body)


def product_of(case: Case, dtype: str) -> ir.Model:
    turned = case.use in (WeightUse.TRANSPOSED, WeightUse.SHARED_TABLE)
    shape = (OUTPUTS, REDUCTION) if turned else (REDUCTION, OUTPUTS)
    weight = weight_of(case, shape, granularity_of(case, int(turned), 1 - int(turned)))
    inputs, outputs = f"{dtype}[b, {REDUCTION}] x", f"{dtype}[b, {OUTPUTS}] y"
    body = "[site] y = MatMul(x, wd)"
    if case.op == "Gemm":
        body = f"[site] y = Gemm<transB={int(turned)}>(x, wd)"
    elif turned:
        body = "wt = Transpose<perm=[1, 0]>(wd) [site] y = MatMul(x, wt)"
    if case.use is WeightUse.LEFT:
        weight = weight_of(case, shape, PerAxis(0))
        inputs, outputs = f"{dtype}[{OUTPUTS}, b] x", f"{dtype}[{REDUCTION}, b] y"
        body = "[site] y = MatMul(wd, x)"
    if case.use is WeightUse.SHARED_TABLE:
        inputs += ", int64[b] ids"
        outputs += f", {dtype}[b, {REDUCTION}] e"
        body += " [lookup] e = Gather(wd, ids)"
    if case.row.rule == "decoded-at-load-matmul":
        return batched(case, dtype)
    return finish(case, weight, f"({inputs}) => ({outputs})", body)


def batched(case: Case, dtype: str) -> ir.Model:
    weight = weight_of(case, (3, 64, OUTPUTS), PerAxis(2))
    text = f"({dtype}[3, b, 64] x) => ({dtype}[3, b, {OUTPUTS}] y)"
    return finish(case, weight, text, "[site] y = MatMul(x, wd)")


def finish(case: Case, weight: CodedWeight, header: str, body: str) -> ir.Model:
    text = f"g {header} {{ {weight.dequantize('wd')} {body} }}"
    model = build(text, weight.weights, opset=opset_for(case.bits))
    model.ir_version = 13
    if case.row.activations is Activations.DYNAMIC:
        node_named(model, "site").metadata_props["qcompiler.scheme"] = "w8a8-dynamic:sym"
    return model


def lower(model: ir.Model, folder: Path) -> None:
    plan = make_plan(CompileOptions())
    for name in ONNXRUNTIME.lowering:
        run_pass(pass_named(name, plan), model, folder)


def expected_kernels(case: Case) -> set[str]:
    if case.row.rule.startswith("decoded-at-load"):
        return {f"float {name}, weights decoded at load" for name in (case.op, "MatMul", "Conv")}
    if case.row.activations is Activations.DYNAMIC:
        return {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    kernel = "GatherBlockQuantized" if case.op == "Gather" else "MatMulNBits"
    assert kernel in case.row.kernel
    return {f"{kernel} ({case.bits}-bit)"}


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_row_runs_as_the_table_says(case: Case, tmp_path: Path) -> None:
    before, after = graph_of(case), graph_of(case)
    lower(after, tmp_path)
    ir.save(after, tmp_path / "m.onnx")
    found = inspect_kernels(tmp_path / "m.onnx", ["site", "lookup"], memory_limit=1 << 30)
    assert found.failure is None
    assert found.kernels["site"].name in expected_kernels(case)
    if case.use is WeightUse.SHARED_TABLE and case.op != "Gather":
        assert found.kernels["lookup"] == Kernel(f"GatherBlockQuantized ({case.bits}-bit)", True)
    feeds = random_feeds(before, seed=0, dims={"t": 3, "b": 4})
    expected = run_model(before, feeds)
    with open_session(after, optimize=True, threads=1) as session:
        for name, values in session.run(feeds).items():
            truth = expected[name].astype(np.float64)
            # Kernels round activations to 8 bits, per block or per tensor.
            assert np.abs(values - truth).max() <= 0.03 * np.abs(truth).max()


@pytest.mark.parametrize("above", [0, 1])
def test_highest_opset(above: int) -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    model.graph.opset_imports[""] = ONNXRUNTIME.opset_max + above
    if above:
        with pytest.raises(Exception, match="opset"):
            open_session(model, optimize=True, threads=1)
        return
    with open_session(model, optimize=True, threads=1) as session:
        assert session.run({"x": np.ones(2, np.float32)})["y"].tolist() == [1, 1]


@pytest.mark.parametrize("outputs", [33, 34, 35])
def test_2_bit_q_dq_is_wrong_without_the_lowering(outputs: int) -> None:
    """The defect that lower-matmul-nbits avoids; when this fails, the pass can be simpler."""
    weight = coded_weight((64, outputs), PerBlock(0, 32), bits=2, signed=True)
    text = f"""g (float[b, 64] x) => (float[b, {outputs}] y) {{
        {weight.dequantize("wd")} y = MatMul(x, wd) }}"""
    model = build(text, weight.weights, opset=25)
    model.ir_version = 13
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    truth = x @ weight.values()
    with open_session(model, optimize=True, threads=1) as session:
        error = np.abs(session.run({"x": x})["y"] - truth).max() / np.abs(truth).max()
    assert error > 0.2


def test_8_bit_dynamic_weights_saturate_here_or_are_exact() -> None:
    """Why pairs of codes are limited: CPUs without VNNI clip sums of two products."""
    weight = coded_weight((256, 16), PerAxis(1), bits=8, signed=True, code_range=(127, 127))
    text = """g (float[b, 256] x) => (float[b, 16] y) {
        q, s, z = DynamicQuantizeLinear(x)
        i = MatMulInteger(q, w, z)
        f = Cast<to=1>(i)
        c = Mul(s, w_s)
        y = Mul(f, c) }"""
    x = np.ones((2, 256), np.float32)
    with open_session(build(text, weight.weights), optimize=True, threads=1) as session:
        found = session.run({"x": x})["y"]
    error = np.abs(found - x @ weight.values()).max() / np.abs(x @ weight.values()).max()
    assert error < 1e-5 or error > 0.3


@pytest.mark.parametrize("op", ["DequantizeLinear", "MatMul"])
def test_bfloat16_has_no_cpu_kernel(op: str, tmp_path: Path) -> None:
    weight = coded_weight(
        (64, 16), PerAxis(1), bits=8, signed=True, scale_type=ir.DataType.BFLOAT16
    )
    text = f"""g (bfloat16[b, 64] x) => (bfloat16[b, 16] y) {{
        {weight.dequantize("wd")} [site] y = MatMul(x, wd) }}"""
    if op == "MatMul":
        text = "g (bfloat16[b, 64] x, bfloat16[64, 16] v) => (bfloat16[b, 16] y) {y = MatMul(x, v)}"
    ir.save(build(text, weight.weights), tmp_path / "m.onnx")
    found = inspect_kernels(tmp_path / "m.onnx", ["site"], memory_limit=1 << 30)
    assert found.failure is not None
    assert "NOT_IMPLEMENTED" in found.failure or "implementation" in found.failure
