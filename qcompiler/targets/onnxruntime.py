"""What ONNX Runtime runs on a CPU, measured.

Every row was run with ONNX Runtime 1.32 on a CPU with AVX2 and no VNNI, two threads; times are
medians of interleaved runs relative to the float op. `tests/targets/test_onnxruntime.py` loads
every row and looks at the kernel, since releases move; it loads opset 28, and 29 in vain.
"""

from typing import Final

from qcompiler.quant.scheme import Activations
from qcompiler.targets.capability import AddedBias, Target
from qcompiler.targets.onnxruntime_int8 import INT8_ROWS, INT8_SUBSTITUTES, PLACEMENT
from qcompiler.targets.onnxruntime_ops import LOWERED_OPS, LOWERING
from qcompiler.targets.rows import OpType, Refusal, Row, WeightUse

_MATMUL: Final[tuple[OpType, ...]] = (("", "MatMul"), ("", "Gemm"))
_FUSED_MATMUL: Final[OpType] = ("com.microsoft", "FusedMatMul")
_GATHER: Final[tuple[OpType, ...]] = (("", "Gather"),)
_CONV: Final[tuple[OpType, ...]] = (("", "Conv"), ("", "ConvTranspose"))
_RECURRENT: Final[tuple[OpType, ...]] = (("", "LSTM"), ("", "GRU"), ("", "RNN"))

_FLOAT16_OK: Final = ("FLOAT", "FLOAT16")
_MATRIX_RANKS: Final = (2, 3, 4, 5)
_CONV_RANKS: Final = (3, 4, 5)
_BLOCKS: Final = (16, 32, 64, 128, 256)
"""In float16, larger blocks are not fused to MatMulNBits; in float32 up to 4096 are."""
_BLOCKS_2_BIT: Final = (32, 64, 128)
"""MatMulNBits at 2 bits runs 15 to 40 times slower than float with blocks of 16 or 256."""

_DECODED: Final = "the float op, weights decoded once when the session starts"
_DECODED_NOTE: Final = (
    "the file is smaller and the speed that of float, since the runtime has no integer kernel"
)

_ROUNDED_NOTE: Final = "MatMulNBits rounds activations to 8 bits per block"
"""At accuracy_level 4, which ONNX Runtime's own fusion of DequantizeLinear and MatMul uses too."""

