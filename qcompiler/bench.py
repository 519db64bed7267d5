"""How fast models and engines are next to each other, and how near their outputs are."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompiler.bounds import Gate
from qcompiler.calibration.calls import Feeds, SampleOptions, Samples
from qcompiler.calibration.held_out import spread
from qcompiler.calibration.largest_call import largest_call
from qcompiler.calibration.quality import MOST_CALLS, distance, energy, is_float
from qcompiler.calibration.samples import open_samples
from qcompiler.engine import SUFFIXES
from qcompiler.errors import TargetError, UsageError
from qcompiler.execution.latency import Budget, Timing, run_in_turns, summarized
from qcompiler.execution.sessions import Session, open_session
from qcompiler.export.engine_session import EngineSession, library_of
from qcompiler.ir.load import load_model
from qcompiler.ir.stored_size import stored_bytes
from qcompiler.progress import Progress, SilentProgress
from qcompiler.quant.ranges import sqnr_db

Array = npt.NDArray[Any]

_FEWEST_ROUNDS: Final = 15
_ONNX_RUNTIME: Final = "ONNX Runtime"


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """How models are compared.

    Attributes:
        samples: How samples are read.
        seconds: Time that all models of a runtime get together.
        threads: Threads of one operator in ONNX Runtime; None leaves it to ONNX Runtime.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
    """

    samples: SampleOptions
    seconds: float = 10.0
    threads: int | None = None
    custom_op_libraries: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Benched:
    """What was measured of one model or engine.

    Attributes:
        name: Its file.
        runtime: What ran it.
        bytes: Of its files.
        output_db: SQNR in dB of its furthest output against the first model's, as both runtimes
            run them; None for the first model, and where no float output has a counterpart.
        compared_with: The first model of the same runtime, which its time is relative to.
        timing: Of the largest call.
    """

    name: str
    runtime: str
    bytes: int
    output_db: float | None
    compared_with: str
    timing: Timing


@dataclass(frozen=True, slots=True)
class Bench:
    """A comparison.

    Attributes:
        inputs: Shapes of the call that was timed.
        calls: On how many calls outputs were compared.
        models: In the order they were given.
    """

    inputs: str
    calls: int
    models: tuple[Benched, ...]

    def to_json(self) -> str:
        """Return everything as JSON text; what is not finite as the text of Python for it."""
        content = asdict(self)
        for each in content["models"]:
            if each["output_db"] is not None and not isfinite(each["output_db"]):
                each["output_db"] = str(each["output_db"])
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True, slots=True)
class _Opened:
    """A model that is loaded.

    Attributes:
        path: Its file.
        runtime: What runs it.
        size: Bytes of its files.
        run: Returns its outputs.
        timed: Returns what is timed: a run on some call.
    """

    path: Path
    runtime: str
    size: int
    run: Callable[[Feeds], dict[str, Array]]
    timed: Callable[[Feeds], Callable[[], object]]


def bench(
    models: Sequence[Path], data: str, options: BenchOptions, *, progress: Progress | None = None
) -> Bench:
    """Run models and engines on the same calls.

    Args:
        models: ONNX models, and engines of TensorRT or TensorRT-RTX (.engine, .plan). The first is
            an ONNX model: samples are read for it, and outputs compared with its. Times are
            compared with those of the first one that the same runtime runs.
        data: Samples, as `calibration.samples.open_samples` takes them.
        options: How.
        progress: Where it is shown.

    Raises:
        UsageError: The first is an engine, samples cannot be used, or a library is missing.
        TargetError: A runtime cannot load or run one of them, or there is no GPU for an engine.
    """
    progress = progress or SilentProgress()
    base = models[0]
    if base.suffix in SUFFIXES:
        message = "the first model is an engine, which does not say what its inputs mean"
        raise UsageError(message, where=str(base), hint="name the ONNX model it was made from")
    graph = load_model(base)
    samples = open_samples(data, graph, options.samples, label=Gate().labels)
    with ExitStack() as stack:
        opened = [_open(path, options, stack) for path in models]
        compared = spread(samples, MOST_CALLS)
        near = _nearness(opened, compared, progress)
        names = {value.name for value in graph.graph.inputs}
        call = {name: each for name, each in largest_call(samples).items() if name in names}
        timings = _timings(opened, call, options, progress)
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in call.items())
    found = [
        Benched(each.path.name, each.runtime, each.size, db, first.path.name, timing)
        for each, db, (first, timing) in zip(opened, near, timings, strict=True)
    ]
    return Bench(shapes, len(compared), tuple(found))


def _open(path: Path, options: BenchOptions, stack: ExitStack) -> _Opened:
    if path.suffix in SUFFIXES:
        engine = stack.enter_context(EngineSession(path))
        size = path.stat().st_size
        return _Opened(path, library_of(path).title, size, engine.run, engine.timed)
    size = stored_bytes(path, load_model(path))
    session = stack.enter_context(
        open_session(
            path,
            optimize=True,
            threads=options.threads,
            in_turns=True,
            custom_op_libraries=options.custom_op_libraries,
        )
    )

    def run(feeds: Feeds) -> dict[str, Array]:
        return session.run(_fitting(session, feeds))

    def timed(feeds: Feeds) -> Callable[[], object]:
        return partial(session.run, _fitting(session, feeds))

    return _Opened(path, _ONNX_RUNTIME, size, run, timed)


def _fitting(session: Session, feeds: Feeds) -> Feeds:
    wanted = session.input_names
    return session.fitting({name: each for name, each in feeds.items() if name in wanted})


def _nearness(
    opened: Sequence[_Opened], samples: Samples, progress: Progress
) -> list[float | None]:
    """Return how near the outputs of each are to those of the first, None for that one."""
    signal: dict[tuple[int, str], float] = {}
    noise: dict[tuple[int, str], float] = {}
    with progress.task("comparing outputs", len(samples)) as advance:
        for feeds in samples:
            truth, *others = (each.run(feeds) for each in opened)
            for index, outputs in enumerate(others, start=1):
                _require_outputs(opened[index].path, truth, outputs)
                for name, values in truth.items():
                    if is_float(values):
                        key = index, name
                        power = energy(values.astype(np.float64))
                        signal[key] = signal.get(key, 0.0) + power
                        noise[key] = noise.get(key, 0.0) + distance(values, outputs[name])
            advance(1)
    found: list[float | None] = [None]
    for index in range(1, len(opened)):
        each = [sqnr_db(signal[key], noise[key]) for key in signal if key[0] == index]
        found.append(min(each, default=None))
    return found


def _require_outputs(path: Path, expected: Mapping[str, Array], found: Mapping[str, Array]) -> None:
    missing = [name for name in expected if name not in found]
    if missing:
        message = f"has no output {', '.join(missing)}, which the first model has"
        hint = "compare models that were made from one"
        raise TargetError(message, where=str(path), hint=hint)


def _timings(
    opened: Sequence[_Opened], call: Feeds, options: BenchOptions, progress: Progress
) -> list[tuple[_Opened, Timing]]:
    """Time all models of each runtime in turns; the first of them is what the others are to."""
    found: dict[Path, tuple[_Opened, Timing]] = {}
    runtimes = list(dict.fromkeys(each.runtime for each in opened))
    with progress.task("measuring latency", len(runtimes)) as advance:
        for runtime in runtimes:
            group = [each for each in opened if each.runtime == runtime]
            budget = Budget(options.seconds, fewest=_FEWEST_ROUNDS)
            rows = run_in_turns([each.timed(call) for each in group], budget)
            for each, timing in zip(group, summarized(rows), strict=True):
                found[each.path] = group[0], timing
            advance(1)
    return [found[each.path] for each in opened]


def bench_lines(found: Bench) -> list[str]:
    """Return a comparison as lines for a terminal."""
    width = max(len(each.name) for each in found.models)
    heads = f"{'runtime':12}  {'MB':>9}  {'ms':>9}  {'time':>5}  {'19 of 20':>12}  outputs"
    lines = [f"{'':{width}}  {heads}"]
    for each in found.models:
        timing = each.timing
        near = "" if each.output_db is None else f"{each.output_db:.1f} dB"
        between = f"{timing.low:.3f}-{timing.high:.3f}"
        lines.append(
            f"{each.name:{width}}  {each.runtime:12}  {each.bytes / 1e6:9.2f}  "
            f"{timing.milliseconds:9.3f}  {timing.ratio:5.2f}  {between:>12}  {near}".rstrip()
        )
    lines.append(f"time: relative to the first model of the same runtime, on {found.inputs}")
    lines.append(
        f"outputs: SQNR against {found.models[0].name}, as both are run, on {found.calls} calls"
    )
    return lines
