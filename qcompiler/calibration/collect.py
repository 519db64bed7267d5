"""Collecting statistics: running a model on samples, in as many rounds as memory asks for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import Samples
from qcompiler.calibration.statistics import (
    CallExtremes,
    Statistics,
    TensorAccumulator,
    TensorStatistics,
    Wanted,
)
from qcompiler.errors import InternalError, ModelError, UsageError
from qcompiler.execution.sessions import open_session
from qcompiler.execution.taps import Measure, Tap, TappedModel, check_taps, tap_model
from qcompiler.ir.editing import values_of
from qcompiler.progress import Advance, Progress, SilentProgress

Array = npt.NDArray[Any]

_SHARE: Final = 4
"""One part in so many of the memory budget is for values that leave the runtime. Its allocator
takes memory in powers of two, and the model's own weights and activations need room as well."""
_BUILDER_BYTES: Final = 3 << 18
"""What a histogram takes while it grows."""
_EXTREMES: Final = (Measure.MINIMUM, Measure.MAXIMUM, Measure.SUM, Measure.SUM_SQUARES)


@dataclass(frozen=True, slots=True)
class _Run:
    """What all rounds have in common."""

    model: ir.Model
    samples: Samples
    custom_op_libraries: Sequence[Path]
    threads: int | None


@dataclass(frozen=True, slots=True)
class _Extent:
    """Rank of a value, and its number of elements in the largest call."""

    rank: int
    size: int


def collect_statistics(
    model: ir.Model,
    wanted: Sequence[Wanted],
    samples: Samples,
    *,
    model_fingerprint: str,
    memory_budget: int,
    progress: Progress | None = None,
    custom_op_libraries: Sequence[Path] = (),
    threads: int | None = None,
) -> Statistics:
    """Run a model on samples and gather what its values hold.

    ONNX Runtime runs the graph as written, without optimization. Extremes are computed inside it;
    values of which a histogram is wanted leave it, in rounds of as many values as memory allows.
    The result does not depend on how many rounds there are.

    Args:
        model: The model; not changed.
        wanted: Values of the main graph and what to know of them.
        samples: The calls to run it on; read once per round, and at most twice before.
        model_fingerprint: What the result is stamped with. Empty for statistics that are not to
            be kept: the samples are then not hashed either, which would read them once more.
        memory_budget: Bytes the process may take. A quarter of it is for tapped values of the
            largest call; what the model itself needs is not controlled.
        progress: Shows the tasks "measuring activations" and "calibrating", in calls.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
        threads: Threads of one operator; None leaves it to ONNX Runtime.

    Raises:
        UsageError: There are no samples, or one value alone exceeds its share of the memory.
        ModelError: A value cannot be tapped, or holds NaN or infinity in some call.
        TargetError: ONNX Runtime cannot run the model on a sample.
        InternalError: One value is wanted along two channel axes.
    """
    progress = progress or SilentProgress()
    merged = _merged(wanted)
    check_taps(model, [want.name for want in merged])
    if not len(samples):
        message = "there is no sample to run the model on"
        raise UsageError(message, hint="give at least one call's inputs")
    run = _Run(model, samples, custom_op_libraries, threads)
    extents = _measure_extents(run, merged, progress)
    rounds = _rounds(_in_graph_order(model, merged), extents, memory_budget)
    tensors: dict[str, TensorStatistics] = {}
    with progress.task("calibrating", len(rounds) * len(samples)) as advance:
        for group in rounds:
            for name, accumulator in _run_round(run, group, extents, advance):
                tensors[name] = accumulator.finish()
    ordered = {name: tensors[name] for name in sorted(tensors)}
    samples_fingerprint = samples.fingerprint() if model_fingerprint else ""
    return Statistics(ordered, model_fingerprint, samples_fingerprint, len(samples))


def _merged(wanted: Sequence[Wanted]) -> list[Wanted]:
    """Return one row per value: two that name the same value want what either wants.

    Raises:
        InternalError: They want different channel axes.
    """
    found: dict[str, Wanted] = {}
    for want in wanted:
        old = found.setdefault(want.name, want)
        axes = {axis for axis in (old.channel_axis, want.channel_axis) if axis is not None}
        if len(axes) > 1:
            message = f"is wanted per channel along the axes {sorted(axes)}; one can be kept"
            raise InternalError(message, where=want.name)
        found[want.name] = Wanted(
            want.name, old.histogram or want.histogram, axes.pop() if axes else None
        )
    return list(found.values())


def _in_graph_order(model: ir.Model, wanted: Sequence[Wanted]) -> list[Wanted]:
    """Sort by where values are made: an early round then runs the first part of the graph only."""
    place = {value.name: index for index, value in enumerate(values_of(model.graph))}
    return sorted(wanted, key=lambda want: place[want.name])


def _measure_extents(run: _Run, wanted: Sequence[Wanted], progress: Progress) -> dict[str, _Extent]:
    """Run the largest calls and return how large values are in them whose extent matters."""
    wanted = [want for want in wanted if want.histogram or want.channel_axis is not None]
    if not wanted:
        return {}
    largest = _largest_calls(run.samples)
    tapped = tap_model(run.model, [Tap(want.name, Measure.SHAPE) for want in wanted])
    extents: dict[str, _Extent] = {}
    with progress.task("measuring activations", len(run.samples)) as advance:
        for _, results in _results(run, tapped, advance, only=largest):
            for tap, shape in results.items():
                old = extents.get(tap.value, _Extent(0, 0))
                size = max(old.size, prod(int(extent) for extent in shape))
                extents[tap.value] = _Extent(len(shape), size)
    for want in wanted:
        rank, axis = extents[want.name].rank, want.channel_axis
        if axis is not None and not -rank <= axis < rank:
            message = f"has {rank} axes, and extremes are wanted along axis {axis}"
            raise ModelError(message, where=want.name)
    return extents


