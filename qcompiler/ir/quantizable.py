"""The one table of ops that have weights: which input, and what its axes mean.

Every pass that needs to know which axis of a weight is summed over asks here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.ir.dataflow import (
    MICROSOFT,
    all_nodes,
    constant_of,
    int_attribute,
    ints_attribute,
    is_op,
    standard_domain,
)
from qcompiler.ir.provenance import PAIR_LIMIT, scheme_of
from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock, PerTensor
from qcompiler.quant.scheme import PairLimit, QScheme, QSpec


@dataclass(frozen=True, slots=True)
class WeightAxes:
    """What the axes of a weight mean, counted from 0.

    Attributes:
        reduction: The axis of input channels, along which blocks lie.
        output: The axis of output channels, or None where the op has only one.
    """

    reduction: int
    output: int | None


@dataclass(frozen=True, slots=True)
class WeightInput:
    """One weight input of an op type.

    Attributes:
        role: What the op calls it.
        index: Position among the node's inputs.
        axes: Gives the meaning of the axes from the node and the weight's rank; None where the
            weight has a form the op type's table row does not cover.
    """

    role: str
    index: int
    axes: Callable[[ir.Node, int], WeightAxes | None]


@dataclass(frozen=True, slots=True)
class QuantizableOp:
    """One row of the table.

    Attributes:
        domain: Operator domain.
        op_type: Operator name.
        data: Position of the data (activation) input, None where codes are looked up by index.
        weights: The inputs that hold a weight when they are constant. MatMul has two: either
            side may be the constant one.
        bias: Position of the bias input, None where the op has none.
    """

    domain: str
    op_type: str
    data: int | None
    weights: tuple[WeightInput, ...]
    bias: int | None = None


def _fixed(
    reduction: int, output: int, rank: int | None = None
) -> Callable[..., WeightAxes | None]:
    def axes(_node: ir.Node, actual_rank: int) -> WeightAxes | None:
        return None if rank is not None and actual_rank != rank else WeightAxes(reduction, output)

    return axes


def _matmul_right(node: ir.Node, rank: int) -> WeightAxes | None:
    if rank == 0:
        return None
    if rank == 1:
        return WeightAxes(0, None)
    transposed = int_attribute(node, "transB", 0)
    return WeightAxes(rank - 1, rank - 2) if transposed else WeightAxes(rank - 2, rank - 1)


def _matmul_left(node: ir.Node, rank: int) -> WeightAxes | None:
    if rank == 0:
        return None
    if rank == 1:
        return WeightAxes(0, None)
    transposed = int_attribute(node, "transA", 0)
    return WeightAxes(rank - 2, rank - 1) if transposed else WeightAxes(rank - 1, rank - 2)


def _gather(node: ir.Node, rank: int) -> WeightAxes | None:
    # A table looked up by row. Rows are what a lookup returns, so they are the channels; blocks
    # lie within a row, which is also what a tied output projection sums over.
    if rank < 2 or int_attribute(node, "axis", 0) not in (0, -rank):
        return None
    return WeightAxes(rank - 1, 0)


def _conv(_node: ir.Node, rank: int) -> WeightAxes | None:
    return None if rank < 3 else WeightAxes(1, 0)


def _conv_transpose(_node: ir.Node, rank: int) -> WeightAxes | None:
    return None if rank < 3 else WeightAxes(0, 1)


_RECURRENT = (
    WeightInput("W", 1, _fixed(2, 1, rank=3)),
    WeightInput("R", 2, _fixed(2, 1, rank=3)),
)
_RIGHT, _LEFT = WeightInput("B", 1, _matmul_right), WeightInput("A", 0, _matmul_left)

TABLE: tuple[QuantizableOp, ...] = (
    QuantizableOp("", "MatMul", 0, (_RIGHT, _LEFT)),
    QuantizableOp("", "Gemm", 0, (_RIGHT, _LEFT), bias=2),
    QuantizableOp("", "Conv", 0, (WeightInput("W", 1, _conv),), bias=2),
    QuantizableOp("", "ConvTranspose", 0, (WeightInput("W", 1, _conv_transpose),), bias=2),
    QuantizableOp("", "Gather", None, (WeightInput("data", 0, _gather),)),
    QuantizableOp("", "LSTM", 0, _RECURRENT, bias=3),
    QuantizableOp("", "GRU", 0, _RECURRENT, bias=3),
    QuantizableOp("", "RNN", 0, _RECURRENT, bias=3),
    QuantizableOp(MICROSOFT, "FusedMatMul", 0, (_RIGHT, _LEFT)),
)

_ROWS = {(row.domain, row.op_type): row for row in TABLE}

FLOAT_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Weight types that DequantizeLinear can give back (ONNX DequantizeLinear-21)."""


