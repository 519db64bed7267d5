"""Where a runtime wants quantized activations, as data: which values get Q/DQ around which op."""

from dataclasses import dataclass
from enum import StrEnum

from qcompiler.quant.qtype import QType
from qcompiler.targets.rows import LegalAttribute, OpType


class Part(StrEnum):
    """What an op does between quantized values."""

    COMPUTES = "computes"
    """Multiplies by weights: the reason why anything is quantized. Where its input is float, the
    cost of quantizing it pays off."""
    FOLLOWS = "follows"
    """Has an integer kernel that pays off only between quantized values: Add, GlobalAveragePool."""
    CARRIES = "carries"
    """Moves or selects values: what it returns has the scale of what it reads."""
    JOINS = "joins"
    """Adds what an op that computes has summed up to another branch. That branch is read as
    codes, which spares its floats a way through memory; the sums stay as they are."""
    VANISHES = "vanishes"
    """Is absorbed by the rounding behind the op before it: a Relu whose output's codes begin at
    its zero point."""


@dataclass(frozen=True, slots=True)
class PlacementRule:
    """One way in which a runtime runs an op on quantized values.

    Attributes:
        rule: Short kebab-case name, which reports show.
        ops: The op types it is about.
        part: What the op does between quantized values.
        kernel: What the runtime runs.
        source: Where the rule comes from.
        data: Positions of the inputs that are activations; None is all of them.
        output: Whether the kernel exists only if the output is quantized too. Of ops that
            compute only: all others need it.
        modes: Values that the string attribute `mode` may have; None is any.
        attributes: Integer attributes, and lists of integers, with a limited range.
        beside: Of ops that join: the ops whose sums they add to the other branch.
    """

    rule: str
    ops: tuple[OpType, ...]
    part: Part
    kernel: str
    source: str
    data: tuple[int, ...] | None = (0,)
    output: bool = True
    modes: tuple[str, ...] | None = None
    attributes: tuple[LegalAttribute, ...] = ()
    beside: tuple[OpType, ...] = ()


@dataclass(frozen=True, slots=True)
class Reluctance:
    """One op that stays in float between quantized values, and why.

    Attributes:
        rule: Short kebab-case name.
        ops: The op types it is about.
        reason: One sentence without a full stop.
        source: Where it comes from.
    """

    rule: str
    ops: tuple[OpType, ...]
    reason: str
    source: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a target wants quantized activations.

    Attributes:
        qtype: Integer type of activation codes.
        symmetric: Whether their zero point is fixed.
        float_types: ONNX names of the float types that integer kernels return.
        rules: How ops run on quantized values; the first that fits is taken.
        reluctances: Ops that have no rule, and why.
    """

    qtype: QType
    symmetric: bool
    float_types: tuple[str, ...]
    rules: tuple[PlacementRule, ...]
    reluctances: tuple[Reluctance, ...]

    def rule_for(self, op: OpType, mode: str | None) -> PlacementRule | None:
        """Return the rule about an op, None where it stays in float.

        Args:
            op: Domain and name.
            mode: Its attribute `mode`, None where it has none.
        """
        for rule in self.rules:
            if op in rule.ops and (rule.modes is None or mode in rule.modes):
                return rule
        return None

    def reluctance_for(self, op: OpType) -> Reluctance | None:
        """Return why an op has no rule, None where nothing is known about it."""
        return next((entry for entry in self.reluctances if op in entry.ops), None)
