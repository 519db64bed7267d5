"""No runtime: Q/DQ graphs whose rounding is real and whose arithmetic is that of floats.

For schemes that no runtime here multiplies, such as 4-bit weights by 8-bit activations: what they
cost in accuracy can be seen, and reconstruction can learn for them. Nothing gets faster.
"""

from typing import Final

from qcompiler.quant.qtype import UINT8
from qcompiler.quant.scheme import Activations
from qcompiler.targets.capability import AddedBias, Target
from qcompiler.targets.onnxruntime_ops import LOWERED_OPS
from qcompiler.targets.placement import Part, Placement, PlacementRule, Reluctance
from qcompiler.targets.rows import OpType, Refusal, Row, Substitute, WeightUse

_PRODUCTS: Final[tuple[OpType, ...]] = (("", "MatMul"), ("", "Gemm"))
_CONV: Final[tuple[OpType, ...]] = (("", "Conv"),)
_TABLES: Final[tuple[OpType, ...]] = (("", "Gather"),)
_OTHERS: Final[tuple[OpType, ...]] = (("", "ConvTranspose"),)
_ALL: Final = (*_PRODUCTS, *_CONV, *_TABLES, *_OTHERS)

_FLOATS: Final = ("FLOAT", "FLOAT16")
_BITS: Final = (8, 4, 3, 2)
_BLOCKS: Final = (16, 32, 64, 128, 256, 512, 1024)
_KERNEL: Final = "the float op on what DequantizeLinear gives"
_SOURCE: Final = (
    "read: the ONNX standard; measured: equal to integer arithmetic on one net (test_emulation.py)"
)
_NOTE: Final = "computed in float, for studies: nothing gets faster"


def _row(
    rule: str,
    ops: tuple[OpType, ...],
    activations: Activations,
    blocks: tuple[int, ...],
    *,
    floating: bool = False,
) -> Row:
    return Row(
        rule=rule,
        ops=ops,
        weight_bits=(8,) if floating else _BITS,
        activations=activations,
        uses=tuple(WeightUse),
        ranks=(2, 3, 4, 5),
        per_channel=True,
        per_tensor=True,
        block_sizes=blocks,
        ragged=False,
        symmetric=(True, False),
        float_types=_FLOATS,
        kernel=_KERNEL,
        source=_SOURCE,
        note=_NOTE,
        activation_bits=(8, 4),
        floating=floating,
        bodies=activations is Activations.FLOAT,
    )


def _computes(rule: str, ops: tuple[OpType, ...]) -> PlacementRule:
    return PlacementRule(
        rule=rule,
        ops=ops,
        part=Part.COMPUTES,
        kernel=_KERNEL,
        source="design: what is multiplied by a weight is rounded, and nothing else",
        output=False,
    )


EMULATION: Final = Target(
    name="emulation",
    title="Emulation",
    opset_min=7,
    opset_max=28,
    default_scheme="w8a16",
    calibrated_scheme="w8a8",
    min_elements=1024,
    min_elements_reason="it would save under 3 KB",
    rows=(
        _row("emulated-product", _PRODUCTS, Activations.STATIC, _BLOCKS),
        _row("emulated-conv", _CONV, Activations.STATIC, ()),
        _row("emulated-fp8", (*_PRODUCTS, *_CONV), Activations.STATIC, (), floating=True),
        _row("emulated-weight", (*_PRODUCTS, *_TABLES), Activations.FLOAT, _BLOCKS),
        _row("emulated-conv-weight", (*_CONV, *_OTHERS), Activations.FLOAT, ()),
    ),
    refusals=(
        Refusal(
            rule="no-dynamic",
            ops=_ALL,
            weight_bits=(8,),
            activations=Activations.DYNAMIC,
            reason="scales that come from the run are not emulated: give --calibration DATA, w8a8",
            source=_SOURCE,
        ),
    ),
    substitutes=(
        *(Substitute(_ALL, (bits,), Activations.STATIC, bits, Activations.FLOAT) for bits in _BITS),
        Substitute(_ALL, (8,), Activations.STATIC, 8, Activations.FLOAT, floating=True),
        Substitute(_ALL, (8,), Activations.DYNAMIC, 8, Activations.FLOAT),
    ),
    placement=Placement(
        qtype=UINT8,
        symmetric=False,
        float_types=_FLOATS,
        rules=(_computes("conv", _CONV), _computes("matmul", _PRODUCTS)),
        reluctances=(
            Reluctance("attention", (("", "Softmax"),), "it multiplies by no weight", "design"),
        ),
    ),
    lowering=(),
    lowered_ops=LOWERED_OPS,
    added_biases=tuple(
        AddedBias(each, any_shape=True, source=_SOURCE)
        for each in (Activations.FLOAT, Activations.STATIC)
    ),
    emulated=True,
)
