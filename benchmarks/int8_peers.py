"""What calibrated int8 models are compared with, and how each peer makes its model.

Imported by the interpreter that the peer is installed for, so nothing of qcompiler is imported
here, and every peer is imported by the method that runs it: by name, where this project never
installs it. Peers get what their documentation asks for: ONNX Runtime its own preprocessing, NNCF
the model's type.
"""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Feeds = dict[str, Array]
_EXTERNAL_FROM_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Task:
    """One model to make.

    Attributes:
        source: The float model.
        calls: Folder with one .npz file per call of the model.
        output: Where the int8 model goes.
        transformer: Whether the model is a transformer.
    """

    source: Path
    calls: Path
    output: Path
    transformer: bool

    def samples(self) -> Iterator[Feeds]:
        """Read the calls in order, one at a time."""
        for path in sorted(self.calls.glob("*.npz")):
            with np.load(path, allow_pickle=False) as arrays:
                yield dict(arrays)

    def equal_samples(self) -> Iterator[Feeds]:
        """Read the same calls, padded with zeros (masked, where there is a mask) to one shape."""
        shapes: dict[str, tuple[int, ...]] = {}
        for feeds in self.samples():
            for name, values in feeds.items():
                shape = tuple(values.shape)
                shapes[name] = tuple(map(max, shapes.get(name, shape), shape))
        for feeds in self.samples():
            yield {name: _padded(values, shapes[name]) for name, values in feeds.items()}


def _padded(values: Array, shape: tuple[int, ...]) -> Array:
    padded = np.zeros(shape, values.dtype)
    padded[tuple(slice(n) for n in values.shape)] = values
    return padded


class Peer(Protocol):
    """One setting of one quantizer.

    Attributes:
        family: Name of the quantizer, as in `--peer-python NAME=PATH`.
        module: What must be importable.
        distribution: The package it comes in.
        requirement: What `pip install` takes.
    """

    family: ClassVar[str]
    module: ClassVar[str]
    distribution: ClassVar[str]
    requirement: ClassVar[str]

    def quantize(self, task: Task) -> None:
        """Make the model."""


class _OnnxRuntime:
    family: ClassVar[str] = "onnxruntime"
    module: ClassVar[str] = "onnxruntime"
    distribution: ClassVar[str] = "onnxruntime"
    requirement: ClassVar[str] = "onnxruntime sympy"


@dataclass(frozen=True, slots=True)
class OrtStatic(_OnnxRuntime):
    """ONNX Runtime's `quantize_static`: Q/DQ, int8 weights per channel, after its preprocessing.

    Its histograms take calls of one shape only, so they get them padded.

    Attributes:
        method: How activation ranges are chosen.
        activations: Type of the activations.
        reduce_range: Whether weights keep to 7 bits, against saturation on CPUs without VNNI.
    """

    method: Literal["MinMax", "Entropy", "Percentile"]
    activations: Literal["u8", "i8"]
    reduce_range: bool = False

    def __str__(self) -> str:
        name = f"ort-static:{self.method.lower()}:{self.activations}"
        return f"{name}:7-bit" if self.reduce_range else name

    def quantize(self, task: Task) -> None:
        """Make the model."""
        from onnxruntime import quantization as library

        with tempfile.TemporaryDirectory(prefix="int8-peer-") as scratch:
            prepared = Path(scratch) / "prepared.onnx"
            preprocess(task.source, prepared)
            library.quantize_static(
                prepared,
                task.output,
                calibration_reader(task, equal=self.method != "MinMax"),
                quant_format=library.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=self.reduce_range,
                activation_type=(
                    library.QuantType.QUInt8
                    if self.activations == "u8"
                    else library.QuantType.QInt8
                ),
                weight_type=library.QuantType.QInt8,
                calibrate_method=library.CalibrationMethod[self.method],
            )


@dataclass(frozen=True, slots=True)
class OrtDynamic(_OnnxRuntime):
    """ONNX Runtime's `quantize_dynamic`: int8 weights, activations scaled at each run.

    Attributes:
        per_channel: Whether each output channel has a scale.
        reduce_range: Whether weights keep to 7 bits.
    """

    per_channel: bool = False
    reduce_range: bool = False

    def __str__(self) -> str:
        options = [":per-channel"] * self.per_channel + [":7-bit"] * self.reduce_range
        return "".join(["ort-dynamic", *options])

    def quantize(self, task: Task) -> None:
        """Make the model."""
        from onnxruntime import quantization as library

        with tempfile.TemporaryDirectory(prefix="int8-peer-") as scratch:
            prepared = Path(scratch) / "prepared.onnx"
            preprocess(task.source, prepared)
            library.quantize_dynamic(
                prepared,
                task.output,
                per_channel=self.per_channel,
                reduce_range=self.reduce_range,
                weight_type=library.QuantType.QInt8,
            )


