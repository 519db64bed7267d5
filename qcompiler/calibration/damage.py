"""What quantizing one op alone does to a model, measured for many ops in few runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, log10, prod
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import Samples
from qcompiler.calibration.candidates import Candidate, carry_ranges, read_by
from qcompiler.errors import UsageError
from qcompiler.execution.branches import BranchedModel
from qcompiler.execution.differences import Comparisons, Difference, Meaning, meaning_of
from qcompiler.execution.sessions import Session, open_session
from qcompiler.execution.taps import Measure, Tap, tap_model
from qcompiler.ir.dataflow import all_nodes
from qcompiler.ir.provenance import SCHEME
from qcompiler.progress import Advance
from qcompiler.quant.scheme import FLOAT
from qcompiler.rewriting.base import Pass, PassContext

_SHARE: Final = 4
"""One part in so many of the memory budget is for what waits for the branches: see `_cost`."""
_MOST_NODES: Final = 20_000
"""Nodes of one session: loading takes longer than in proportion to them."""


@dataclass(frozen=True, slots=True)
class Damage:
    """How far outputs are from those of the float model.

    Attributes:
        noise: Energy of the error over that of the float values, of the worst output.
        divergence: Mean Kullback-Leibler divergence per row from the float distribution, in nats,
            of the worst output; None where no output is a distribution.
    """

    noise: float
    divergence: float | None = None

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio, in dB; infinite where nothing changed."""
        return decibels(self.noise)


def decibels(noise: float) -> float:
    """Return relative noise as a signal to noise ratio in dB."""
    if noise == 0.0:
        return inf
    return -inf if not isfinite(noise) else -10 * log10(noise)


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """How damage is measured.

    Attributes:
        samples: The calls to run models on.
        passes: What quantizes a model whose ops have schemes and whose values have ranges: from
            the placement of quantizers to the insertion of Q/DQ nodes.
        context: For these passes.
        memory_budget: Bytes the process may take. A quarter of it is for values of the float
            model that wait for the branches that begin there, and for the branches' weights.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
    """

    samples: Samples
    passes: tuple[Pass, ...]
    context: PassContext
    memory_budget: int = 2 << 30
    custom_op_libraries: tuple[Path, ...] = ()


def measure_damage(
    model: ir.Model,
    candidates: Sequence[Candidate],
    places_of: Callable[[Candidate], Sequence[str]],
    options: MeasureOptions,
    task: str,
) -> list[Damage]:
    """Quantize each candidate alone, and compare some values with those of the float model.

    All runs in one graph: the float model, and for every candidate a branch that begins with its
    ops, quantized, and ends at the places where the comparison is. What branches have in common
    with the model is so computed once, and only sums of squares leave the runtime. ONNX Runtime
    runs the graph as written: the error is that of the quantization, without what kernels add.

    Args:
        model: A model with schemes and ranges; not changed.
        candidates: What is quantized.
        places_of: Names of the float values of the main graph to compare for a candidate.
        options: How.
        task: What the progress shows, in calls.

    Returns:
        The damage that each candidate does, in order.

    Raises:
        UsageError: One branch alone exceeds its share of the memory.
        TargetError: ONNX Runtime cannot run the model on a sample.
    """
    base = _float_copy(model)
    groups = _groups(model, candidates, options)
    found: list[Damage] = []
    total = len(groups) * len(options.samples)
    with options.context.progress.task(task, total) as advance:
        for group in groups:
            places = [(candidate, places_of(candidate)) for candidate in group]
            found += _measure(*_branched(base, places, options), options, advance)
    return found


def _float_copy(model: ir.Model) -> ir.Model:
    copy = model.clone()
    carry_ranges(copy.graph)
    for node in all_nodes(copy):
        if SCHEME in node.metadata_props:
            node.metadata_props[SCHEME] = FLOAT
    return copy


def _branched(
    base: ir.Model, wanted: Sequence[tuple[Candidate, Sequence[str]]], options: MeasureOptions
) -> tuple[ir.Model, list[list[Difference]]]:
    """Return the model with a quantized branch for each candidate, and what differs there."""
    branched = BranchedModel(base)
    comparisons = Comparisons(branched.model)
    differences: list[list[Difference]] = []
    for candidate, places in wanted:
        branch = branched.add(candidate.nodes, places)
        for node in branch.nodes:
            node.metadata_props[SCHEME] = candidate.scheme
        truths = {name: branched.values[name] for name in branch.values}
        differences.append(
            [
                comparisons.add(truth, branch.values[name], _meaning(truth))
                for name, truth in truths.items()
            ]
        )
    for rewrite in options.passes:
        rewrite.run(branched.model, options.context)
    return branched.model, differences


def _meaning(value: ir.Value) -> Meaning | None:
    return meaning_of(value) if value.is_graph_output() else None


