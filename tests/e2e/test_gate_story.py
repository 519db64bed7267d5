"""What stops a pipeline: a real model, four ways to spoil it, and what the gate says of each."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks.models import cifar_cnn
from qcompiler.bounds import gate_from_texts
from qcompiler.calibration.calls import SampleOptions
from qcompiler.calibration.observers import Observer
from qcompiler.compile import compile_model
from qcompiler.gate.check import run_gate
from qcompiler.gate.setting import Candidate, GateOptions, candidate_at
from qcompiler.options import CalibrationOptions, CompileOptions
from qcompiler.report.verdict import Suspect, Verdict
from tests.support.real_models import real_model

pytestmark = pytest.mark.slow

BOUNDS = (
    *("min-sqnr=20", "min-agreement=0.95", "max-kl=0.05", "max-input-shift=0.1"),
    *("metric=top1", "max-metric-drop=0.02", "max-size=0.6", "max-bits=9"),
)
TESTED, CALIBRATED = 500, 200
CORRUPTED = "conv2d_4"


@dataclass(frozen=True, slots=True)
class Story:
    """A folder with the float model, data, and the good model."""

    folder: Path
    base: Path

    def compiled(self, name: str, scheme: str, data: str | None = None) -> Path:
        """Compile the float model as `name`."""
        calibration = None
        if data is not None:
            source = str(self.folder / data)
            samples = SampleOptions(batch_size=10)
            calibration = CalibrationOptions(source, samples, observer=Observer.MIN_MAX)
        options = CompileOptions(
            scheme=scheme,
            calibration=calibration,
            never_slower=False if data is not None else None,
            inspect_kernels=False,
        )
        return compile_model(self.base, options, output=self.folder / f"{name}.onnx").path

    def verdict(self, candidate: Candidate, *bounds: str) -> Verdict:
        """Judge a model on the test images."""
        gate = gate_from_texts([f"data={self.folder / 'test.npz'}", *bounds])
        assert gate is not None
        return run_gate(self.base, candidate, gate, GateOptions(SampleOptions(batch_size=50)))


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    base = real_model(cifar_cnn.NAME)
    folder = tmp_path_factory.mktemp("story")
    images, labels = cifar_cnn.read_images(0, TESTED)
    np.savez(folder / "test.npz", images=images, label=labels)
    last = cifar_cnn.TEST_IMAGES
    rgb, _ = cifar_cnn.read_images(last - CALIBRATED, last)
    np.savez(folder / "rgb.npz", images=rgb)
    np.savez(folder / "bgr.npz", images=rgb[:, ::-1])
    made = Story(folder, base)
    made.compiled("good", "w8a8", "rgb.npz")
    return made


def _named(suspects: tuple[Suspect, ...]) -> list[tuple[str, str]]:
    return [(suspect.kind, suspect.name) for suspect in suspects[:3]]


def test_a_good_model_passes(story: Story) -> None:
    verdict = story.verdict(candidate_at(story.folder / "good.onnx"), *BOUNDS)
    assert verdict.passed, verdict.failed
    assert verdict.samples == TESTED


@pytest.mark.parametrize("with_manifest", [False, True])
def test_corrupted_weights_of_one_layer(story: Story, with_manifest: bool) -> None:
    model = ir.load(story.folder / "good.onnx")
    codes = model.graph.initializers[f"{CORRUPTED}.weight.codes"]
    assert codes.const_value is not None
    values = codes.const_value.numpy().copy().reshape(-1)
    np.random.default_rng(0).shuffle(values[: len(values) // 3])
    shape = codes.const_value.shape.numpy()
    codes.const_value = ir.tensor(values.reshape(shape), name=codes.name)
    path = story.folder / "corrupted.onnx"
    ir.save(model, path)
    good = story.folder / "good.manifest.json"
    candidate = candidate_at(path, good) if with_manifest else Candidate(path, path.name)
    verdict = story.verdict(candidate, *BOUNDS)
    assert {"min_sqnr", "max_metric_drop"} <= {finding.bound for finding in verdict.failed}
    first = [("file", "the candidate")] if with_manifest else []
    assert _named(verdict.suspects)[: len(first) + 1] == [*first, ("node", CORRUPTED)]


def test_images_in_bgr_as_calibration_data(story: Story) -> None:
    path = story.compiled("bgr", "w8a8", "bgr.npz")
    verdict = story.verdict(candidate_at(path), *BOUNDS)
    assert "max_input_shift" in {finding.bound for finding in verdict.failed}
    assert _named(verdict.suspects)[0] == ("data", "input images")
    assert "BGR for RGB" in verdict.suspects[0].sentence


def test_a_scheme_that_is_too_low(story: Story) -> None:
    path = story.compiled("low", "w2a16:b64")
    verdict = story.verdict(candidate_at(path), *BOUNDS)
    assert "min_sqnr" in {finding.bound for finding in verdict.failed}
    assert ("scheme", "w2a16") in _named(verdict.suspects)
