"""Graphs whose rounding is real and whose arithmetic is that of floats."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.compile import compile_model
from qcompiler.errors import TargetError, UsageError
from qcompiler.ir.provenance import facts_of
from qcompiler.options import (
    CalibrationOptions,
    CompileOptions,
    EqualizationOptions,
    Reconstruction,
)
from qcompiler.plan import make_plan
from qcompiler.quant.reconstruction import BlockReconstruction
from qcompiler.quant.scheme import parse_scheme
from qcompiler.targets.capability import SchemeRequest, resolve
from qcompiler.targets.emulation import EMULATION
from qcompiler.targets.registry import TARGETS
from tests.support.graphs import build, initializer, random_array
from tests.support.parity import run_model

TEXT = """g (float[N, 64] x) => (float[N, 48] y) {
    [up] h = MatMul(x, w)
    [act] r = Relu(h)
    [down] y = MatMul(r, v)
}"""


def _net() -> ir.Model:
    return build(TEXT, {"w": random_array(64, 96), "v": random_array(96, 48, seed=1)}, opset=21)


def _calls(folder: Path, count: int = 24) -> Path:
    folder.mkdir()
    for seed in range(count):
        np.savez(folder / f"{seed}.npz", x=random_array(32, 64, seed=10 + seed))
    return folder


def _compiled(scheme: str, folder: Path, **options: object) -> ir.Model:
    given = CompileOptions(
        scheme=scheme,
        target="emulation",
        calibration=CalibrationOptions(str(_calls(folder / "calls"))),
        equalization=EqualizationOptions(None),
        correct_bias=False,
        **options,  # type: ignore[arg-type]
    )
    return compile_model(_net(), given, output=folder / "m.onnx").model()


def _error(model: ir.Model) -> float:
    feeds = {"x": random_array(64, 64, seed=99)}
    exact, found = (run_model(each, feeds)["y"].astype(np.float64) for each in (_net(), model))
    return float(np.square(found - exact).sum() / np.square(exact).sum())


@pytest.mark.parametrize(
    ("scheme", "data", "weights"),
    [
        ("w4a8", ir.DataType.UINT8, ir.DataType.INT4),
        ("w4a8:b32", ir.DataType.UINT8, ir.DataType.INT4),
        ("w2a8:b32:asym", ir.DataType.UINT8, ir.DataType.UINT2),
        ("w4a4", ir.DataType.UINT4, ir.DataType.INT4),
        ("w8a4", ir.DataType.UINT4, ir.DataType.INT8),
        ("w8a8", ir.DataType.UINT8, ir.DataType.INT8),
    ],
)
def test_products_read_codes_of_both_and_nothing_else_is_rounded(
    scheme: str, data: ir.DataType, weights: ir.DataType, tmp_path: Path
) -> None:
    model = _compiled(scheme, tmp_path)
    assert sorted(node.op_type for node in model.graph) == sorted(
        ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"] * 2 + ["Relu"]
    )
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            assert node.outputs[0].dtype is data
        if node.op_type == "MatMul":
            assert facts_of(node)["scheme"].startswith(scheme)
            assert "for studies" in facts_of(node)["reason"]
    codes = model.graph.initializers["w.codes"].const_value
    assert codes is not None
    assert codes.dtype is weights


def test_outputs_are_those_of_integer_arithmetic(tmp_path: Path) -> None:
    model = _compiled("w4a4", tmp_path)
    x = random_array(16, 64, seed=99)
    found, value = run_model(model, {"x": x})["y"], x.astype(np.float64)
    for data, weight in (("x", "w"), ("r", "v")):
        scale = float(initializer(model, f"{data}.scale"))
        zero = int(initializer(model, f"{data}.zero_point"))
        codes = np.clip(np.rint(value / scale) + zero, 0, 15) - zero
        wide = codes @ initializer(model, f"{weight}.codes").astype(np.float64)
        value = wide * scale * initializer(model, f"{weight}.scale").astype(np.float64)
        value = np.maximum(value, 0) if weight == "w" else value
    np.testing.assert_allclose(found, value, rtol=2e-4, atol=2e-4 * np.abs(value).max())


@pytest.mark.parametrize("scheme", ["w4a8", "w2a8:b32", "w4a4"])
def test_reconstruction_learns_weights_and_activations(scheme: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("none", "cbq")]
    for folder in folders:
        folder.mkdir()
    plain = _compiled(scheme, folders[0])
    how = BlockReconstruction(steps=80)
    learned = _compiled(scheme, folders[1], reconstruct=Reconstruction.CBQ, blocks=how)
    assert initializer(plain, "r.scale") != initializer(learned, "r.scale")
    assert np.any(initializer(plain, "w.codes") != initializer(learned, "w.codes"))
    assert _error(learned) < 0.95 * _error(plain)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "emulation"])
@pytest.mark.parametrize("scheme", ["w4a8", "w3a8:b64", "w4a4", "w8a4"])
def test_runtimes_without_such_integers_are_refused(target: str, scheme: str) -> None:
    options = CompileOptions(scheme=scheme, target=target, calibration="calls")
    with pytest.raises(TargetError, match=f"multiplies no integers as {scheme} has them") as error:
        make_plan(options)
    assert error.value.reason == "no-such-integers"
    assert "--target emulation" in (error.value.hint or "")


def test_a_table_keeps_its_bits_and_its_activations_stay_in_float() -> None:
    scheme = parse_scheme("w4a8:b32")
    assert scheme is not None
    request = SchemeRequest("Gather", "", scheme, "FLOAT", 64, 1000, 2)
    found = resolve(EMULATION, request)
    assert str(found.scheme) == "w4a16:b32:sym"
    assert "Emulation has no w4a8:b32 kernel for Gather" in found.reason


def test_nothing_is_computed_apart_and_nothing_timed(tmp_path: Path) -> None:
    plan = make_plan(CompileOptions(scheme="w4a4", target="emulation", calibration="calls"))
    assert not plan.never_slower
    assert not plan.target.runs_here
    model = _compiled("w4a4", tmp_path)
    assert sum(node.op_type == "MatMul" for node in model.graph) == 2, "no second terms"


@pytest.mark.parametrize("scheme", ["fp8", "fp8:tensor"])
def test_floats_of_8_bits(scheme: str, tmp_path: Path) -> None:
    made = _compiled(scheme, tmp_path)
    floats = ir.DataType.FLOAT8E4M3FN
    codes = [node for node in made.graph if node.op_type == "QuantizeLinear"]
    assert [node.outputs[0].dtype for node in codes] == [floats, floats]
    for weight in ("w", "v"):
        assert made.graph.initializers[f"{weight}.codes"].dtype == floats
        shape = () if scheme.endswith("tensor") else initializer(made, f"{weight}.codes").shape[1:]
        assert initializer(made, f"{weight}.scale").shape == shape
    # 3 bits of mantissa on both sides of two products: 2**-4 / sqrt(3) each at most.
    assert 1e-4 < _error(made) < 4 * (2.0**-4) ** 2 / 3


@pytest.mark.parametrize(
    ("target", "message", "way_out"),
    [
        ("onnxruntime", "ONNX Runtime has no products of FLOAT8E4M3FN", "tensorrt-rtx:sm89"),
        ("tensorrt-rtx", "SM80, SM86 has no FLOAT8E4M3FN", "tensorrt-rtx:sm89,sm120,sm121"),
        ("tensorrt-rtx:sm75", "SM75 has no FLOAT8E4M3FN", "or give w8a8"),
        ("tensorrt-10:sm87,sm89", "SM87 has no FLOAT8E4M3FN", "tensorrt-10:sm89,sm90"),
        ("tensorrt", "SM80, SM86 has no FLOAT8E4M3FN", "tensorrt-11:sm89,sm90"),
    ],
)
def test_what_has_no_floats_of_8_bits_says_what_has(
    target: str, message: str, way_out: str
) -> None:
    with pytest.raises(TargetError, match=message) as error:
        make_plan(CompileOptions(scheme="fp8", target=target, calibration="calls"))
    assert error.value.reason == "no-such-floats"
    assert way_out in (error.value.hint or "")


@pytest.mark.parametrize("reconstruct", [Reconstruction.GPTQ, Reconstruction.CBQ])
def test_learning_codes_of_equal_steps_is_refused_for_floats(reconstruct: Reconstruction) -> None:
    options = CompileOptions(
        scheme="fp8", target="emulation", calibration="calls", reconstruct=reconstruct
    )
    with pytest.raises(UsageError, match="it works on codes of equal steps") as error:
        make_plan(options)
    assert error.value.reason == "integer-codes-only"


def test_floats_of_8_bits_need_samples() -> None:
    with pytest.raises(UsageError, match="fp8 needs samples"):
        make_plan(CompileOptions(scheme="fp8", target="emulation"))
