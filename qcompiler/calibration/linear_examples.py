"""Examples of what ops with weights multiply: rows of a matrix, patches of images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import Feeds, Samples, widened_feeds
from qcompiler.errors import UsageError
from qcompiler.execution.intermediates import shapes_at
from qcompiler.execution.sessions import open_session
from qcompiler.execution.taps import Measure, Tap, tap_model
from qcompiler.ir.channels.weights import data_axis, data_input
from qcompiler.ir.dataflow import int_attribute, ints_attribute
from qcompiler.ir.quantizable import Site
from qcompiler.ir.widened import widened
from qcompiler.progress import Progress

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_FLOAT_BYTES: Final = 4


@dataclass(frozen=True, slots=True, eq=False)
class ChannelRanges:
    """What the channels of a value held over all calls, float64 `[channels]` each."""

    minimum: F64
    maximum: F64
    mean_magnitude: F64

    def joined(self, other: "ChannelRanges", count: int, others: int) -> "ChannelRanges":
        """Return the ranges of what both were taken of, of `count` and `others` examples."""
        total = count * self.mean_magnitude + others * other.mean_magnitude
        return ChannelRanges(
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
            total / (count + others),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """What one op with a weight multiplies.

    Attributes:
        rows: float32 `[groups, examples, K]`; groups is 1 but for grouped convolutions. K runs in
            the order of `weight_matrix`. Those of every other call come first.
        ranges: Of the whole data, by channel.
        split: How many rows come first.
        first_ranges: Of the calls that these rows are from: what calibration on them alone would
            see, so that the other rows show what lies beyond.
    """

    rows: F32
    ranges: ChannelRanges
    split: int
    first_ranges: ChannelRanges


def weight_matrix(site: Site, values: Array) -> Array:
    """Return a weight as `[groups, K, N]`, so that `rows @ matrix` is what the op computes.

    Of a ConvTranspose it is what one position contributes to all those it reaches.
    """
    group = int_attribute(site.node, "group", 1)
    if site.row.op_type == "Conv":
        return np.swapaxes(values.reshape(group, len(values) // group, -1), 1, 2)
    if site.row.op_type == "ConvTranspose":
        return values.reshape(group, len(values) // group, -1)
    return np.moveaxis(values, site.axes.reduction, 0).reshape(1, site.reduction, -1)


def channels_of_rows(site: Site, channels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the channel of each row of `weight_matrix`, `[groups, K]`."""
    group = int_attribute(site.node, "group", 1) if site.row.op_type.startswith("Conv") else 1
    positions = prod(site.shape[2:]) if site.row.op_type == "Conv" else 1
    return np.repeat(channels, positions).reshape(group, -1)


