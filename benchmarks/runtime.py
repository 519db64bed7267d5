"""Running models in ONNX Runtime, the same way in every benchmark."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from qcompiler.quant.ranges import sqnr_db

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
_ERRORS_ONLY = 3


class _Named(Protocol):
    @property
    def name(self) -> str: ...


class Session(Protocol):
    """What benchmarks need of something that runs a model."""

    def get_outputs(self) -> Sequence[_Named]:
        """Return the outputs, in order."""

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Array]) -> list[Array]:
        """Run once; return some outputs, or all of them in order."""


SessionFactory = Callable[[], Session]
ModelSource = Path | SessionFactory


def session_factory(
    path: Path, *, optimized: bool = True, threads: int = 1, reuse_buffers: bool = True
) -> SessionFactory:
    """Return a function that opens `path` on the CPU.

    Args:
        path: The `.onnx` file.
        optimized: Whether ONNX Runtime may rewrite the graph. A Q/DQ model is worth scoring both
            ways: without, its Q/DQ nodes run as written; with, integer kernels take over.
        threads: Threads used inside one operator.
        reuse_buffers: Whether values may share memory, which takes shapes in the file that are
            true.
    """

    def open_session() -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        options.enable_mem_reuse = reuse_buffers
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
        )
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    return open_session


def open_session(source: ModelSource) -> Session:
    """Open a model given as a path (optimized, one thread) or as a function that opens it."""
    return session_factory(source)() if isinstance(source, Path) else source()


def run(session: Session, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run once and return the outputs by name."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def output_sqnr(reference: ModelSource, candidate: ModelSource, feeds: Sequence[Feeds]) -> float:
    """Return the SQNR in dB of the first output of `candidate`, over all feeds together."""
    before, after = open_session(reference), open_session(candidate)
    name = before.get_outputs()[0].name
    signal = error = 0.0
    for feed in feeds:
        expected = np.asarray(before.run([name], feed)[0], np.float64)
        actual = np.asarray(after.run([name], feed)[0], np.float64)
        signal += float(np.square(expected).sum())
        error += float(np.square(actual - expected).sum())
    return sqnr_db(signal, error)
