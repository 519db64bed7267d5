"""Models next to each other: how fast, how near."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.bench import Bench, Benched, BenchOptions, bench, bench_lines
from qcompiler.calibration.calls import SampleOptions
from qcompiler.cli.main import main
from qcompiler.errors import TargetError, UsageError
from qcompiler.execution.latency import Timing
from tests.support.graphs import build

QUICK = BenchOptions(SampleOptions(), seconds=0.01)
PRODUCT = "g (float[n, 64] x) => (float[n, {columns}] {output}) {{ {output} = MatMul(x, w) }}"


def write(path: Path, factor: float = 1.0, columns: int = 8, output: str = "y") -> Path:
    """Write a product whose weight is a factor times a weight that is always the same."""
    weight = np.random.default_rng(0).standard_normal((64, columns)).astype(np.float32)
    text = PRODUCT.format(columns=columns, output=output)
    ir.save(build(text, {"w": np.float32(factor) * weight}), path)
    return path


def test_outputs_are_compared_with_the_first_models(tmp_path: Path) -> None:
    base, twin = write(tmp_path / "a.onnx"), write(tmp_path / "b.onnx")
    other = write(tmp_path / "c.onnx", factor=1.1)
    found = bench([base, twin, other], "random:3", QUICK)
    first, second, third = found.models
    assert (first.output_db, second.output_db) == (None, np.inf)
    assert third.output_db == pytest.approx(20.0, abs=0.01)  # a tenth of the signal is noise
    assert first.timing.ratio == 1
    assert {each.compared_with for each in found.models} == {"a.onnx"}
    assert first.bytes == base.stat().st_size
    assert (found.calls, found.inputs) == (3, "x [4, 64]")


def test_a_slower_model_is_seen_to_be_slower(tmp_path: Path) -> None:
    base, large = write(tmp_path / "a.onnx"), write(tmp_path / "b.onnx", columns=40_000)
    data = tmp_path / "x.npz"
    np.savez(data, x=np.ones((16, 64), np.float32), label=np.arange(16))
    options = BenchOptions(SampleOptions(batch_size=16), seconds=0.01, threads=1)
    slow = bench([base, base, large], str(data), options).models[2]
    assert slow.timing.low > 2
    assert slow.output_db == -np.inf  # its outputs have another shape


def test_an_engine_does_not_come_first(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not say what its inputs mean"):
        bench([tmp_path / "a.engine", write(tmp_path / "b.onnx")], "random", QUICK)


def test_models_of_other_outputs_are_refused(tmp_path: Path) -> None:
    models = [write(tmp_path / "a.onnx"), write(tmp_path / "b.onnx", output="z")]
    with pytest.raises(TargetError, match="has no output y"):
        bench(models, "random", QUICK)


def test_every_runtime_has_a_first_model_of_its_own() -> None:
    timing = Timing(2.0, 0.5, 0.45, 0.55)
    models = (
        Benched("float.onnx", "ONNX Runtime", 4_000_000, None, "float.onnx", timing),
        Benched("int8.engine", "TensorRT", 1_000_000, 31.24, "half.engine", timing),
    )
    lines = bench_lines(Bench("x [1, 8]", 4, models))
    assert lines[2].split() == [
        *("int8.engine", "TensorRT", "1.00", "2.000", "0.50", "0.450-0.550", "31.2", "dB")
    ]
    assert json.loads(Bench("", 1, models).to_json())["models"][1]["compared_with"] == "half.engine"


def test_the_command_prints_a_line_for_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [str(write(tmp_path / "a.onnx")), str(write(tmp_path / "b.onnx"))]
    with pytest.raises(SystemExit) as done:
        main(["bench", *models, "--seconds", "0.01"])
    assert done.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["a.onnx", "b.onnx"]
    with pytest.raises(SystemExit) as done:
        main(["bench", *models, "--seconds", "0.01", "--report", "json"])
    content = json.loads(capsys.readouterr().out)
    assert [each["output_db"] for each in content["models"]] == [None, "inf"]
