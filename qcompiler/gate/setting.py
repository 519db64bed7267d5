"""What a gate works with, opened."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from qcompiler.bounds import Gate
from qcompiler.calibration.calls import Feeds, SampleOptions, Samples
from qcompiler.calibration.input_statistics import InputStatistics
from qcompiler.calibration.largest_call import largest_call
from qcompiler.calibration.task_metrics import TaskMetric
from qcompiler.errors import UsageError
from qcompiler.execution.narrow_floats import has_bfloat16, runnable
from qcompiler.ir.dataflow import standard_opset
from qcompiler.ir.fingerprint import fingerprint
from qcompiler.ir.load import load_model
from qcompiler.ir.stored_size import stored_bytes
from qcompiler.progress import Progress
from qcompiler.report.files import read_manifest
from qcompiler.report.records import FileFacts
from qcompiler.report.verdict import Recorded


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that is to be judged, and what is known about it.

    Attributes:
        path: The file.
        name: What reports call it.
        calibrated: What calibration saw of its inputs, by name; empty if that is not known.
        sha256: Hash that it should have by its manifest, None without one.
        calibration_sha256: Hash over the samples it was calibrated on, None if not known.
    """

    path: Path
    name: str
    calibrated: Mapping[str, InputStatistics] = field(default_factory=dict)
    sha256: str | None = None
    calibration_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class GateOptions:
    """How a gate measures.

    Attributes:
        samples: How data is read.
        threads: Threads of one operator while latency and memory are measured.
        custom_op_libraries: Shared libraries with custom operators.
        native: Whether ONNX Runtime is what will run the candidate; else outputs are compared
            without its optimizations, and time and memory are not measured.
    """

    samples: SampleOptions = field(default_factory=SampleOptions)
    threads: int | None = None
    custom_op_libraries: tuple[Path, ...] = ()
    native: bool = True


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that is measured: its file, what was loaded from it, and facts for reports."""

    path: Path
    model: ir.Model
    facts: FileFacts

    @property
    def runs_here(self) -> bool:
        """Whether ONNX Runtime has kernels for it on a CPU."""
        return not has_bfloat16(self.model)

    @property
    def to_run(self) -> Path | ir.Model:
        """The file, or what can be run in its place."""
        return self.path if self.runs_here else runnable(self.model)


@dataclass(frozen=True, slots=True)
class Setting:
    """All that is measured and judged.

    Attributes:
        base: The float model.
        candidate: The model that is judged.
        released: The last release, if its file is there; it is measured beside the candidate.
        recorded: What was measured of the last release, if its file is not there.
        gate: The bounds.
        options: How it is measured.
        metric: The measure of the task, or None.
        samples: What it is judged on.
        progress: Where long work is shown.
    """

    base: Opened
    candidate: Opened
    released: Opened | None
    recorded: Recorded | None
    gate: Gate
    options: GateOptions
    metric: TaskMetric | None
    samples: Samples
    progress: Progress

    @property
    def others(self) -> list[Opened]:
        """The models that are held against the float model."""
        return [self.candidate, *([] if self.released is None else [self.released])]

    @property
    def native(self) -> bool:
        """Whether what ONNX Runtime makes of the models is what counts."""
        models = (self.base, *self.others)
        return self.options.native and all(model.runs_here for model in models)

    def largest_feeds(self) -> Feeds:
        """Return the inputs that latency and memory are measured on."""
        call = largest_call(self.samples)
        names = [value.name or "" for value in self.base.model.graph.inputs]
        return {name: call[name] for name in names if name in call}


def candidate_at(path: Path, manifest: Path | None = None) -> Candidate:
    """Return a model with what its manifest says of it.

    Args:
        path: The model.
        manifest: Its manifest; None is the file of that name beside it, if there is one.

    Raises:
        UsageError: The manifest cannot be read.
    """
    beside = path.with_suffix(".manifest.json")
    if manifest is None and not beside.is_file():
        return Candidate(path, path.name)
    source = manifest or beside
    found = read_manifest(source)
    try:
        inputs = {name: InputStatistics.from_table(t) for name, t in found.inputs.items()}
    except (KeyError, TypeError, ValueError) as error:
        message = f"its statistics of inputs cannot be read: {error}"
        raise UsageError(message, where=str(source)) from error
    calibration = found.settings.get("calibration") or {}
    return Candidate(path, path.name, inputs, found.output.sha256, calibration.get("sha256"))


def opened(path: Path, name: str) -> Opened:
    """Load a model.

    Raises:
        UsageError: There is no such file.
        ModelError: It is malformed.
    """
    model = load_model(path)
    size = stored_bytes(path, model)
    return Opened(path, model, FileFacts(name, size, fingerprint(path), standard_opset(model)))
