"""How near a compiled model's outputs are to those of its source, on samples."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.calibration.held_out import spread
from qcompiler.execution.differences import SMALLEST_PROBABILITY, Meaning, meaning_of
from qcompiler.execution.narrow_floats import emulated, has_bfloat16, runnable
from qcompiler.execution.sessions import Session, open_session
from qcompiler.ir.provenance import COMPUTE_TYPE
from qcompiler.progress import Progress, SilentProgress
from qcompiler.quant.ranges import sqnr_db

_ROW_BYTES: Final = 64 << 20
"""Rows of distributions of one call that are compared, at most, as float64."""
MOST_CALLS: Final = 8
"""Enough for a figure of a tenth of a decibel, and seconds of work."""


@dataclass(frozen=True, slots=True)
class OutputQuality:
    """How near one output is to the source model's.

    Attributes:
        name: The output.
        native_db: SQNR in dB as the runtime runs the model; infinite where nothing changed, None
            where this machine has no kernels for it.
        emulated_db: The same with the runtime's optimizations off, which computes Q/DQ nodes in
            float, and with every value rounded that is stored in 16 bits: what the quantization
            itself costs, without what kernels add.
    """

    name: str
    native_db: float | None
    emulated_db: float


@dataclass(slots=True)
class _Energies:
    """Sums of squares of one output over the calls."""

    signal: float = 0.0
    native: float = 0.0
    emulated: float = 0.0


def output_quality(
    source: Path,
    compiled: Path,
    samples: Samples,
    *,
    native: bool = True,
    custom_op_libraries: Sequence[Path] = (),
    progress: Progress | None = None,
) -> tuple[OutputQuality, ...]:
    """Run source and compiled model on some of the calls and compare their float outputs.

    Args:
        source: The source model, which runs without optimizations.
        compiled: The compiled model.
        samples: The calls; at most 8 are used, evenly spread.
        native: Whether ONNX Runtime's own run of the compiled model is of interest.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
        progress: Where the work is shown.

    Raises:
        TargetError: ONNX Runtime cannot run one of the models.
    """
    progress = progress or SilentProgress()
    count = min(len(samples), MOST_CALLS)
    energies: dict[str, _Energies] = {}
    with ExitStack() as stack, progress.task("comparing outputs", count) as advance:
        graph = ir.load(compiled, format="protobuf")
        native = native and not has_bfloat16(graph)
        models: list[tuple[Path | ir.Model, bool]] = [(_from_file(source), False)]
        if native:
            models.append((compiled, True))
        cast = COMPUTE_TYPE in graph.metadata_props
        models.append((emulated(graph) if cast else _from_file(compiled), False))
        sessions = [
            stack.enter_context(
                open_session(model, optimize=optimize, custom_op_libraries=custom_op_libraries)
            )
            for model, optimize in models
        ]
        for feeds in spread(samples, MOST_CALLS):
            _add(sessions, feeds, energies)
            advance(1)
    return tuple(
        OutputQuality(
            name, sqnr_db(e.signal, e.native) if native else None, sqnr_db(e.signal, e.emulated)
        )
        for name, e in energies.items()
    )


class Reference:
    """What a model returns on some calls, to compare variants of it with.

    Args:
        model: The model; it runs without optimizations.
        samples: The calls; of some evenly spread over them as many are used as fit.
        memory: Bytes that kept outputs may take; one call is used at least.
        most_calls: Calls at most.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
    """

    def __init__(
        self,
        model: ir.Model,
        samples: Samples,
        *,
        memory: int,
        most_calls: int,
        custom_op_libraries: Sequence[Path] = (),
    ) -> None:
        self._libraries = tuple(custom_op_libraries)
        found = {value.name or "": meaning_of(value) for value in model.graph.outputs}
        self._meanings = {name: m for name, m in found.items() if m is not None}
        self._calls: list[tuple[Feeds, dict[str, npt.NDArray[Any]]]] = []
        with self._session(model) as session:
            for feeds in spread(samples, most_calls):
                outputs = session.run(feeds)
                size = sum(array.nbytes for array in (*feeds.values(), *outputs.values()))
                memory -= size
                if self._calls and memory < 0:
                    break
                self._calls.append((feeds, outputs))

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def of_distributions(self) -> bool:
        """Whether nearness is a divergence, since outputs are distributions."""
        return bool(self._meanings)

    @property
    def feeds(self) -> list[Feeds]:
        """The calls that were kept."""
        return [feeds for feeds, _ in self._calls]

    def sqnr_db(self, variant: ir.Model) -> float:
        """Return the SQNR in dB of the output that is furthest from the model's.

        The variant runs without optimizations. NaN counts as infinitely far.
        """
        return self.sqnr_db_each(variant, [{}])[0]

    def sqnr_db_each(self, variant: ir.Model, settings: Sequence[Feeds]) -> list[float]:
        """Return the same for a variant with more inputs, for each setting of these."""
        with self._session(variant) as session:
            return [self._worst(session, setting) for setting in settings]

    def nearness_each(self, variant: ir.Model, settings: Sequence[Feeds]) -> list[float]:
        """Return a figure for each setting that is larger the nearer the outputs are.

        Where outputs are distributions it is less their mean Kullback-Leibler divergence per row,
        of the worst: the energy of logits is mostly that of a few rows. Elsewhere it is the SQNR.
        """
        if not self._meanings:
            return self.sqnr_db_each(variant, settings)
        with self._session(variant) as session:
            return [-self._divergence(session, setting) for setting in settings]

    def _divergence(self, session: Session, setting: Feeds) -> float:
        sums = dict.fromkeys(self._meanings, 0.0)
        rows = dict.fromkeys(self._meanings, 0)
        for feeds, outputs in self._calls:
            found = session.run(session.fitting(feeds) | setting)
            for name, meaning in self._meanings.items():
                step = max(1, -(-8 * outputs[name].size // _ROW_BYTES))
                wide, other = (
                    each[name].reshape(-1, each[name].shape[-1])[::step]
                    for each in (outputs, found)
                )
                sums[name] += float(row_divergences(wide, other, meaning).sum())
                rows[name] += len(wide)
        each = [sums[name] / max(1, rows[name]) for name in sums]
        return max(each) if np.isfinite(each).all() else np.inf

    def _worst(self, session: Session, setting: Feeds) -> float:
        signal: dict[str, float] = {}
        noise: dict[str, float] = {}
        for feeds, outputs in self._calls:
            found = session.run(session.fitting(feeds) | setting)
            for name, values in outputs.items():
                if is_float(values):
                    signal[name] = signal.get(name, 0.0) + energy(values.astype(np.float64))
                    noise[name] = noise.get(name, 0.0) + distance(values, found[name])
        return min((sqnr_db(signal[name], noise[name]) for name in signal), default=np.inf)

    def _session(self, model: ir.Model) -> Session:
        model = runnable(model)
        return open_session(model, optimize=False, custom_op_libraries=self._libraries)


def _from_file(path: Path) -> Path | ir.Model:
    """Return a model's file, whose weights the runtime can map; or what can be run in its place."""
    model = ir.load(path, format="protobuf")
    return emulated(model) if has_bfloat16(model) else path


