"""`--scheme float16` and `--compute-type`, from the model to report and explanation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import CompileOptions, CompileResult, ModelError, Recipe, UsageError, compile_model
from qcompiler.cli.main import main
from qcompiler.options import Verification
from qcompiler.quant.compute_type import ComputeType
from tests.support.graphs import build, node_named, random_array

Compile = Callable[..., CompileResult]

NET = """g (float[N, 64] x) => (float[N, 64] y) {
    [fc1] a = MatMul(x, w) [square] p = Pow(a, two) [mean] m = ReduceMean(p, axes)
    [eps] e = Add(m, tiny) [root] r = Sqrt(e) [div] n = Div(a, r) [fc2] y = MatMul(n, v) }"""
NORM = {"square", "mean", "eps", "root"}


def net() -> ir.Model:
    scale = np.float32(0.125)
    return build(
        NET,
        {
            "w": random_array(64, 64, seed=1) * scale,
            "v": random_array(64, 64, seed=2) * scale,
            "two": np.float32(2),
            "axes": np.array([1]),
            "tiny": np.float32(1e-9),
        },
    )


@pytest.fixture
def compiled(tmp_path: Path) -> Compile:
    np.savez(tmp_path / "calls.npz", x=random_array(8, 64, seed=3))

    def run(calibrated: bool = True, **options: Any) -> CompileResult:
        calibration = str(tmp_path / "calls.npz") if calibrated else None
        options.setdefault("calibration", calibration)
        return compile_model(net(), CompileOptions(**options), output=tmp_path / "o.onnx")

    return run


@pytest.mark.parametrize("calibrated", [True, False])
def test_the_whole_model_in_float16(compiled: Compile, calibrated: bool) -> None:
    result = compiled(calibrated, scheme="float16")
    summary = result.report.summary
    assert (summary.compute_type, summary.float32_ops, summary.casts) == ("float16", 4, 4)
    assert summary.narrow_ops == 3
    reasons = {node.name: node.type_reason for node in result.report.nodes if node.type_reason}
    assert set(reasons) == NORM
    assert "leaves the range" in str(reasons["square"])
    assert summary.weight_bytes_after * 2 == summary.weight_bytes_before
    model = result.model()
    assert model.graph.inputs[0].dtype == model.graph.outputs[0].dtype == ir.DataType.FLOAT
    if calibrated:
        calibration = result.report.calibration
        assert calibration is not None
        (output,) = calibration.outputs
        assert output.emulated_db is not None
        assert output.emulated_db > 55


def test_bfloat16_is_judged_by_rounding(compiled: Compile) -> None:
    result = compiled(scheme="bfloat16", verify=Verification.NUMERICS)
    assert result.report.runtime is None
    assert "no bfloat16 kernels" in result.report.warnings[0]
    calibration = result.report.calibration
    assert calibration is not None
    (output,) = calibration.outputs
    assert not output.ran
    assert output.native_db is None
    assert output.emulated_db is not None
    assert 35 < output.emulated_db < 50
    lost = {check.name: check.sqnr_db for check in result.report.output_checks}
    assert lost["cast-types"] == pytest.approx(output.emulated_db, abs=3)


def test_a_type_beside_a_quantized_scheme(compiled: Compile) -> None:
    result = compiled(scheme="w4a16:b32", compute_type=ComputeType.FLOAT16)
    nodes = {node.name: node for node in result.report.nodes}
    assert {nodes[name].scheme for name in ("fc1", "fc2")} == {"w4a16:b32:asym"}
    assert {nodes[name].kernel for name in ("fc1", "fc2")} == {"MatMulNBits (4-bit)"}
    weight = node_named(result.model(), "fc1").inputs[1]
    decoder = None if weight is None else weight.producer()
    assert decoder is not None
    scales = decoder.inputs[1]
    assert scales is not None
    assert scales.dtype == ir.DataType.FLOAT16
    # 64 * 64 codes of 4 bits, 128 scales of 16, 128 zero points of 4
    assert nodes["fc1"].bytes_after == 2048 + 256 + 64
    assert nodes["fc1"].compute_type == "float16"


def test_int8_activations_have_no_kernel_in_float16_here(compiled: Compile) -> None:
    result = compiled(
        scheme="w8a8", compute_type=ComputeType.FLOAT16, float32=("fc2",), never_slower=False
    )
    nodes = {node.name: node for node in result.report.nodes}
    assert nodes["fc1"].scheme == "w8a16:sym"
    assert "no 8-bit kernel for a FLOAT16 MatMul" in nodes["fc1"].reason
    assert nodes["fc2"].scheme == "w8a8:sym"
    assert (nodes["fc2"].compute_type, nodes["fc1"].compute_type) == ("float32", "float16")


def test_inputs_and_outputs_too(compiled: Compile) -> None:
    result = compiled(scheme="float16", cast_io=True, verify=Verification.NUMERICS)
    model = result.model()
    assert model.graph.inputs[0].dtype == model.graph.outputs[0].dtype == ir.DataType.FLOAT16
    assert result.report.summary.casts == 2
    manifest = json.loads(result.manifest_path.read_text())
    assert manifest["settings"]["cast_io"] is True
    assert 'compute_type = "float16"' in manifest["recipe"]


def test_a_recipe_says_the_same(compiled: Compile) -> None:
    text = 'version = 1\ndefault = "float"\ncompute_type = "float16"\n'
    text += '\n[[float32]]\nop_type = "Div"\n'
    first = compiled(recipe=Recipe.from_text(text, "r.toml"))
    assert first.report.recipe == text
    reasons = {node.name: node.type_reason for node in first.report.nodes}
    assert reasons["div"] == "it was asked for by op_type=Div"


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"scheme": "float16", "float32": ("nobody",)}, "float32: name=nobody means no node"),
        ({"scheme": "w8a16", "float32": ("fc1",)}, "no type is given that the others get"),
        ({"scheme": "w8a16", "cast_io": True}, "no type is given to cast them to"),
        ({"scheme": "float16", "compute_type": ComputeType.BFLOAT16}, "float16 and the compute"),
    ],
)
def test_options_that_contradict(compiled: Compile, options: dict[str, Any], fault: str) -> None:
    with pytest.raises(UsageError) as caught:
        compiled(**options)
    assert fault in str(caught.value)


def test_a_model_that_has_the_type_says_so(tmp_path: Path) -> None:
    model = build(
        "g (float16[N, 64] x) => (float16[N, 64] y) { [fc] y = MatMul(x, w) }",
        {"w": random_array(64, 64).astype(np.float16)},
    )
    result = compile_model(model, CompileOptions(scheme="float16"), output=tmp_path / "o.onnx")
    assert result.report.summary.casts == 0
    integers = build("g (int64[N] x) => (int64[N] y) { y = Neg(x) }")
    with pytest.raises(ModelError, match="no constant float weight"):
        compile_model(integers, CompileOptions(scheme="float16"), output=tmp_path / "i.onnx")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ir.save(net(), tmp_path / "m.onnx")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "m.onnx"), "--scheme", "w8a16", "--compute-type", "float16"])
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "5 ops compute in float16, 4 stay in float32; Casts added between them: 4" in out
    assert "float32: 1 (square): its result leaves the range" in out
    output = tmp_path / "m.w8a16-float16.onnx"
    with pytest.raises(SystemExit):
        main(["explain", str(output), "root"])
    out = capsys.readouterr().out
    assert "computes in float32, since small numbers" in out
    assert "rule" not in out
