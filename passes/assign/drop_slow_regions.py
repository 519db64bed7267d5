"""Measures every integer region against float, and changes the plan of those that lose."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Final

import onnx_ir as ir

from qcompiler.calibration.calls import Samples
from qcompiler.calibration.largest_call import largest_call
from qcompiler.execution.latency import compare_latency
from qcompiler.execution.measurements import Measurements
from qcompiler.ir.dataflow import node_name
from qcompiler.ir.provenance import annotate, scheme_of
from qcompiler.passes.assign.latency_choice import Variant
from qcompiler.passes.assign.measured_units import Unit, find_units
from qcompiler.passes.assign.region_bench import (
    Compare,
    Outcome,
    Workshop,
    measure_units,
    write_resolution,
)
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage
from qcompiler.targets.capability import Target

RULE: Final = "never-slower"


@dataclass(frozen=True, slots=True)
class DropSlowRegionsOptions:
    """Options of `drop-slow-regions`.

    Attributes:
        target: What products could get instead of what was planned.
        samples: Where the inputs come from that regions are measured on.
        place: The pass that marks the values to be quantized.
        remaining: The passes that make of the plan what is shipped, in order.
        measurements: A file of measurements: what it holds is not measured again, and what is
            measured is added; None keeps nothing.
        threads: Threads of one operator; None leaves it to ONNX Runtime.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
        compare: What measures, None for ONNX Runtime.
    """

    target: Target
    samples: Samples
    place: Pass
    remaining: tuple[Pass, ...]
    measurements: Path | None = None
    threads: int | None = None
    custom_op_libraries: tuple[Path, ...] = ()
    compare: Compare | None = None


class DropSlowRegions(Pass):
    """Leave integer regions in float, or quantize them in another way, where that is faster.

    Before: y = MatMul(x, w)   # qcompiler.scheme = "w8a8:sym", qcompiler.region = 3
    After:  y = MatMul(x, w)   # qcompiler.scheme = "float", qcompiler.rule = "never-slower",
                               # qcompiler.float_ms = 0.412, qcompiler.quantized_ms = 0.540
    Refuses: products that neither integers nor a smaller weight make as fast as float: they stay
        in float.

    The graph does not change; what was measured is written on all nodes of a region. Each region
    runs in ONNX Runtime as the remaining passes would make it, on what the model's values hold in
    the largest of the samples.

    Raises (from `run`):
        UsageError: The samples or the file of measurements cannot be used.
        TargetError: ONNX Runtime cannot run the model or a region.
    """

    name: ClassVar[str] = "drop-slow-regions"
    consumes: ClassVar[Stage] = Stage.ASSIGNED
    produces: ClassVar[Stage] = Stage.ASSIGNED
    numerics: ClassVar[Numerics] = Numerics.EXACT

    options: DropSlowRegionsOptions

    def __init__(self, options: DropSlowRegionsOptions) -> None:
        self.options = options

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Measure, decide, write the decisions, and place the quantizers again."""
        units = find_units(model)
        if not units:
            return PassResult()
        measurements = Measurements(self.options.measurements)
        feeds = largest_call(self.options.samples)
        outcomes = measure_units(model, units, feeds, self._workshop(), measurements, context)
        measurements.save()
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        for unit, outcome in zip(units, outcomes, strict=True):
            _write_times(unit, outcome)
            for change in _changes(unit, outcome):
                if isinstance(change, Skip):
                    skips.append(change)
                else:
                    rewrites.append(change)
        if any(outcome.variant is not Variant.PLANNED for outcome in outcomes):
            self.options.place.run(model, context)
        return PassResult(tuple(rewrites), tuple(skips))

    def _workshop(self) -> Workshop:
        options = self.options
        compare = options.compare or partial(
            compare_latency,
            threads=options.threads,
            custom_op_libraries=options.custom_op_libraries,
        )
        return Workshop(
            options.target,
            options.place,
            options.remaining,
            compare,
            options.threads,
            options.custom_op_libraries,
        )


def _write_times(unit: Unit, outcome: Outcome) -> None:
    timings = outcome.timings
    quantized = Variant.PLANNED if outcome.variant is Variant.FLOAT else outcome.variant
    for node in unit.nodes:
        annotate(
            node,
            float_ms=timings[Variant.FLOAT].milliseconds,
            quantized_ms=timings[quantized].milliseconds,
        )


def _changes(unit: Unit, outcome: Outcome) -> Iterator[Rewrite | Skip]:
    """Write on the products of a unit what they get, and yield what is to be reported."""
    planned, where = outcome.timings[Variant.PLANNED], f"at {list(outcome.shape)}"
    if outcome.variant is Variant.PLANNED:
        detail = f"{planned.ratio:.2f} of float's time {where}"
        yield Rewrite("measure-region", node_name(unit.nodes[0]), detail)
        return
    chosen = outcome.resolutions.get(outcome.variant, {})
    for node in dict.fromkeys(site.node for site in unit.sites):
        before, resolution = scheme_of(node), chosen.get(node.name or "")
        write_resolution(node, resolution)
        if resolution is None:
            # No times in reasons: equal decisions shall give equal bytes.
            reason = f"left in float by --never-slower: {before} is slower than float {where}"
            annotate(node, rule=RULE, reason=reason)
            detail = f"{reason}, {planned.ratio:.2f} of its time"
            yield Skip(RULE, node_name(node), detail)
            continue
        reason = f"chosen by --never-slower: faster than {before} {where}; {resolution.reason}"
        annotate(node, rule=resolution.rule, reason=reason)
        ratio = outcome.timings[outcome.variant].ratio
        detail = f"{resolution.scheme}, {ratio:.2f} of float's time {where}, instead of {before}, "
        yield Rewrite(RULE, node_name(node), f"{detail}{planned.ratio:.2f}")