_ROWS: Final[tuple[Row, ...]] = (
    Row(
        rule="matmul-nbits-8",
        ops=_MATMUL,
        weight_bits=(8,),
        uses=(WeightUse.PLAIN, WeightUse.TRANSPOSED),
        per_channel=True,
        block_sizes=_BLOCKS,
        ragged=True,
        symmetric=(True, False),
        float_types=_FLOAT16_OK,
        kernel="MatMulNBits (8-bit)",
        source="measured: 0.33-0.50 of float at batch 1, 1.2-1.7 at batch 64 (K = N = 2048); "
        "no difference between symmetric and not",
        note=_ROUNDED_NOTE,
    ),
    Row(
        rule="matmul-nbits-4",
        ops=_MATMUL,
        weight_bits=(4, 3),
        uses=(WeightUse.PLAIN,),
        per_channel=True,
        block_sizes=_BLOCKS,
        ragged=True,
        symmetric=(False, True),
        float_types=_FLOAT16_OK,
        kernel="MatMulNBits (4-bit)",
        source="measured: symmetric 0.27-0.30 of float at batch 1, with zero points 0.30-0.34, "
        "both 0.9-1.1 at batch 64; zero points gain 0.5-0.9 dB; blocks of 16 take twice as long",
        note=_ROUNDED_NOTE,
    ),
    Row(
        rule="matmul-nbits-2",
        ops=_MATMUL,
        weight_bits=(2,),
        uses=(WeightUse.PLAIN,),
        per_channel=True,
        block_sizes=_BLOCKS_2_BIT,
        ragged=True,
        symmetric=(False, True),
        float_types=_FLOAT16_OK,
        kernel="MatMulNBits (2-bit)",
        source="measured: 0.19-0.39 of float at batch 1, 0.9-1.2 at batch 64; blocks of 16 and "
        "256 run 15-40 times slower than float; zero points gain 2-3 dB",
        note=_ROUNDED_NOTE,
    ),
    Row(
        rule="matmul-nbits-transposed",
        ops=_MATMUL,
        weight_bits=(4, 3),
        uses=(WeightUse.TRANSPOSED,),
        per_channel=False,
        block_sizes=_BLOCKS,
        ragged=False,
        symmetric=(False, True),
        float_types=_FLOAT16_OK,
        kernel="MatMulNBits (4-bit)",
        source="measured: DequantizeLinear, Transpose, MatMul is not fused for blocks, so the "
        "pass lower-matmul-nbits writes MatMulNBits on the stored [N, K] codes",
        note=_ROUNDED_NOTE,
    ),
    Row(
        rule="matmul-nbits-transposed-2",
        ops=_MATMUL,
        weight_bits=(2,),
        uses=(WeightUse.TRANSPOSED,),
        per_channel=False,
        block_sizes=_BLOCKS_2_BIT,
        ragged=False,
        symmetric=(False, True),
        float_types=_FLOAT16_OK,
        kernel="MatMulNBits (2-bit)",
        source="measured, as matmul-nbits-transposed",
        note=_ROUNDED_NOTE,
    ),
    Row(
        rule="shared-table-8",
        ops=(*_MATMUL, *_GATHER),
        weight_bits=(8,),
        uses=(WeightUse.SHARED_TABLE,),
        per_channel=True,
        block_sizes=_BLOCKS,
        ragged=False,
        symmetric=(False, True),
        float_types=_FLOAT16_OK,
        kernel="GatherBlockQuantized and MatMulNBits (8-bit) on one table",
        source="measured: the Q/DQ form dequantizes the table twice at each run, 12 times float",
        reduction_multiple=16,
        note=_ROUNDED_NOTE,
    ),
    Row(
        rule="shared-table-4",
        ops=(*_MATMUL, *_GATHER),
        weight_bits=(4, 3),
        uses=(WeightUse.SHARED_TABLE,),
        per_channel=False,
        block_sizes=_BLOCKS,
        ragged=False,
        symmetric=(False, True),
        float_types=_FLOAT16_OK,
        kernel="GatherBlockQuantized and MatMulNBits (4-bit) on one table",
        source="measured: 0.3-0.4 of float at batch 1; the Q/DQ form takes 20 times float",
        note=_ROUNDED_NOTE,
    ),
    Row(
        rule="shared-table-2",
        ops=(*_MATMUL, *_GATHER),
        weight_bits=(2,),
        uses=(WeightUse.SHARED_TABLE,),
        per_channel=False,
        block_sizes=_BLOCKS_2_BIT,
        ragged=False,
        symmetric=(False, True),
        float_types=_FLOAT16_OK,
        kernel="GatherBlockQuantized and MatMulNBits (2-bit) on one table",
        source="measured, as shared-table-4",
        note=_ROUNDED_NOTE,
    ),
    Row(
        rule="gather-block-quantized-8",
        ops=_GATHER,
        weight_bits=(8,),
        uses=(WeightUse.PLAIN,),
        per_channel=True,
        block_sizes=_BLOCKS,
        ragged=True,
        symmetric=(False, True),
        float_types=_FLOAT16_OK,
        kernel="GatherBlockQuantized (8-bit)",
        source="measured: 0.5-0.9 of float Gather; the Q/DQ form dequantizes all rows at each "
        "run and took 7-48 times float",
    ),
    Row(
        rule="gather-block-quantized-4",
        ops=_GATHER,
        weight_bits=(4, 3),
        uses=(WeightUse.PLAIN,),
        per_channel=True,
        block_sizes=_BLOCKS,
        ragged=True,
        symmetric=(False, True),
        float_types=_FLOAT16_OK,
        kernel="GatherBlockQuantized (4-bit)",
        source="measured: 0.9-1.0 of float Gather on bytes (uint8 data), 1.4-4.3 on 4-bit typed "
        "data; the Q/DQ form took 37-327 times float",
        reduction_multiple=2,
    ),
    Row(
        rule="gather-block-quantized-2",
        ops=_GATHER,
        weight_bits=(2,),
        uses=(WeightUse.PLAIN,),
        per_channel=True,
        block_sizes=_BLOCKS,
        ragged=True,
        symmetric=(False, True),
        float_types=_FLOAT16_OK,
        kernel="GatherBlockQuantized (2-bit)",
        source="measured: 0.7-0.8 of float Gather",
        reduction_multiple=4,
    ),
    *INT8_ROWS,
    Row(
        rule="decoded-at-load",
        ops=(*_CONV, *_RECURRENT),
        weight_bits=(8,),
        uses=(WeightUse.PLAIN, WeightUse.TRANSPOSED),
        ranks=_CONV_RANKS,
        per_channel=True,
        block_sizes=(),
        ragged=False,
        symmetric=(True, False),
        float_types=_FLOAT16_OK,
        kernel=_DECODED,
        source="measured: DequantizeLinear before Conv runs at each run and blocks prepacking, "
        "1.2-1.6 times float (LSTM, GRU 1.1-1.5); Cast and Mul are folded at session start, 1.0",
        note=_DECODED_NOTE,
    ),
    Row(
        rule="decoded-at-load-matmul",
        ops=(*_MATMUL, _FUSED_MATMUL),
        weight_bits=(8,),
        uses=(WeightUse.PLAIN, WeightUse.TRANSPOSED, WeightUse.LEFT),
        ranks=_MATRIX_RANKS,
        per_channel=True,
        block_sizes=(),
        ragged=False,
        symmetric=(True, False),
        float_types=_FLOAT16_OK,
        kernel=_DECODED,
        source="measured: DequantizeLinear is not fused into a MatMul whose weight is its first "
        "input or of rank other than 2, nor into FusedMatMul",
        note=_DECODED_NOTE,
    ),
    Row(
        rule="bfloat16-no-cpu-kernel",
        ops=(*_MATMUL, *_GATHER),
        weight_bits=(8, 4, 3, 2),
        uses=(WeightUse.PLAIN, WeightUse.TRANSPOSED, WeightUse.SHARED_TABLE),
        per_channel=True,
        block_sizes=_BLOCKS_2_BIT,
        ragged=True,
        symmetric=(False, True),
        float_types=("BFLOAT16",),
        kernel="DequantizeLinear, and the op in bfloat16",
        source="measured: no CPU kernel of DequantizeLinear, MatMul or Conv takes bfloat16",
        note="ONNX Runtime has no bfloat16 kernel on CPU, for the float model either; "
        "convert the model to float32 or float16 to run it there",
    ),
)

