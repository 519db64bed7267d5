"""Finds the ranges of the activations that are to be quantized, from samples."""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.calls import Samples
from qcompiler.calibration.coarseness import median_magnitude
from qcompiler.calibration.collect import collect_statistics
from qcompiler.calibration.grid_error import grid_of
from qcompiler.calibration.observers import (
    DEFAULT_PERCENTILE,
    Observer,
    activation_sqnr_db,
    choose_range,
)
from qcompiler.calibration.outliers import outlier_channels
from qcompiler.calibration.quality import Reference
from qcompiler.calibration.statistics import Statistics, TensorStatistics, Wanted
from qcompiler.calibration.statistics_file import load_statistics, save_statistics
from qcompiler.ir.dataflow import int_attribute, is_op
from qcompiler.ir.provenance import (
    ACTIVATION_SQNR,
    MADE_UP,
    OBSERVER,
    OUTLIERS,
    PLACEMENT,
    QUANTIZED_INPUTS,
    QUANTIZER,
    RANGE,
    SHARES,
    TERMS,
    annotate,
    quantizer_of,
)
from qcompiler.ir.weights import WeightStore
from qcompiler.passes.quantize.observer_trial import try_ranges
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

_TRIAL_CALLS: Final = 16
_SECOND_TERM_DB: Final = 20 * math.log10(254)
"""The second term has steps so much smaller."""
_SHARE_OF_OUTPUTS: Final = 8
"""One part in so many of the memory budget is for outputs that variants are compared with."""


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """Options of `calibrate`.

    Attributes:
        samples: The calls to run the model on.
        model_fingerprint: Of the source model, asked for when statistics are kept or read.
        observer: How ranges are chosen; None tries all of them and takes the one that leaves the
            outputs nearest to float.
        trial: For that: what turns a model with ranges into one whose activations are quantized.
        percentile: For that observer.
        outlier_limit: Channels of one value that may stay in float at most; 0 is none.
        two_terms_below: Values whose median is fewer steps large get two terms of codes; 0 gives
            none.
        memory_budget: Bytes the process may take.
        statistics: A file of statistics: read if it exists, else written.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
    """

    samples: Samples
    model_fingerprint: Callable[[], str]
    observer: Observer | None = None
    trial: tuple[Pass, ...] = ()
    percentile: float = DEFAULT_PERCENTILE
    outlier_limit: int = 8
    two_terms_below: float = 3.0
    memory_budget: int = 2 << 30
    statistics: Path | None = None
    custom_op_libraries: tuple[Path, ...] = ()


