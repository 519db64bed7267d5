"""Whether two models compute the same, judged by ONNX Runtime without its optimizations."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

_SYMBOLIC_DIM = 2


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one output is from what it should be.

    Attributes:
        output: Name of the output.
        max_abs: Largest `|after - before|`.
        max_rel: `max_abs / max|before|`.
        sqnr_db: Signal to noise ratio in dB; infinite for equal values.
        same_bits: Whether dtype, shape and every byte agree.
    """

    output: str
    max_abs: float
    max_rel: float
    sqnr_db: float
    same_bits: bool

    def __str__(self) -> str:
        return (
            f"{self.output}: max abs {self.max_abs:.3e}, max rel {self.max_rel:.3e}, "
            f"SQNR {self.sqnr_db:.1f} dB"
        )


def random_feeds(model: ir.Model, seed: int, dims: Mapping[str, int] | None = None) -> Feeds:
    """Return one random value for every graph input without a default.

    Args:
        model: The model.
        seed: Seed of the generator.
        dims: Sizes of symbolic dimensions by name; the others get 2.
    """
    generator = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        assert value.name
        assert value.dtype
        assert value.shape is not None
        shape = [_size(dim, dims or {}) for dim in value.shape]
        dtype = value.dtype.numpy()
        if value.dtype == ir.DataType.BOOL:
            feeds[value.name] = generator.integers(0, 2, shape).astype(dtype)
        elif np.issubdtype(dtype, np.integer):
            feeds[value.name] = generator.integers(0, 4, shape).astype(dtype)
        else:
            feeds[value.name] = generator.standard_normal(shape).astype(dtype)
    return feeds


def run_model(model: ir.Model, feeds: Feeds) -> dict[str, Array]:
    """Run a model in ONNX Runtime on the CPU with all graph optimizations off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="model.data")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def assert_parity(
    before: ir.Model,
    after: ir.Model,
    *,
    tolerance: float,
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    feeds: Feeds | None = None,
) -> None:
    """Fail unless both models give the same outputs.

    Args:
        before: The model that is right.
        after: The model to judge.
        tolerance: Largest allowed `max|after - before| / max|before|` over an output; 0 asks for
            equal bits. There is no default: a test states what its pass promises.
        seed: Seed of the random feeds.
        dims: Sizes of symbolic dimensions of the inputs.
        feeds: Inputs to use in place of random ones.
    """
    used = feeds if feeds is not None else random_feeds(before, seed, dims)
    expected, found = run_model(before, used), run_model(after, used)
    assert list(expected) == list(found), f"outputs {list(expected)} became {list(found)}"
    differences = [_difference(name, expected[name], found[name]) for name in expected]
    wrong = [item for item in differences if not _within(item, tolerance)]
    listed = "\n".join(str(item) for item in wrong)
    assert not wrong, f"beyond tolerance {tolerance:g} with seed {seed}:\n{listed}"


def _within(difference: Difference, tolerance: float) -> bool:
    return difference.same_bits or (tolerance > 0 and difference.max_rel <= tolerance)


def _difference(name: str, expected: Array, found: Array) -> Difference:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return Difference(name, np.inf, np.inf, -np.inf, same_bits=False)
    same = expected.tobytes() == found.tobytes()
    if same or expected.dtype == object:
        return Difference(name, 0.0, 0.0 if same else np.inf, np.inf, same_bits=same)
    truth = expected.astype(np.float64)
    error = found.astype(np.float64) - truth
    max_abs = float(np.max(np.abs(error), initial=0.0))
    peak = float(np.max(np.abs(truth), initial=0.0))
    signal, noise = float(np.sum(truth**2)), float(np.sum(error**2))
    with np.errstate(divide="ignore", invalid="ignore"):
        sqnr = float(10 * np.log10(np.float64(signal) / np.float64(noise)))
        relative = float(np.float64(max_abs) / np.float64(peak)) if max_abs else 0.0
    return Difference(name, max_abs, relative, sqnr, same_bits=False)


def _size(dim: int | ir.SymbolicDim, dims: Mapping[str, int]) -> int:
    return dim if isinstance(dim, int) else dims.get(str(dim.value), _SYMBOLIC_DIM)
