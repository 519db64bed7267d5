"""`--engine`: compilations that end in an engine, with a library of the test and the real one."""

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import CompileOptions, CompileResult, TargetError, UsageError, compile_model
from qcompiler.cli.main import main
from qcompiler.export.tensorrt_profiles import ShapeRange
from qcompiler.export.to_tensorrt import EngineOptions
from qcompiler.report.files import read_report
from tests.support.fake_tensorrt import Does, library
from tests.support.graphs import build, random_array

__all__ = ["library"]

Compile = Callable[..., CompileResult]
Run = Callable[..., tuple[int, str, str]]

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="builds engines: pip install 'qcompiler[tensorrt-rtx]'",
)


def net(name: str = "x") -> ir.Model:
    text = f"g (float[N, 256] {name}) => (float[N, 256] y) {{ [fc1] a = MatMul({name}, w)"
    weights = {key: random_array(256, 256, seed=seed) / 16 for seed, key in enumerate("wv")}
    return build(f"{text} [act] r = Relu(a) [fc2] y = MatMul(r, v) }}", weights)


@pytest.fixture
def compiled(tmp_path: Path) -> Compile:
    np.savez(tmp_path / "calls.npz", x=random_array(8, 256, seed=3))

    def run(output: str = "o.engine", **options: Any) -> CompileResult:
        options = {"target": "tensorrt-rtx", "scheme": "w8a16", **options}
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        return compile_model(net(), CompileOptions(**options), output=folder / output)

    return run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        text = capsys.readouterr()
        return int(stop.value.code or 0), text.out, text.err

    return call


SHAPES = EngineOptions(profile={"x": ShapeRange((1, 256), (2, 256), (8, 256))})


