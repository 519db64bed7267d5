"""Small models of whole families of operators, written in old opsets."""

from dataclasses import dataclass

import onnx


@dataclass(frozen=True, slots=True)
class OpsetCase:
    """A model of one node, as ONNX text.

    Attributes:
        name: Name of the case; it starts with the operator's.
        opset: The opset it is written in.
        inputs: Graph inputs.
        outputs: Graph outputs.
        body: Nodes.
        weights: Initializers.
    """

    name: str
    opset: int
    inputs: str
    outputs: str
    body: str
    weights: str = ""

    @property
    def operator(self) -> str:
        """Name of the operator."""
        return self.name.partition("-")[0]

    def model(self) -> onnx.ModelProto:
        """Parse the model."""
        weights = f"<{self.weights}>" if self.weights else ""
        return onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["": {self.opset}]>\n'
            f"g ({self.inputs}) => ({self.outputs}) {weights} {{ {self.body} }}"
        )


_UNARY = {
    7: "Abs Acos Asin Atan Ceil Cos Elu Exp Floor HardSigmoid Identity LeakyRelu Log Neg "
    "Reciprocal Relu Selu Sigmoid Sin Softplus Softsign Sqrt Tan Tanh Flatten Transpose Shape Size "
    "LpNormalization",
    9: "Acosh Asinh Atanh Cosh Erf IsNaN Sign Sinh NonZero MeanVarianceNormalization",
    10: "IsInf ThresholdedRelu",
    11: "Round Det",
    12: "Celu",
    14: "HardSwish",
    18: "Mish",
}
_BINARY = {
    7: "Add Sub Mul Div Pow Max Min Mean Sum PRelu",
    8: "Max Min Mean Sum",
    9: "Greater Less MatMul",
    12: "GreaterOrEqual LessOrEqual",
    15: "CastLike",
}
_POOLED = "GlobalAveragePool GlobalMaxPool GlobalLpPool"
_REDUCED = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
    "ReduceSum ReduceSumSquare"
)

_INTEGERS = {"NonZero", "Shape", "Size"}
_BOOLEANS = {"IsNaN", "IsInf", "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"}


def _simple(op: str, opset: int, arguments: str, inputs: str) -> OpsetCase:
    kind = "int64" if op in _INTEGERS else "bool" if op in _BOOLEANS else "float"
    return OpsetCase(f"{op}-{opset}", opset, inputs, f"{kind}[] y", f"y = {op}({arguments})")


def elementwise_and_reductions() -> list[OpsetCase]:
    """Return one case for each operator that needs no more than inputs and axes."""
    cases = []
    for opset, names in _UNARY.items():
        cases += [_simple(op, opset, "x", "float[3,4,4] x") for op in names.split()]
    for opset, names in _BINARY.items():
        cases += [_simple(op, opset, "x, z", "float[4,4] x, float[4,4] z") for op in names.split()]
    cases += [_simple(op, 7, "x", "float[1,3,5,5] x") for op in _POOLED.split()]
    for op in _REDUCED.split():
        for opset in (7, 11, 13):
            for label, attributes in (
                ("all", ""),
                ("axis", "<axes=[1], keepdims=0>"),
                ("axes", "<axes=[0, 2]>"),
            ):
                if op != "ReduceSum" or opset < 13 or not attributes.startswith("<axes"):
                    name = f"{op}-{opset}-{label}"
                    body = f"y = {op}{attributes}(x)"
                    cases.append(OpsetCase(name, opset, "float[2,3,4] x", "float[] y", body))
    return cases


X4 = "float[1,2,5,6] x"
X3 = "float[2,3,4] x"
ANY_FLOAT = "float[] y"
ANY_INTEGER = "int64[] y"


def opset_case(
    name: str, opset: int, inputs: str, outputs: str, body: str, weights: str = ""
) -> OpsetCase:
    """Return a case whose name ends in its opset."""
    return OpsetCase(f"{name}-{opset}", opset, inputs, outputs, body, weights)


def _resize(opset: int, scales: str, attributes: str) -> OpsetCase:
    operator = "Resize" if opset > 9 else "Upsample"
    label = f"{operator}-{attributes.replace(' ', '')}-{scales.replace(' ', '')}"
    weights = f"float[4] s = {{{scales}}}"
    arguments = "x, s"
    if opset > 10:
        weights += ", float[0] roi = {}"
        arguments = "x, roi, s"
    return opset_case(
        label, opset, X4, ANY_FLOAT, f"y = {operator}<{attributes}>({arguments})", weights
    )


RESIZES = [
    _resize(opset, scales, f'mode="{mode}"')
    for opset in (9, 10)
    for mode in ("nearest", "linear")
    for scales in ("1,1,2,2", "1,1,1.7,3", "1,1,0.6,0.7", "1,1,0.5,0.5")
    if opset > 9 or "0." not in scales
] + [
    _resize(opset, scales, attributes)
    for opset in (11, 13, 18)
    for scales in ("1,1,2,2", "1,1,1.7,2.6", "1,1,0.6,0.7")
    for attributes in (
        'mode="nearest"',
        'mode="linear"',
        'mode="cubic", cubic_coeff_a=-0.5',
        'mode="linear", coordinate_transformation_mode="align_corners"',
        'mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"',
        'mode="linear", coordinate_transformation_mode="pytorch_half_pixel"',
        'mode="nearest", nearest_mode="floor", '
        'coordinate_transformation_mode="tf_half_pixel_for_nn"',
    )
    if opset < 13 or "tf_half" not in attributes
]

POOLS = [
    opset_case(
        f"{op}-{attributes}".replace(" ", ""),
        opset,
        "float[1,2,7,8] x",
        ANY_FLOAT,
        f"y = {op}<{attributes}>(x)",
    )
    for op, opset, attributes in (
        ("AveragePool", 7, "kernel_shape=[3,3], pads=[1,1,1,1]"),
        (
            "AveragePool",
            7,
            "kernel_shape=[3,3], strides=[2,2], count_include_pad=1, pads=[1,1,1,1]",
        ),
        ("AveragePool", 10, "kernel_shape=[3,3], strides=[2,2], ceil_mode=1"),
        ("AveragePool", 11, "kernel_shape=[3,3], strides=[2,3], ceil_mode=1, pads=[1,1,1,1]"),
        ("AveragePool", 11, 'kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_UPPER"'),
        (
            "AveragePool",
            11,
            "kernel_shape=[3,3], strides=[2,3], ceil_mode=1, count_include_pad=1, pads=[1,1,1,1]",
        ),
        ("MaxPool", 7, "kernel_shape=[3,3], pads=[1,1,1,1]"),
        ("MaxPool", 10, "kernel_shape=[3,3], strides=[2,3], ceil_mode=1, dilations=[2,1]"),
        ("MaxPool", 11, "kernel_shape=[3,3], strides=[2,3], ceil_mode=1, pads=[1,1,1,1]"),
        ("LpPool", 7, "kernel_shape=[3,3], strides=[2,2]"),
        ("LpPool", 11, "kernel_shape=[2,2], p=3"),
    )
]

RECURRENT = [
    opset_case(
        f"{op}-{direction}",
        7,
        f"float[4,2,3] x, float[{count},{gates * 5},3] w, float[{count},{gates * 5},5] r",
        "float[] y, float[] h",
        f'y, h = {op}<hidden_size=5, direction="{direction}">(x, w, r)',
    )
    for op, gates in (("RNN", 1), ("GRU", 3), ("LSTM", 4))
    for direction, count in (("forward", 1), ("bidirectional", 2))
]
