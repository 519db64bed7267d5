"""Models with a calibrated plan, and a stand-in for the measuring of their regions."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.execution.latency import Budget, Timing
from qcompiler.ir.provenance import OUTLIERS, QUANTIZER, RANGE, SHARES
from qcompiler.ir.shapes import infer_shapes
from qcompiler.ir.weights import WeightStore
from qcompiler.options import CompileOptions
from qcompiler.passes.assign.assign_schemes import AssignOptions, AssignSchemes
from qcompiler.passes.assign.drop_slow_regions import DropSlowRegions, DropSlowRegionsOptions
from qcompiler.passes.assign.latency_choice import Variant
from qcompiler.passes.assign.place_quantizers import PlaceOptions, PlaceQuantizers
from qcompiler.pipeline import pass_named
from qcompiler.plan import make_plan
from qcompiler.quant.recipe import Recipe
from qcompiler.quant.scheme import parse_scheme
from qcompiler.rewriting.base import PassContext, PassResult
from qcompiler.targets.onnxruntime import ONNXRUNTIME

_PLAN = make_plan(CompileOptions(calibration="random"))
REMAINING = tuple(
    pass_named(name, _PLAN)
    for name in (
        *("split-outlier-channels", "insert-activation-qdq", "insert-qdq"),
        *ONNXRUNTIME.lowering,
    )
)
"""What makes of a plan what is shipped."""


def place() -> PlaceQuantizers:
    """Return the pass that marks values for ONNX Runtime."""
    return PlaceQuantizers(PlaceOptions(ONNXRUNTIME.placement))


def planned(
    model: ir.Model,
    folder: Path,
    *,
    outliers: Mapping[str, Sequence[int]] | None = None,
    exclude: tuple[str, ...] = (),
) -> ir.Model:
    """Plan w8a8 for a model, in place, and say that all its values lie between -4 and 4."""
    infer_shapes(model)
    recipe = Recipe.uniform(parse_scheme("w8a8"), exclude)
    with WeightStore(folder) as store:
        context = PassContext(store)
        AssignSchemes(AssignOptions(recipe, ONNXRUNTIME)).run(model, context)
        place().run(model, context)
    for value in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]:
        if QUANTIZER in value.metadata_props and SHARES not in value.metadata_props:
            value.metadata_props[RANGE] = json.dumps([-4.0, 4.0])
        if channels := (outliers or {}).get(value.name or ""):
            value.metadata_props[OUTLIERS] = json.dumps(channels)
    return model


class FakeBench:
    """Times nothing: knows how long each variant takes relative to float.

    Attributes:
        seen: For each comparison its models, float first.
        budgets: And how long it was to take.
    """

    def __init__(self, **ratios: float) -> None:
        self._ratios = {"float": 1.0, **ratios}
        self.seen: list[list[ir.Model]] = []
        self.feeds: list[Feeds] = []
        self.budgets: list[Budget] = []

    def __call__(
        self, models: Sequence[ir.Model], feeds: Feeds, budget: Budget
    ) -> tuple[Timing, ...]:
        self.seen.append(list(models))
        self.feeds.append(feeds)
        self.budgets.append(budget)
        ratios = [self._ratios[variant_of(model).value] for model in models]
        return tuple(Timing(2 * ratio, ratio, ratio, ratio) for ratio in ratios)


def variant_of(model: ir.Model) -> Variant:
    """Say which variant of a region a model is, by its ops."""
    ops = {node.op_type for node in model.graph}
    if "QuantizeLinear" in ops:
        return Variant.PLANNED
    if "DynamicQuantizeLinear" in ops:
        return Variant.DYNAMIC
    stored = (tensor.const_value for tensor in model.graph.initializers.values())
    if any(tensor is not None and tensor.dtype.bitwidth == 8 for tensor in stored):
        return Variant.WEIGHTS
    return Variant.FLOAT


def drop_slow_regions(
    model: ir.Model,
    folder: Path,
    bench: FakeBench,
    calls: Sequence[Mapping[str, npt.NDArray[Any]]],
    measurements: Path | None = None,
) -> PassResult:
    """Run the pass over a planned model."""
    samples = Samples("test", False, len(calls), lambda: iter([dict(call) for call in calls]))
    options = DropSlowRegionsOptions(
        ONNXRUNTIME, samples, place(), REMAINING, measurements, compare=bench
    )
    with WeightStore(folder) as store:
        return DropSlowRegions(options).run(model, PassContext(store))
