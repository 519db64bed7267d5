"""Ops on codes as a table: where their operands, scales and zero points stand."""

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from qcompiler.ir.dataflow import MICROSOFT, constant_of, int_attribute, standard_domain

_POOL: Final = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
_CONV: Final = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_SOFTMAX_OPSET: Final = 13
"""Before it, Softmax worked on a matrix that it made of its data."""


@dataclass(frozen=True, slots=True)
class OperandForm:
    """One operand of an op on codes.

    Attributes:
        places: Positions of its codes, its scale and its zero point.
        axis: Along which it may have several scales; None where it has one.
    """

    places: tuple[int, int, int]
    axis: int | None = None

    @property
    def scale(self) -> int:
        """Position of the scale."""
        return self.places[1]


@dataclass(frozen=True, slots=True)
class QuantizedForm:
    """One op on codes.

    Attributes:
        domain: Its domain.
        name: Its name.
        op: The standard op that it computes.
        fixed: Its operands; empty where they repeat from position 2 on.
        result: Positions of scale and zero point of the result; None where it has none.
        bias: Position of a bias of int32 codes, or None.
        attributes: Those that the standard op has as well.
    """

    domain: str
    name: str
    op: str
    fixed: tuple[OperandForm, ...]
    result: tuple[int, int] | None
    bias: int | None = None
    attributes: tuple[str, ...] = ()

    def operands(self, node: ir.Node) -> tuple[OperandForm, ...]:
        """Return the operands of a node."""
        if not self.fixed:
            places = range(2, len(node.inputs) - 2, 3)
            return tuple(OperandForm((place, place + 1, place + 2)) for place in places)
        if self.op == "Gemm":
            axis = 1 - int_attribute(node, "transB", 0)
            return (self.fixed[0], OperandForm(self.fixed[1].places, axis))
        return self.fixed


_FIRST, _SECOND = OperandForm((0, 1, 2)), OperandForm((3, 4, 5))


def _unary(name: str, *attributes: str) -> QuantizedForm:
    return QuantizedForm(
        MICROSOFT, f"QLinear{name}", name, (_FIRST,), (3, 4), attributes=attributes
    )


FORMS: Final[tuple[QuantizedForm, ...]] = (
    QuantizedForm("", "QLinearConv", "Conv", (_FIRST, OperandForm((3, 4, 5), 0)), (6, 7), 8, _CONV),
    QuantizedForm("", "QLinearMatMul", "MatMul", (_FIRST, OperandForm((3, 4, 5), -1)), (6, 7)),
    QuantizedForm(
        MICROSOFT, "QGemm", "Gemm", (_FIRST, _SECOND), (7, 8), 6, ("alpha", "transA", "transB")
    ),
    QuantizedForm(MICROSOFT, "QLinearAdd", "Add", (_FIRST, _SECOND), (6, 7)),
    QuantizedForm(MICROSOFT, "QLinearMul", "Mul", (_FIRST, _SECOND), (6, 7)),
    QuantizedForm(MICROSOFT, "QLinearConcat", "Concat", (), (0, 1), attributes=("axis",)),
    _unary("AveragePool", *_POOL),
    _unary("GlobalAveragePool"),
    _unary("LeakyRelu", "alpha"),
    _unary("Sigmoid"),
    _unary("Softmax", "axis"),
)


def form_of(node: ir.Node) -> QuantizedForm | None:
    """Return the form of an op on codes, None for other ops."""
    key = (standard_domain(node.domain), node.op_type)
    return next((form for form in FORMS if (form.domain, form.name) == key), None)


def form_refusal(node: ir.Node, form: QuantizedForm) -> str:
    """Return why a node cannot be split, "" if it can."""
    if int_attribute(node, "channels_last", 0):
        return "its channels are last, and no standard op has them there"
    if form.op == "Softmax" and int_attribute(node, "opset", _SOFTMAX_OPSET) < _SOFTMAX_OPSET:
        return "it means the Softmax of an opset before 13"
    operands = form.operands(node)
    scales = [constant_of(node.inputs[operand.scale]) for operand in operands]
    for operand, scale in zip(operands, scales, strict=True):
        if operand.axis is None and scale is not None and scale.size != 1:
            return "one of its activations has several scales"
    has_bias = form.bias is not None and form.bias < len(node.inputs)
    if has_bias and any(scale is None for scale in scales):
        return "its bias has no scale that is known before the run"
    return ""
