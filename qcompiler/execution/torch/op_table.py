"""Which function runs which op: keyed by domain, op type and the version that introduced it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qcompiler.ir.dataflow import standard_domain

OpFunction = Callable[..., Any]
"""`f(call, *inputs, **bodies)`: a value, or a tuple of them for an op of several outputs.

Inputs that a node leaves out are None, or missing at the end. Bodies come by attribute name.
"""


@dataclass(frozen=True, slots=True)
class Op:
    """One version of an op.

    Attributes:
        domain: "" for the standard domain.
        op_type: Name of the op.
        since: First opset version it is right for; a later row for the same op replaces it.
        function: What runs it.
        host: Positions of inputs that are read as Python numbers (shapes, axes): kept on the CPU.
        all_types: Whether it can take every element type, UINT16 to UINT64 and strings among
            them; otherwise nodes of those types go to the reference evaluator.
    """

    domain: str
    op_type: str
    since: int
    function: OpFunction
    host: frozenset[int] = frozenset()
    all_types: bool = False


@dataclass(slots=True)
class OpTable:
    """Rows for the ops of one domain, written down next to their functions."""

    domain: str = ""
    rows: list[Op] = field(default_factory=list)

    def op(
        self,
        *op_types: str,
        since: int = 1,
        host: Iterable[int] = (),
        all_types: bool = False,
    ) -> Callable[[OpFunction], OpFunction]:
        """Write down that the decorated function runs these ops."""
        positions = frozenset(host)

        def note(function: OpFunction) -> OpFunction:
            for op_type in op_types:
                row = Op(self.domain, op_type, since, function, positions, all_types)
                self.rows.append(row)
            return function

        return note


class OpIndex:
    """All rows of some tables, looked up by what a node says."""

    def __init__(self, tables: Iterable[OpTable]) -> None:
        self._rows: dict[tuple[str, str], list[Op]] = {}
        for row in (row for table in tables for row in table.rows):
            self._rows.setdefault((row.domain, row.op_type), []).append(row)
        for rows in self._rows.values():
            rows.sort(key=lambda row: row.since, reverse=True)

    def find(self, domain: str, op_type: str, version: int) -> Op | None:
        """Return the row for an op as an opset version defines it, or None."""
        rows = self._rows.get((standard_domain(domain), op_type), ())
        return next((row for row in rows if row.since <= version), None)

    def __iter__(self) -> Iterator[Op]:
        """Yield every row, ordered by domain, op type and version."""
        for key in sorted(self._rows):
            yield from reversed(self._rows[key])
