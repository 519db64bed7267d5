"""Decides what every quantizable op gets, and writes it on the op."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import onnx_ir as ir

from qcompiler.errors import ModelError, UsageError
from qcompiler.ir.blocks import find_blocks
from qcompiler.ir.dataflow import is_op, node_label
from qcompiler.ir.provenance import BYTES_BEFORE, ELEMENTS, WEIGHT, annotate, origins_of
from qcompiler.ir.quantizable import NotASite, Site, find_sites
from qcompiler.ir.selection import SelectionIndex
from qcompiler.quant.compute_type import ComputeType
from qcompiler.quant.recipe import Recipe, Rule
from qcompiler.quant.scheme import FLOAT, QScheme
from qcompiler.quant.selector import Selector, nearest
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage
from qcompiler.targets.capability import Resolution, Target, resolve
from qcompiler.targets.site_requests import request_for

_FEWEST_TABLE_BITS: Final = 4
_TABLES: Final = Rule(
    Selector(op_type="Gather"),
    QScheme(8),
    "a table of fewer than 4 bits spoils what all that follows reads",
    "default of tables",
)
"""What tables get where the recipe's default has fewer bits and no rule speaks of them."""


@dataclass(frozen=True, slots=True)
class AssignOptions:
    """Options of `assign-schemes`.

    Attributes:
        recipe: Which op is asked to get which scheme.
        target: What can be run, and how.
    """

    recipe: Recipe
    target: Target


@dataclass(frozen=True, slots=True)
class Decision:
    """What one site gets.

    Attributes:
        scheme: The scheme, fully decided; None is float.
        rule: The recipe rule or target row that decided.
        reason: Why, as a sentence.
        pair_limit: What neighbouring codes may add up to, None without a limit.
    """

    scheme: QScheme | None
    rule: str
    reason: str
    pair_limit: int | None = None