_REFUSALS: Final[tuple[Refusal, ...]] = (
    Refusal(
        rule="conv-low-bit",
        ops=_CONV,
        weight_bits=(4, 3, 2),
        reason="ONNX Runtime has no convolution kernel for weights below 8 bits: it would "
        "dequantize them at each run, 1.1-2.7 times slower than float",
        source="measured: int4 Conv and ConvTranspose, per axis and in blocks of 32",
    ),
    Refusal(
        rule="recurrent-low-bit",
        ops=_RECURRENT,
        weight_bits=(4, 3, 2),
        reason="ONNX Runtime has no recurrent kernel for weights below 8 bits: it would "
        "dequantize them at each run, 1.6-7 times slower than float",
        source="measured: int4 LSTM, GRU and RNN in blocks of 32",
    ),
)

_ADDED_BIASES: Final[tuple[AddedBias, ...]] = (
    AddedBias(
        Activations.FLOAT,
        any_shape=True,
        source="measured: MatMulNBits takes it at 8, 4 and 2 bits, in float32 and float16, for "
        "results of any shape, also before a Relu",
    ),
    AddedBias(
        Activations.DYNAMIC,
        any_shape=True,
        source="measured: DynamicQuantizeMatMul and MatMulIntegerToFloat take it",
    ),
    AddedBias(
        Activations.STATIC,
        any_shape=False,
        source="measured: QGemm takes it, which MatMul and Add become for matrices and fixed "
        "shapes; for others the Add stays behind MatMulIntegerToFloat",
    ),
)

ONNXRUNTIME: Final = Target(
    name="onnxruntime",
    title="ONNX Runtime",
    opset_min=7,
    opset_max=28,
    default_scheme="w8a16",
    calibrated_scheme="w8a8",
    min_elements=1024,
    min_elements_reason="it would save under 3 KB, and runs 1.1 to 1.5 times slower than float",
    rows=_ROWS,
    refusals=_REFUSALS,
    substitutes=INT8_SUBSTITUTES,
    placement=PLACEMENT,
    lowering=LOWERING,
    lowered_ops=LOWERED_OPS,
    added_biases=_ADDED_BIASES,
)
