"""Which weights TensorRT and TensorRT-RTX take as codes, as rows of a table.

Every row of TensorRT-RTX was built with release 1.7.1 for SM75 to SM121 on a machine without a GPU;
`tests/targets/test_tensorrt_rtx.py` builds them again, and reads in the engine's own description of
its graph which types a product multiplies. What kernel runs, the runtime chooses on the device. The
rows of TensorRT proper are those that its documents allow among them; none of them was run here.

Codes are signed and zero points 0 everywhere. A last block that is shorter than the others is not
taken: the parser divides the axis by the number of scales, and 200 channels in blocks of 64 would
silently become four blocks of 50.
"""

from dataclasses import replace
from typing import Final

from qcompiler.quant.scheme import Activations
from qcompiler.targets.rows import OpType, Refusal, Row, Substitute, WeightForm, WeightUse

_PRODUCTS: Final[tuple[OpType, ...]] = (("", "MatMul"), ("", "Gemm"))
_CONV: Final[tuple[OpType, ...]] = (("", "Conv"),)
_CONVOLUTIONS: Final[tuple[OpType, ...]] = (*_CONV, ("", "ConvTranspose"))
_TABLES: Final[tuple[OpType, ...]] = (("", "Gather"),)
_RECURRENT: Final[tuple[OpType, ...]] = (("", "LSTM"), ("", "RNN"))
_GRU: Final[tuple[OpType, ...]] = (("", "GRU"),)
_ALL: Final = (*_PRODUCTS, *_CONVOLUTIONS, *_TABLES, *_RECURRENT, *_GRU)

_FLOATS: Final = ("FLOAT", "FLOAT16", "BFLOAT16")
_BLOCKS: Final = (16, 32, 64, 128, 256, 512, 1024)
_DOCUMENTED_BLOCKS: Final = (64, 128)
_CONV_RANKS: Final = (3, 4, 5)
_PRODUCT_RANKS: Final = (2, 3, 4, 5)

_STORED: Final = "the float op on weights that the engine keeps as codes"
_READ: Final = (
    "read: TensorRT's documents on explicit quantization and its operator table; not run here"
)

_INT8_CONV: Final = Row(
    rule="int8-conv",
    ops=_CONV,
    weight_bits=(8,),
    activations=Activations.STATIC,
    uses=(WeightUse.PLAIN,),
    ranks=_CONV_RANKS,
    per_channel=True,
    per_tensor=True,
    block_sizes=(),
    ragged=False,
    symmetric=(True,),
    float_types=_FLOATS,
    kernel="a convolution of int8 by int8",
    source="measured: the engine's convolution has int8 operands in 1, 2 and 3 dimensions, with "
    "groups, dilations, depthwise, and with 3 channels",
    bodies=False,
)

_INT8_PRODUCT: Final = Row(
    rule="int8-product",
    ops=_PRODUCTS,
    weight_bits=(8,),
    activations=Activations.STATIC,
    uses=(WeightUse.PLAIN, WeightUse.TRANSPOSED),
    ranks=_PRODUCT_RANKS,
    per_channel=True,
    per_tensor=True,
    block_sizes=(),
    ragged=False,
    symmetric=(True,),
    float_types=_FLOATS,
    kernel="a product of int8 by int8",
    source="measured: the engine's product has int8 operands where scales are per tensor or per "
    "output channel; with one scale per input channel it multiplies floats",
    bodies=False,
)

_FP8_CONV: Final = replace(
    _INT8_CONV,
    rule="fp8-conv",
    kernel="a convolution of fp8 by fp8",
    source="measured: the engine's convolution has E4M3 operands in 1, 2 and 3 dimensions, with "
    "groups and depthwise, its scales per tensor or per output channel",
    note="TensorRT-RTX builds it, and documents fp8 for matrix products only: compare with w8a8 on "
    "the device",
    floating=True,
)

_FP8_PRODUCT: Final = replace(
    _INT8_PRODUCT,
    rule="fp8-product",
    kernel="a product of fp8 by fp8",
    source="measured: the engine's product has E4M3 operands where scales are per tensor or per "
    "output channel; with one scale per input channel, and with float data, it multiplies floats",
    floating=True,
)