def _groups(
    base: ir.Model, candidates: Sequence[Candidate], options: MeasureOptions
) -> list[list[Candidate]]:
    """Divide candidates into groups that fit memory, in order.

    Raises:
        UsageError: One does not fit alone.
    """
    most = max(1, _MOST_NODES // max(1, len(base.graph)))
    limit = options.memory_budget // _SHARE
    sizes = _value_bytes(base, candidates, options)
    groups: list[list[Candidate]] = []
    room = 0
    for candidate in candidates:
        cost = _cost(candidate, [sizes.get(name, 0) for name in read_by(base, candidate)])
        if cost > limit:
            message = f"comparing it takes {cost >> 20} MiB, of {limit >> 20} MiB that are for that"
            hint = f"raise the memory budget to {(cost * _SHARE >> 20) + 1} MiB"
            raise UsageError(message, where=candidate.nodes[0], hint=hint)
        if not groups or cost > room or len(groups[-1]) == most:
            groups.append([])
            room = limit
        groups[-1].append(candidate)
        room -= cost
    return groups


def _cost(candidate: Candidate, read: Sequence[int]) -> int:
    """Return the bytes a branch adds: what it reads, as much that goes around it, its weights."""
    return 2 * sum(read) + candidate.weight_bytes


def _value_bytes(
    base: ir.Model, candidates: Sequence[Candidate], options: MeasureOptions
) -> dict[str, int]:
    """Return how large the values are that branches begin with, in the call with most elements."""
    names = dict.fromkeys(name for c in candidates for name in read_by(base, c))
    if not names or len(candidates) == 1:
        return {}
    sizes = [sum(array.size for array in feeds.values()) for feeds in options.samples]
    largest = sizes.index(max(sizes))
    feeds = next(feeds for index, feeds in enumerate(options.samples) if index == largest)
    tapped = tap_model(base, [Tap(name, Measure.SHAPE) for name in names])
    with _open(tapped.model, options) as session:
        results = session.run(feeds)
    width = np.dtype(np.float32).itemsize
    return {
        tap.value: width * prod(int(n) for n in results[name])
        for tap, name in tapped.outputs.items()
    }


def _open(model: ir.Model, options: MeasureOptions) -> Session:
    return open_session(
        model,
        optimize=False,
        threads=options.context.workers,
        custom_op_libraries=options.custom_op_libraries,
    )


@dataclass(slots=True)
class _Sums:
    """Sums over the calls, for one place where a branch is compared."""

    signal: float = 0.0
    error: float = 0.0
    divergence: float = 0.0
    rows: int = 0


def _measure(
    model: ir.Model,
    differences: Sequence[Sequence[Difference]],
    options: MeasureOptions,
    advance: Advance,
) -> list[Damage]:
    flat = [difference for places in differences for difference in places]
    taps = dict.fromkeys(tap for difference in flat for tap in _taps(difference).values())
    if not taps:
        advance(len(options.samples))
        return [Damage(0.0) for _ in differences]
    tapped = tap_model(model, list(taps))
    sums = {difference: _Sums() for difference in flat}
    with _open(tapped.model, options) as session:
        for feeds in options.samples:
            results = session.run(feeds)
            values = {tap: results[name] for tap, name in tapped.outputs.items()}
            for difference in flat:
                _add(sums[difference], difference, values)
            advance(1)
    return [_damage([sums[d] for d in places], places) for places in differences]


def _taps(difference: Difference) -> dict[str, Tap]:
    taps = {
        "signal": Tap(difference.truth, Measure.SUM_SQUARES),
        "error": Tap(difference.error, Measure.SUM_SQUARES),
    }
    if difference.divergence is not None:
        taps["divergence"] = Tap(difference.divergence, Measure.VALUES)
        taps["shape"] = Tap(difference.truth, Measure.SHAPE)
    return taps


def _add(
    sums: _Sums, difference: Difference, values: Mapping[Tap, npt.NDArray[np.generic]]
) -> None:
    found = {part: values[tap] for part, tap in _taps(difference).items()}
    sums.signal += float(found["signal"])
    sums.error += float(found["error"])
    if difference.divergence is not None:
        sums.divergence += float(found["divergence"])
        sums.rows += prod(int(n) for n in found["shape"][:-1])


def _damage(sums: Sequence[_Sums], places: Sequence[Difference]) -> Damage:
    noises = [_noise(entry) for entry in sums if isfinite(entry.signal)]
    divergences = [
        max(0.0, entry.divergence / max(1, entry.rows))
        for entry, place in zip(sums, places, strict=True)
        if place.divergence is not None
    ]
    return Damage(max(noises, default=0.0), max(divergences, default=None))


def _noise(sums: _Sums) -> float:
    if sums.error == 0.0:
        return 0.0
    noise = sums.error / sums.signal if sums.signal else inf
    return noise if isfinite(noise) else inf
