"""What ONNX Runtime runs on a CPU with 8-bit activations, measured.

ONNX Runtime 1.32, AVX2 without VNNI, two threads; medians of interleaved runs relative to float.
`tests/targets/test_onnxruntime_int8.py` loads a graph for every line and looks at the kernel.

Weights are signed and activations unsigned: u8 x s8 has the fastest kernel (Conv 3x3 of 64 to 128
channels 0.45-0.65 of float, u8 x u8 0.9-1.05; MatMul 0.52-0.7 against 0.58-0.8). Without VNNI that
kernel adds pairs of products in 16 bits, so neighbouring weight codes are limited to a sum of 128,
with which the result equals integer arithmetic on every CPU. It costs 1.0 dB on the CIFAR CNN
(29.7 against 30.7 dB); 7-bit weights would cost 2.5 dB, and doing nothing 14.6 dB.
"""

from typing import Final

from qcompiler.quant.qtype import UINT8
from qcompiler.quant.scheme import Activations
from qcompiler.targets.placement import Part, Placement, PlacementRule, Reluctance
from qcompiler.targets.rows import LegalAttribute, OpType, Row, Substitute, WeightUse

_CONV: Final[tuple[OpType, ...]] = (("", "Conv"),)
_MATMUL: Final[tuple[OpType, ...]] = (("", "MatMul"), ("", "Gemm"))
_ALL_WITH_WEIGHTS: Final[tuple[OpType, ...]] = (
    *_CONV,
    *_MATMUL,
    ("", "ConvTranspose"),
    ("", "Gather"),
    ("", "LSTM"),
    ("", "GRU"),
    ("", "RNN"),
    ("com.microsoft", "FusedMatMul"),
)
_PAIR_LIMIT: Final = 128
_PAIR_NOTE: Final = (
    "neighbouring codes add up to at most 128, since 16-bit sums overflow on CPUs without VNNI"
)

INT8_ROWS: Final[tuple[Row, ...]] = (
    Row(
        rule="qlinear-conv",
        ops=_CONV,
        weight_bits=(8,),
        activations=Activations.STATIC,
        uses=(WeightUse.PLAIN,),
        ranks=(3, 4),
        per_channel=True,
        block_sizes=(),
        ragged=False,
        symmetric=(True,),
        float_types=("FLOAT",),
        kernel="QLinearConv",
        source="measured: 0.45-0.65 of float in a chain of 3x3 convolutions",
        pair_limit=_PAIR_LIMIT,
        per_tensor=True,
        bodies=False,
        note=_PAIR_NOTE,
    ),
    Row(
        rule="qlinear-matmul",
        ops=_MATMUL,
        weight_bits=(8,),
        activations=Activations.STATIC,
        uses=(WeightUse.PLAIN, WeightUse.TRANSPOSED),
        per_channel=True,
        block_sizes=(),
        ragged=False,
        symmetric=(True,),
        float_types=("FLOAT",),
        kernel="QLinearMatMul, MatMulIntegerToFloat or QGemm",
        source="measured: 0.52-0.7 of float for 16 rows, 0.5-0.85 for 1024 (K, N of 384 to 1536)",
        pair_limit=_PAIR_LIMIT,
        per_tensor=True,
        bodies=False,
        note=_PAIR_NOTE,
    ),
    Row(
        rule="dynamic-quantize-matmul",
        ops=_MATMUL,
        weight_bits=(8,),
        activations=Activations.DYNAMIC,
        uses=(WeightUse.PLAIN, WeightUse.TRANSPOSED),
        per_channel=True,
        block_sizes=(),
        ragged=False,
        symmetric=(True,),
        float_types=("FLOAT",),
        kernel="DynamicQuantizeMatMul or MatMulIntegerToFloat",
        source="measured: 0.33 of float at batch 1, 0.52 at batch 64 (K = N = 2048); with free "
        "8-bit codes the 16-bit sums of AVX2 saturate, and the result is off by 27 % on random "
        "and 49 % on extreme inputs; with limited pairs it equals integer arithmetic",
        pair_limit=_PAIR_LIMIT,
        note=_PAIR_NOTE,
    ),
)

INT8_SUBSTITUTES: Final[tuple[Substitute, ...]] = (
    Substitute(_MATMUL, (8,), Activations.STATIC, 8, Activations.DYNAMIC),
    Substitute(_ALL_WITH_WEIGHTS, (8,), Activations.STATIC, 8, Activations.FLOAT),
    Substitute(_ALL_WITH_WEIGHTS, (8,), Activations.DYNAMIC, 8, Activations.FLOAT),
)

_FUSED: Final = "seen in the optimized graph between a quantized Conv and QuantizeLinear"


