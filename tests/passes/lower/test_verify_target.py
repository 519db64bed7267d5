"""verify-target: what the tables of a target do not allow does not leave the compiler."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import InternalError, QCompilerError, TargetError
from qcompiler.ir.provenance import CREATED_BY, annotate
from qcompiler.passes.lower.lower_embeddings import LowerEmbeddings
from qcompiler.passes.lower.verify_target import VerifyTarget, VerifyTargetOptions
from qcompiler.quant.granularity import PerBlock
from qcompiler.targets.capability import Target
from qcompiler.targets.onnxruntime import ONNXRUNTIME
from tests.support.coded import coded_weight
from tests.support.graphs import build
from tests.support.parity import assert_parity
from tests.support.rewrites import assert_idempotent, run_pass


def product(*, dtype: ir.DataType = ir.DataType.INT8, opset: int = 21) -> ir.Model:
    """Return a planned product over codes of a type."""
    text = "g (float[n, 64] x) => (float[n, 8] y) { [dq] w = DequantizeLinear(q, s) "
    codes = ir.tensor(np.ones((64, 8), dtype.numpy()), dtype=dtype)
    weights = {"q": codes, "s": np.float32(0.1)}
    model = build(text + "[site] y = MatMul(x, w) }", weights, opset=opset)
    annotate(model.graph.node("dq"), created_by="insert-qdq")
    annotate(model.graph.node("site"), scheme="w8a16:sym", rule="matmul-nbits-8")
    return model


def lookup(folder: Path) -> ir.Model:
    """Return a lowered lookup."""
    weight = coded_weight((10, 64), PerBlock(1, 16), bits=4, signed=False)
    text = f"""g (int64[n] i) => (float[n, 64] y) {{
        {weight.dequantize("wd")} [site] y = Gather(wd, i) }}"""
    model = build(text, weight.weights)
    run_pass(LowerEmbeddings(), model, folder)
    return model


def verify(target: Target = ONNXRUNTIME) -> VerifyTarget:
    return VerifyTarget(VerifyTargetOptions(target))


def refusal(model: ir.Model, folder: Path) -> QCompilerError:
    with pytest.raises(QCompilerError) as caught:
        run_pass(verify(), model, folder)
    return caught.value


def test_changes_nothing(tmp_path: Path) -> None:
    model = product()
    assert run_pass(verify(), model, tmp_path).rewrites == ()
    assert_parity(product(), model, tolerance=0)


@pytest.mark.parametrize("opset", [6, 29])
def test_refuses_an_opset_that_is_not_loaded(opset: int, tmp_path: Path) -> None:
    model = product()
    model.graph.opset_imports[""] = opset
    error = refusal(model, tmp_path)
    assert isinstance(error, TargetError)
    assert f"loads opset 7 to 28, and the model is at {opset}" in error.message


def test_refuses_types_without_a_kernel(tmp_path: Path) -> None:
    error = refusal(product(dtype=ir.DataType.FLOAT4E2M1, opset=23), tmp_path)
    assert isinstance(error, TargetError)
    assert error.where == "dq (DequantizeLinear)"
    assert "input 0 is FLOAT4E2M1; legal: INT8" in error.message


def test_refuses_q_dq_nodes_of_the_source_model(tmp_path: Path) -> None:
    model = product(dtype=ir.DataType.FLOAT4E2M1, opset=23)
    del model.graph.node("dq").metadata_props[CREATED_BY]
    assert isinstance(refusal(model, tmp_path), TargetError)


def test_refuses_ops_that_are_not_in_the_table(tmp_path: Path) -> None:
    model = build("g (float[2] x) => (float[2] y) { [a] y = Relu(x) }")
    run_pass(verify(), model, tmp_path)  # the source model's own ops are free
    annotate(model.graph.node("a"), created_by="lower-for-another-target")
    error = refusal(model, tmp_path)
    assert isinstance(error, TargetError)
    assert "no such op in its table" in error.message


@pytest.mark.parametrize(("attribute", "value"), [("bits", 3), ("block_size", 24)])
def test_values_without_a_kernel_are_defects_of_the_lowering(
    attribute: str, value: int, tmp_path: Path
) -> None:
    model = lookup(tmp_path)
    run_pass(verify(), model, tmp_path)
    model.graph.node("site").attributes[attribute] = ir.AttrInt64(attribute, value)
    error = refusal(model, tmp_path)
    assert isinstance(error, InternalError)
    assert f"{attribute} is {value}" in error.message
    assert "lower-embeddings" in error.message


def test_refuses_a_plan_for_another_target(tmp_path: Path) -> None:
    model = product()
    annotate(model.graph.node("site"), rule="int8-weight-only")
    error = refusal(model, tmp_path)
    assert isinstance(error, TargetError)
    assert error.where == "site (MatMul)"
    assert "'int8-weight-only'" in error.message


def test_any_form_of_an_op_will_do(tmp_path: Path) -> None:
    forms = [form for form in ONNXRUNTIME.lowered_ops if form.op == ("", "DequantizeLinear")]
    wrong = replace(forms[0], inputs=(("UINT8",),))
    run_pass(verify(replace(ONNXRUNTIME, lowered_ops=(wrong, *forms))), product(), tmp_path)


def test_is_idempotent(tmp_path: Path) -> None:
    assert_idempotent(verify(), lookup(tmp_path), tmp_path)
