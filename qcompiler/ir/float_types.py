"""Which float type each place of a node may have, and which ops want float32 whatever they may.

What is allowed is asked of ONNX's own schemas for the model's opset, so that no list of types can
go stale here. What is wise is a table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final

import onnx
import onnx_ir as ir

from qcompiler.ir.dataflow import bodies_of, is_op, standard_domain
from qcompiler.quant.compute_type import ComputeType


def data_type_of(compute: ComputeType) -> ir.DataType:
    """Return the element type of a graph's values."""
    return ir.DataType[compute.onnx_name]


class Place(Enum):
    """What decides the type of one input or output of a node."""

    COMPUTED = "computed"
    """The type that the node computes in."""
    FLOAT32 = "float32"
    """Nothing: it is float32."""
    ANY = "any"
    """It is read as it comes: Shape, and what a Cast casts."""


@dataclass(frozen=True, slots=True)
class Places:
    """The places of a node that hold float32 now, by position.

    Attributes:
        inputs: Of the inputs.
        outputs: Of the outputs.
        reason: Why none of them can be computed in the 16-bit type; "" where one can.
    """

    inputs: Mapping[int, Place]
    outputs: Mapping[int, Place]
    reason: str = ""

    @property
    def computes(self) -> bool:
        """Whether the node has a float type to choose."""
        return Place.COMPUTED in (*self.inputs.values(), *self.outputs.values())


SENSITIVE: Final[Mapping[str, str]] = MappingProxyType(
    dict.fromkeys(("Exp", "Pow"), "its result leaves the range of 16 bits for moderate data")
    | dict.fromkeys(
        (
            *("ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL1", "ReduceL2", "CumSum"),
            *("ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "LpPool", "GlobalLpPool"),
        ),
        "it adds up or multiplies many numbers",
    )
    | dict.fromkeys(
        ("LpNormalization", "MeanVarianceNormalization", "InstanceNormalization"),
        "it sums squares in the type of its data",
    )
    | dict.fromkeys(
        ("Sqrt", "Reciprocal", "Log"),
        "small numbers, such as a variance, matter to it and become 0 in 16 bits",
    )
    | dict.fromkeys(("QLinearConv", "QLinearMatMul"), "its scales belong to its codes")
    | dict.fromkeys(
        ("Sin", "Cos", "Tan"), "a large angle has no digits left behind the point in 16 bits"
    )
    | dict.fromkeys(
        (
            *("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"),
            *("Bernoulli", "Constant", "EyeLike", "HannWindow", "HammingWindow", "BlackmanWindow"),
            *("MelWeightMatrix", "STFT", "DFT"),
        ),
        "it makes numbers in float32",
    )
)
"""Standard ops that compute in float32, and why."""

MOVING: Final = frozenset(
    (
        *("Cast", "CastLike", "Compress", "Concat", "ConstantOfShape", "DepthToSpace", "Expand"),
        *("Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape"),
        *("ReverseSequence", "ScatterElements", "ScatterND", "Slice", "SpaceToDepth", "Split"),
        *("Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where"),
    )
)
"""Standard ops that move numbers and compute none: any type is as good."""
HEAVY: Final = frozenset(
    (
        *("Attention", "Conv", "ConvTranspose", "DeformConv", "Einsum", "GRU", "Gemm", "LSTM"),
        *("MatMul", "RNN"),
    )
)
"""Standard ops that a 16-bit type exists for."""

_SCALE_INPUT: Final = 1
_FLOAT32_INPUTS: Final = MappingProxyType({"Resize": (1, 2), "Upsample": (1,), "Dropout": (1,)})
"""Coordinates and probabilities: parameters, which cost nothing in float32."""
_ANY_INPUTS: Final = MappingProxyType({"Cast": (0,), "CastLike": (0,), "Shape": (0,), "Size": (0,)})
_CONTROL_FLOW: Final = ("If", "Loop", "Scan")


def is_control_flow(node: ir.Node) -> bool:
    """Whether the types of a node are those of its bodies."""
    return is_op(node, *_CONTROL_FLOW)


def is_scale(node: ir.Node, index: int) -> bool:
    """Whether an input is the scale of a QuantizeLinear or DequantizeLinear."""
    return is_op(node, "QuantizeLinear", "DequantizeLinear") and index == _SCALE_INPUT


def is_float32(value: ir.Value | None) -> bool:
    """Whether a value is a float32 tensor."""
    return (
        value is not None
        and isinstance(value.type, ir.TensorType)
        and value.dtype == ir.DataType.FLOAT
    )


def places_of(node: ir.Node, opset: int, compute: ComputeType) -> Places:
    """Return what decides the types of the float32 inputs and outputs of a node.

    Not for If, Loop and Scan, whose types are those of their bodies.

    Args:
        node: The node.
        opset: Version of the standard opset of the model.
        compute: The 16-bit type.
    """
    inputs = [index for index, value in enumerate(node.inputs) if is_float32(value)]
    outputs = [index for index, value in enumerate(node.outputs) if is_float32(value)]
    reason = _refusal(node)
    schema = None if reason else _schema(node, opset)
    if schema is None:
        fixed = dict.fromkeys(inputs, Place.FLOAT32)
        reason = reason or f"{node.domain or 'ONNX'} has no public schema of {node.op_type}"
        return Places(fixed, dict.fromkeys(outputs, Place.FLOAT32), reason)
    allowed = _Allowed(schema, compute)
    found = Places(
        {index: _input_place(node, index, allowed) for index in inputs},
        {index: allowed.place(schema.outputs, index) for index in outputs},
    )
    if found.computes or not (found.inputs or found.outputs):
        return found
    if all(place is Place.ANY for place in (*found.inputs.values(), *found.outputs.values())):
        return found
    version = f"{node.op_type}-{schema.since_version}"
    return Places(found.inputs, found.outputs, f"{version} does not take {compute}")


def _input_place(node: ir.Node, index: int, allowed: "_Allowed") -> Place:
    if index in _ANY_INPUTS.get(node.op_type, ()):
        return Place.ANY
    if index in _FLOAT32_INPUTS.get(node.op_type, ()):
        return Place.FLOAT32
    return allowed.place(allowed.schema.inputs, index)


def _refusal(node: ir.Node) -> str:
    """Return why nothing can be said about a node's types, "" if something can."""
    if standard_domain(node.domain):
        return f"types of {node.domain} ops are not known"
    if any(True for _ in bodies_of(node)):
        return "it has bodies of its own kind"
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.type is not None:
            if not isinstance(value.type, ir.TensorType):
                return "it holds a sequence or an optional value"
        elif value is not None and (value.name or value.uses()):
            return f"the type of {value.name} is not known"
    return ""


def _schema(node: ir.Node, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


class _Allowed:
    """The type variables of a schema that may be the 16-bit type."""

    def __init__(self, schema: onnx.defs.OpSchema, compute: ComputeType) -> None:
        self.schema = schema
        wanted = f"tensor({compute})"
        self._free = {
            constraint.type_param_str
            for constraint in schema.type_constraints
            if wanted in constraint.allowed_type_strs
        }

    def place(self, parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int) -> Place:
        """Return what decides a parameter; the last one may be variadic."""
        if not parameters:
            return Place.FLOAT32
        parameter = parameters[min(index, len(parameters) - 1)]
        return Place.COMPUTED if parameter.type_str in self._free else Place.FLOAT32
