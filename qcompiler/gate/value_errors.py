"""How far the values inside a model are from those of the float model that have the same name."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import Feeds
from qcompiler.execution.intermediates import shapes_at
from qcompiler.execution.narrow_floats import has_bfloat16, runnable
from qcompiler.execution.sessions import Array, open_session
from qcompiler.execution.taps import Measure, Tap, tap_model
from qcompiler.ir.dataflow import inputs_with_captures, node_name
from qcompiler.ir.editing import values_of
from qcompiler.ir.quantizable import row_of
from qcompiler.progress import Progress

_MOST_VALUES: Final = 600
_BYTES_AT_ONCE: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class NodeError:
    """The error of what one node computes.

    Attributes:
        node: The float model's node.
        op_type: Its op.
        value: What it computes.
        error: Share of the value's energy that is wrong, 0 to 1.
        before: The same of the worst value that it is computed from.
    """

    node: str
    op_type: str
    value: str
    error: float
    before: float

    @property
    def added(self) -> float:
        """What the node added, and what lies between.

        The growth of the error, times its share that is new: products let errors grow that were
        there before, and where nearly nothing was, the node made it.
        """
        growth = max(0.0, self.error - self.before)
        return growth * growth / self.error if growth else 0.0


def node_errors(
    base: ir.Model,
    candidate: ir.Model,
    calls: Sequence[Feeds],
    *,
    rescaled: bool,
    custom_op_libraries: Sequence[Path] = (),
    progress: Progress,
) -> list[NodeError]:
    """Compare the results of ops with weights, in graph order; of all ops where these are too few.

    Both models run without the runtime's optimizations. Values in bodies are not looked at.

    Args:
        base: The float model.
        candidate: The model that was made of it.
        calls: What both are run on.
        rescaled: Whether channels of the candidate's values may have another scale and offset, as
            after equalization and folding of batch norms: errors are then what is left when each
            channel is fitted by a straight line.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
        progress: Shows the task "looking for causes".

    Raises:
        TargetError: ONNX Runtime cannot run one of the models.
    """
    base, candidate = (runnable(m) if has_bfloat16(m) else m for m in (base, candidate))
    shared = _shared_values(base, candidate)
    if not shared or not calls:
        return []
    sums = {value.name or "": _Sums() for value in shared}
    batches = _batches(base, shared, calls[0], custom_op_libraries)
    with progress.task("looking for causes", len(batches)) as advance:
        for names in batches:
            taps = {name: Tap(name, Measure.VALUES) for name in names}
            tapped = [tap_model(model, list(taps.values())) for model in (base, candidate)]
            with (
                open_session(
                    tapped[0].model, optimize=False, custom_op_libraries=custom_op_libraries
                ) as one,
                open_session(
                    tapped[1].model, optimize=False, custom_op_libraries=custom_op_libraries
                ) as other,
            ):
                for feeds in calls:
                    truth, found = (each.run(each.fitting(feeds)) for each in (one, other))
                    for name, tap in taps.items():
                        sums[name].add(truth[tapped[0].outputs[tap]], found[tapped[1].outputs[tap]])
            advance(1)
    errors = {name: entry.error(rescaled=rescaled) for name, entry in sums.items()}
    return [_node_error(value, errors) for value in shared]


def _node_error(value: ir.Value, errors: Mapping[str, float]) -> NodeError:
    node = value.producer()
    assert node is not None  # _shared_values takes no others
    before = max((errors[name] for name in _nearest(value, errors)), default=0.0)
    return NodeError(
        node_name(node), node.op_type, value.name or "", errors[value.name or ""], before
    )


def _shared_values(base: ir.Model, candidate: ir.Model) -> list[ir.Value]:
    """Return what ops with weights compute in both models, in graph order."""
    there = {v.name for v in values_of(candidate.graph) if v.producer() is not None and _floats(v)}
    found = [
        value
        for node in base.graph
        for value in node.outputs[:1]
        if value.name in there and _floats(value)
    ]
    chosen = [value for value in found if _has_weight(value)]
    return (chosen if len(chosen) > 1 else found)[:_MOST_VALUES]


def _floats(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _has_weight(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and row_of(node) is not None


def _nearest(value: ir.Value, known: Mapping[str, float]) -> set[str]:
    """Return the known values that a value is computed from, without others between."""
    found: set[str] = set()
    seen: set[ir.Value] = set()
    pending = [value]
    while pending:
        producer = pending.pop().producer()
        for read in [] if producer is None else inputs_with_captures(producer):
            if read in seen:
                continue
            seen.add(read)
            if read.name in known:
                found.add(read.name or "")
            else:
                pending.append(read)
    return found


def _batches(
    model: ir.Model, values: Sequence[ir.Value], feeds: Feeds, libraries: Sequence[Path]
) -> list[list[str]]:
    """Divide values so that those of both models fit into memory."""
    names = [value.name or "" for value in values]
    shapes = shapes_at(model, names, feeds, custom_op_libraries=libraries)
    batches: list[list[str]] = [[]]
    taken = 0
    for name in names:
        size = 2 * 4 * prod(shapes[name])
        if batches[-1] and taken + size > _BYTES_AT_ONCE:
            batches.append([])
            taken = 0
        batches[-1].append(name)
        taken += size
    return batches


@dataclass(slots=True)
class _Sums:
    """Sums over all calls, for each channel of one value."""

    parts: list[tuple[npt.NDArray[np.float64], float]] = field(default_factory=list)
    broken: bool = False

    def add(self, truth: Array, found: Array) -> None:
        if truth.shape != found.shape:
            self.broken = True
            return
        pair = [_by_channel(each) for each in (truth, found)]
        if not all(np.isfinite(each).all() for each in pair):
            self.broken = True
            return
        one, other = pair
        moments = (one, other, one**2, other**2, one * other)
        sums = np.stack([each.sum(axis=1) for each in moments])
        self.parts.append((sums, float(one.shape[1])))

    def error(self, *, rescaled: bool) -> float:
        widths = {sums.shape[1] for sums, _ in self.parts}
        if self.broken or len(widths) != 1:
            return 1.0 if self.broken or widths else 0.0
        count = sum(size for _, size in self.parts)
        total = np.sum([sums for sums, _ in self.parts], axis=0)
        a, b, aa, bb, ab = total / max(count, 1.0)
        if not rescaled:
            wrong, signal = float((aa + bb - 2 * ab).sum()), float(aa.sum())
        else:
            spread, other = np.maximum(aa - a**2, 0), np.maximum(bb - b**2, 0)
            both = ab - a * b
            explained = np.divide(both**2, other, out=np.zeros_like(both), where=other > 1e-30)
            wrong, signal = float(np.maximum(spread - explained, 0).sum()), float(spread.sum())
        return min(1.0, max(0.0, wrong) / signal) if signal > 0 else float(wrong > 0)


def _by_channel(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return values as `[channels, values]`: of images the second axis, else the last."""
    wide = values.astype(np.float64)
    if wide.ndim < 2:
        return wide.reshape(1, -1)
    axis = 1 if wide.ndim in (4, 5) else wide.ndim - 1
    return np.moveaxis(wide, axis, 0).reshape(wide.shape[axis], -1)


def largest_first(errors: Sequence[NodeError]) -> Iterator[tuple[NodeError, float]]:
    """Yield nodes that added an error, with their share of all that was added."""
    total = sum(entry.added for entry in errors)
    for entry in sorted(errors, key=lambda entry: -entry.added):
        if total > 0 and entry.added > 0:
            yield entry, entry.added / total
