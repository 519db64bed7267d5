"""Leaves the most sensitive ops out of w8a8 until the outputs are good enough."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import ClassVar, Final

import onnx_ir as ir

from qcompiler.calibration.calls import Samples, counted
from qcompiler.calibration.candidates import (
    Candidate,
    carry_ranges,
    find_candidates,
    float_outputs,
    nearby_places,
)
from qcompiler.calibration.damage import Damage, MeasureOptions, measure_damage
from qcompiler.calibration.held_out import hold_out, spread
from qcompiler.calibration.metric import OutputBound
from qcompiler.calibration.quality import Reference
from qcompiler.errors import ParityError
from qcompiler.ir.dataflow import all_nodes
from qcompiler.ir.editing import values_of
from qcompiler.ir.provenance import (
    ACTIVATION_SQNR,
    OUTLIERS,
    PAIR_LIMIT,
    PLACEMENT,
    QUANTIZER,
    RANGE,
    TERMS,
    annotate,
    scheme_of,
)
from qcompiler.ir.quantizable import Site, find_sites
from qcompiler.ir.weights import WeightStore
from qcompiler.quant.scheme import FLOAT, Activations
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite
from qcompiler.rewriting.stages import Stage
from qcompiler.targets.capability import Resolution, Target, resolve
from qcompiler.targets.site_requests import request_for

RANKING_CALLS: Final = 4
"""Calls that ops are ranked on; more of them change few ranks."""


@dataclass(frozen=True, slots=True)
class FallbackOptions:
    """Options of `assign-fallbacks`.

    Attributes:
        bound: What must hold of the outputs.
        samples: The calls to run models on; the last quarter judges, the others rank.
        target: What ops can fall back to.
        place: Places quantizers for the schemes that ops have.
        quantize: Turns a placed model into one with Q/DQ nodes, in this order.
        lower: Turns that into what is shipped, which is what is judged.
        memory_budget: Bytes the process may take.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
    """

    bound: OutputBound
    samples: Samples
    target: Target
    place: Pass
    quantize: tuple[Pass, ...]
    lower: tuple[Pass, ...] = ()
    memory_budget: int = 2 << 30
    custom_op_libraries: tuple[Path, ...] = ()


class AssignFallbacks(Pass):
    """Give the most sensitive ops w8a16 in place of w8a8, as many as a bound on outputs asks for.

    Before: y = MatMul(x, w)     # qcompiler.scheme = "w8a8:sym", alone it leaves 14.4 dB
    After:  y = MatMul(x, w)     # qcompiler.scheme = "w8a16:asym", qcompiler.reason = why
    Refuses: nothing: it stops where no choice is good enough.

    The graph does not change; places of quantizers do. Ops are ranked by the damage each does
    alone (`calibration.damage`), near the op for all and at the outputs for the worst, and how
    many of them fall back is found by bisection, each time by running the quantized model on
    held-out samples without the runtime's optimizations.

    Raises (from `run`):
        ParityError: The bound does not hold with every op left out.
        UsageError: The user's metric cannot be used.
    """

    name: ClassVar[str] = "assign-fallbacks"
    consumes: ClassVar[Stage] = Stage.ASSIGNED
    produces: ClassVar[Stage] = Stage.ASSIGNED
    numerics: ClassVar[Numerics] = Numerics.EXACT

    options: FallbackOptions

    def __init__(self, options: FallbackOptions) -> None:
        self.options = options

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Rank, choose by bisection, and write the choice."""
        candidates = _candidates(model)
        if not candidates:
            return PassResult()
        with WeightStore(context.store.directory) as store:
            scratch = replace(context, store=store)
            trials = _Trials(model, self.options, scratch)
            first = trials.outcome([])
            if first.shortfall <= 0:
                return PassResult((Rewrite("bound-holds", "", trials.account(0, len(candidates))),))
            chosen = self._choose(model, candidates, trials, scratch)
        rewrites = [
            Rewrite("fall-back", node, _leave_out(model, node, text, self.options))
            for node, text in self._reasons(chosen)
        ]
        carry_ranges(model.graph)
        self.options.place.run(model, context)
        _forget_unused_ranges(model.graph)
        account = trials.account(len(chosen), len(candidates))
        return PassResult((Rewrite("bound-holds", "", account), *rewrites))

    def _choose(
        self,
        model: ir.Model,
        candidates: Sequence[Candidate],
        trials: "_Trials",
        context: PassContext,
    ) -> list[tuple[Candidate, Damage]]:
        """Return what falls back, with its damage at the outputs, the worst first."""
        everything = trials.outcome(candidates)
        if everything.shortfall > 0:
            raise _out_of_reach(self.options.bound, trials, everything, len(candidates))
        near = nearby_places(model)
        order = self._ranked(model, candidates, lambda c: near.get(c.nodes[0], ()), context)
        count = _fewest([c for c, _ in order], len(order), trials)
        ends = [value.name or "" for value in float_outputs(model)]
        # The nearby ranking is an estimate; twice as many as needed are looked at exactly.
        worst = [c for c, _ in order[: 2 * count]]
        exact = self._ranked(model, worst, lambda c: ends, context)
        better = [c for c, _ in exact]
        if trials.outcome(better[:count]).shortfall <= 0:
            return exact[: _fewest(better, count, trials)]
        damage = dict(exact)
        return [(c, damage[c]) for c, _ in order[:count]]

    def _ranked(
        self,
        model: ir.Model,
        candidates: Sequence[Candidate],
        places: Callable[[Candidate], Sequence[str]],
        context: PassContext,
    ) -> list[tuple[Candidate, Damage]]:
        """Return candidates with their damage, the worst first; the earlier one of equals."""
        options = self.options
        ranking, _ = hold_out(options.samples)
        measure = MeasureOptions(
            spread(ranking, RANKING_CALLS),
            (options.place, *options.quantize),
            context,
            options.memory_budget,
            options.custom_op_libraries,
        )
        found = measure_damage(model, candidates, places, measure, "ranking ops")
        pairs = list(zip(candidates, found, strict=True))
        return sorted(pairs, key=lambda pair: -pair[1].noise)

    def _reasons(self, chosen: Sequence[tuple[Candidate, Damage]]) -> Iterator[tuple[str, str]]:
        for candidate, damage in chosen:
            scheme = candidate.scheme.partition(":")[0]
            text = (
                f"left out of {scheme} by {self.options.bound.option}: alone it leaves "
                f"{damage.sqnr_db:.1f} dB at the outputs"
            )
            for node in candidate.nodes:
                yield node, text


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How good a quantized model is.

    Attributes:
        shortfall: By how much it misses the bound; not positive where the bound holds. Of two
            bounds, that of the one that is missed, the SQNR first.
        text: For people.
    """

    shortfall: float
    text: str


@dataclass(slots=True)
class _Trials:
    """Quantizes copies of a model with some ops left out, and judges them; keeps what it found."""

    model: ir.Model
    options: FallbackOptions
    context: PassContext
    found: dict[tuple[str, ...], _Outcome] = field(default_factory=dict)
    reference: Reference | None = None
    wanted: float | None = None

    def outcome(self, left_out: Sequence[Candidate]) -> _Outcome:
        """Judge the model with some candidates left out."""
        key = tuple(sorted(node for candidate in left_out for node in candidate.nodes))
        if key not in self.found:
            self.found[key] = self._judge(self._quantized(key))
        return self.found[key]

    def account(self, count: int, of: int) -> str:
        """Say what was tried: with nothing left out, and with what was chosen."""
        return f"{count} of {of} ops left out of w8a8: {'; '.join(self._texts(count))}"

    def _texts(self, count: int) -> Iterator[str]:
        calls = counted(len(self.reference), "held-out call") if self.reference else "the metric"
        yield f"{self.found[()].text} with none ({calls})"
        held = [o for key, o in self.found.items() if len(key) >= count and o.shortfall <= 0]
        if count and held:
            yield f"{min(held, key=lambda o: -o.shortfall).text} with {count}"

    def _quantized(self, left_out: Sequence[str]) -> ir.Model:
        copy = self.model.clone()
        carry_ranges(copy.graph)
        for name in left_out:
            _leave_out(copy, name, "", self.options)
        options = self.options
        for rewrite in (options.place, *options.quantize, *options.lower):
            rewrite.run(copy, self.context)
        return copy

    def _judge(self, quantized: ir.Model) -> _Outcome:
        bound, libraries = self.options.bound, self.options.custom_op_libraries
        shortfalls, texts = [], []
        if bound.min_sqnr_db is not None:
            found = self._reference().sqnr_db(quantized)
            shortfalls.append(inf if found != found else bound.min_sqnr_db - found)
            texts.append(f"{found:.1f} dB")
        if bound.metric is not None:
            if self.wanted is None:
                self.wanted = bound.metric.of(self.model, libraries) - bound.max_drop
            score = bound.metric.of(quantized, libraries)
            shortfalls.append(self.wanted - score)
            texts.append(f"{bound.metric.reference} {score:.6g} of {self.wanted:.6g}")
        missed = [shortfall for shortfall in shortfalls if shortfall > 0]
        return _Outcome(missed[0] if missed else max(shortfalls), ", ".join(texts))

    def _reference(self) -> Reference:
        if self.reference is None:
            _, judging = hold_out(self.options.samples)
            self.reference = Reference(
                self.model,
                judging,
                memory=self.options.memory_budget // 4,
                most_calls=len(judging),
                custom_op_libraries=self.options.custom_op_libraries,
            )
        return self.reference


def _candidates(model: ir.Model) -> list[Candidate]:
    """Return what works on quantized activations."""
    quantized = {node.name for node in all_nodes(model) if _quantizes_activations(node)}
    return [c for c in find_candidates(model) if any(name in quantized for name in c.nodes)]


def _quantizes_activations(node: ir.Node) -> bool:
    scheme = scheme_of(node)
    if scheme is None or scheme.activations is Activations.FLOAT:
        return False
    return scheme.activations is Activations.DYNAMIC or PLACEMENT in node.metadata_props


def _fewest(order: Sequence[Candidate], holds: int, trials: _Trials) -> int:
    """Return how many from the front must be left out, given that `holds` are enough and 0 not."""
    fails = 0
    while holds - fails > 1:
        middle = (fails + holds) // 2
        if trials.outcome(order[:middle]).shortfall <= 0:
            holds = middle
        else:
            fails = middle
    return holds


def _leave_out(model: ir.Model, name: str, reason: str, options: FallbackOptions) -> str:
    """Give an op the best that needs no activation ranges; return that scheme."""
    (node,) = (node for node in all_nodes(model) if node.name == name)
    found = [_fallback(site, model, options) for site in find_sites(model)[0] if site.node is node]
    resolution = next((entry for entry in found if entry.scheme is None), found[0])
    scheme = FLOAT if resolution.scheme is None else str(resolution.scheme)
    node.metadata_props.pop(PAIR_LIMIT, None)
    if resolution.pair_limit is not None:
        annotate(node, pair_limit=resolution.pair_limit)
    annotate(node, scheme=scheme, rule=resolution.rule, reason=reason)
    return scheme


def _fallback(site: Site, model: ir.Model, options: FallbackOptions) -> Resolution:
    scheme = scheme_of(site.node)
    assert scheme is not None
    wanted = replace(scheme, activations=Activations.FLOAT, symmetric=None)
    in_body = site.node.graph is not model.graph
    tied = len(site.weight.uses()) > 1
    return resolve(options.target, request_for(site, wanted, tied=tied, in_body=in_body))


def _forget_unused_ranges(graph: ir.Graph) -> None:
    for value in values_of(graph):
        if QUANTIZER not in value.metadata_props:
            for key in (RANGE, OUTLIERS, TERMS, ACTIVATION_SQNR):
                value.metadata_props.pop(key, None)


def _out_of_reach(
    bound: OutputBound, trials: _Trials, everything: _Outcome, count: int
) -> ParityError:
    first = trials.outcome([])
    message = (
        f"{bound.option} does not hold: all {count} ops in w8a8 give {first.text}, and with all of "
        f"them left out of it the outputs still have {everything.text}"
    )
    return ParityError(message, hint="lower the bound, or keep more ops in float with --exclude")
