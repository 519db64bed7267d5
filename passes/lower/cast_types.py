"""Casts a float32 graph to 16 bits, with islands of float32 where 16 bits do not do."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import onnx_ir as ir

from qcompiler.calibration.calls import Samples
from qcompiler.errors import ParityError, UsageError
from qcompiler.ir.blocks import find_blocks
from qcompiler.ir.dataflow import all_nodes, node_name
from qcompiler.ir.provenance import COMPUTE_TYPE, SCHEME, TYPE_REASON, WEIGHT, annotate
from qcompiler.ir.quantizable import find_sites
from qcompiler.ir.selection import SelectionIndex
from qcompiler.ir.shapes import infer_shapes
from qcompiler.ir.weights import constant_bytes
from qcompiler.passes.lower.cast_apply import Applied, apply_types
from qcompiler.passes.lower.cast_check import CheckOptions, runs_as_it_is, spoiled_values
from qcompiler.passes.lower.cast_constants import ConstantCaster
from qcompiler.passes.lower.cast_graph import TypedGraph
from qcompiler.passes.lower.cast_measure import Extremes
from qcompiler.passes.lower.cast_rules import (
    Forced,
    force_around,
    force_by_constants,
    force_by_op,
    force_by_range,
)
from qcompiler.passes.lower.stored_bytes import record_stored_bytes
from qcompiler.quant.compute_type import ComputeType
from qcompiler.quant.scheme import FLOAT
from qcompiler.quant.selector import Selector
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

RULE: Final = "cast-types"
_ROUNDS: Final = 8
"""Most times that islands grow."""
_FARTHEST: Final = 128
"""Most nodes upstream of a spoiled value that join its island; the reach doubles every time."""
_JOINED: Final = "it stands between float32 ops, and in 16 bits would take more Casts"


@dataclass(frozen=True, slots=True)
class CastTypesOptions:
    """Options of `cast-types`.

    Attributes:
        type: The type to compute in.
        samples: Calls that show which values leave the range, None to go by rules alone.
        keep_io: Whether inputs and outputs of the model stay float32.
        margin: How much larger than on the samples values may be elsewhere.
        float32: Nodes that stay float32.
        memory_budget: Bytes the process may take while it reads and rounds weights.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
    """

    type: ComputeType = ComputeType.FLOAT16
    samples: Samples | None = None
    keep_io: bool = True
    margin: float = 4.0
    float32: tuple[Selector, ...] = ()
    memory_budget: int = 2 << 30
    custom_op_libraries: tuple[Path, ...] = ()


class CastTypes(Pass):
    """Let a graph compute in float16 or bfloat16, but for ops and values that this would spoil.

    Before: y = Div(x, Sqrt(ReduceMean(Pow(x, 2))))
    After:  r = Cast<float16>(Sqrt(ReduceMean(Pow(Cast<float>(x), 2))));  y = Div(x, r)
    Refuses: ops whose results leave the range of 16 bits or that need digits they do not have;
        what reads constants out of range; what makes or reads values that left the range on
        samples; types that ONNX does not allow; nodes that were excluded. They stay float32, and
        an op between them joins them where that saves a Cast.

    Which ops compute in float32 is a minimum cut: fewest Casts, then fewest float32 ops. A value
    has one Cast per type, however many read it. Constants that only mask a Softmax are clipped to
    numbers that mask as well. Scales of Q/DQ nodes follow the type; integers are untouched. Where
    there are samples, the result is run on them with every value rounded as it is stored, and
    islands grow until no value is NaN or infinite that is not so in float32.

    Without `keep_io`, float inputs and outputs of the model get the type, too, where what reads
    and makes them does.

    Raises (from `run`):
        UsageError: The model was cast to another type before, or `float32` names no node.
        ModelError: Weights cannot be read.
        ParityError: Values are NaN or infinite on samples, however far islands grow.
        TargetError: ONNX Runtime cannot run the model on a sample.
    """

    name: ClassVar[str] = RULE
    consumes: ClassVar[Stage] = Stage.CANONICAL
    produces: ClassVar[Stage] = Stage.CANONICAL
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    options: CastTypesOptions

    def __init__(self, options: CastTypesOptions | None = None) -> None:
        self.options = options or CastTypesOptions()
        self.retypes_signature = not self.options.keep_io

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Choose the islands, try them on samples, and cast the rest."""
        done = model.metadata_props.get(COMPUTE_TYPE)
        if done is not None:
            return self._again(model, done)
        infer_shapes(model)
        with context.progress.task("casting weights", 2 * constant_bytes(model) + 1) as advance:
            options = self.options
            caster = ConstantCaster(context.store, options.type, options.memory_budget, advance)
            graph = self._typed(model)
            forced = Forced()
            self._force_asked(graph, forced)
            force_by_op(graph, forced)
            masks = force_by_constants(graph, caster, forced)
            if options.samples is None:
                float32 = graph.float32_terms(list(forced.reasons))
            else:
                check = CheckOptions(
                    options.samples,
                    options.custom_op_libraries,
                    context.workers,
                    context.progress,
                )
                truth = check.measure(model, "measuring ranges")
                force_by_range(graph, truth, masks, options.margin, forced)
                float32 = self._tried(graph, forced, _by_name(masks), caster, truth, check)
            applied = apply_types(graph, float32, _by_name(masks), caster, self.name)
        return self._report(graph, float32, forced, applied)

    def _typed(self, model: ir.Model) -> TypedGraph:
        return TypedGraph(model, self.options.type, keep_io=self.options.keep_io)

    def _tried(
        self,
        graph: TypedGraph,
        forced: Forced,
        masks: Mapping[str, float],
        caster: ConstantCaster,
        truth: Mapping[str, Extremes],
        check: CheckOptions,
    ) -> set[int]:
        """Return the float32 terms with which no value goes wrong on the samples.

        Raises:
            ParityError: There are none.
        """
        found: Mapping[str, str] = {}
        reach: int | None = 0
        for _ in range(_ROUNDS + 1):
            if reach is None:
                break
            float32 = graph.float32_terms(list(forced.reasons))
            candidate = self._typed(graph.model.clone())
            applied = apply_types(candidate, float32, masks, caster, self.name)
            found = spoiled_values(candidate.model, applied, truth, check)
            if not found:
                name = runs_as_it_is(candidate.model, graph.compute, truth, check)
                found = {name: "NaN"} if name else {}
            if not found:
                return float32
            reach = self._grow(graph, found, forced, reach)
        name, fault = next(iter(found.items()))
        message = f"holds {fault} in {self.options.type} on the samples, and in float32 does not"
        hint = f"keep the nodes around it in float32 with --float32, or use {_other(graph.compute)}"
        raise ParityError(message, where=name, hint=hint)

    def _grow(
        self, graph: TypedGraph, found: Mapping[str, str], forced: Forced, reach: int
    ) -> int | None:
        """Force what lies around spoiled values, farther out where that forces nothing new.

        Returns:
            How far to reach when that was not enough; None where there is nothing left to force.
        """
        values = {value.name: value for value in graph.producer}
        while reach <= _FARTHEST:
            grown = False
            for name, fault in found.items():
                reason = f"{name} held {fault} when it was tried in {self.options.type}"
                if name in values:
                    grown |= force_around(graph, values[name], reach, reason, forced)
            reach = max(1, 2 * reach)
            if grown:
                return reach
        return None

    def _force_asked(self, graph: TypedGraph, forced: Forced) -> None:
        """Force what the user wants in float32.

        Raises:
            UsageError: A selector means no node.
        """
        selectors = self.options.float32
        blocks = any(selector.blocks is not None for selector in selectors)
        index = SelectionIndex(graph.model, find_blocks(graph.model) if blocks else [])
        for selector in selectors:
            for node in index.nodes(selector, "float32"):
                if node in graph.term_of:
                    forced.add(graph.term_of[node], f"it was asked for by {selector}")

    def _report(
        self, graph: TypedGraph, float32: Collection[int], forced: Forced, applied: Applied
    ) -> PassResult:
        """Write on every float32 node why it is one, and say what was done."""
        compute = graph.compute
        graph.model.metadata_props[COMPUTE_TYPE] = compute.value
        _record_bytes(graph.model)
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        terms = {node: [term] for node, term in graph.term_of.items()}
        for number, term in enumerate(graph.terms):
            if term.node is not None and term.node not in graph.term_of:
                terms.setdefault(term.node, []).append(number)
        for node in all_nodes(graph.model):
            wide = [number for number in terms.get(node, ()) if number in float32]
            reason = graph.refusals.get(node, "") if _holds_float32(node) else ""
            if wide:
                reason = next((forced.reasons[t] for t in wide if t in forced.reasons), _JOINED)
            if reason:
                node.metadata_props[COMPUTE_TYPE] = "float32"
                node.metadata_props[TYPE_REASON] = reason
                skips.append(Skip(RULE, node_name(node), reason))
            elif node in terms:
                rewrites.append(Rewrite(RULE, node_name(node), compute))
        for cast in applied.casts:
            readers = ", ".join(cast.readers[:3]) + (", ..." if len(cast.readers) > 3 else "")
            kind = "float32" if cast.to == ir.DataType.FLOAT else compute
            rewrites.append(Rewrite("insert-cast", cast.output, f"to {kind}, for {readers}"))
        rewrites += [Rewrite("eliminate-cast", name) for name in applied.removed]
        return PassResult(tuple(rewrites), tuple(skips))

    def _again(self, model: ir.Model, done: str) -> PassResult:
        """Return the refusals of a run before; the model stays as it is.

        Raises:
            UsageError: That was for another type.
        """
        if done != self.options.type:
            message = f"the model was cast to {done} before, and {self.options.type} is asked for"
            raise UsageError(message, where=self.name, hint="start from the float32 model")
        nodes = [node for node in all_nodes(model) if TYPE_REASON in node.metadata_props]
        found = (Skip(RULE, node_name(n), n.metadata_props[TYPE_REASON]) for n in nodes)
        return PassResult((), tuple(found))


def _record_bytes(model: ir.Model) -> None:
    """Write what weights take now on the ops of which it was known before."""
    record_stored_bytes(model, None)
    sizes: dict[ir.Node, int] = {}
    for site in find_sites(model)[0]:
        sizes[site.node] = sizes.get(site.node, 0) + site.tensor.nbytes
    for node, size in sizes.items():
        if node.metadata_props.get(SCHEME) == FLOAT and WEIGHT in node.metadata_props:
            annotate(node, weight_bytes_after=size)


def _by_name(masks: Mapping[ir.Value, float]) -> dict[str, float]:
    return {value.name or "": limit for value, limit in masks.items()}


def _other(compute: ComputeType) -> ComputeType:
    others = [member for member in ComputeType if member is not compute]
    return others[0]


def _holds_float32(node: ir.Node) -> bool:
    values = (*node.inputs, *node.outputs)
    return any(value is not None and value.dtype == ir.DataType.FLOAT for value in values)
