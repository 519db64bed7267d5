"""How large data and weights are by input channel, before and after channels were equalized."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import widened_feeds
from qcompiler.calibration.error_growth import GrowthOptions
from qcompiler.calibration.held_out import spread
from qcompiler.calibration.largest_call import largest_call
from qcompiler.calibration.linear_examples import channels_of_rows, weight_matrix
from qcompiler.execution.intermediates import shapes_at
from qcompiler.execution.sessions import open_session
from qcompiler.execution.taps import Measure, Tap, tap_model
from qcompiler.ir.channels.weights import data_axis, data_input
from qcompiler.ir.dataflow import constant_of
from qcompiler.ir.quantizable import Site, find_sites
from qcompiler.ir.weights import read_all
from qcompiler.ir.widened import widened
from qcompiler.progress import Progress, SilentProgress

F64 = npt.NDArray[np.float64]

_CALLS: Final = 2
MOST_POINTS: Final = 64
"""Points of a curve: more cannot be told apart on a screen."""


@dataclass(frozen=True, slots=True)
class ChannelProfile:
    """Largest magnitudes of one op's data and weight by input channel.

    Channels are in descending order of the data's magnitude before equalization. Where there are
    more than `MOST_POINTS` of them, a point is the largest of a stretch.

    Attributes:
        node: The op, as the float models call it.
        channels: How many channels there are.
        data_before: By point, before equalization.
        data_after: Equal to that where the op was not equalized.
        weight_before: Of the weight, at the same channels.
        weight_after: The same after equalization.
    """

    node: str
    channels: int
    data_before: tuple[float, ...]
    data_after: tuple[float, ...]
    weight_before: tuple[float, ...]
    weight_after: tuple[float, ...]


def channel_profiles(
    before: ir.Model,
    after: ir.Model,
    nodes: Sequence[str],
    options: GrowthOptions,
    progress: Progress | None = None,
) -> tuple[ChannelProfile, ...]:
    """Measure some ops in the model before and after equalization.

    Args:
        before: The float model before.
        after: The float model after; ops keep their names.
        nodes: Which ops. Those without weight and computed data in the main graph are left out,
            and those whose weight does not fit a quarter of the memory budget.
        options: Samples and limits.
        progress: Where the work is shown.

    Raises:
        TargetError: ONNX Runtime cannot run one of the models.
    """
    wanted = dict.fromkeys(nodes)
    first = last = _Curves(widened(before), wanted, options)
    if after is not before:
        last = _Curves(widened(after), wanted, options)
    curves = dict.fromkeys((first, last))
    with (progress or SilentProgress()).task("measuring channels", len(curves)) as advance:
        for entry in curves:
            entry.measure()
            advance(1)
    return tuple(
        _profile(node, (first.data[node], first.weights[node], last.data[node], last.weights[node]))
        for node in wanted
        if node in first.data and node in last.data
    )


class _Curves:
    """Magnitudes by channel in one model.

    Attributes:
        data: By node name, float64 `[channels]`.
        weights: By node name, float64 `[channels]`.
    """

    def __init__(self, model: ir.Model, nodes: dict[str, None], options: GrowthOptions) -> None:
        limit = options.memory_budget // 4
        self._model = model
        self._options = options
        self._sites = {
            site.node.name or "": site
            for site in find_sites(model)[0]
            if site.node.name in nodes
            and site.node.graph is model.graph
            and _data(site) is not None
            and site.tensor.nbytes <= limit
        }
        self.data: dict[str, F64] = {}
        self.weights: dict[str, F64] = {}

    def measure(self) -> None:
        """Run the model, and read the weights."""
        if not self._sites:
            return
        taps = self._taps()
        tapped = tap_model(self._model, [tap for pair in taps.values() for tap in pair])
        options = self._options
        with open_session(
            tapped.model,
            optimize=False,
            threads=options.threads,
            custom_op_libraries=options.custom_op_libraries,
        ) as session:
            for feeds in spread(options.samples, _CALLS):
                results = session.run(widened_feeds(feeds))
                for node, pair in taps.items():
                    found = [
                        np.abs(results[tapped.outputs[tap]].astype(np.float64)) for tap in pair
                    ]
                    largest = np.maximum(*found)
                    self.data[node] = np.maximum(largest, self.data.get(node, largest))
        for node, site in self._sites.items():
            self.weights[node] = _weight_magnitudes(site, len(self.data[node]))

    def _taps(self) -> dict[str, tuple[Tap, Tap]]:
        names = {node: _data(site) or "" for node, site in self._sites.items()}
        options = self._options
        shapes = shapes_at(
            self._model,
            list(dict.fromkeys(names.values())),
            widened_feeds(largest_call(spread(options.samples, _CALLS))),
            threads=options.threads,
            custom_op_libraries=options.custom_op_libraries,
        )
        found = {}
        for node, name in names.items():
            rank = len(shapes[name])
            kept = (data_axis(self._sites[node]) or 0) % rank
            axes = tuple(axis for axis in range(rank) if axis != kept)
            found[node] = (Tap(name, Measure.MINIMUM, axes), Tap(name, Measure.MAXIMUM, axes))
        return found


def _data(site: Site) -> str | None:
    """Return the name of the computed value that a site's weight meets."""
    position = data_input(site)
    value = None if position is None else site.node.inputs[position]
    return None if value is None or constant_of(value) is not None else value.name


def _weight_magnitudes(site: Site, channels: int) -> F64:
    matrix: npt.NDArray[Any] = weight_matrix(site, read_all(site.tensor))
    rows = np.abs(matrix).max(axis=2).astype(np.float64)
    found = np.zeros(channels)
    np.maximum.at(found, channels_of_rows(site, np.arange(channels)), rows)
    return found


def _profile(node: str, curves: tuple[F64, F64, F64, F64]) -> ChannelProfile:
    data, weights, data_after, weights_after = curves
    order = np.argsort(-data, kind="stable")
    parts = np.array_split(order, min(MOST_POINTS, len(order)))
    points = [
        tuple(float(f"{curve[part].max():.3g}") for part in parts)
        for curve in (data, data_after, weights, weights_after)
    ]
    return ChannelProfile(node, len(order), *points)
