"""A real model in which channels were made to leave float16, exactly: it is cast all the same."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks.planted import OVERFLOW, plant_overflow
from qcompiler import CompileOptions, compile_model
from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.execution.narrow_floats import emulated
from qcompiler.passes.lower.cast_measure import measure_extremes
from qcompiler.quant.ranges import sqnr_db
from tests.support.graphs import random_array
from tests.support.parity import run_model

DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "digits.onnx"
FLOAT16_MAX = 65504


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planted") / "planted.onnx"
    assert plant_overflow(DIGITS, path) == 2
    return path


@pytest.fixture(scope="module")
def call() -> Feeds:
    name = ir.load(DIGITS).graph.inputs[0].name or ""
    images = np.abs(random_array(8, 1, 8, 8, seed=1)).clip(0, 1)
    return {name: images.astype(np.float32)}


def test_nothing_changes_but_the_range(planted: Path, call: Feeds) -> None:
    before, after = run_model(ir.load(DIGITS), call), run_model(ir.load(planted), call)
    for name, truth in before.items():
        # A power of two rounds nothing; folding BatchNormalization did, a little.
        np.testing.assert_allclose(after[name], truth, rtol=1e-4, atol=1e-4)
    samples = Samples("test", False, 1, lambda: iter([dict(call)]))
    held = measure_extremes(ir.load(planted), samples, lambda _: None)
    assert FLOAT16_MAX < max(each.peak for each in held.values()) < 100 * OVERFLOW


def test_it_is_cast_without_an_infinity(
    planted: Path,
    call: Feeds,
    tmp_path: Path,
) -> None:
    np.savez(tmp_path / "calls.npz", **call)  # type: ignore[arg-type]
    options = CompileOptions(
        scheme="float16", target="tensorrt-rtx", calibration=str(tmp_path / "calls.npz")
    )
    result = compile_model(planted, options, output=tmp_path / "out.onnx")
    reasons = [node.type_reason for node in result.report.nodes if node.type_reason]
    assert any("on the samples" in reason or "reaches" in reason for reason in reasons)
    truth = run_model(ir.load(planted), call)
    for name, values in run_model(emulated(result.model()), call).items():
        error = np.square(values - truth[name]).sum()
        assert sqnr_db(float(np.square(truth[name]).sum()), float(error)) > 50
