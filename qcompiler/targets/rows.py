"""The lines of a capability table."""

from dataclasses import dataclass
from enum import StrEnum

from qcompiler.quant.scheme import Activations, QScheme

OpType = tuple[str, str]
"""Operator domain ("" is ONNX's own) and name."""


class WeightUse(StrEnum):
    """How a weight reaches its op; kernels differ by it."""

    PLAIN = "plain"
    """As the op's usual weight input: `[K, N]` of a MatMul, `[M, C, kH, kW]` of a Conv."""
    TRANSPOSED = "transposed"
    """A matrix stored `[N, K]`, through a Transpose node or Gemm's transB."""
    SHARED_TABLE = "shared table"
    """A table `[N, K]` that a Gather looks up and a MatMul or Gemm multiplies by, transposed."""
    LEFT = "left"
    """The first input of a matrix product, with the data on the right."""


@dataclass(frozen=True, slots=True)
class Row:
    """One thing a runtime can run.

    Attributes:
        rule: Short kebab-case name, which reports show.
        ops: The op types it is about.
        weight_bits: The widths it is about.
        activations: What happens to the data input.
        uses: How the weight may reach the op.
        ranks: Legal ranks of the weight.
        per_channel: Whether one scale per output channel is legal.
        block_sizes: Legal block sizes, ascending; empty where blocks are not.
        ragged: Whether the last block may be shorter than the others.
        symmetric: Legal symmetries, the preferred one first.
        float_types: ONNX names of the float types computed in.
        kernel: What the runtime runs.
        source: Where the row comes from.
        reduction_multiple: The number of input channels must be a multiple of this.
        pair_limit: What two neighbouring codes of one sign may add up to in magnitude
            (`quant.scheme.PairLimit`); None where the kernel does not saturate.
        bodies: Whether the op may lie in an If, Loop or Scan body.
        note: A clause added to the reason: what a user should know about the row.
        per_tensor: Whether one scale for the whole weight is legal.
        weight_bound: Whether the row pays off only where reading weights takes longer than
            multiplying by them; it is asked where the processor is known.
        activation_bits: Legal widths of calibrated activations.
        floating: Whether codes are floats (E4M3), those of weights and of activations.
    """

    rule: str
    ops: tuple[OpType, ...]
    weight_bits: tuple[int, ...]
    uses: tuple[WeightUse, ...]
    per_channel: bool
    block_sizes: tuple[int, ...]
    ragged: bool
    symmetric: tuple[bool, ...]
    float_types: tuple[str, ...]
    kernel: str
    source: str
    activations: Activations = Activations.FLOAT
    ranks: tuple[int, ...] = (2,)
    reduction_multiple: int = 1
    pair_limit: int | None = None
    bodies: bool = True
    note: str = ""
    per_tensor: bool = False
    weight_bound: bool = False
    activation_bits: tuple[int, ...] = (8,)
    floating: bool = False

    def multiplies(self, scheme: QScheme) -> bool:
        """Whether it is about weights and activations of such bits."""
        static = scheme.activations is Activations.STATIC
        return (
            scheme.floating == self.floating
            and scheme.weight_bits in self.weight_bits
            and scheme.activations is self.activations
            and (not static or scheme.activation_bits in self.activation_bits)
        )


@dataclass(frozen=True, slots=True)
class WeightForm:
    """One form of weights that no scheme makes, and graphs of other tools may hold.

    Codes stand behind a DequantizeLinear in blocks. Their scales are codes, too, behind a
    DequantizeLinear of their own with one float scale for all of them.

    Attributes:
        rule: Short kebab-case name.
        ops: The op types that read the weight.
        code_type: ONNX name of the type of its codes; which processor has it says their table.
        scale_type: ONNX name of the type of the codes of its scales.
        block_sizes: Legal block sizes, ascending, along one of the last two axes.
        float_types: ONNX names of the float types computed in.
        kernel: What the runtime runs.
        source: Where the row comes from.
    """

    rule: str
    ops: tuple[OpType, ...]
    code_type: str
    scale_type: str
    block_sizes: tuple[int, ...]
    float_types: tuple[str, ...]
    kernel: str
    source: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """One thing a runtime runs badly or not at all.

    Attributes:
        rule: Short kebab-case name.
        ops: The op types it is about.
        weight_bits: The widths it is about.
        reason: Why the op stays in float, one sentence without a full stop.
        source: Where the row comes from.
        activations: The treatment of the data input that it is about; None is any.
        floating: Whether it is about codes that are floats.
    """

    rule: str
    ops: tuple[OpType, ...]
    weight_bits: tuple[int, ...]
    reason: str
    source: str
    activations: Activations | None = None
    floating: bool = False


@dataclass(frozen=True, slots=True)
class Substitute:
    """What to try where no row fits the request.

    Attributes:
        ops: The op types it is about.
        weight_bits: The requested widths.
        activations: The requested treatment of the data input.
        instead_bits: The width to try.
        instead_activations: The treatment of the data input to try.
        floating: Whether codes that are floats were requested; integers are tried.
    """

    ops: tuple[OpType, ...]
    weight_bits: tuple[int, ...]
    activations: Activations
    instead_bits: int
    instead_activations: Activations
    floating: bool = False


@dataclass(frozen=True, slots=True)
class LegalAttribute:
    """Which values of an integer attribute have a kernel; without it, the operator's default.

    Attributes:
        name: Name of the attribute.
        values: Its legal values.
    """

    name: str
    values: tuple[int, ...]


class Demand(StrEnum):
    """What a runtime wants of a QuantizeLinear or DequantizeLinear beside its types."""

    ZERO_POINTS_ARE_ZERO = "zero points are 0"
    SIGNED = "codes are signed, which a QuantizeLinear must say"
    """Without a zero point and `output_dtype` its codes are uint8."""
    WHOLE_BLOCKS = "blocks divide their axis"
    BLOCKS_ON_LAST_AXES = "blocks lie along one of the last two axes"
    INT4_BLOCKS_ON_THE_RIGHT = "blocks of int4 are no first operand of a product"


@dataclass(frozen=True, slots=True)
class MissingOp:
    """One op that a runtime does not have, wherever it comes from.

    Attributes:
        domain: Domain of the operator.
        names: Operator names; empty for all of the domain.
        way_out: What to do about it, a clause.
    """

    domain: str
    names: tuple[str, ...]
    way_out: str


@dataclass(frozen=True, slots=True)
class LoweredOp:
    """One form of an op that a lowered graph may hold.

    Attributes:
        op: Domain and name.
        inputs: ONNX names of the legal element types by position; inputs beyond are free.
        attributes: Integer attributes with a limited range.
        demands: What else must hold of it.
    """

    op: OpType
    inputs: tuple[tuple[str, ...], ...] = ()
    attributes: tuple[LegalAttribute, ...] = ()
    demands: tuple[Demand, ...] = ()
