"""What a graph for TensorRT may hold, and where quantizers stand in it.

Measured with TensorRT-RTX 1.7.1, as in `targets/tensorrt_rows.py`; `source` says what was
only read.
"""

from typing import Final

from qcompiler.quant.qtype import INT8
from qcompiler.targets.placement import Part, Placement, PlacementRule, Reluctance
from qcompiler.targets.rows import Demand, LoweredOp, MissingOp, OpType

_FLOATS: Final = ("FLOAT", "FLOAT16", "BFLOAT16")
_CODES: Final = ("INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1")
"""Which processor has which of them says `targets/processors.py`."""

_SIGNED_ONLY: Final = (Demand.ZERO_POINTS_ARE_ZERO, Demand.SIGNED)

LOWERED_OPS: Final[tuple[LoweredOp, ...]] = (
    LoweredOp(
        ("", "DequantizeLinear"),
        (_CODES, _FLOATS, _CODES),
        demands=(
            *_SIGNED_ONLY,
            Demand.WHOLE_BLOCKS,
            Demand.BLOCKS_ON_LAST_AXES,
            Demand.INT4_BLOCKS_ON_THE_RIGHT,
        ),
    ),
    LoweredOp(("", "QuantizeLinear"), (_FLOATS, _FLOATS, _CODES), demands=_SIGNED_ONLY),
    # What splitting outlier channels, correcting biases, equalizing, casting, and taking in what
    # other tools quantized, make.
    LoweredOp(("", "Add"), (_FLOATS, _FLOATS)),
    LoweredOp(("", "AveragePool"), (_FLOATS,)),
    LoweredOp(("", "Cast")),
    LoweredOp(("", "Clip"), (_FLOATS, _FLOATS, _FLOATS)),
    LoweredOp(("", "Concat"), (_FLOATS,)),
    LoweredOp(("", "Conv"), (_FLOATS, _FLOATS, _FLOATS)),
    LoweredOp(("", "Gather"), (_FLOATS, ("INT32", "INT64"))),
    LoweredOp(("", "Gemm"), (_FLOATS, _FLOATS, _FLOATS)),
    LoweredOp(("", "GlobalAveragePool"), (_FLOATS,)),
    LoweredOp(("", "LeakyRelu"), (_FLOATS,)),
    LoweredOp(("", "MatMul"), (_FLOATS, _FLOATS)),
    LoweredOp(("", "Mul"), (_FLOATS, _FLOATS)),
    LoweredOp(("", "Reshape"), (_FLOATS, ("INT64",))),
    LoweredOp(("", "Sigmoid"), (_FLOATS,)),
    LoweredOp(("", "Softmax"), (_FLOATS,)),
    LoweredOp(("", "Sub"), (_FLOATS, _FLOATS)),
    LoweredOp(("", "Sum"), (_FLOATS, _FLOATS)),
    LoweredOp(("", "Transpose"), (_FLOATS,)),
)

MISSING_OPS: Final[tuple[MissingOp, ...]] = (
    MissingOp("com.microsoft", (), "export again without ONNX Runtime's optimizer"),
    MissingOp(
        "",
        (
            *("ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv"),
            "QLinearMatMul",
        ),
        "start from the float model",
    ),
    MissingOp(
        "",
        (
            *("AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr"),
            *("BitwiseXor", "CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "DFT"),
            *("Det", "ImageDecoder", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix", "Multinomial"),
            *("NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement"),
            *("OptionalHasElement", "RegexFullMatch", "SequenceAt", "SequenceConstruct"),
            *("SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength"),
            *("SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat"),
            *("StringNormalizer", "StringSplit", "TfIdfVectorizer", "Unique"),
        ),
        "rewrite it with standard ops",
    ),
)
"""The parser of TensorRT-RTX 1.7.1 says so itself (`supports_operator`); TensorRT 10.15 documents
the same (read), but for Unique, StringConcat and StringSplit, which it does not list."""

RTX_MISSING_OPS: Final = (
    *MISSING_OPS,
    MissingOp("", ("BitCast", "CumProd", "DeformConv", "SwiGLU"), "rewrite it with standard ops"),
)


def _standard(*names: str) -> tuple[OpType, ...]:
    return tuple(("", name) for name in names)


_RULES: Final[tuple[PlacementRule, ...]] = (
    PlacementRule(
        rule="conv",
        ops=_standard("Conv"),
        part=Part.COMPUTES,
        kernel="a convolution of codes by codes",
        source="measured: BatchNormalization is folded before, and Relu, bias and the next "
        "QuantizeLinear follow in one kernel; a pair between them would stand in the way",
        output=False,
    ),
    PlacementRule(
        rule="matmul",
        ops=_standard("MatMul", "Gemm"),
        part=Part.COMPUTES,
        kernel="a product of codes by codes",
        source="measured: three products that read one quantized value are merged into one",
        output=False,
    ),
    PlacementRule(
        rule="residual",
        ops=_standard("Add"),
        part=Part.JOINS,
        kernel="an addition of float sums and dequantized codes",
        source="read: TensorRT's advice for residual connections; measured: the convolution before "
        "it keeps int8 operands",
        data=None,
        output=False,
        beside=_standard("Conv"),
    ),
)

_RELUCTANCES: Final[tuple[Reluctance, ...]] = (
    Reluctance(
        "attention",
        _standard("MatMul", "Softmax"),
        "attention runs as one kernel in 16 bits, and a pair in it would only cost accuracy",
        "measured in float16: both products and the Softmax of attention become one kernel where "
        "only the projections around it are quantized; in float32 they do not",
    ),
    Reluctance(
        "fused-by-the-builder",
        _standard(
            *("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "Gelu", "Erf", "Mul", "Sub", "Div"),
            *("Concat", "MaxPool", "AveragePool", "GlobalAveragePool", "Reshape", "Transpose"),
            *("Slice", "Split", "Resize", "Pad", "LayerNormalization"),
        ),
        "the builder fuses it with its neighbours or moves quantizers past it by itself",
        "measured: MaxPool works on int8 whether the pair stands before or behind it",
    ),
)

PLACEMENT: Final = Placement(
    qtype=INT8,
    symmetric=True,
    float_types=_FLOATS,
    rules=_RULES,
    reluctances=_RELUCTANCES,
)
