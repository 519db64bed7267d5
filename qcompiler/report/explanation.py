"""What became of a node, by which rule, from what, at which cost, and what would change it."""

import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from qcompiler.ir.dataflow import all_nodes, constant_of, is_op
from qcompiler.ir.provenance import CREATED_BY, origins_of
from qcompiler.quant.selector import Selector, check_pattern
from qcompiler.report.records import EngineReport, NodeReport, PassReport
from qcompiler.report.refusals import meaning_of_rule
from qcompiler.report.terminal import size

_LOW_DB: Final = 20.0
"""A weight so near its rounding error is worth another choice."""
_SAME_DB: Final = 1.0
_VALUES_SHOWN: Final = 4


@dataclass(frozen=True, slots=True)
class Subject:
    """What is known of a compiled model.

    Attributes:
        model: The compiled model.
        nodes: Its ops with a decision.
        passes: What passes did; empty without a report.
        engine: The engine built from it, if one was.
    """

    model: ir.Model
    nodes: Sequence[NodeReport]
    passes: Sequence[PassReport] = ()
    engine: EngineReport | None = None

    def names(self) -> list[str]:
        """Return all names that can be asked for: of the source and of the result."""
        found: dict[str, None] = {}
        for entry in self.nodes:
            found.update(dict.fromkeys((entry.name, *entry.origins)))
        for record in self.passes:
            found.update(dict.fromkeys(record.removed))
        for node in all_nodes(self.model):
            found.update(dict.fromkeys((node.name or "", *origins_of(node))))
        return [name for name in found if name]


def explanations(subject: Subject, pattern: str) -> Iterator[list[str]]:
    """Yield for each node that a pattern matches all that is known of it, one line a fact.

    Args:
        subject: The compiled model and its report.
        pattern: A name of the source or the compiled model, a glob, or /regex/.

    Raises:
        UsageError: The pattern is empty, or no regular expression.
    """
    check_pattern(pattern, "explain")
    selector = Selector(name=pattern)
    wanted = {name for name in subject.names() if selector.matches_name(name)}
    told: set[str] = set()
    for entry in subject.nodes:
        names = {entry.name, *entry.origins}
        if names & wanted:
            told |= names
            yield list(_decided(subject, entry))
    for node in all_nodes(subject.model):
        names = {node.name or "", *origins_of(node)}
        if names & (wanted - told):
            told |= names
            yield list(_undecided(subject, node))
    for record in subject.passes:
        for name in record.removed:
            if name in wanted - told:
                told.add(name)
                yield list(_removed(subject, record, name))


def _decided(subject: Subject, entry: NodeReport) -> Iterator[str]:
    """Tell of an op that was given a scheme, or a reason to stay in float."""
    names = {entry.name, *entry.origins}
    made = [n for n in all_nodes(subject.model) if {n.name, *origins_of(n)} & names]
    yield f"{entry.name} ({entry.op_type})"
    others = [name for name in entry.origins if name != entry.name]
    if others:
        yield f"  also      {', '.join(others)}"
    yield f"  scheme    {entry.scheme}"
    if entry.reason:
        yield f"  rule      {entry.rule}"
        yield f"  reason    {entry.reason}"
    if entry.compute_type is not None:
        because = f", since {entry.type_reason}" if entry.type_reason else ""
        yield f"  computes  in {entry.compute_type}{because}"
    for node in made:
        yield f"  became    {_described(node)}"
    yield from _costs(entry)
    yield from _in_engine(subject.engine, made)
    known = {entry.reason, entry.type_reason or ""}
    yield from _history(subject.passes, names, _values(made), known)
    for text in _ways_out(entry):
        yield f"  change    {text}"


def _described(node: ir.Node) -> str:
    """Say what a node of the result is, and what passes put in front of it."""
    domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}."
    by = node.metadata_props.get(CREATED_BY)
    text = f"{domain}{node.op_type} {node.name}" + (f", made by {by}" if by else "")
    before = [producer for value in node.inputs if (producer := _made(value)) is not None]
    reads = ", ".join(f"{made.op_type} ({made.metadata_props[CREATED_BY]})" for made in before)
    return f"{text}; reads {reads}" if reads else text


def _made(value: ir.Value | None) -> ir.Node | None:
    producer = None if value is None else value.producer()
    return producer if producer is not None and CREATED_BY in producer.metadata_props else None


def _costs(entry: NodeReport) -> Iterator[str]:
    """Tell bytes, error and time."""
    if entry.weight is not None:
        yield f"  weight    {entry.weight}: {entry.elements} elements"
        yield (
            f"  size      {size(entry.bytes_before)} -> {size(entry.bytes_after)}, "
            f"{entry.bits_per_weight:.2f} bits per element"
        )
    if entry.sqnr_db is not None:
        yield f"  SQNR      {entry.sqnr_db:.1f} dB (weight against its quantized form)"
    if entry.output_sqnr_db is not None:
        data = "" if entry.data_sqnr_db is None else f"reads {entry.data_sqnr_db:.1f} dB, "
        yield (
            f"  error     {data}returns {entry.output_sqnr_db:.1f} dB (against float, of all ops "
            "up to it)"
        )
    if entry.sensitivity_db is not None:
        yield f"  alone     {entry.sensitivity_db:.1f} dB would be left by quantizing it alone"
    if entry.placement is not None:
        yield f"  placed    by rule {entry.placement}, in integer region {entry.region}"
    if entry.equalized is not None:
        yield f"  scaled    {entry.equalized}"
    if entry.float_ms is not None and entry.quantized_ms is not None:
        yield (
            f"  latency   {entry.float_ms:.3f} ms in float, {entry.quantized_ms:.3f} ms quantized "
            "(its region and what shares its inputs)"
        )
    if entry.kernel is not None:
        yield f"  kernel    {entry.kernel}"


