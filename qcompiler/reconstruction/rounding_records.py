"""What reports say of rounded weights."""

from collections.abc import Iterator
from typing import Final

from qcompiler.ir.provenance import SCHEME
from qcompiler.reconstruction.rounding import Outcome
from qcompiler.rewriting.base import Rewrite, Skip

RULE: Final = "round-weights"


def records_of(outcome: Outcome) -> Iterator[Rewrite | Skip]:
    """Yield what became of a weight, for every site that reads it."""
    for site in outcome.weight.sites:
        if outcome.reason:
            yield Skip(RULE, site.label, outcome.reason)
            continue
        detail = (
            f"{site.node.metadata_props[SCHEME]}, output {outcome.sqnr_before:.1f} -> "
            f"{outcome.sqnr_after:.1f} dB"
        )
        rows = outcome.weight.rows.count
        if outcome.changed < rows:
            detail += f", {rows - outcome.changed} of {rows} channels as they were"
        detail += f", damping {outcome.damping:g}" if outcome.damping > 0.01 else ""
        yield Rewrite(RULE, site.label, detail)
