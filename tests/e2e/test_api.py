"""The Python interface."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler import (
    CompileOptions,
    ModelError,
    Recipe,
    TargetError,
    UsageError,
    compile_model,
)
from qcompiler.calibration.calls import SampleOptions
from qcompiler.options import CalibrationOptions
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


def test_a_weight_of_zeros_is_represented_exactly(tmp_path: Path) -> None:
    model = build(
        "g (float[N, 64] x) => (float[N, 64] y) { [mm] y = MatMul(x, w) }",
        {"w": np.zeros((64, 64), np.float32)},
    )
    result = compile_model(model, CompileOptions(scheme="w4a16:b32"), output=tmp_path / "o.onnx")
    assert result.report.nodes[0].sqnr_db is None
    assert read_report(result.report_path) == result.report


def test_a_merged_duplicate_is_still_known_by_its_name(tmp_path: Path) -> None:
    model = build(
        """g (float[N, 64] x) => (float[N, 64] y) {
            a = MatMul(x, w)
            b = MatMul(x, w)
            y = Add(a, b)
        }""",
        {"w": random_array(64, 64)},
    )
    model.graph[0].name, model.graph[1].name = "layer one", "layer two"
    result = compile_model(model, output=tmp_path / "o.onnx")
    (node,) = result.report.nodes
    assert (node.name, node.origins) == ("layer one", ("layer one", "layer two"))
    excluded = compile_model(
        model, CompileOptions(exclude=("layer two",)), output=tmp_path / "e.onnx"
    )
    assert not excluded.report.nodes[0].quantized


@pytest.mark.parametrize("external", [False, True])
def test_workers_and_storage_change_no_weight(digits: Path, tmp_path: Path, external: bool) -> None:
    made = []
    for workers in (1, 4):
        (tmp_path / str(workers)).mkdir()
        options = CompileOptions(scheme="w4a16:b32", workers=workers, external_data=external)
        result = compile_model(digits, options, output=tmp_path / str(workers) / "o.onnx")
        data = b"" if result.data_path is None else result.data_path.read_bytes()
        made.append((result.path.read_bytes(), data, result.manifest_path.read_bytes()))
    assert made[0] == made[1]


def test_the_manifest_holds_what_was_in_force(digits: Path, tmp_path: Path) -> None:
    result = compile_model(digits, output=tmp_path / "o.onnx")
    manifest = json.loads(result.manifest_path.read_text())
    assert manifest["settings"]["weight_range"] == "weighted-mse"
    assert 'default = "w8a16"' in manifest["recipe"]
    assert manifest["versions"]["onnxruntime"] != "not installed"


@pytest.mark.parametrize(
    "text",
    [
        "g (float[64, N] x) => (float[64, N] y) { [mm] y = MatMul(w, x) }",
        "g (float[64, N] x) => (float[64, N] y) { [mm] y = Gemm(w, x) }",
    ],
)
def test_a_weight_on_the_left_is_quantized(text: str, tmp_path: Path) -> None:
    result = compile_model(build(text, {"w": random_array(64, 64)}), output=tmp_path / "o.onnx")
    assert result.report.nodes[0].elements == 4096
    assert result.report.nodes[0].quantized


def test_a_compiled_model_is_not_compiled_again(digits: Path, tmp_path: Path) -> None:
    once = compile_model(
        build(
            "g (float[N, 64] x) => (float[N, 64] y) { [mm] y = MatMul(x, w) }",
            {"w": random_array(64, 64)},
        ),
        output=tmp_path / "once.onnx",
    )
    with pytest.raises(ModelError, match="quantized already"):
        compile_model(once.path, output=tmp_path / "twice.onnx")


def test_claims_in_the_input_are_not_believed(tmp_path: Path) -> None:
    model = build(
        "g (float[N, 64] x) => (float[N, 64] y) { [mm] y = MatMul(x, w) }",
        {"w": random_array(64, 64)},
    )
    model.graph[0].metadata_props["qcompiler.weight_sqnr_db"] = "999"
    model.metadata_props["qcompiler.stage"] = "lowered"
    result = compile_model(model, CompileOptions(exclude=("mm",)), output=tmp_path / "o.onnx")
    assert result.report.nodes[0].sqnr_db is None


def test_an_output_without_a_shape_is_no_defect(tmp_path: Path) -> None:
    model = build(
        "g (float[N, 64] x) => (y) { [mm] h = MatMul(x, w) y = Relu(h) }",
        {"w": random_array(64, 64)},
    )
    assert model.graph.outputs[0].shape is None
    assert compile_model(model, output=tmp_path / "o.onnx").report.summary.quantized == 1


def test_kernels_of_16_bit_models_are_found(tmp_path: Path) -> None:
    model = build(
        """g (float16[N, 64] x) => (float16[N, 64] y) {
            [one] a = MatMul(x, w)
            b = Relu(a)
            [two] c = MatMul(b, v)
            y = Sigmoid(c)
        }""",
        {
            "w": random_array(64, 64, dtype=np.float16),
            "v": random_array(64, 64, dtype=np.float16, seed=1),
        },
    )
    result = compile_model(model, output=tmp_path / "o.onnx")
    assert [node.integer_kernel for node in result.report.nodes] == [True, True]


@pytest.mark.parametrize("name", ["x.json", "x.textproto", "x"])
def test_the_name_of_the_output_does_not_decide_its_format(
    digits: Path, tmp_path: Path, name: str
) -> None:
    result = compile_model(digits, output=tmp_path / name)
    assert result.report.summary.integer_kernels == 3


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16:b32"])
def test_special_files_are_refused(digits: Path, tmp_path: Path, scheme: str) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(UsageError, match="is no regular file"):
        compile_model(tmp_path / "pipe.onnx", output=tmp_path / "o.onnx")
    with pytest.raises(UsageError, match="is no regular file"):
        compile_model(digits, CompileOptions(scheme=scheme), output=tmp_path / "pipe.onnx")


def test_comparing_can_be_left_out_and_changes_no_byte(digits: Path, tmp_path: Path) -> None:
    source = str(digits.with_name("calibration.npz"))
    data = CalibrationOptions(source, SampleOptions(batch_size=32))
    options = CompileOptions(calibration=data, never_slower=False)
    found = {}
    for compare in (True, False):
        output = tmp_path / str(compare) / "o.onnx"
        output.parent.mkdir()
        result = compile_model(digits, replace(options, compare=compare), output=output)
        calibration = result.report.calibration
        assert calibration is not None
        assert bool(calibration.outputs) == compare
        assert any(node.output_sqnr_db is not None for node in result.report.nodes) == compare
        found[compare] = output.read_bytes()
    assert found[True] == found[False]