class Calibrate(Pass):
    """Write on every value that is to be quantized which range its codes cover.

    Before: x     # qcompiler.quantizer = "uint8:asym"
    After:  x     # qcompiler.range = "[-0.17, 6.2]", qcompiler.outlier_channels = "[856]"
                  # or qcompiler.terms = "2", where its values are few steps large
    Refuses: values that no sample fills, since they have no range; they are not quantized.

    The graph does not change. The model runs in ONNX Runtime on every sample, unless a file of
    statistics of the same model and samples exists. No observer is best for every model: on a
    CIFAR CNN entropy left 32 dB and mse 21 dB, on MiniLM mse 24 dB and entropy 11 dB. So without
    one being asked for, each is tried on a few calls, with weights in float; that takes one run of
    these calls for each. Floats of 8 bits have no outlier channels and no second term: their steps
    are fine where values are small, however large the largest.

    Raises (from `run`):
        UsageError: The samples or the file of statistics cannot be used.
        ModelError: A value holds NaN or infinity on a sample.
    """

    name: ClassVar[str] = "calibrate"
    consumes: ClassVar[Stage] = Stage.ASSIGNED
    produces: ClassVar[Stage] = Stage.ASSIGNED
    numerics: ClassVar[Numerics] = Numerics.EXACT

    options: CalibrateOptions

    def __init__(self, options: CalibrateOptions) -> None:
        self.options = options

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Collect or read statistics, and choose the ranges."""
        values = [value for value in _quantized_values(model.graph) if _has_own_scale(value)]
        if not values:
            return PassResult()
        wanted = [self._wanted(value) for value in values]
        statistics = self._statistics(model, wanted, context)
        skips: list[Skip] = []
        filled: list[ir.Value] = []
        for value in values:
            found = statistics.tensors[value.name or ""]
            if found.count:
                self._mark_outliers(value, found)
                self._mark_coarse(value, statistics)
                filled.append(value)
            else:
                reason = f"{value.name} has no element in any sample, and so no range"
                skips.append(Skip("no-range", value.name or "", reason))
        if not filled:
            return PassResult((), tuple(skips))
        observer = self.options.observer or self._best_observer(model, filled, statistics, context)
        model.metadata_props[OBSERVER] = observer.value
        if self.options.samples.made_up:
            model.metadata_props[MADE_UP] = "true"
        rewrites = tuple(
            Rewrite("choose-range", value.name or "", self._write(value, statistics, observer))
            for value in filled
        )
        return PassResult(rewrites, tuple(skips))

    def _wanted(self, value: ir.Value) -> Wanted:
        options = self.options
        axis = _channel_axis(value)
        observer = options.observer
        histogram = observer is None or observer.needs_histogram
        coarse = axis is not None and options.two_terms_below > 0
        channels = axis if options.outlier_limit else None
        return Wanted(value.name or "", histogram or coarse, channels)

    def _best_observer(
        self,
        model: ir.Model,
        values: Sequence[ir.Value],
        statistics: Statistics,
        context: PassContext,
    ) -> Observer:
        """Quantize the activations of a copy with each observer, and return the best."""
        options = self.options
        types = {quantizer_of(value)[0] for value in values}
        observers = [each for each in Observer if all(each.knows(qtype) for qtype in types)]
        with (
            context.progress.task("trying observers", 2) as advance,
            tempfile.TemporaryDirectory(prefix="qcompile-trial-") as folder,
            WeightStore(Path(folder)) as store,
        ):
            reference = Reference(
                model,
                options.samples,
                memory=options.memory_budget // _SHARE_OF_OUTPUTS,
                most_calls=_TRIAL_CALLS,
                custom_op_libraries=options.custom_op_libraries,
            )
            advance(1)
            candidates = [
                {value.name or "": self._range(value, statistics, observer) for value in values}
                for observer in observers
            ]
            quality = try_ranges(model, candidates, options.trial, reference, PassContext(store))
            advance(1)
        return observers[int(np.argmax(quality))]

    def _statistics(
        self, model: ir.Model, wanted: Sequence[Wanted], context: PassContext
    ) -> Statistics:
        options = self.options
        path = options.statistics
        if path is not None and path.exists():
            found = load_statistics(
                path,
                model_fingerprint=options.model_fingerprint(),
                samples_fingerprint=options.samples.fingerprint(),
            )
            found.require(wanted, str(path))
            return found
        collected = collect_statistics(
            model,
            wanted,
            options.samples,
            model_fingerprint=options.model_fingerprint() if path else "",
            memory_budget=options.memory_budget,
            progress=context.progress,
            custom_op_libraries=options.custom_op_libraries,
            threads=context.workers,
        )
        if path is not None:
            save_statistics(collected, path)
        return collected

    def _mark_outliers(self, value: ir.Value, found: TensorStatistics) -> None:
        """Write on a value which of its channels stay in float."""
        if found.channel_minimum is None or found.channel_maximum is None:
            return
        if quantizer_of(value)[0].floating:
            return
        channels = outlier_channels(
            found.channel_minimum, found.channel_maximum, self.options.outlier_limit
        )
        if channels:
            value.metadata_props[OUTLIERS] = json.dumps(channels)

    def _mark_coarse(self, value: ir.Value, statistics: Statistics) -> None:
        """Write on a value that one term is too coarse; with two it needs no outlier channels."""
        if not self.options.two_terms_below or _channel_axis(value) is None:
            return
        qtype, symmetric = quantizer_of(value)
        found = _inliers(value, statistics)
        if found.histogram is None or qtype.floating:
            return
        low, high = min(found.minimum, 0.0), max(found.maximum, 0.0)
        step = grid_of(low, high, qtype, symmetric=symmetric).scale
        size = median_magnitude(found.histogram.centers, found.histogram.counts)
        if size < self.options.two_terms_below * step:
            value.metadata_props[TERMS] = "2"
            value.metadata_props.pop(OUTLIERS, None)

    def _range(
        self, value: ir.Value, statistics: Statistics, observer: Observer
    ) -> tuple[float, float]:
        """Return the range of a value's codes, its outlier channels left out."""
        qtype, symmetric = quantizer_of(value)
        # What a range leaves out is no residual that one step could hold.
        return choose_range(
            _inliers(value, statistics),
            Observer.MIN_MAX if TERMS in value.metadata_props else observer,
            qtype,
            symmetric,
            percentile=self.options.percentile,
        )

    def _write(self, value: ir.Value, statistics: Statistics, observer: Observer) -> str:
        """Write the range on a value; return it as a clause."""
        low, high = self._range(value, statistics, observer)
        value.metadata_props[RANGE] = json.dumps([low, high])
        clause = f"{low:.6g} to {high:.6g}"
        if OUTLIERS in value.metadata_props:
            clause += f", channels {value.metadata_props[OUTLIERS].strip('[]')} in float"
        found = _inliers(value, statistics)
        if found.histogram is not None:
            qtype, symmetric = quantizer_of(value)
            quality = activation_sqnr_db(found, qtype, low, high, symmetric=symmetric)
            if TERMS in value.metadata_props:
                quality += _SECOND_TERM_DB
                clause += " in two terms"
            if np.isfinite(quality):
                annotate(value, **{ACTIVATION_SQNR.removeprefix("qcompiler."): quality})
                clause += f", {quality:.1f} dB"
        return clause


def _quantized_values(graph: ir.Graph) -> Iterator[ir.Value]:
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        if QUANTIZER in value.metadata_props:
            yield value


def _has_own_scale(value: ir.Value) -> bool:
    return SHARES not in value.metadata_props


def _channel_axis(value: ir.Value) -> int | None:
    """Return the axis of channels that may stay in float, None where none may.

    They may where every reader of the codes is a product over the value's last axis, and the value
    itself is there in float.
    """
    producer = value.producer()
    if value.shape is None or (producer is not None and PLACEMENT in producer.metadata_props):
        return None
    readers = [
        use.node
        for use in value.uses()
        if use.idx in json.loads(use.node.metadata_props.get(QUANTIZED_INPUTS, "[]"))
    ]
    products = all(
        is_op(node, "MatMul", "Gemm") and not int_attribute(node, "transA", 0) for node in readers
    )
    return len(value.shape) - 1 if products and len(value.shape) > 1 else None


def _inliers(value: ir.Value, statistics: Statistics) -> TensorStatistics:
    """Return statistics of the channels that are quantized.

    What an outlier channel holds within the range of the others is taken for theirs.
    """
    found = statistics.tensors[value.name or ""]
    channels = json.loads(value.metadata_props.get(OUTLIERS, "[]"))
    if not channels:
        return found
    assert found.channel_minimum is not None
    assert found.channel_maximum is not None
    low = float(np.delete(found.channel_minimum, channels).min())
    high = float(np.delete(found.channel_maximum, channels).max())
    histogram = None if found.histogram is None else found.histogram.within(low, high)
    return replace(found, minimum=low, maximum=high, histogram=histogram)