_W8_PRODUCT: Final = Row(
    rule="w8-product",
    ops=_PRODUCTS,
    weight_bits=(8,),
    uses=(WeightUse.PLAIN, WeightUse.TRANSPOSED, WeightUse.LEFT, WeightUse.SHARED_TABLE),
    ranks=_PRODUCT_RANKS,
    per_channel=True,
    per_tensor=True,
    block_sizes=_BLOCKS,
    ragged=False,
    symmetric=(True,),
    float_types=_FLOATS,
    kernel=_STORED,
    source="measured: 4.2 MB for 2048 x 2048, of which 4.2 are codes; a table that a Gather shares "
    "is stored twice",
)

_W8_CONV: Final = Row(
    rule="w8-conv",
    ops=_CONVOLUTIONS,
    weight_bits=(8,),
    uses=(WeightUse.PLAIN,),
    ranks=_CONV_RANKS,
    per_channel=True,
    per_tensor=True,
    block_sizes=(),
    ragged=False,
    symmetric=(True,),
    float_types=_FLOATS,
    kernel=_STORED,
    source="measured: 2.8 MB for 512 x 512 x 3 x 3, 9.7 in float32; the parser takes blocks along "
    "the last two axes only",
)

_W8_TABLE: Final = Row(
    rule="w8-table",
    ops=_TABLES,
    weight_bits=(8,),
    uses=(WeightUse.PLAIN, WeightUse.SHARED_TABLE),
    ranks=(2, 3),
    per_channel=True,
    per_tensor=True,
    block_sizes=_BLOCKS,
    ragged=False,
    symmetric=(True,),
    float_types=_FLOATS,
    kernel="a lookup in a table that the engine keeps as codes",
    source="measured: 10.5 MB for 20,000 x 512",
)

_W8_RECURRENT: Final = Row(
    rule="w8-recurrent",
    ops=_RECURRENT,
    weight_bits=(8,),
    uses=(WeightUse.PLAIN,),
    ranks=(3,),
    per_channel=True,
    per_tensor=True,
    block_sizes=_BLOCKS,
    ragged=False,
    symmetric=(True,),
    float_types=_FLOATS,
    kernel=_STORED,
    source="measured: LSTM of 512 units 1.9 MB, in float32 9.1",
)

_W8_GRU: Final = Row(
    rule="w8-gru",
    ops=_GRU,
    weight_bits=(8,),
    uses=(WeightUse.PLAIN,),
    ranks=(3,),
    per_channel=False,
    block_sizes=_BLOCKS[:-1],
    ragged=False,
    symmetric=(True,),
    float_types=("FLOAT", "FLOAT16"),
    kernel=_STORED,
    source="measured: with a scale per tensor or per output channel the builder fails with an "
    "internal error (vector::_M_range_check), and with blocks of 1024 of as many units a fresh "
    "process crashes; in smaller blocks it builds. The parser takes no GRU in bfloat16",
)

_W4_PRODUCT: Final = Row(
    rule="w4-product",
    ops=_PRODUCTS,
    weight_bits=(4, 3),
    uses=(WeightUse.PLAIN, WeightUse.TRANSPOSED, WeightUse.SHARED_TABLE),
    ranks=_PRODUCT_RANKS,
    per_channel=True,
    block_sizes=_BLOCKS,
    ragged=False,
    symmetric=(True,),
    float_types=_FLOATS,
    kernel="the float op on int4 weights, decoded block by block",
    source="measured: 2.2 MB for 2048 x 2048 in blocks of 128, also as the table of a Gather; "
    "with the weight on the left the builder ends in a segmentation fault",
    weight_bound=True,
)

_W4_CONV: Final = Row(
    rule="w4-conv",
    ops=_CONVOLUTIONS,
    weight_bits=(4, 3),
    uses=(WeightUse.PLAIN,),
    ranks=_CONV_RANKS,
    per_channel=True,
    block_sizes=(),
    ragged=False,
    symmetric=(True,),
    float_types=_FLOATS,
    kernel=_STORED,
    source="measured: 1.6 MB for 512 x 512 x 3 x 3, 9.7 in float32",
    weight_bound=True,
)

_W4_TABLE: Final = replace(
    _W8_TABLE,
    rule="w4-table",
    weight_bits=(4, 3),
    per_tensor=False,
    source="measured: 6.5 MB for 20,000 x 512 in blocks of 32",
)