INTEGER_OPS = frozenset(
    {
        ("", "ConvInteger"),
        ("", "DequantizeLinear"),
        ("", "MatMulInteger"),
        ("", "QLinearConv"),
        ("", "QLinearMatMul"),
        (MICROSOFT, "DynamicQuantizeMatMul"),
        (MICROSOFT, "GatherBlockQuantized"),
        (MICROSOFT, "MatMulIntegerToFloat"),
        (MICROSOFT, "MatMulNBits"),
        (MICROSOFT, "QAttention"),
        (MICROSOFT, "QGemm"),
    }
)
"""Ops that read integer weights: a model that holds them was quantized before."""


def row_of(node: ir.Node) -> QuantizableOp | None:
    """Return the table row of a node's op type, None for ops without weights."""
    return _ROWS.get((standard_domain(node.domain), node.op_type))


@dataclass(frozen=True, slots=True)
class Site:
    """A place where a constant float weight meets an op: what a scheme is assigned to.

    Attributes:
        node: The op.
        row: Its table row.
        role: What the op calls this input.
        weight_input: Position of the weight among the node's inputs.
        weight: The initializer that holds the weight; several sites may share it.
        axes: Meaning of the axes of the *initializer*, Transposes on the way undone.
        transposes: The Transpose nodes between the initializer and the op, in that order.
    """

    node: ir.Node
    row: QuantizableOp
    role: str
    weight_input: int
    weight: ir.Value
    axes: WeightAxes
    transposes: tuple[ir.Node, ...]

    @property
    def label(self) -> str:
        """How reports name the site: the node's name, with the role where it has two."""
        name = self.node.name or ""
        return f"{name}.{self.role}" if self.row.op_type in ("LSTM", "GRU", "RNN") else name

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The weight itself."""
        tensor = self.weight.const_value
        if tensor is None:
            message = f"the weight {self.weight.name} has lost its value"
            raise ValueError(message)
        return tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the initializer."""
        return tuple(self.tensor.shape.numpy())

    @property
    def left(self) -> bool:
        """Whether the weight is the first input of a matrix product, with the data second."""
        return self.weight_input == 0 and self.row.data is not None

    @property
    def transposed(self) -> bool:
        """Whether a matrix weight is stored `[N, K]`: behind a Transpose, or by transB."""
        if self.row.op_type not in ("MatMul", "Gemm", "FusedMatMul") or self.axes.output is None:
            return bool(self.transposes)
        return not self.left and self.axes.reduction > self.axes.output

    @property
    def reduction(self) -> int:
        """Number of input channels."""
        return self.shape[self.axes.reduction]

    @property
    def reduction_axes(self) -> tuple[int, ...]:
        """All axes but that of output channels, input channels last: how kernels sum."""
        others = (axis for axis in range(len(self.shape)) if axis != self.axes.output)
        return tuple(sorted(others, key=lambda axis: axis == self.axes.reduction))

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return 1 if self.axes.output is None else self.shape[self.axes.output]

    def granularity(self, scheme: QScheme) -> Granularity:
        """Bind a scheme to this weight's axes.

        A weight with a single output channel has blocks only: its per-axis form is one block
        over the whole reduction axis.
        """
        if scheme.per_tensor:
            return PerTensor()
        if scheme.block_size is not None:
            return PerBlock(self.axes.reduction, scheme.block_size)
        if self.axes.output is None:
            return PerBlock(self.axes.reduction, self.reduction)
        return PerAxis(self.axes.output)


