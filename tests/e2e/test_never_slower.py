"""Compiling with measured regions, in the real runtime."""

import json
import signal
from pathlib import Path

import onnx_ir as ir
import pytest

from qcompiler import CompileOptions, compile_model
from qcompiler.cli.main import main
from qcompiler.options import CalibrationOptions
from qcompiler.report.files import read_report
from tests.support.graphs import build, random_array


def _model(folder: Path) -> Path:
    model = build(
        """g (float[N, 64] x) => (float[N, 64] y) {
            [a] p = MatMul(x, w) [s] s = Softmax(p) [b] q = MatMul(s, v) [y] y = Add(q, x) }""",
        {"w": random_array(64, 64), "v": random_array(64, 64, seed=1)},
    )
    ir.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def test_recorded_measurements_give_the_same_bytes(tmp_path: Path) -> None:
    source, file = _model(tmp_path), tmp_path / "measured.json"
    options = CompileOptions(calibration=CalibrationOptions("random"), measurements=file, threads=1)
    results = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        results.append(compile_model(source, options, output=tmp_path / name / "o.onnx"))
    assert results[0].path.read_bytes() == results[1].path.read_bytes()
    assert results[0].manifest_path.read_bytes() == results[1].manifest_path.read_bytes()
    entries = json.loads(file.read_text())["measurements"]
    assert {entry["what"] for entry in entries.values()} == {"MatMul on [4, 64]"}
    report = read_report(results[1].report_path)
    assert report == results[1].report
    assert all(n.float_ms and n.quantized_ms for n in report.nodes if n.weight is not None)
    assert report.summary.float_ms
    assert report.summary.compiled_ms
    assert report.summary.latency_ratio


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    source = _model(tmp_path)
    options = CompileOptions(calibration=CalibrationOptions("random"), never_slower=False)
    report = compile_model(source, options, output=tmp_path / "o.onnx").report
    assert all(node.float_ms is None for node in report.nodes)
    assert report.summary.latency_ratio is None


def _status(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def test_the_command_line_has_the_options(tmp_path: Path) -> None:
    source, file, output = _model(tmp_path), tmp_path / "measured.json", tmp_path / "o.onnx"
    common = (source, "--calibration", "random", "-o", output, "--measurements", file)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert _status(*common, "--threads", "1") == 0
        assert file.exists()
        file.unlink()
        assert _status(*common, "--no-never-slower") == 0
        assert not file.exists()
        assert _status(source, "--never-slower", "-o", output) == 2
    finally:
        signal.signal(signal.SIGTERM, handler)
