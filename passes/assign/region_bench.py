"""Measures the variants of integer regions, each different one once."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir

from qcompiler.calibration.calls import Feeds
from qcompiler.execution.intermediates import shapes_at, values_at
from qcompiler.execution.latency import Budget, Timing
from qcompiler.execution.measurements import Measurement, Measurements, machine_name
from qcompiler.ir.provenance import PAIR_LIMIT, SCHEME, annotate
from qcompiler.ir.weights import WeightStore
from qcompiler.passes.assign.latency_choice import Variant, choose
from qcompiler.passes.assign.measured_units import Unit, alternative
from qcompiler.quant.scheme import FLOAT, Activations
from qcompiler.rewriting.base import Pass, PassContext
from qcompiler.targets.capability import Resolution, Target

Compare = Callable[[Sequence[ir.Model], Feeds, Budget], Sequence[Timing]]
"""Times models on the same inputs, relative to the first."""
Shape = tuple[int, ...]

_SECONDS: Final = 0.6
"""Time to measure one unit."""
_UNITS: Final = 40
_SECONDS_BEYOND: Final = 30.0
"""Time for all different units beyond the first so many together."""
_ALTERNATIVES: Final = {
    Variant.DYNAMIC: Activations.DYNAMIC,
    Variant.WEIGHTS: Activations.FLOAT,
}


@dataclass(frozen=True, slots=True)
class Workshop:
    """What it takes to make and run the variants of a region.

    Attributes:
        target: What products could get instead of what was planned.
        place: The pass that marks the values to be quantized.
        remaining: The passes that make of a plan what is shipped, in order.
        compare: What measures.
        threads: Threads of one operator; None leaves it to ONNX Runtime.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
    """

    target: Target
    place: Pass
    remaining: tuple[Pass, ...]
    compare: Compare
    threads: int | None = None
    custom_op_libraries: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured of a unit, and what follows.

    Attributes:
        variant: What is kept.
        timings: The timing of each variant, relative to float.
        resolutions: What products get in the variants other than float and the planned one.
        shape: Shape of the unit's data.
    """

    variant: Variant
    timings: Mapping[Variant, Timing]
    resolutions: Mapping[Variant, Mapping[str, Resolution]]
    shape: Shape


@dataclass(frozen=True, slots=True)
class _Question:
    """A unit and the variants that are compared: float and these."""

    unit: Unit
    variants: tuple[Variant, ...]
    resolutions: Mapping[Variant, Mapping[str, Resolution]] = field(default_factory=dict)


def measure_units(
    model: ir.Model,
    units: Sequence[Unit],
    feeds: Feeds,
    workshop: Workshop,
    measurements: Measurements,
    context: PassContext,
) -> list[Outcome]:
    """Measure all units and choose a variant of each.

    Args:
        model: The model with its plan and calibrated ranges; not changed.
        units: What to measure.
        feeds: The call it is measured on.
        workshop: How variants are made and run.
        measurements: What is known already, and where the rest is put.
        context: What passes may use; shows the task "measuring regions".

    Raises:
        TargetError: ONNX Runtime cannot run the model or a region.
    """
    bench = _Bench(model, units, feeds, workshop, measurements, context)
    questions = [_first_question(unit, workshop.target) for unit in units]
    answers = bench.answers(questions)
    second: dict[int, _Question] = {}
    for index, (question, timings) in enumerate(zip(questions, answers, strict=True)):
        if choose(timings) is Variant.FLOAT and Variant.WEIGHTS not in timings:
            found = alternative(question.unit, Activations.FLOAT, workshop.target)
            if found:
                weights = Variant.WEIGHTS
                second[index] = _Question(question.unit, (weights,), {weights: found})
    for index, timings in zip(second, bench.answers(list(second.values())), strict=True):
        answers[index] = {**answers[index], Variant.WEIGHTS: timings[Variant.WEIGHTS]}
    return [
        Outcome(
            choose(timings),
            timings,
            {**question.resolutions, **(second[index].resolutions if index in second else {})},
            bench.shapes[question.unit.data.name or ""],
        )
        for index, (question, timings) in enumerate(zip(questions, answers, strict=True))
    ]


def measure_as_planned(
    model: ir.Model,
    units: Sequence[Unit],
    feeds: Feeds,
    workshop: Workshop,
    measurements: Measurements,
    context: PassContext,
) -> list[Mapping[Variant, Timing]]:
    """Measure units in float and as they are planned, and nothing else.

    Arguments and errors are those of `measure_units`.
    """
    bench = _Bench(model, units, feeds, workshop, measurements, context)
    return [*bench.answers([_Question(unit, (Variant.PLANNED,)) for unit in units])]


def _first_question(unit: Unit, target: Target) -> _Question:
    """Ask for the plan, and for all that a unit of products alone could get instead.

    A range that is found at each run holds the outlier channels, and leaves the others few codes.
    """
    resolutions: dict[Variant, Mapping[str, Resolution]] = {}
    if unit.products_only:
        for variant, activations in _ALTERNATIVES.items():
            found = alternative(unit, activations, target)
            fits = variant is Variant.WEIGHTS or not unit.one_scale_is_coarse
            if fits and len(found) == len(unit.nodes):
                resolutions[variant] = found
    return _Question(unit, (Variant.PLANNED, *resolutions), resolutions)