@dataclass(frozen=True, slots=True)
class ModelOpt:
    """NVIDIA ModelOpt's int8 for ONNX.

    Attributes:
        method: How activation ranges are chosen.
    """

    method: Literal["max", "entropy"]

    family: ClassVar[str] = "modelopt"
    module: ClassVar[str] = "modelopt.onnx"
    distribution: ClassVar[str] = "nvidia-modelopt"
    requirement: ClassVar[str] = "'nvidia-modelopt[onnx]'"

    def __str__(self) -> str:
        return f"modelopt:{self.method}"

    def quantize(self, task: Task) -> None:
        """Make the model."""
        library = import_module("modelopt.onnx.quantization")
        # It leaves intermediate files beside its source.
        with tempfile.TemporaryDirectory(prefix="int8-peer-") as scratch:
            for file in task.source.parent.glob(f"{task.source.name}*"):
                shutil.copy(file, scratch)
            library.quantize(
                str(Path(scratch) / task.source.name),
                quantize_mode="int8",
                calibration_data_reader=calibration_reader(task),
                calibration_method=self.method,
                calibration_eps=["cpu"],
                high_precision_dtype="fp32",
                output_path=str(task.output),
            )


@dataclass(frozen=True, slots=True)
class Nncf:
    """NNCF's post-training quantization of ONNX models."""

    family: ClassVar[str] = "nncf"
    module: ClassVar[str] = "nncf"
    distribution: ClassVar[str] = "nncf"
    requirement: ClassVar[str] = "nncf onnx onnxruntime"

    def __str__(self) -> str:
        return "nncf"

    def quantize(self, task: Task) -> None:
        """Make the model."""
        import onnx

        library = import_module("nncf")
        advanced = import_module("nncf.quantization.advanced_parameters")
        samples = list(task.samples())
        settings: dict[str, Any] = {"subset_size": len(samples)}
        if task.transformer:
            settings["model_type"] = library.ModelType.TRANSFORMER
        try:
            model = library.quantize(onnx.load(task.source), library.Dataset(samples), **settings)
        except AttributeError:
            # On SmolLM2 its SmoothQuant looks for the values of weights that are none.
            off = advanced.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
            settings["advanced_parameters"] = advanced.AdvancedQuantizationParameters(
                smooth_quant_alphas=off
            )
            model = library.quantize(onnx.load(task.source), library.Dataset(samples), **settings)
        save(model, task.output)


@dataclass(frozen=True, slots=True)
class Onnxsim:
    """onnxsim's `quantize_static`.

    Attributes:
        method: How activation ranges are chosen.
        full_graph: Whether every float value is quantized, or only the inputs of MatMul, Gemm and
            Conv, which is its default.
    """

    method: Literal["minmax", "percentile", "entropy", "mse"]
    full_graph: bool = False

    family: ClassVar[str] = "onnxsim"
    module: ClassVar[str] = "onnxsim"
    distribution: ClassVar[str] = "onnxsim"
    requirement: ClassVar[str] = "'onnxsim>=0.8' onnxruntime"

    def __str__(self) -> str:
        return f"onnxsim:{self.method}{':full' if self.full_graph else ''}"

    def quantize(self, task: Task) -> None:
        """Make the model."""
        import onnx

        library = import_module("onnxsim")
        simplified, _ = library.simplify(onnx.load(task.source))
        model = library.quantize_static(
            simplified, list(task.samples()), method=self.method, full_graph=self.full_graph
        )
        save(model, task.output)


def preprocess(source: Path, prepared: Path) -> None:
    """Prepare a model as ONNX Runtime wants it: optimized, with all shapes that can be inferred."""
    from onnxruntime.quantization import quant_pre_process

    try:
        quant_pre_process(source, prepared)
    # What it raises where it cannot follow a symbolic shape has no type of its own.
    except Exception:
        quant_pre_process(source, prepared, skip_symbolic_shape=True)


def calibration_reader(task: Task, *, equal: bool = False) -> Any:
    """Return the calls as ONNX Runtime's quantizer, and ModelOpt's, want to read them.

    Args:
        task: What has the calls.
        equal: Whether they are padded to one shape.
    """
    from onnxruntime.quantization import CalibrationDataReader

    samples = task.equal_samples if equal else task.samples

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Gives one call after the other."""

        def __init__(self) -> None:
            self.rewind()

        def get_next(self) -> Feeds | None:
            """Return the next call, None after the last."""
            return next(self._calls, None)

        def get_first(self) -> Feeds:
            """Return the first call again."""
            return next(samples())

        def rewind(self) -> None:
            """Start again."""
            self._calls = samples()

    return Reader()


def save(model: Any, output: Path) -> None:
    """Write a model, large weights beside it."""
    import onnx

    if model.ByteSize() > _EXTERNAL_FROM_BYTES:
        onnx.save(model, output, save_as_external_data=True, location=f"{output.name}.data")
    else:
        onnx.save(model, output)


_METHODS: tuple[Literal["MinMax", "Entropy", "Percentile"], ...] = (
    "MinMax",
    "Entropy",
    "Percentile",
)
_TYPES: tuple[Literal["u8", "i8"], ...] = ("u8", "i8")

PEERS: tuple[Peer, ...] = (
    *(OrtStatic(*setting) for setting in product(_METHODS, _TYPES, (False, True))),
    OrtDynamic(),
    OrtDynamic(per_channel=True),
    OrtDynamic(per_channel=True, reduce_range=True),
    ModelOpt("max"),
    ModelOpt("entropy"),
    Nncf(),
    *(Onnxsim(method) for method in ("minmax", "percentile", "entropy", "mse")),
    Onnxsim("minmax", full_graph=True),
    Onnxsim("percentile", full_graph=True),
)
FAMILIES = tuple(dict.fromkeys(peer.family for peer in PEERS))
