"""Moves range between the channels of activations and weights, so that both round better."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final

import onnx_ir as ir

from qcompiler.calibration.calls import Samples
from qcompiler.calibration.damage import decibels
from qcompiler.calibration.linear_examples import ExampleCollector
from qcompiler.ir.channels.groups import ChannelGroup, Refusal, find_groups, group_behind_mul
from qcompiler.ir.channels.scaling import scale_group
from qcompiler.ir.channels.weights import data_input
from qcompiler.ir.dataflow import node_name
from qcompiler.ir.editing import value_names
from qcompiler.ir.linear_ops import NotFoldableError
from qcompiler.ir.provenance import EQUALIZED, annotate, scheme_of
from qcompiler.ir.quantizable import Site, find_sites
from qcompiler.passes.equalize.group_scales import Choice, ScaleOptions, choose_scales
from qcompiler.passes.equalize.output_check import CheckOptions, Verdict, check_outputs
from qcompiler.quant.equalization import InsertMul
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

RULE: Final = "equalize-channels"
CHECKED: Final = "equalized-outputs"
_EXAMPLES: Final = 256
"""Rows that each op is tried on; half of them choose."""


@dataclass(frozen=True, slots=True)
class EqualizeOptions:
    """Options of `equalize-channels`.

    Attributes:
        samples: The calls to run the model on.
        scales: How scales are chosen.
        insert_mul: Where a Mul may be added.
        memory_budget: Bytes the process may take.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
        check: How the outputs of the quantized model are compared at the end; None is not at all.
    """

    samples: Samples
    scales: ScaleOptions = field(default_factory=ScaleOptions)
    insert_mul: InsertMul = InsertMul.NEVER
    memory_budget: int = 2 << 30
    custom_op_libraries: tuple[Path, ...] = ()
    check: CheckOptions | None = None


class EqualizeChannels(Pass):
    """Divide channels of activations by numbers that constants before and behind them take up.

    Before: y = MatMul(Mul(n, gamma), w)
    After:  y = MatMul(Mul(n, gamma / s), w * s)     # s: one number per channel
    Refuses: channels that a node between the constants does not let through unchanged, such as
        those behind a Gelu or before a norm, and those of weights that another op reads too.

    Which constants these are is found by following every value that would be scaled to all that
    computes or reads it (`ir.channels`): weights of the norm, linear op or convolution before,
    through attention and gates. In real arithmetic nothing changes. Scales are chosen group by
    group (`quant.equalization`), tried on rows of real data with weights and data rounded as they
    are going to be; in models of 16-bit floats they are powers of two, which round nothing.

    Raises (from `run`):
        UsageError: The examples of one op do not fit the memory budget.
        TargetError: ONNX Runtime cannot run the model on a sample.
    """

    name: ClassVar[str] = RULE
    consumes: ClassVar[Stage] = Stage.ASSIGNED
    produces: ClassVar[Stage] = Stage.ASSIGNED
    numerics: ClassVar[Numerics] = Numerics.REORDERED
    tolerance: ClassVar[float | None] = 1e-5

    options: EqualizeOptions

    def __init__(self, options: EqualizeOptions) -> None:
        self.options = options

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Find the groups, measure what scales would do, and scale."""
        sites, _ = find_sites(model)
        wanted = [site for site in sites if _is_wanted(site, model)]
        groups, refusals = find_groups(wanted, sites)
        skips: list[Skip] = []
        for refusal in refusals:
            group = self._with_mul(refusal)
            if isinstance(group, str):
                skips.extend(Skip(RULE, node_name(site.node), group) for site in refusal.readers)
            else:
                groups.append(group)
        if not groups:
            return PassResult((), tuple(skips))
        plain = model.clone()
        outcomes = list(self._equalize(model, groups, context))
        scaled = {group: found for group, found in outcomes if isinstance(found, Rewrite)}
        skips += [found for _, found in outcomes if isinstance(found, Skip)]
        if not scaled or self.options.check is None:
            return PassResult(tuple(scaled.values()), tuple(skips))
        verdict = check_outputs(plain, model, self.options.check, context)
        if verdict.equalizes:
            account = Rewrite(CHECKED, "", f"outputs have {verdict}")
            return PassResult((account, *scaled.values()), tuple(skips))
        _undo(model, plain, scaled, verdict)
        reason = f"all groups together do not make the outputs better: {verdict}"
        skips += [Skip(CHECKED, rewrite.node, reason) for rewrite in scaled.values()]
        return PassResult((), tuple(skips))

    def _with_mul(self, refusal: Refusal) -> ChannelGroup | str:
        """Return the group that a Mul would make of a refused value, or why there is none."""
        if self.options.insert_mul is InsertMul.NEVER:
            return refusal.reason
        if self.options.insert_mul is InsertMul.NORMS and not is_bare_norm(refusal.data):
            return refusal.reason
        group = group_behind_mul(refusal.data, refusal.readers)
        return f"{refusal.reason}; and {group}" if isinstance(group, str) else group

    def _equalize(
        self, model: ir.Model, groups: Sequence[ChannelGroup], context: PassContext
    ) -> Iterator[tuple[ChannelGroup, Rewrite | Skip]]:
        options = self.options
        collector = ExampleCollector(
            model,
            options.samples,
            count=_EXAMPLES,
            memory_budget=options.memory_budget,
            custom_op_libraries=options.custom_op_libraries,
            threads=context.workers,
        )
        taken = value_names(model)
        planned = [_planned(group) for group in groups]
        found = collector.each(planned, context.progress, "equalizing channels")
        for group, examples in zip(groups, found, strict=True):
            if any(not each.rows.shape[1] for each in examples.values()):
                first = group.readers[0]
                reason = f"no sample gives {first.data.name} an element"
                yield group, Skip(RULE, node_name(first.site.node), reason)
                continue
            choice = choose_scales(group, examples, options.scales)
            yield group, self._apply(group, choice, context, taken)

    def _apply(
        self, group: ChannelGroup, choice: Choice, context: PassContext, taken: set[str]
    ) -> Rewrite | Skip:
        """Scale a group as it was decided, and write that down."""
        first = group.readers[0]
        names = ", ".join(node_name(reader.site.node) for reader in group.readers)
        before, after = decibels(choice.before), decibels(choice.after)
        if not choice.equalizes:
            _note(group, f"no, {before:.1f} dB as they are, {after:.1f} dB with the best scales")
            reason = (
                f"no scales make the outputs of {names} better: {before:.1f} dB as they are, "
                f"{after:.1f} dB with the best"
            )
            return Skip(RULE, node_name(first.site.node), reason)
        try:
            changed = scale_group(group, choice.scales, context.store, taken, self.name)
        except NotFoldableError as error:
            return Skip(RULE, node_name(first.site.node), f"{error}")
        _note(group, f"by {choice.label}, from {before:.1f} to {after:.1f} dB")
        takers = [node_name(n) for n in changed if n not in {r.site.node for r in group.readers}]
        spread = float(choice.scales.max() / choice.scales.min())
        detail = (
            f"{group.count} channels of {first.data.name}, read by {names}, by {choice.label} "
            f"(scales spread {spread:.3g}), from {before:.1f} to {after:.1f} dB; taken up by "
            f"{', '.join(takers) or 'its readers'}"
        )
        if group.reasons:
            detail += f"; some channels stay: {group.reasons[0]}"
        return Rewrite(RULE, node_name(first.site.node), detail)