def _largest_calls(samples: Samples) -> frozenset[int]:
    """Return which calls may need most memory, judged by the shapes of their inputs.

    These are the first with the most elements in total, and for every axis of every input the
    first of the largest extent there: attention grows with the square of one axis.
    """
    records: dict[tuple[str, int], tuple[int, int]] = {}
    for index, feeds in enumerate(samples):
        extents = {("", 0): sum(values.size for values in feeds.values())}
        for name, values in feeds.items():
            extents.update({(name, axis): size for axis, size in enumerate(values.shape)})
        for key, size in extents.items():
            if key not in records or size > records[key][0]:
                records[key] = (size, index)
    return frozenset(index for _, index in records.values())


def _rounds(
    wanted: Sequence[Wanted], extents: Mapping[str, _Extent], memory_budget: int
) -> list[list[Wanted]]:
    """Divide the wanted values into rounds that fit the memory, in order.

    Only values that leave the runtime count: reductions run as soon as their value is there.

    Raises:
        UsageError: A value does not fit alone.
    """
    limit = memory_budget // _SHARE
    rounds: list[list[Wanted]] = []
    room = 0
    for want in wanted:
        cost = 0
        if want.histogram:
            cost = extents[want.name].size * np.dtype(np.float32).itemsize + _BUILDER_BYTES
        if cost > limit:
            message = (
                f"takes {_mebibytes(cost)} MiB in the largest call, and one part in {_SHARE} of "
                f"the memory budget is {_mebibytes(limit)} MiB"
            )
            need = _mebibytes(cost * _SHARE)
            hint = f"raise the budget to {need} MiB, or use smaller samples or the observer min-max"
            raise UsageError(message, where=want.name, hint=hint)
        if not rounds or cost > room:
            rounds.append([])
            room = limit
        rounds[-1].append(want)
        room -= cost
    return rounds


def _mebibytes(size: int) -> int:
    return -(-size >> 20)


def _run_round(
    run: _Run, group: Sequence[Wanted], extents: Mapping[str, _Extent], advance: Advance
) -> list[tuple[str, TensorAccumulator]]:
    """Run all calls with the taps of one round."""
    taps = {want: _taps_of(want, extents.get(want.name)) for want in group}
    tapped = tap_model(run.model, [tap for parts in taps.values() for tap in parts.values()])
    gathered = {
        want: TensorAccumulator(histogram=want.histogram, channel_axis=want.channel_axis)
        for want in group
    }
    for index, results in _results(run, tapped, advance):
        for want, parts in taps.items():
            try:
                _add(gathered[want], {part: results[tap] for part, tap in parts.items()})
            except ValueError as error:
                message = f"{error}, in call {index + 1} of {len(run.samples)}"
                hint = "leave that sample out, or keep the nodes around this value in float"
                raise ModelError(
                    message, where=want.name, hint=hint, reason="values-not-finite"
                ) from error
        del results
    return [(want.name, accumulator) for want, accumulator in gathered.items()]


def _taps_of(want: Wanted, extent: _Extent | None) -> dict[str, Tap]:
    """Return what is tapped for one value, by the part that it is of its statistics."""
    if want.histogram:
        return {"values": Tap(want.name, Measure.VALUES)}
    parts = {"shape": Tap(want.name, Measure.SHAPE)}
    parts.update({measure.value: Tap(want.name, measure) for measure in _EXTREMES})
    if want.channel_axis is not None and extent is not None:
        kept = want.channel_axis % extent.rank
        others = tuple(axis for axis in range(extent.rank) if axis != kept)
        parts["channel_minimum"] = Tap(want.name, Measure.MINIMUM, others)
        parts["channel_maximum"] = Tap(want.name, Measure.MAXIMUM, others)
    return parts


def _add(accumulator: TensorAccumulator, parts: Mapping[str, Array]) -> None:
    """Add what the taps of one value gave in one call.

    Raises:
        ValueError: As `TensorAccumulator` does.
    """
    if "values" in parts:
        accumulator.add_values(parts["values"])
        return
    call = CallExtremes(
        count=prod(int(extent) for extent in parts["shape"]),
        minimum=float(parts[Measure.MINIMUM]),
        maximum=float(parts[Measure.MAXIMUM]),
        total=float(parts[Measure.SUM]),
        total_squares=float(parts[Measure.SUM_SQUARES]),
        channel_minimum=parts.get("channel_minimum"),
        channel_maximum=parts.get("channel_maximum"),
    )
    accumulator.add_extremes(call)


def _results(
    run: _Run, tapped: TappedModel, advance: Advance, only: frozenset[int] | None = None
) -> Iterator[tuple[int, dict[Tap, Array]]]:
    """Yield index and results of each call, or of some."""
    with open_session(
        tapped.model,
        optimize=False,
        threads=run.threads,
        custom_op_libraries=run.custom_op_libraries,
    ) as session:
        for index, feeds in enumerate(run.samples):
            if only is None or index in only:
                outputs = session.run(feeds)
                yield index, {tap: outputs[name] for tap, name in tapped.outputs.items()}
                # Nothing of this call may be kept while the next one runs.
                del outputs
            advance(1)