class _Bench:
    """Answers questions about one model on one call.

    Attributes:
        shapes: Shapes of what the units read, by value name.
    """

    def __init__(
        self,
        model: ir.Model,
        units: Sequence[Unit],
        feeds: Feeds,
        workshop: Workshop,
        measurements: Measurements,
        context: PassContext,
    ) -> None:
        self._model = model
        self._feeds = feeds
        self._workshop = workshop
        self._measurements = measurements
        self._context = context
        self._machine = machine_name(workshop.threads)
        names = [value.name or "" for unit in units for value in unit.segment.inputs]
        names += [unit.data.name or "" for unit in units]
        self.shapes = shapes_at(
            model,
            list(dict.fromkeys(names)),
            feeds,
            threads=workshop.threads,
            custom_op_libraries=workshop.custom_op_libraries,
        )

    def answers(self, questions: Sequence[_Question]) -> list[dict[Variant, Timing]]:
        """Return the timings of each question; those that are the same are measured once."""
        keys = [self._key(question) for question in questions]
        missing: dict[str, _Question] = {}
        for key, question in zip(keys, questions, strict=True):
            if self._known(key, question) is None:
                missing.setdefault(key, question)
        self._measure(missing)
        found = [self._known(key, q) for key, q in zip(keys, questions, strict=True)]
        return [timings for timings in found if timings is not None]

    def _known(self, key: str, question: _Question) -> dict[Variant, Timing] | None:
        """Return what is known of a question; an entry without all variants is of no use."""
        entry = self._measurements.get(key)
        variants = (Variant.FLOAT, *question.variants)
        if entry is None or any(variant not in entry.timings for variant in variants):
            return None
        return {variant: entry.timings[variant] for variant in variants}

    def _measure(self, missing: Mapping[str, _Question]) -> None:
        if not missing:
            return
        names = [v.name or "" for q in missing.values() for v in q.unit.segment.inputs]
        values = values_at(
            self._model,
            list(dict.fromkeys(names)),
            self._feeds,
            threads=self._workshop.threads,
            custom_op_libraries=self._workshop.custom_op_libraries,
        )
        with self._context.progress.task("measuring regions", len(missing)) as advance:
            for index, (key, question) in enumerate(missing.items()):
                feeds = {v.name or "": values[v.name or ""] for v in question.unit.segment.inputs}
                budget = Budget(_seconds(index, len(missing)))
                with WeightStore(self._context.store.directory) as store:
                    models = self._models(question, feeds, store)
                    timings = self._workshop.compare(models, feeds, budget)
                named = zip((Variant.FLOAT, *question.variants), timings, strict=True)
                entry = Measurement(
                    question.unit.what(self.shapes),
                    self._machine,
                    {variant.value: timing for variant, timing in named},
                )
                self._measurements.put(key, entry)
                advance(1)

    def _models(self, question: _Question, feeds: Feeds, store: WeightStore) -> list[ir.Model]:
        """Return the unit in float, and every variant as it would be shipped."""
        base = question.unit.segment.as_model(self._model).clone()
        for value in base.graph.inputs:
            if value.type is None:
                dtype = ir.DataType.from_numpy(feeds[value.name or ""].dtype)
                value.type = ir.TensorType(dtype)
        context = PassContext(store, workers=self._context.workers)
        models = [base]
        for variant in question.variants:
            model = base.clone()
            if variant is not Variant.PLANNED:
                for node in model.graph:
                    if node.metadata_props.get(SCHEME, FLOAT) != FLOAT:
                        write_resolution(node, question.resolutions[variant].get(node.name or ""))
                self._workshop.place.run(model, context)
            for rewrite in self._workshop.remaining:
                rewrite.run(model, context)
            models.append(model)
        return models

    def _key(self, question: _Question) -> str:
        """Return what stands for a question in a file: equal for those with equal answers."""
        unit = question.unit
        signature: tuple[object, ...] | None = unit.segment.signature()
        if signature is None:
            signature = tuple(node.name for node in unit.segment.nodes)
        content: list[Any] = [
            signature,
            [self.shapes[value.name or ""] for value in unit.segment.inputs],
            unit.plan(),
            [variant.value for variant in question.variants],
            [
                [str(resolution.scheme) for resolution in found.values()]
                for found in question.resolutions.values()
            ],
            self._machine,
            version("qcompiler"),
        ]
        return hashlib.sha256(repr(content).encode()).hexdigest()


def write_resolution(node: ir.Node, resolution: Resolution | None) -> None:
    """Write on a node which scheme it gets; None is float."""
    node.metadata_props.pop(PAIR_LIMIT, None)
    if resolution is None or resolution.scheme is None:
        annotate(node, scheme=FLOAT)
        return
    annotate(node, scheme=str(resolution.scheme))
    if resolution.pair_limit is not None:
        annotate(node, pair_limit=resolution.pair_limit)


def _seconds(index: int, count: int) -> float:
    """Return how long the unit of this index is measured, of so many."""
    if index < _UNITS:
        return _SECONDS
    return min(_SECONDS, _SECONDS_BEYOND / (count - _UNITS))
