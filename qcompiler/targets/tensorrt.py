"""TensorRT 10 and 11, and TensorRT-RTX: what their engines take.

All of them take precision from the graph alone (TensorRT 10 where networks are strongly typed), so
one table of rows serves them. TensorRT-RTX 1.7.1 was run; for TensorRT proper, whose library needs
a GPU, the table holds what its documents allow.
"""

from dataclasses import replace
from typing import Final

from qcompiler.quant.scheme import Activations
from qcompiler.targets.capability import AddedBias, Target
from qcompiler.targets.processors import processors_named
from qcompiler.targets.tensorrt_graph import (
    LOWERED_OPS,
    MISSING_OPS,
    PLACEMENT,
    RTX_MISSING_OPS,
)
from qcompiler.targets.tensorrt_rows import (
    PROPER_REFUSALS,
    REFUSALS,
    RTX_FORMS,
    RTX_ROWS,
    SUBSTITUTES,
    TENSORRT_FORMS,
    TENSORRT_ROWS,
)

_FUSED: Final = "measured: an Add of a constant becomes a part of the kernel behind the product"

TENSORRT_RTX: Final = Target(
    name="tensorrt-rtx",
    title="TensorRT-RTX",
    opset_min=10,
    opset_max=28,
    default_scheme="w8a16",
    calibrated_scheme="w8a8",
    min_elements=1024,
    min_elements_reason="it would save under 3 KB",
    rows=RTX_ROWS,
    refusals=REFUSALS,
    substitutes=SUBSTITUTES,
    placement=PLACEMENT,
    lowering=("widen-scales",),
    intake=(
        "decompose-quantized-ops",
        "remove-dynamic-quantization",
        "recode-weights",
        "center-activations",
    ),
    lowered_ops=LOWERED_OPS,
    added_biases=(
        AddedBias(Activations.FLOAT, any_shape=True, source=_FUSED),
        AddedBias(Activations.STATIC, any_shape=True, source=_FUSED),
    ),
    weight_forms=RTX_FORMS,
    missing_ops=RTX_MISSING_OPS,
    processors=processors_named("SM80", "SM86", "SM89", "SM120", "SM121"),
    known_processors=processors_named("SM75", "SM80", "SM86", "SM89", "SM120", "SM121"),
    engine="tensorrt-rtx",
)

TENSORRT_11: Final = replace(
    TENSORRT_RTX,
    name="tensorrt-11",
    title="TensorRT 11",
    opset_min=9,
    opset_max=24,
    rows=TENSORRT_ROWS,
    refusals=PROPER_REFUSALS,
    # What widening avoids is a warning of TensorRT-RTX.
    lowering=(),
    weight_forms=TENSORRT_FORMS,
    missing_ops=MISSING_OPS,
    processors=processors_named("SM80", "SM86", "SM89", "SM90", "SM100", "SM120"),
    known_processors=processors_named(
        *("SM75", "SM80", "SM86", "SM89", "SM90", "SM100", "SM110", "SM120", "SM121")
    ),
    engine="tensorrt",
)
"""Opsets 9 to 24 are those of TensorRT 10.15 and 11.2 (read)."""

TENSORRT_10: Final = replace(
    TENSORRT_11,
    name="tensorrt-10",
    title="TensorRT 10",
    known_processors=processors_named(
        *("SM75", "SM80", "SM86", "SM87", "SM89", "SM90", "SM100", "SM120")
    ),
)
"""Jetson Orin has TensorRT 10 only."""