class AssignSchemes(Pass):
    """Write on every quantizable op the scheme it gets, or why it stays in float.

    Before: y = MatMul(x, w)
    After:  y = MatMul(x, w)   # qcompiler.scheme = "w4a16:b128:asym", rule, reason
    Refuses: sites the recipe leaves in float, sites the target has no row for, ops without a
        constant weight, weights that something else than a quantizable op reads as well.

    Tables that are looked up (embeddings) get 8 bits where the default has 2 or 3 and no rule
    speaks of them, and so does a head that is tied to one. The graph does not change. A weight
    shared by several sites gets one scheme: float if any of them must stay in float, otherwise
    that of the site with the most bits.

    Raises (from `run`):
        UsageError: A recipe rule matches no node; the message names the nearest.
        ModelError: A weight to be quantized has no elements.
    """

    name: ClassVar[str] = "assign-schemes"
    consumes: ClassVar[Stage] = Stage.CANONICAL
    produces: ClassVar[Stage] = Stage.ASSIGNED
    numerics: ClassVar[Numerics] = Numerics.EXACT

    options: AssignOptions

    def __init__(self, options: AssignOptions) -> None:
        self.options = options

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Decide for every site, then write the decisions."""
        sites, others = find_sites(model)
        asked = _match(self.options.recipe, model, sites, others)
        types = _compute_types(self.options.recipe, model, sites)
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        groups: dict[ir.Value, list[Site]] = {}
        for site in sites:
            groups.setdefault(site.weight, []).append(site)
        decisions: dict[ir.Node, Decision] = {}
        for weight, sharing in groups.items():
            decision = self._decide(weight, sharing, asked, types, model.graph)
            for site in sharing:
                decisions[site.node] = _stricter(decisions.get(site.node), decision)
        described: set[ir.Node] = set()
        for site in sites:
            _write_weight_facts(site, first=site.node not in described)
            described.add(site.node)
        for node, decision in decisions.items():
            scheme = FLOAT if decision.scheme is None else str(decision.scheme)
            annotate(node, scheme=scheme, rule=decision.rule, reason=decision.reason)
            if decision.pair_limit is not None:
                annotate(node, pair_limit=decision.pair_limit)
            if decision.scheme is None:
                skips.append(Skip(decision.rule, node.name or "", decision.reason))
            else:
                rewrites.append(Rewrite(decision.rule, node.name or "", scheme))
        for other in others:
            annotate(other.node, scheme=FLOAT, rule="no-weight", reason=other.reason)
            skips.append(Skip("no-weight", other.node.name or "", other.reason))
        return PassResult(tuple(rewrites), tuple(skips))

    def _decide(
        self,
        weight: ir.Value,
        sharing: Sequence[Site],
        asked: dict[ir.Node, Rule | None],
        types: dict[ir.Node, ComputeType | None],
        main: ir.Graph,
    ) -> Decision:
        """Decide for all sites that share a weight."""
        obstacle = _reader_that_is_no_site(weight, sharing) or _axes_that_differ(sharing)
        if obstacle is not None:
            return Decision(None, "shared-weight", obstacle)
        chosen: Decision | None = None
        for site in sharing:
            decision = self._decide_one(
                site, asked[site.node], types[site.node], main, tied=len(sharing) > 1
            )
            chosen = _stricter(chosen, decision)
        if chosen is None:
            message = f"the weight {weight.name} belongs to no site"
            raise ValueError(message)
        return chosen

    def _decide_one(
        self,
        site: Site,
        rule: Rule | None,
        compute_type: ComputeType | None,
        main: ir.Graph,
        *,
        tied: bool,
    ) -> Decision:
        recipe = self.options.recipe
        scheme = recipe.default if rule is None else rule.scheme
        if rule is None and _is_crude_for(scheme, site.node):
            rule, scheme = _TABLES, _TABLES.scheme
        label = "recipe default" if rule is None else rule.label
        if scheme is None:
            reason = (rule.reason if rule is not None else None) or (
                "no rule of the recipe gives it a scheme" if rule is None else "the recipe says so"
            )
            return Decision(None, label, reason)
        if site.tensor.size == 0:
            message = f"its weight {site.weight.name} has shape {list(site.shape)}: no elements"
            raise ModelError(
                message,
                where=node_label(site.node),
                hint="the export is broken, or exclude the node",
                reason="weight-not-quantizable",
            )
        in_body = site.node.graph is not main
        request = request_for(site, scheme, tied=tied, in_body=in_body, compute_type=compute_type)
        resolution = resolve(self.options.target, request)
        if resolution.scheme is None:
            return Decision(None, resolution.rule, resolution.reason)
        reason = _sentence(label, rule, resolution)
        return Decision(resolution.scheme, resolution.rule, reason, resolution.pair_limit)


def _is_crude_for(scheme: QScheme | None, node: ir.Node) -> bool:
    """Whether a node looks rows up in a table, and a scheme has too few bits for that."""
    few = scheme is not None and scheme.weight_bits < _FEWEST_TABLE_BITS
    return few and is_op(node, "Gather")


def _sentence(label: str, rule: Rule | None, resolution: Resolution) -> str:
    asked = f"{label} asks for it" + (f" ({rule.reason})" if rule and rule.reason else "")
    return f"{asked}; {resolution.reason}" if resolution.reason else asked


def _match(
    recipe: Recipe, model: ir.Model, sites: Sequence[Site], others: Sequence[NotASite]
) -> dict[ir.Node, Rule | None]:
    """Find the first rule that matches each node; a rule that matches nothing is an error."""
    nodes = list(dict.fromkeys([site.node for site in sites]))
    candidates = nodes + [other.node for other in others]
    index = SelectionIndex(model, find_blocks(model) if _uses_blocks(recipe) else [])
    for rule in recipe.rules:
        if not any(index.selects(rule.selector, node) for node in candidates):
            raise _unmatched(rule, candidates)
    return {
        node: next((rule for rule in recipe.rules if index.selects(rule.selector, node)), None)
        for node in nodes
    }


def _compute_types(
    recipe: Recipe, model: ir.Model, sites: Sequence[Site]
) -> dict[ir.Node, ComputeType | None]:
    """Return the type each op is going to be cast to, as far as the recipe knows.

    Raises:
        UsageError: An op that is to stay in float32 does not exist.
    """
    index = SelectionIndex(model, find_blocks(model) if _uses_blocks(recipe) else [])
    wide = {node for selector in recipe.float32 for node in index.nodes(selector, "float32")}
    return {site.node: None if site.node in wide else recipe.compute_type for site in sites}


def _uses_blocks(recipe: Recipe) -> bool:
    selectors = [*(rule.selector for rule in recipe.rules), *recipe.float32]
    return any(selector.blocks is not None for selector in selectors)


def _unmatched(rule: Rule, candidates: Sequence[ir.Node]) -> UsageError:
    names = [name for node in candidates for name in origins_of(node)]
    wanted = (rule.selector.name or "").strip("*/")
    close = nearest(wanted, names) if wanted else sorted({node.op_type for node in candidates})
    message = f"{rule.label} matches no quantizable op"
    hint = f"nearest: {', '.join(close)}" if close else "`qcompile inspect` lists the names"
    return UsageError(message, where="recipe", hint=hint)


def _reader_that_is_no_site(weight: ir.Value, sharing: Sequence[Site]) -> str | None:
    """Say who else reads a weight, as the reason to leave it alone; None if nobody does."""
    if weight.is_graph_output():
        return f"its weight {weight.name} is an output of the model"
    known = {(site.node, site.weight_input) for site in sharing}
    pending = [weight]
    while pending:
        for use in pending.pop().uses():
            if is_op(use.node, "Transpose"):
                pending.append(use.node.outputs[0])
            elif (use.node, use.idx) not in known:
                return (
                    f"its weight {weight.name} is also read by {node_label(use.node)}, "
                    "which is not quantized; both forms would have to be stored"
                )
    return None


def _axes_that_differ(sharing: Sequence[Site]) -> str | None:
    """Say which sites would need scales along different axes of one weight; None if none do."""
    first = sharing[0]
    for site in sharing[1:]:
        if site.axes != first.axes:
            return (
                f"its weight {site.weight.name} is shared by {node_label(first.node)} and "
                f"{node_label(site.node)}, which need scales along different axes of it"
            )
    return None


def _stricter(one: Decision | None, other: Decision) -> Decision:
    """Return the decision that keeps more of the weight; the earlier one on a tie."""
    if one is None:
        return other
    return other if _kept_bits(other) > _kept_bits(one) else one


def _kept_bits(decision: Decision) -> float:
    return float("inf") if decision.scheme is None else decision.scheme.weight_bits


def _write_weight_facts(site: Site, *, first: bool) -> None:
    """Write name, size and bytes of a site's weight; an op with two weights gets their sum."""
    facts = site.node.metadata_props
    elements = 0 if first else int(facts[ELEMENTS])
    size = 0 if first else int(facts[BYTES_BEFORE])
    name = site.weight.name or ""
    annotate(
        site.node,
        weight=name if first else f"{facts[WEIGHT]} {name}",
        weight_elements=elements + site.tensor.size,
        weight_bytes_before=size + site.tensor.nbytes,
    )