def planned_spec(site: Site) -> QSpec | None:
    """Return how the weight of a site is going to be quantized, None where it stays in float."""
    scheme = scheme_of(site.node)
    if scheme is None:
        return None
    limit = site.node.metadata_props.get(PAIR_LIMIT)
    pairs = None if limit is None else PairLimit(int(limit), site.reduction_axes)
    return scheme.weight_spec(site.granularity(scheme), pairs)


@dataclass(frozen=True, slots=True)
class NotASite:
    """A node of a quantizable op type that has no weight to quantize.

    Attributes:
        node: The op.
        reason: Why, as a sentence.
    """

    node: ir.Node
    reason: str


def find_sites(model: ir.Model) -> tuple[list[Site], list[NotASite]]:
    """Return every weight site of a model, bodies included, and the ops that have none.

    Both lists are in graph order.
    """
    sites: list[Site] = []
    others: list[NotASite] = []
    for node in all_nodes(model):
        row = row_of(node)
        if row is None:
            continue
        found = list(_sites_of(node, row))
        if found:
            sites.extend(found)
        else:
            others.append(NotASite(node, _why_not(node, row)))
    return sites, others


def _sites_of(node: ir.Node, row: QuantizableOp) -> Iterator[Site]:
    for entry in row.weights:
        if entry.index >= len(node.inputs):
            continue
        source, transposes = _through_transposes(node.inputs[entry.index])
        tensor = constant_of(source)
        if source is None or tensor is None or not source.is_initializer():
            continue
        if tensor.dtype not in FLOAT_TYPES:
            continue
        axes = entry.axes(node, len(tensor.shape))
        if axes is None:
            continue
        yield Site(node, row, entry.role, entry.index, source, _undo(axes, transposes), transposes)
        if row.op_type in ("MatMul", "Gemm", "FusedMatMul"):
            return  # one constant side is the weight; two would have been folded away


def _through_transposes(
    value: ir.Value | None,
) -> tuple[ir.Value | None, tuple[ir.Node, ...]]:
    """Follow a value back through Transpose nodes; nodes are returned in graph order."""
    path: list[ir.Node] = []
    while value is not None:
        producer = value.producer()
        if producer is None or not is_op(producer, "Transpose"):
            break
        path.append(producer)
        value = producer.inputs[0]
    return value, tuple(reversed(path))


def _undo(axes: WeightAxes, transposes: tuple[ir.Node, ...]) -> WeightAxes:
    reduction, output = axes.reduction, axes.output
    for transpose in reversed(transposes):
        perm = ints_attribute(transpose, "perm")
        if perm is None:
            rank = len(transpose.inputs[0].shape or ()) if transpose.inputs[0] else 2
            perm = tuple(reversed(range(rank)))
        reduction = perm[reduction]
        output = None if output is None else perm[output]
    return WeightAxes(reduction, output)


def _why_not(node: ir.Node, row: QuantizableOp) -> str:
    for entry in row.weights:
        value = node.inputs[entry.index] if entry.index < len(node.inputs) else None
        source, _ = _through_transposes(value)
        if source is not None and is_op(source.producer(), "DequantizeLinear"):
            return "its weight is quantized already"
        tensor = constant_of(source)
        if tensor is None:
            continue
        if tensor.dtype in FLOAT_TYPES:
            return (
                f"its weight of shape {list(tensor.shape)} is not a form {row.op_type} "
                "is quantized in"
            )
        return (
            f"its constant input has type {tensor.dtype.name}, and DequantizeLinear returns "
            "float32, float16 or bfloat16 only"
        )
    if row.op_type == "Gather":
        return "it looks up a computed value, not a table of weights"
    return "both inputs are computed at run time, and there is no weight to quantize"