def _planned(group: ChannelGroup) -> list[Site]:
    """Return the sites of a group that are going to be quantized."""
    return [r.site for r in group.readers if scheme_of(r.site.node) is not None]


def _is_wanted(site: Site, model: ir.Model) -> bool:
    """Whether a site has data whose channels may be scaled, and was not considered before."""
    return (
        site.node.graph is model.graph
        and data_input(site) is not None
        and scheme_of(site.node) is not None
        and EQUALIZED not in site.node.metadata_props
    )


def _undo(
    model: ir.Model, plain: ir.Model, scaled: Iterable[ChannelGroup], verdict: Verdict
) -> None:
    """Make a model what it was, but for notes of what was found out."""
    again = {reader.site.node.name for group in scaled for reader in group.readers}
    notes = {node.name: node.metadata_props.get(EQUALIZED) for node in model.graph}
    model.graph = plain.graph
    for node in model.graph:
        if note := f"no, {verdict}" if node.name in again else notes.get(node.name):
            annotate(node, equalized=note)


def _note(group: ChannelGroup, text: str) -> None:
    for reader in group.readers:
        annotate(reader.site.node, equalized=text)


def is_bare_norm(value: ir.Value) -> bool:
    """Whether a value is computed by the Mul that ends a norm without a weight of its own."""
    producer = value.producer()
    if producer is None or producer.op_type not in ("Mul", "Div") or len(producer.inputs) != 2:
        return False
    shapes = [operand.shape if operand is not None else None for operand in producer.inputs]
    last = [shape[-1] if shape is not None and len(shape) else None for shape in shapes]
    return 1 in last and last[0] != last[1]
