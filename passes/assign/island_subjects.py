"""Which weights can have islands, and what all planned weights take without any."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from qcompiler.errors import TargetError
from qcompiler.ir.provenance import scheme_of
from qcompiler.ir.quantizable import Site, find_sites, planned_spec
from qcompiler.ir.side_paths import index_type, why_no_side_path
from qcompiler.quant.islands import IslandKind, quantized_bits
from qcompiler.quant.scheme import Activations
from qcompiler.rewriting.base import Skip
from qcompiler.targets.capability import Target

RULE: Final = "assign-islands"
HALF_BITS: Final = 16
"""Of a value in an island, whatever the model's float type."""
CHANNEL_BITS: Final = 32
"""Of the number of an input channel."""


@dataclass(frozen=True, slots=True)
class Subjects:
    """The planned weights of a model.

    Attributes:
        sites: Those that can have islands, in graph order.
        base_bits: What all planned weights take without islands.
        elements: Of all planned weights.
    """

    sites: tuple[Site, ...]
    base_bits: int
    elements: int

    @property
    def names(self) -> list[str]:
        """Names of the weights that can have islands."""
        return [site.weight.name or "" for site in self.sites]

    @property
    def island_elements(self) -> int:
        """Elements of the weights that can have islands."""
        return sum(site.tensor.size for site in self.sites)


def find_subjects(
    model: ir.Model, kind: IslandKind, target: Target, *, stored: bool
) -> tuple[Subjects, list[Skip]]:
    """Return the weights that can have islands, and why others cannot.

    Args:
        model: A model whose sites have schemes.
        kind: What islands are made of.
        target: Where the model is to run.
        stored: Whether bits are those of containers.

    Raises:
        TargetError: It runs no side path of single weights.
    """
    scatters = any(form.op == ("", "ScatterND") for form in target.lowered_ops)
    if kind is IslandKind.WEIGHT and not scatters:
        message = f"{target.name} runs no sparse product of single weights beside a quantized one"
        hint = "--island-kind column, block or node, which are whole channels or whole weights"
        raise TargetError(message, where="--island-kind weight", hint=hint)
    planned: dict[ir.Value, list[Site]] = {}
    for site in find_sites(model)[0]:
        if scheme_of(site.node) is not None:
            planned.setdefault(site.weight, []).append(site)
    subjects: list[Site] = []
    skips: list[Skip] = []
    for sites in planned.values():
        reason = _why_not(sites, kind, model.graph)
        if reason is None:
            subjects.append(sites[0])
        else:
            skips.append(Skip(RULE, sites[0].label, reason))
    base = sum(site_bits(sites[0], stored=stored) for sites in planned.values())
    elements = sum(sites[0].tensor.size for sites in planned.values())
    return Subjects(tuple(subjects), base, elements), skips


def site_bits(site: Site, *, stored: bool) -> int:
    """Return the bits that the weight of a site takes as it is planned."""
    spec = planned_spec(site)
    if spec is None:
        return site.tensor.size * site.tensor.dtype.bitwidth
    return quantized_bits(site.shape, spec, site.tensor.dtype.bitwidth, stored=stored)


def element_bits(sites: Sequence[Site]) -> int:
    """Return the bits that one element in an island takes: its value and where it lies."""
    sizes = [size for site in sites for size in (site.reduction, site.outputs)]
    return HALF_BITS + 2 * index_type(max(sizes, default=1)).bitwidth


def _why_not(sites: Sequence[Site], kind: IslandKind, graph: ir.Graph) -> str | None:
    site = sites[0]
    scheme = scheme_of(site.node)
    if len(sites) > 1:
        return f"its weight {site.weight.name} is read by {len(sites)} ops"
    if site.row.data is None:
        return "its rows are looked up, and a row is no part of a product"
    if site.node.graph is not graph:
        return "it lies in the body of another node, where no gradient is computed"
    if scheme is not None and scheme.activations is not Activations.FLOAT:
        return f"{scheme} quantizes its data as well"
    if kind is IslandKind.NODE:
        return _two_weights(site)
    return why_no_side_path(site, single=kind is IslandKind.WEIGHT)


def _two_weights(site: Site) -> str | None:
    if site.row.op_type in ("LSTM", "GRU", "RNN"):
        return f"the two weights of a {site.row.op_type} have one scheme"
    return None