_W4_RECURRENT: Final = replace(
    _W8_RECURRENT,
    rule="w4-recurrent",
    weight_bits=(4, 3),
    per_channel=False,
    per_tensor=False,
    source="measured: LSTM of 512 units in blocks of 32 1.8 MB, in float32 9.1",
)

_W4_GRU: Final = replace(_W8_GRU, rule="w4-gru", weight_bits=(4, 3))

RTX_ROWS: Final = (
    _INT8_CONV,
    _INT8_PRODUCT,
    _FP8_CONV,
    _FP8_PRODUCT,
    _W8_PRODUCT,
    _W8_CONV,
    _W8_TABLE,
    _W8_RECURRENT,
    _W8_GRU,
    _W4_PRODUCT,
    _W4_CONV,
    _W4_TABLE,
    _W4_RECURRENT,
    _W4_GRU,
)

_NVFP4: Final = WeightForm(
    rule="nvfp4-product",
    ops=(*_PRODUCTS, *_TABLES),
    code_type="FLOAT4E2M1",
    scale_type="FLOAT8E4M3FN",
    block_sizes=(16, 32, 64),
    float_types=_FLOATS,
    kernel=_STORED,
    source="measured: 0.73 MB for 1024 x 1024 in blocks of 16, of which 0.59 are codes and scales, "
    "for SM120 and SM121; operands are floats. E4M3 scales without the second scale, and blocks "
    "along the channels of a convolution, the parser refuses; a processor without the type, the "
    "builder",
)
"""NVFP4, as other tools write it. Codes in blocks with float scales build as well."""

RTX_FORMS: Final = (_NVFP4,)

TENSORRT_FORMS: Final = (replace(_NVFP4, ops=_PRODUCTS, block_sizes=(16,), source=_READ),)

_NO_BLOCKS: Final = (WeightUse.PLAIN, WeightUse.TRANSPOSED)

TENSORRT_ROWS: Final = (
    replace(_INT8_CONV, source=_READ),
    replace(_INT8_PRODUCT, source=_READ),
    replace(
        _FP8_CONV,
        note="TensorRT documents no fast fp8 kernel for groups, nor for more than 32 taps (7 x 7)",
        source="read: limitations in the release notes of TensorRT 10.13; not run here",
    ),
    replace(_FP8_PRODUCT, source=_READ),
    replace(_W8_PRODUCT, uses=_NO_BLOCKS, block_sizes=(), source=_READ),
    replace(_W8_CONV, source=_READ),
    replace(
        _W4_PRODUCT,
        uses=_NO_BLOCKS,
        ranks=(2,),
        per_channel=False,
        block_sizes=_DOCUMENTED_BLOCKS,
        source=_READ,
    ),
)

REFUSALS: Final[tuple[Refusal, ...]] = (
    Refusal(
        rule="no-2-bit",
        ops=_ALL,
        weight_bits=(2,),
        reason="TensorRT has no 2-bit type: use w4a16:b128, or w3a16:b128, which is stored in 4",
        source="measured: the parser does not import INT2 or UINT2",
    ),
    Refusal(
        rule="no-dynamic",
        ops=_ALL,
        weight_bits=(8,),
        activations=Activations.DYNAMIC,
        reason="TensorRT computes in float where scales come from the run: give --calibration DATA "
        "and w8a8",
        source="measured: no DynamicQuantizeLinear; with a computed scale operands are float",
    ),
)

PROPER_REFUSALS: Final[tuple[Refusal, ...]] = (
    *REFUSALS,
    Refusal(
        rule="not-documented",
        ops=(*_TABLES, *_RECURRENT, *_GRU),
        weight_bits=(8, 4, 3),
        reason="TensorRT documents no codes as weights of this op: exclude it, or use tensorrt-rtx",
        source=_READ,
    ),
    Refusal(
        rule="int4-products-only",
        ops=_CONVOLUTIONS,
        weight_bits=(4, 3),
        reason="TensorRT documents int4 weights of matrix products only: use w8a16 or w8a8",
        source=_READ,
    ),
)

SUBSTITUTES: Final[tuple[Substitute, ...]] = (
    # Where ops have no product of fp8 by fp8, and in bodies.
    Substitute(_ALL, (8,), Activations.STATIC, 8, Activations.FLOAT, floating=True),
    Substitute(_ALL, (8,), Activations.STATIC, 8, Activations.FLOAT),
    Substitute(_ALL, (8,), Activations.DYNAMIC, 8, Activations.FLOAT),
)