def _in_engine(engine: EngineReport | None, nodes: Iterable[ir.Node]) -> Iterator[str]:
    """Tell in which type the constants of nodes lie in the engine, where it is not the planned."""
    if engine is None or engine.weights is None:
        return
    constants = {name for node in nodes for name in _constants(node)}
    for weight in engine.other:
        if weight.name in constants:
            found = "not found" if weight.found is None else f"found as {weight.found}"
            yield f"  engine    {weight.name}: planned as {weight.planned}, {found}"


def _constants(node: ir.Node) -> Iterator[str]:
    """Yield the names of constants that a node reads, itself or through dequantizing."""
    for value in node.inputs:
        if value is None:
            continue
        stored = _before_quantizing(value)
        if constant_of(stored) is not None:
            yield stored.name or ""


def _values(nodes: Iterable[ir.Node]) -> set[str]:
    """Return names of computed values that nodes read and return, as they were before Q/DQ."""
    found: set[str] = set()
    for node in nodes:
        for value in (*node.inputs, *node.outputs):
            if value is not None and constant_of(value) is None:
                found.add(_before_quantizing(value).name or "")
    return found


def _before_quantizing(value: ir.Value) -> ir.Value:
    for op_type in ("DequantizeLinear", "QuantizeLinear"):
        producer = value.producer()
        source = producer.inputs[0] if is_op(producer, op_type) and producer is not None else None
        value = value if source is None else source
    return value


def _history(
    passes: Sequence[PassReport],
    names: set[str],
    values: set[str],
    known: Collection[str] = (),
) -> Iterator[str]:
    """Tell what each pass did at a node and its values, and what it refused for other reasons."""
    for record in passes:
        for change in record.changes:
            touched = [name for name in change.nodes if name in names | values]
            for name in touched[:_VALUES_SHOWN]:
                of = "" if name in names else f"{name}: "
                rule = "" if change.rule == record.name else f" ({change.rule})"
                yield f"  {record.name}{rule}: {of}{change.detail or 'changed it'}"
        for skip in record.skips:
            if skip.node in names and skip.reason not in known:
                yield f"  {record.name} left it alone ({skip.rule}): {skip.reason}"


def _ways_out(entry: NodeReport) -> Iterator[str]:
    """Say what would give the node something else."""
    name = shlex.quote(entry.name)
    if not entry.quantized:
        refusal = meaning_of_rule(entry.rule)
        if refusal is not None:
            yield f"{refusal.way_out} ({refusal.anchor})"
        return
    if entry.weight is None:
        yield f"it follows the ops around it: --exclude {name} and theirs"
        return
    if "--never-slower" in entry.reason:
        yield "--no-never-slower gives it what the recipe asks for"
    if "left out of" in entry.reason:
        yield "a lower --min-output-sqnr or a larger --max-metric-drop gives it 8-bit activations"
    if entry.integer_kernel is False:
        yield "no integer kernel runs it: in float (--exclude) it is larger and as fast"
    yield from _for_accuracy(entry)
    yield f"--exclude {name} keeps it in float"


def _for_accuracy(entry: NodeReport) -> Iterator[str]:
    rule = f'name = "{entry.name}", scheme = "w8a16"'
    if entry.sqnr_db is not None and entry.sqnr_db < _LOW_DB and not entry.scheme.startswith("w8"):
        yield (
            "its weight has little room: smaller blocks, --reconstruct gptq with samples, or a "
            f"rule {rule}"
        )
    elif not entry.scheme.startswith("w8a16"):
        yield f"a rule {rule} gives it 8-bit weights and float activations"
    read, returned = entry.data_sqnr_db, entry.output_sqnr_db
    if read is not None and returned is not None and returned > read - _SAME_DB:
        yield "most of its error arrives with its data: look at the ops before it"


def _undecided(subject: Subject, node: ir.Node) -> Iterator[str]:
    """Tell of a node of the result that no scheme was asked for."""
    yield f"{node.name} ({node.op_type})"
    others = [name for name in origins_of(node) if name != node.name]
    if others:
        yield f"  stands    for {', '.join(others)} of the source"
    by = node.metadata_props.get(CREATED_BY)
    if by:
        yield f"  made      by {by}"
    readers = dict.fromkeys(use.node.name or "" for out in node.outputs for use in out.uses())
    if readers:
        shown = list(readers)[:_VALUES_SHOWN]
        more = f" and {len(readers) - len(shown)} more" if len(readers) > len(shown) else ""
        yield f"  read      by {', '.join(shown)}{more}"
    if not by:
        yield "  kept      in float: it has no weight that a scheme could be given to"
    yield from _history(subject.passes, {node.name or "", *origins_of(node)}, _values([node]))


def _removed(subject: Subject, record: PassReport, name: str) -> Iterator[str]:
    """Tell of a node of the source that nothing stands for any more."""
    yield name
    yield f"  gone      since {record.name}"
    yield from _history(subject.passes, {name}, set())