class ExampleCollector:
    """Runs a model on samples and keeps some of what ops with weights multiply.

    Args:
        model: The model; it is not changed.
        samples: The calls.
        count: How many rows to keep for an op, evenly over the calls.
        memory_budget: Bytes the process may take; a quarter is for what is collected at once.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
        threads: Threads of one operator; None leaves it to ONNX Runtime.
    """

    def __init__(
        self,
        model: ir.Model,
        samples: Samples,
        *,
        count: int,
        memory_budget: int,
        custom_op_libraries: Sequence[Path] = (),
        threads: int | None = None,
    ) -> None:
        # The runtime has next to no kernels for bfloat16 on a CPU.
        self._model = widened(model)
        self._samples = samples
        self._per_call = max(1, -(-count // max(1, len(samples))))
        self._limit = memory_budget // 4
        self._libraries = tuple(custom_op_libraries)
        self._threads = threads

    def each(
        self, units: Sequence[Sequence[Site]], progress: Progress, task: str
    ) -> Iterator[dict[Site, Examples]]:
        """Yield the examples of lists of sites that belong together, in order.

        The model runs on all calls for as many of them at once as fit memory.

        Args:
            units: The lists.
            progress: Where it is shown.
            task: What is done with each, for people.

        Raises:
            UsageError: One list does not fit memory alone.
            TargetError: ONNX Runtime cannot run the model on a sample.
        """
        with progress.task(task, len(units)) as advance:
            for chunk in self._rounds(units):
                found = self._collect([site for sites in chunk for site in sites], progress)
                for sites in chunk:
                    yield {site: found[site] for site in sites}
                    advance(1)

    def _rounds(self, units: Sequence[Sequence[Site]]) -> list[list[Sequence[Site]]]:
        """Divide lists of sites that belong together into rounds that fit memory, in order."""
        names = dict.fromkeys(_data(site).name or "" for sites in units for site in sites)
        shapes = shapes_at(
            self._model,
            list(names),
            widened_feeds(_largest(self._samples)),
            threads=self._threads,
            custom_op_libraries=self._libraries,
        )
        found: list[list[Sequence[Site]]] = []
        room = 0
        for sites in units:
            values = {_data(site).name or "": site for site in sites}
            cost = sum(self._cost(shapes[name], site) for name, site in values.items())
            if cost > self._limit:
                message = (
                    f"its examples take {cost >> 20} MiB, and {self._limit >> 20} MiB are free"
                )
                hint = (
                    f"raise the memory budget to {(4 * cost >> 20) + 1} MiB, or use smaller samples"
                )
                raise UsageError(message, where=sites[0].label, hint=hint)
            if cost > room:
                found.append([])
                room = self._limit
            found[-1].append(sites)
            room -= cost
        return found

    def _collect(self, sites: Sequence[Site], progress: Progress) -> dict[Site, Examples]:
        """Run all calls once; return examples of some sites, shared where they read one value."""
        groups: dict[tuple[str, object], _Gatherer] = {}
        owner: dict[Site, _Gatherer] = {}
        for site in sites:
            key = (_data(site).name or "", _geometry(site))
            owner[site] = groups.setdefault(key, _Gatherer(site, self._per_call))
        taps = {name: Tap(name, Measure.VALUES) for name, _ in groups}
        tapped = tap_model(self._model, list(taps.values()))
        with (
            open_session(
                tapped.model,
                optimize=False,
                threads=self._threads,
                custom_op_libraries=self._libraries,
            ) as session,
            progress.task("collecting examples", len(self._samples)) as advance,
        ):
            for index, feeds in enumerate(self._samples):
                results = session.run(widened_feeds(feeds))
                values = {tap.value: results[name] for tap, name in tapped.outputs.items()}
                for (name, _), gatherer in groups.items():
                    gatherer.add(values[name], index)
                del results, values
                advance(1)
        return {site: owner[site].examples() for site in sites}

    def _cost(self, shape: Sequence[int], site: Site) -> int:
        rows = self._per_call * len(self._samples)
        row = site.reduction * (prod(site.shape[2:]) if site.row.op_type == "Conv" else 1)
        return _FLOAT_BYTES * (prod(shape) + rows * row)


class _Gatherer:
    """Gathers examples and ranges of one value, call by call."""

    def __init__(self, site: Site, per_call: int) -> None:
        self._site = site
        self._per_call = per_call
        self._halves = (_Half(), _Half())

    def add(self, values: Array, call: int) -> None:
        if not values.size:
            return
        axis = data_axis(self._site)
        assert axis is not None
        table = np.moveaxis(values, axis, -1)
        flat = table.reshape(-1, table.shape[-1])
        generator = np.random.default_rng(call)
        half = self._halves[call % 2]
        if self._site.row.op_type == "Conv":
            half.rows.append(_patches(self._site, values, self._per_call, generator))
        else:
            chosen = _chosen(flat, self._per_call, generator)
            group = int_attribute(self._site.node, "group", 1)
            rows = flat[chosen].reshape(len(chosen), group, -1)
            half.rows.append(np.swapaxes(rows, 0, 1).astype(np.float32))
        half.widen(flat)

    def examples(self) -> Examples:
        first, second = self._halves
        rows = [*first.rows, *second.rows]
        if not rows:
            nothing = _Half().ranges()
            return Examples(np.zeros((1, 0, 0), np.float32), nothing, 0, nothing)
        joined = np.concatenate(rows, axis=1)
        if not (first.rows and second.rows):  # a single call
            whole = (first if first.rows else second).ranges()
            return Examples(joined, whole, joined.shape[1] // 2, whole)
        split = sum(part.shape[1] for part in first.rows)
        both = first.ranges().joined(second.ranges(), first.count, second.count)
        return Examples(joined, both, split, first.ranges())


class _Half:
    """What every other call gave."""

    def __init__(self) -> None:
        self.rows: list[F32] = []
        self.count = 0
        self._low = self._high = self._total = np.zeros(0)

    def widen(self, flat: Array) -> None:
        low, high = flat.min(axis=0).astype(np.float64), flat.max(axis=0).astype(np.float64)
        total = np.abs(flat).sum(axis=0, dtype=np.float64)
        if self.count:
            low, high = np.minimum(low, self._low), np.maximum(high, self._high)
            total = total + self._total
        self._low, self._high, self._total = low, high, total
        self.count += len(flat)

    def ranges(self) -> ChannelRanges:
        return ChannelRanges(self._low, self._high, self._total / max(1, self.count))


def _chosen(rows: Array, count: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return which rows are kept: at random, but with that of the largest value.

    In language models it is that of one token in hundreds, and rounding it is a task of its own.
    """
    largest = np.abs(rows).max(axis=1).argmax()
    others = generator.permutation(len(rows))
    return np.sort(np.append(others[others != largest][: count - 1], largest))


def _patches(site: Site, values: Array, count: int, generator: np.random.Generator) -> F32:
    """Return what a Conv multiplies at some output positions: `[groups, count, K]`."""
    kernel = site.shape[2:]
    rank = len(kernel)
    strides = ints_attribute(site.node, "strides") or (1,) * rank
    dilations = ints_attribute(site.node, "dilations") or (1,) * rank
    extents = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    pads = _pads(site.node, values.shape[2:], extents, strides)
    padded = np.pad(values, [(0, 0), (0, 0), *pads])
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, extents, axis=tuple(range(2, 2 + rank))
    )
    places = windows[:, :, *[slice(None, None, step) for step in strides]]
    outer = (len(places), *places.shape[2 : 2 + rank])
    chosen = np.sort(generator.permutation(prod(outer))[:count])
    image, *where = np.unravel_index(chosen, outer)
    rows = np.moveaxis(places, 1, -1 - rank)[(image, *where)]
    for axis, step in enumerate(dilations):
        rows = rows.take(range(0, rows.shape[2 + axis], step), axis=2 + axis)
    group = int_attribute(site.node, "group", 1)
    grouped = np.ascontiguousarray(rows, np.float32).reshape(len(chosen), group, -1)
    return np.swapaxes(grouped, 0, 1)


def _pads(
    node: ir.Node, sizes: Sequence[int], extents: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the zeros in front of and behind each spatial axis (ONNX Conv-11)."""
    auto = node.attributes.get("auto_pad")
    mode = "NOTSET" if auto is None else auto.as_string()
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        found = []
        for size, extent, step in zip(sizes, extents, strides, strict=True):
            total = max(0, (-(-size // step) - 1) * step + extent - size)
            small, large = total // 2, total - total // 2
            found.append((small, large) if mode == "SAME_UPPER" else (large, small))
        return found
    given = ints_attribute(node, "pads") if mode == "NOTSET" else None
    pads = given or (0,) * (2 * len(sizes))
    return list(zip(pads[: len(sizes)], pads[len(sizes) :], strict=True))


def _geometry(site: Site) -> object:
    """Return what, besides the value, decides what an op's examples are."""
    names = ("strides", "dilations", "pads")
    numbers = tuple(ints_attribute(site.node, name) for name in names)
    auto = site.node.attributes.get("auto_pad")
    group = int_attribute(site.node, "group", 1)
    kernel = site.shape[2:] if site.row.op_type == "Conv" else ()
    return data_axis(site), kernel, group, numbers, None if auto is None else auto.as_string()


def _data(site: Site) -> ir.Value:
    position = data_input(site)
    value = None if position is None else site.node.inputs[position]
    assert value is not None
    return value


def _largest(samples: Samples) -> Feeds:
    """Return the call with the most elements."""
    best: tuple[int, Feeds] | None = None
    for feeds in samples:
        size = sum(array.size for array in feeds.values())
        if best is None or size > best[0]:
            best = (size, feeds)
    if best is None:
        message = "there is no sample to run the model on"
        raise UsageError(message, hint="give at least one call's inputs")
    return best[1]