def _add(sessions: Sequence[Session], feeds: Feeds, energies: dict[str, _Energies]) -> None:
    """Add what the source model returns, and how far the others are: the emulated one is last."""
    reference, *others = (session.run(session.fitting(feeds)) for session in sessions)
    for name, values in reference.items():
        if not is_float(values):
            continue
        entry = energies.setdefault(name, _Energies())
        entry.signal += energy(values.astype(np.float64))
        entry.native += distance(values, others[0][name])
        entry.emulated += distance(values, others[-1][name])


def row_divergences(
    truth: npt.NDArray[Any], other: npt.NDArray[Any], meaning: Meaning
) -> npt.NDArray[np.float64]:
    """Return how far distributions along the last axis diverge from true ones, in nats.

    Args:
        truth: The true ones, `[..., classes]`.
        other: Those that stand for them, of the same shape.
        meaning: What both hold.

    Returns:
        The Kullback-Leibler divergence of each row, `[...]`.
    """
    wide, close = truth.astype(np.float64), other.astype(np.float64)
    if meaning is Meaning.PROBABILITIES:
        logs = [np.log(np.maximum(each, SMALLEST_PROBABILITY)) for each in (wide, close)]
    else:
        logs = [log_softmax(each) for each in (wide, close)]
    return np.asarray((np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1))


def log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the logarithms of the probabilities along the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def is_float(values: npt.NDArray[Any]) -> bool:
    """Whether an array holds floating-point numbers."""
    return values.dtype.kind == "f" or values.dtype.name == "bfloat16"


def distance(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """Return the sum of squared differences, infinite where shapes differ or one is not finite."""
    if one.shape != other.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):
        difference = one.astype(np.float64) - other.astype(np.float64)
    return energy(np.where(one == other, 0.0, difference))


def energy(values: npt.NDArray[np.float64]) -> float:
    """Return the sum of squares, infinite where one is not finite."""
    found = float(np.square(values).sum())
    return found if np.isfinite(found) else float("inf")