def test_an_engine_lies_beside_its_graph(compiled: Compile, library: Does) -> None:
    library(copies=True)
    result = compiled(engine_options=SHAPES, external_data=True, scheme="w4a16:b32")
    folder = result.path.parent
    assert sorted(path.name for path in folder.iterdir()) == [
        *("o.engine", "o.engine.manifest.json", "o.lowered.manifest.json"),
        *("o.lowered.onnx", "o.lowered.onnx.data"),
        *("o.lowered.report.html", "o.lowered.report.json"),
    ]
    assert result.engine_path == folder / "o.engine"
    assert result.report == read_report(result.report_path)
    engine = result.report.engine
    assert engine is not None
    assert (engine.weights, engine.as_planned, engine.other) == (2, 2, ())
    # Two weights of 256 * 256 codes, and a scale of 32 bits for 32 of them.
    assert engine.planned_bytes == 2 * (256 * 128 + 256 * 8 * 4)
    manifest = json.loads((folder / "o.engine.manifest.json").read_text())
    assert manifest["graph"]["sha256"] == result.report.output.sha256
    content = (folder / "o.engine").read_bytes()
    assert manifest["engine"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest["profile"] == {"x": [[1, 256], [2, 256], [8, 256]]}
    assert manifest["library"] == {"name": "tensorrt-rtx", "version": "9.9"}


def test_weights_that_are_not_there_are_listed(run: Run, tmp_path: Path, library: Does) -> None:
    library(log=[[2, "be careful"]])
    ir.save(net(), tmp_path / "m.onnx")
    plain = (tmp_path / "m.onnx", "--profile", "x:1x256", "-o", tmp_path / "m.engine")
    rtx = ("--target", "tensorrt-rtx")
    assert run(*plain, *rtx)[0] == 0
    assert (tmp_path / "m.lowered.onnx").exists()
    status, out, _ = run(
        *(tmp_path / "m.onnx", "--scheme", "w8a16", "--profile", "x:1x256..2x256..8x256"),
        *("--engine", tmp_path / "deep.plan", "-o", tmp_path / "o.onnx", *rtx),
        *("--sm", "8.6", "--builder-flag", "refit", "--workspace", "1MiB"),
    )
    assert status == 0
    assert "engine deep.plan for SM86 by TensorRT-RTX 9.9" in out
    assert "0 of 2 weights lie in it as planned" in out
    assert "w.codes: planned as INT8, not found" in out
    assert "TensorRT-RTX warns: be careful" in out
    calls = json.loads((tmp_path / "deep.plan").read_text())
    assert calls[:3] == [["flag", "REFIT"], ["pool", "WORKSPACE", 1 << 20], ["sm", "SM86"]]
    assert (tmp_path / "deep.plan.manifest.json").exists()


def test_shapes_come_from_the_samples(compiled: Compile, tmp_path: Path, library: Does) -> None:
    result = compiled(scheme="float16", calibration=str(tmp_path / "calls.npz"))
    assert result.engine_path is not None
    calls = json.loads(result.engine_path.read_text())
    assert calls == [["profile", {"x": [[8, 256]] * 3}]]
    own = compiled(scheme="float16", calibration=str(tmp_path / "calls.npz"), engine_options=SHAPES)
    assert own.engine_path is not None
    assert json.loads(own.engine_path.read_text())[0][1]["x"] == [[1, 256], [2, 256], [8, 256]]


def test_a_build_that_fails_leaves_nothing(
    compiled: Compile, tmp_path: Path, library: Does
) -> None:
    library(parse=["fc1"])
    with pytest.raises(TargetError, match="does not take the model: fc1 "):
        compiled(engine_options=SHAPES)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"engine_options": EngineOptions(flags=("REFIT",)), "output": "o.onnx"}, "none is asked"),
        ({"engine": Path("other.engine")}, "two engines were named"),
        ({}, "no profile says which shape it takes"),
        (
            {"engine_options": EngineOptions(profile={"z": ShapeRange((1,), (1,), (1,))})},
            "the model has no input 'z'",
        ),
        (
            {"engine_options": EngineOptions(profile={"x": ShapeRange((1,), (1,), (1,))})},
            "input x has 2 axes, and its profile 1",
        ),
        ({"output": "nowhere/o.engine", "engine_options": SHAPES}, "the folder does not exist"),
    ],
)
def test_options_that_cannot_be(
    options: dict[str, Any], fault: str, compiled: Compile, library: Does
) -> None:
    with pytest.raises(UsageError) as caught:
        compiled(**options)
    assert fault in str(caught.value)


def test_a_missing_library_stops_before_any_work(compiled: Compile) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        pytest.skip("TensorRT-RTX is installed")
    with pytest.raises(UsageError, match="TensorRT-RTX is not installed") as caught:
        compiled(engine_options=SHAPES)
    assert caught.value.hint == "pip install 'qcompiler[tensorrt-rtx]'"
    assert caught.value.exit_code == 2


def test_onnx_runtime_has_no_engines(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it has no engines"):
        compile_model(net(), CompileOptions(), output=tmp_path / "o.engine")


@needs_rtx
@pytest.mark.parametrize(
    ("scheme", "kind", "most"),
    [
        ("float", None, 2.2),
        ("float16", None, 1.2),
        ("bfloat16", None, 1.2),
        ("w8a16", "float16", 0.8),
        ("w4a16:b32", "float16", 1.0),
    ],
)
def test_real_engines_hold_what_was_planned(
    scheme: str, kind: str | None, most: float, compiled: Compile
) -> None:
    from qcompiler.quant.compute_type import ComputeType

    options = EngineOptions(profile=SHAPES.profile, capabilities=("SM86", "SM89"))
    compute = None if kind is None else ComputeType(kind)
    result = compiled(scheme=scheme, compute_type=compute, engine_options=options)
    engine = result.report.engine
    assert engine is not None
    assert (engine.weights, engine.as_planned) == (2, 2)
    assert engine.planned_bytes <= engine.bytes < most * 512 * 1024
    assert not result.report.warnings