def _standard(*names: str) -> tuple[OpType, ...]:
    return tuple(("", name) for name in names)


_RULES: Final[tuple[PlacementRule, ...]] = (
    PlacementRule(
        rule="conv",
        ops=_CONV,
        part=Part.COMPUTES,
        kernel="QLinearConv",
        source=f"{_FUSED}; without a quantized output it stays a float Conv behind DQ",
        output=True,
    ),
    PlacementRule(
        rule="matmul",
        ops=_MATMUL,
        part=Part.COMPUTES,
        kernel="QLinearMatMul or QGemm, MatMulIntegerToFloat where the output stays float",
        source=_FUSED,
        output=False,
    ),
    PlacementRule(
        rule="elementwise",
        ops=_standard("Add", "Mul"),
        part=Part.FOLLOWS,
        kernel="QLinearAdd, QLinearMul",
        source=_FUSED,
        data=None,
    ),
    PlacementRule(
        rule="concat",
        ops=_standard("Concat"),
        part=Part.FOLLOWS,
        kernel="QLinearConcat, which rescales: inputs and output have scales of their own",
        source=_FUSED,
        data=None,
    ),
    PlacementRule(
        rule="select",
        ops=_standard("Where"),
        part=Part.FOLLOWS,
        kernel="QLinearWhere, which rescales as QLinearConcat does",
        source=f"{_FUSED}, whether it was asked for or not",
        data=(1, 2),
    ),
    PlacementRule(
        rule="average-pool",
        ops=_standard("AveragePool", "GlobalAveragePool"),
        part=Part.FOLLOWS,
        kernel="QLinearAveragePool, QLinearGlobalAveragePool",
        source=f"{_FUSED}; with ceil_mode and count_include_pad the kernel is wrong (16 dB), and "
        "with dilations the model does not load",
        attributes=(LegalAttribute("ceil_mode", (0,)), LegalAttribute("dilations", (1,))),
    ),
    PlacementRule(
        rule="table-lookup",
        ops=_standard("Sigmoid", "LeakyRelu"),
        part=Part.FOLLOWS,
        kernel="QLinearSigmoid, QLinearLeakyRelu: a table of 256 results",
        source=_FUSED,
    ),
    PlacementRule(
        rule="data-movement",
        ops=_standard(
            *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split"),
            *("Gather", "Expand", "Tile", "DepthToSpace", "MaxPool", "ReduceMax"),
        ),
        part=Part.CARRIES,
        kernel="the op on integers, the scale passed through",
        source=_FUSED,
    ),
    PlacementRule(
        rule="resize-nearest",
        ops=_standard("Resize"),
        part=Part.CARRIES,
        kernel="Resize on integers, the scale passed through",
        source=f"{_FUSED}; linear and cubic stay in float",
        modes=("nearest",),
    ),
    PlacementRule(
        rule="clipping",
        ops=_standard("Relu", "Clip"),
        part=Part.VANISHES,
        kernel="none: the codes of the output end where the op clips",
        source="measured: Relu before a QuantizeLinear whose zero point is its smallest code, and "
        "Clip whose bounds contain the range of the codes, are removed",
    ),
)

_NO_KERNEL: Final = "ONNX Runtime has no integer kernel for it on a CPU"

_RELUCTANCES: Final[tuple[Reluctance, ...]] = (
    Reluctance(
        "matmul-of-activations",
        _standard("MatMul"),
        "the product of two activations, as in attention, is a small part of the time, and "
        "quantizing both of its inputs costs more than its integer kernel gains",
        "measured: 1 % of MiniLM's time at 16 tokens",
    ),
    Reluctance(
        "softmax",
        _standard("Softmax"),
        "its probabilities span more decades than 8 bits do; QLinearSoftmax exists and is not used",
        "design",
    ),
    Reluctance(
        "no-integer-kernel",
        _standard(
            *("LayerNormalization", "InstanceNormalization", "GroupNormalization", "Gelu", "Erf"),
            *("HardSwish", "HardSigmoid", "Tanh", "PRelu", "Sub", "Div", "Max", "Min", "Abs"),
            *("Neg", "Exp", "Sqrt", "Pow", "ReduceMean", "GlobalMaxPool", "Pad", "SpaceToDepth"),
            *("RMSNormalization", "Swish", "Elu", "Softplus", "Resize"),
        ),
        _NO_KERNEL,
        "seen in the optimized graph between a quantized Conv and QuantizeLinear: left in float",
    ),
)

PLACEMENT: Final = Placement(
    qtype=UINT8,
    symmetric=False,
    float_types=("FLOAT",),
    rules=_RULES,
    reluctances=_RELUCTANCES,
)
