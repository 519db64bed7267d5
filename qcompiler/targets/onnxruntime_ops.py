"""The lowering passes for ONNX Runtime, and what they may leave behind, measured.

Every type was loaded in ONNX Runtime 1.32 on a CPU; `tests/targets/test_onnxruntime_ops.py`
loads them again.
"""

from typing import Final

from qcompiler.targets.rows import LegalAttribute, LoweredOp

_FLOATS: Final = ("FLOAT", "FLOAT16", "BFLOAT16")
"""BFLOAT16 has no CPU kernel; row bfloat16-no-cpu-kernel says so where it is planned."""
_BYTE_FLOATS: Final = ("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ")
_NARROW: Final = ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")
_QUANTIZED: Final = (*_NARROW, "INT16", "UINT16", *_BYTE_FLOATS)
_DEQUANTIZED: Final = (*_QUANTIZED, "INT32")
_COMPUTED: Final = (*_FLOATS, "DOUBLE")
_KERNEL_FLOATS: Final = ("FLOAT", "FLOAT16")
_BYTES: Final = ("UINT8",)

_BITS: Final = LegalAttribute("bits", (2, 4, 8))
_BLOCKS: Final = LegalAttribute("block_size", tuple(1 << power for power in range(4, 31)))
_MICROSOFT: Final = "com.microsoft"

LOWERING: Final = (
    "quantize-biases",
    "decompose-gemm",
    "lower-matmul-nbits",
    "lower-embeddings",
    "lower-dynamic-quantization",
    "decode-at-load",
    "isolate-float-ops",
)

LOWERED_OPS: Final[tuple[LoweredOp, ...]] = (
    LoweredOp(("", "DequantizeLinear"), (_DEQUANTIZED, _FLOATS, _DEQUANTIZED)),
    LoweredOp(("", "QuantizeLinear"), (_FLOATS, _FLOATS, _QUANTIZED)),
    LoweredOp(
        (_MICROSOFT, "MatMulNBits"),
        (_KERNEL_FLOATS, _BYTES, _KERNEL_FLOATS, (*_BYTES, *_KERNEL_FLOATS)),
        (_BITS, _BLOCKS, LegalAttribute("accuracy_level", (0, 1, 2, 3, 4))),
    ),
    LoweredOp(
        (_MICROSOFT, "GatherBlockQuantized"),
        (_BYTES, ("INT32", "INT64"), _KERNEL_FLOATS, _BYTES),
        (
            _BITS,
            _BLOCKS,
            LegalAttribute("gather_axis", (0,)),
            LegalAttribute("quantize_axis", (1,)),
        ),
    ),
    LoweredOp(("", "DynamicQuantizeLinear"), (("FLOAT",),)),
    LoweredOp(("", "MatMulInteger"), (_BYTES, ("INT8", "UINT8"), _BYTES, ("INT8", "UINT8"))),
    LoweredOp(("", "Cast"), ((*_DEQUANTIZED, *_COMPUTED),)),
    LoweredOp(("", "Reshape"), ((*_BYTES, *_COMPUTED), ("INT64",))),
    LoweredOp(("", "Expand"), ((*_BYTES, *_COMPUTED), ("INT64",))),
    LoweredOp(("", "Transpose"), ((*_DEQUANTIZED, *_COMPUTED),)),
    LoweredOp(("", "Add"), (_COMPUTED, _COMPUTED)),
    LoweredOp(("", "Sum"), (_COMPUTED, _COMPUTED)),
    LoweredOp(("", "Sub"), (_COMPUTED, _COMPUTED)),
    LoweredOp(("", "Mul"), (_COMPUTED, _COMPUTED)),
    LoweredOp(("", "MatMul"), (_COMPUTED, _COMPUTED)),
    LoweredOp(("", "Gather"), (_COMPUTED, ("INT32", "INT64"))),
    LoweredOp(("", "Concat"), (_COMPUTED,)),
    LoweredOp(("", "Conv"), (_KERNEL_FLOATS, _KERNEL_FLOATS)),
    LoweredOp(("", "ScatterND"), (("FLOAT",), ("INT64",), ("FLOAT",))),
)
