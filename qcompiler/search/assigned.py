"""A model with one scheme on all of its weights: what that takes, and how long it should run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from qcompiler.calibration.calls import Feeds
from qcompiler.execution.latency import Timing
from qcompiler.execution.measurements import Measurements
from qcompiler.ir.provenance import scheme_of
from qcompiler.ir.quantizable import Site, find_sites
from qcompiler.options import CompileOptions
from qcompiler.passes.assign.assign_schemes import AssignSchemes
from qcompiler.passes.assign.island_subjects import site_bits
from qcompiler.passes.assign.latency_choice import Variant
from qcompiler.passes.assign.measured_units import find_products
from qcompiler.passes.assign.place_quantizers import PlaceQuantizers
from qcompiler.passes.assign.region_bench import Compare, Workshop, measure_as_planned
from qcompiler.passes.quantize.insert_qdq import InsertQdq
from qcompiler.pipeline import pass_named, pipeline
from qcompiler.plan import Plan
from qcompiler.quant.ranges import RangeMethod
from qcompiler.quant.scheme import Activations, QScheme
from qcompiler.rewriting.base import PassContext
from qcompiler.rewriting.manager import PassManager


@dataclass(frozen=True, slots=True)
class Assigned:
    """A canonical model with schemes on its ops.

    Attributes:
        name: The scheme that was asked for.
        options: What compiles it.
        plan: The same, looked up, with samples.
        model: The model.
        sites: By name of the weight, the first place that reads it.
        more_ms: By name of a node, milliseconds beyond what it takes in float; empty where that
            was not measured.
    """

    name: str
    options: CompileOptions
    plan: Plan
    model: ir.Model
    sites: Mapping[str, Site]
    more_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def weight_only(self) -> bool:
        """Whether all data stays in float."""
        schemes = [scheme for scheme in self.schemes().values() if scheme is not None]
        return all(scheme.activations is Activations.FLOAT for scheme in schemes)

    @property
    def elements(self) -> int:
        """Elements of all weights, those that stay in float as well."""
        return sum(site.tensor.size for site in self.sites.values())

    def schemes(self) -> dict[str, QScheme | None]:
        """Return what every weight gets, by its name."""
        return {name: scheme_of(site.node) for name, site in self.sites.items()}

    def bits(self, *, stored: bool, planned: bool | None = None) -> int:
        """Return the bits of all weights, or of those that are planned or are not."""
        return sum(
            site_bits(site, stored=stored)
            for site in self.sites.values()
            if planned is None or (scheme_of(site.node) is not None) is planned
        )

    @property
    def planned_elements(self) -> int:
        """Elements of the weights that get integers."""
        return sum(s.tensor.size for s in self.sites.values() if scheme_of(s.node) is not None)


def assign(
    name: str, options: CompileOptions, plan: Plan, canonical: ir.Model, context: PassContext
) -> Assigned:
    """Bring a copy of a model to where its ops have schemes."""
    model = canonical.clone()
    passes = pipeline(plan)
    names = [entry.name for entry in passes]
    PassManager(context).run(model, passes[: names.index(AssignSchemes.name) + 1])
    sites: dict[str, Site] = {}
    for site in find_sites(model)[0]:
        sites.setdefault(site.weight.name or "", site)
    return Assigned(name, options, plan, model, sites)


def products_ms(
    assigned: Assigned,
    feeds: Feeds,
    compare: Compare,
    measurements: Measurements,
    context: PassContext,
) -> dict[str, float]:
    """Measure every op with a scheme alone, in float and as planned, on real data.

    Args:
        assigned: A model whose data stays in float.
        feeds: The call.
        compare: What measures.
        measurements: What is known already, and where the rest is put.
        context: What passes may use.

    Returns:
        By name of the node, how many milliseconds more than in float it takes.

    Raises:
        TargetError: ONNX Runtime cannot run an op.
    """
    quick = _quick(assigned.plan)
    remaining = (InsertQdq.name, *assigned.plan.target.lowering)
    workshop = Workshop(
        assigned.plan.target,
        pass_named(PlaceQuantizers.name, quick),
        tuple(pass_named(name, quick) for name in remaining),
        compare,
        assigned.plan.threads,
        assigned.plan.custom_op_libraries,
    )
    units = find_products(assigned.model)
    found = measure_as_planned(assigned.model, units, feeds, workshop, measurements, context)
    return {
        unit.nodes[0].name or "": _more(timings) for unit, timings in zip(units, found, strict=True)
    }


def _quick(plan: Plan) -> Plan:
    """Return a plan whose codes are found at once: what they are does not change the speed."""
    return replace(plan, weight_range=RangeMethod.MIN_MAX)


def _more(timings: Mapping[Variant, Timing]) -> float:
    return timings[Variant.PLANNED].milliseconds - timings[Variant.FLOAT].milliseconds
