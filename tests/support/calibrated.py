"""Compiling small models with calibrated activations, and seeing what ONNX Runtime runs."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from qcompiler.artefacts import CompileResult
from qcompiler.calibration.observers import Observer
from qcompiler.compile import compile_model
from qcompiler.options import CalibrationOptions, CompileOptions, EqualizationOptions
from qcompiler.quant.ranges import sqnr_db
from qcompiler.quant.recipe import Recipe
from tests.support.graphs import random_array
from tests.support.parity import run_model

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A model compiled with calibrated activations.

    Attributes:
        result: What the compiler returned.
        truth: Outputs of the source model, without optimizations.
        emulated: Outputs of the compiled model, without optimizations.
        native: Outputs of the compiled model, with all of them.
        optimized: The graph that ran then.
    """

    result: CompileResult
    truth: Mapping[str, Array]
    emulated: Mapping[str, Array]
    native: Mapping[str, Array]
    optimized: ir.Model

    @property
    def ops(self) -> list[str]:
        """What ONNX Runtime runs, without changes of layout, bodies included."""
        layout = ("Transpose", "ReorderInput", "ReorderOutput")
        found = [node.op_type for node in self.optimized.graph.all_nodes()]
        return [op for op in found if op not in layout]

    def kernel(self, name: str) -> str | None:
        """Return the kernel of a node, by its name in the source."""
        return next(node.kernel for node in self.result.report.nodes if node.name == name)

    def worst_db(self) -> float:
        """Return the SQNR of the output that is furthest from the source, native or emulated."""
        return min(
            distance_db(self.truth[name], found[name])
            for found in (self.emulated, self.native)
            for name in self.truth
            if self.truth[name].dtype.kind == "f"
        )

    def kernel_loss_db(self) -> float:
        """Return the SQNR of native against emulated outputs: what kernels add; inf is nothing."""
        return min(distance_db(self.emulated[name], self.native[name]) for name in self.truth)


def distance_db(truth: Array, found: Array) -> float:
    """Return the SQNR of one array against another of the same shape."""
    assert truth.shape == found.shape
    wide = truth.astype(np.float64)
    return sqnr_db(float((wide**2).sum()), float(((found.astype(np.float64) - wide) ** 2).sum()))


def compile_calibrated(
    model: ir.Model,
    feeds: Mapping[str, Array],
    folder: Path,
    *,
    recipe: Recipe | None = None,
    exclude: tuple[str, ...] = (),
    as_given: bool = False,
    two_terms_below: float = 3.0,
) -> Calibrated:
    """Compile a model with min-max ranges of one call, and run it on that call.

    Args:
        model: The model.
        feeds: The call.
        folder: Where files go.
        recipe: What each op gets; None is w8a8 for all.
        exclude: Nodes that stay in float.
        as_given: Whether weights and biases are quantized as they are: neither equalized nor
            corrected.
        two_terms_below: Activations of typically fewer steps get two terms.
    """
    np.savez(folder / "call.npz", **dict[str, Any](feeds))
    calibration = CalibrationOptions(
        str(folder / "call.npz"), observer=Observer.MIN_MAX, two_terms_below=two_terms_below
    )
    options = CompileOptions(
        recipe=recipe,
        exclude=exclude,
        calibration=calibration,
        never_slower=False,
        equalization=EqualizationOptions(None) if as_given else None,
        correct_bias=False if as_given else None,
    )
    result = compile_model(model, options, output=folder / "compiled.onnx")
    native, optimized = run_optimized(result.path, feeds)
    emulated = run_model(result.model(), feeds)
    return Calibrated(result, run_model(model, feeds), emulated, native, optimized)


def run_optimized(
    model: Path | bytes, feeds: Mapping[str, Array]
) -> tuple[dict[str, Array], ir.Model]:
    """Run a model with all optimizations on; return its outputs and the graph that ran."""
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 3
    session_options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session_options.optimized_model_filepath = str(path)
        source = str(model) if isinstance(model, Path) else model
        session = onnxruntime.InferenceSession(
            source, session_options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        outputs = session.run(names, dict(feeds))
        optimized = ir.load(path)
    return dict(zip(names, outputs, strict=True)), optimized


def conv_weight(*shape: int, seed: int = 0) -> Array:
    """Return a random Conv weight whose outputs have the size of its inputs."""
    values = random_array(*shape, seed=seed) / np.sqrt(np.prod(shape[1:]))
    narrow: Array = values.astype(np.float32)
    return narrow
