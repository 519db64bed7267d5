"""What a search needs before it makes anything: samples, tables, candidates."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final

from qcompiler.calibration.held_out import hold_out
from qcompiler.calibration.largest_call import largest_call
from qcompiler.calibration.metric import OutputBound
from qcompiler.errors import UsageError
from qcompiler.execution.latency import Budget, compare_latency
from qcompiler.execution.measurements import Measurement, Measurements, machine_name
from qcompiler.ir.fingerprint import fingerprint
from qcompiler.ir.load import load_model
from qcompiler.ir.provenance import forget
from qcompiler.ir.weights import WeightStore
from qcompiler.options import CompileOptions
from qcompiler.passes.assign.assign_islands import AssignIslands
from qcompiler.pipeline import pass_named, pipeline
from qcompiler.plan import Plan, make_plan, with_data
from qcompiler.progress import Progress
from qcompiler.quant.islands import IslandBudget, IslandKind, IslandRequest, Saliency
from qcompiler.quant.scheme import Activations, parse_scheme
from qcompiler.rewriting.base import PassContext
from qcompiler.rewriting.manager import PassManager
from qcompiler.search.assigned import Assigned, assign, products_ms
from qcompiler.search.candidates import Candidate, Planner
from qcompiler.search.mixing import Choice, Mix, choices_of
from qcompiler.search.request import SearchRequest
from qcompiler.search.trial import Trials

_FLOAT_BUDGET: Final = Budget(seconds=2.0)


@dataclass(frozen=True, slots=True)
class Folders:
    """Where a search works.

    Attributes:
        work: A folder that goes at the end.
        measurements: The file of measurements.
    """

    work: Path
    measurements: Path

    @property
    def gradients(self) -> Path:
        """Where gradients are kept."""
        return self.work / "gradients"


class Preparation:
    """Opens model and samples, and lists candidates."""

    def __init__(
        self,
        source: Path,
        common: CompileOptions,
        request: SearchRequest,
        bound: OutputBound | None,
        folders: Folders,
        progress: Progress,
    ) -> None:
        self._source, self._request, self._bound = source, request, bound
        self._folders, self._progress = folders, progress
        self._options = [self._with_scheme(common, scheme, bound) for scheme in request.schemes]
        self._model = load_model(source)
        forget(self._model)
        self._sha256 = fingerprint(source)
        self._plan = self._plan_of(self._options[0])
        assert self._plan.data is not None
        self._feeds = largest_call(self._plan.data.samples)
        self._judging = hold_out(self._plan.data.samples)[1]

    @property
    def judged_on(self) -> str:
        """The calls that judge."""
        return self._judging.origin

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know of the judgement."""
        assert self._plan.data is not None
        if len(self._plan.data.samples) > 1:
            return ()
        return ("the search judged on the only call, which codes were chosen on as well",)

    def trials(self) -> Trials:
        """Return what makes and measures candidates."""
        return Trials(
            self._source,
            self._request,
            self._bound,
            self._plan,
            self._judging,
            self._feeds,
            self._folders.measurements,
            self._progress,
        )

    def candidates(self) -> list[Candidate]:
        """Return what is to be tried, the smallest of each sort first."""
        with WeightStore(self._folders.work) as store:
            workers = self._options[0].workers or os.cpu_count() or 1
            context = PassContext(store, self._progress, workers)
            uniform, float_ms = self._uniform(context), None
            if self._request.max_latency_ratio is not None:
                float_ms = self._float_ms()
                uniform = [self._timed(each, context) for each in uniform]
            saliency, mix = self._request.saliency, None
            weight_only = [each for each in uniform if each.weight_only]
            if saliency is not None and weight_only:
                mix = self._mix(weight_only, saliency, context)
            planner = Planner(self._request, uniform, float_ms, mix)
            found = [*planner.uniform()]
            if saliency is not None:
                found += [*planner.columns(saliency), *planner.mixes()]
            return found

    def _uniform(self, context: PassContext) -> list[Assigned]:
        """Return the model with each scheme, less those that come out as another one did."""
        found: list[Assigned] = []
        for options in self._options:
            plan = self._plan_of(options)
            each = assign(options.scheme or "", options, plan, self._model, context)
            seen = any(other.schemes() == each.schemes() for other in found)
            if each.planned_elements and not seen:
                found.append(each)
        if not found:
            message = "no weight of the model can have any of the schemes"
            hint = "`qcompile inspect` lists its ops"
            raise UsageError(message, where="--search", hint=hint)
        return found

    def _timed(self, assigned: Assigned, context: PassContext) -> Assigned:
        if not assigned.weight_only:
            return assigned
        compare = partial(
            compare_latency,
            threads=self._plan.threads,
            custom_op_libraries=self._plan.custom_op_libraries,
        )
        measurements = Measurements(self._folders.measurements)
        found = products_ms(assigned, self._feeds, compare, measurements, context)
        measurements.save()
        return replace(assigned, more_ms=found)

    def _float_ms(self) -> float:
        machine = machine_name(self._plan.threads)
        shapes = [(name, array.shape) for name, array in sorted(self._feeds.items())]
        content = (self._sha256, shapes, machine, version("qcompiler"))
        key = hashlib.sha256(repr(content).encode()).hexdigest()
        measurements = Measurements(self._folders.measurements)
        known = measurements.get(key)
        if known is None:
            (timing,) = compare_latency(
                (self._source,),
                self._feeds,
                _FLOAT_BUDGET,
                threads=self._plan.threads,
                custom_op_libraries=self._plan.custom_op_libraries,
            )
            known = Measurement(f"{self._source.name} in float", machine, {"float": timing})
            measurements.put(key, known)
            measurements.save()
        return known.timings["float"].milliseconds

    def _mix(
        self, uniform: Sequence[Assigned], saliency: Saliency, context: PassContext
    ) -> Mix | None:
        """Score the weights at the smallest scheme; None where none can have another one."""
        stored = self._request.in_bytes
        base = min(uniform, key=lambda each: each.bits(stored=stored))
        known = choices_of(uniform, stored=stored)
        # Nothing is spent: only scores are asked for.
        request = IslandRequest(saliency, IslandBudget(fraction=1.0), IslandKind.NODE)
        plan = self._plan_of(replace(base.options, islands=request))
        model = self._model.clone()
        passes = pipeline(plan)
        names = [entry.name for entry in passes]
        PassManager(context).run(model, passes[: names.index(AssignIslands.name)])
        scoring = pass_named(AssignIslands.name, plan)
        assert isinstance(scoring, AssignIslands)
        schemes = {name: [entry[0] for entry in entries] for name, entries in known.items()}
        damages = scoring.damages(model, schemes, context)
        if not damages:
            return None
        choices = {
            name: [
                Choice(scheme, bits, damage, more)
                for (scheme, bits, more), damage in zip(known[name], damages[name], strict=True)
            ]
            for name in damages
        }
        return Mix(base, choices, stored)

    def _plan_of(self, options: CompileOptions) -> Plan:
        return with_data(make_plan(options), self._model, lambda: self._sha256)

    def _with_scheme(
        self, common: CompileOptions, scheme: str, bound: OutputBound | None
    ) -> CompileOptions:
        """Return the options of one scheme; only one that calibrates can fall back for a bound."""
        options = replace(common, scheme=scheme)
        found = parse_scheme(scheme)
        if found is not None and found.activations is Activations.STATIC and bound is not None:
            return replace(
                options,
                min_output_sqnr=bound.min_sqnr_db,
                metric=None if bound.metric is None else bound.metric.reference,
                max_metric_drop=None if bound.metric is None else bound.max_drop,
            )
        return options if options.never_slower is False else replace(options, never_slower=None)
