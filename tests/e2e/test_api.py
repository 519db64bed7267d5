"""The Python interface."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler import CompileOptions, Recipe, TargetError, UsageError, compile_model
from qcompiler.report.files import read_report
from tests.support.graphs import build, random_array, serialized


def test_compile_a_path(digits: Path, tmp_path: Path) -> None:
    result = compile_model(digits, CompileOptions(scheme="w4a16:b32"), output=tmp_path / "o.onnx")
    assert result.path == tmp_path / "o.onnx"
    assert result.data_path is None
    assert result.report == read_report(result.report_path)
    assert result.report.summary.integer_kernels == result.report.summary.quantized == 3
    assert {node.op_type for node in result.model().graph} >= {"Conv", "MatMulNBits"}


def test_compile_a_model_in_memory_and_leave_it_as_it_was(tmp_path: Path) -> None:
    model = build(
        "g (float[N, 64] x) => (float[N, 64] y) { [mm] y = MatMul(x, w) }",
        {"w": random_array(64, 64)},
    )
    before = serialized(model)
    result = compile_model(model, output=tmp_path / "o.onnx")
    assert result.report.summary.quantized == 1
    assert serialized(model) == before
    with pytest.raises(UsageError, match="no folder to write beside"):
        compile_model(model)


def test_a_recipe_object(digits: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_text(
        'version = 1\n[[rule]]\nname = "node_linear_1"\nscheme = "w4a16:b32"\n', "inline"
    )
    result = compile_model(digits, CompileOptions(recipe=recipe), output=tmp_path / "o.onnx")
    chosen = [node.name for node in result.report.nodes if node.quantized]
    assert chosen == ["node_linear_1"]


def test_external_data_on_request(digits: Path, tmp_path: Path) -> None:
    options = CompileOptions(external_data=True)
    result = compile_model(digits, options, output=tmp_path / "o.onnx")
    assert result.data_path == tmp_path / "o.onnx.data"
    assert result.data_path.exists()
    assert result.report.output.bytes == sum(
        path.stat().st_size for path in (result.path, result.data_path)
    )


def test_an_op_no_runtime_knows_is_a_target_error(tmp_path: Path) -> None:
    model = build(
        """<ir_version: 10, opset_import: ["" : 21, "acme" : 1]>
        g (float[N, 64] x) => (float[N, 64] y) { [mm] h = MatMul(x, w) [c] y = acme.Twist(h) }""",
        {"w": random_array(64, 64)},
    )
    with pytest.raises(TargetError, match="ONNX Runtime does not load the compiled model"):
        compile_model(model, output=tmp_path / "o.onnx")
    assert list(tmp_path.iterdir()) == []
    options = CompileOptions(inspect_kernels=False)
    result = compile_model(model, options, output=tmp_path / "o.onnx")
    assert result.report.summary.quantized == 1
    assert result.report.runtime is None


def test_half_precision_models_keep_their_type(tmp_path: Path) -> None:
    model = build(
        "g (float16[N, 64] x) => (float16[N, 64] y) { [mm] y = MatMul(x, w) }",
        {"w": random_array(64, 64, dtype=np.float16)},
    )
    result = compile_model(model, CompileOptions(scheme="w4a16:b32"), output=tmp_path / "o.onnx")
    types = {v.dtype for v in result.model().graph.initializers.values()}
    assert ir.DataType.FLOAT16 in types
    assert ir.DataType.FLOAT not in types
    assert result.report.nodes[0].kernel == "MatMulNBits (4-bit)"


def test_every_exported_name_exists() -> None:
    for name in qcompiler.__all__:
        assert getattr(qcompiler, name) is not None
