"""Constants that only mask a Softmax: any number whose exponential is 0 will do in their place."""

from typing import Final

import onnx_ir as ir

from qcompiler.ir.dataflow import constant_of, is_op
from qcompiler.ir.float_types import MOVING
from qcompiler.ir.weights import read_all
from qcompiler.passes.lower.cast_constants import ConstantFacts

MASK: Final = 32_752.0
"""Half of float16's range: two masks may be added and stay finite, and exp(-MASK / 32) is 0."""
_SMALLEST_FACTOR: Final = 1 / 32
_PASSING: Final = tuple(MOVING - {"Cast", "CastLike"} | {"Add", "Sub"})
_SMALL: Final = 1 << 10
"""Constants with more elements are not read to see what they multiply by."""


def only_masks(value: ir.Value, facts: ConstantFacts, largest: float) -> bool:
    """Whether a constant with numbers out of range is only ever added to what a Softmax takes.

    Every way from it must lead to the input of a Softmax, through ops that move, add and scale,
    and there its large numbers must be negative. Then numbers of that size are 0 behind the
    Softmax, however large they are exactly.

    Args:
        value: The constant.
        facts: What it holds.
        largest: Where the range ends.
    """
    beyond = [side for side in (facts.low, facts.high) if abs(side) > largest]
    if len(beyond) != 1:
        return False
    return _leads_to_softmax(value, 1 if beyond[0] > 0 else -1, set())


def _leads_to_softmax(value: ir.Value, sign: int, above: set[ir.Value]) -> bool:
    uses = list(value.uses())
    if value.is_graph_output() or not uses or value in above:
        return False
    return all(_use_masks(use.node, use.idx, sign, above | {value}) for use in uses)


def _use_masks(node: ir.Node, index: int, sign: int, above: set[ir.Value]) -> bool:
    if is_op(node, "Softmax"):
        return sign < 0
    if is_op(node, "Sub") and index == 1:
        sign = -sign
    elif is_op(node, "Mul", "Div"):
        if not _factor_is_mild(node, index):
            return False
    elif not is_op(node, *_PASSING):
        return False
    return all(_leads_to_softmax(output, sign, above) for output in node.outputs)


def _factor_is_mild(node: ir.Node, index: int) -> bool:
    """Whether the other operand leaves a mask a mask: 0 or 1 for one that is computed."""
    other = node.inputs[1 - index]
    if is_op(node, "Div") and index == 1:
        return False
    tensor = constant_of(other)
    if tensor is None:
        return is_op(node, "Mul")
    if tensor.size > _SMALL:
        return False
    values = read_all(tensor).astype("float64")
    if is_op(node, "Div"):
        return bool(((values >= 1) & (values <= 1 / _SMALLEST_FACTOR)).all())
    return bool(((values >= _SMALLEST_FACTOR) & (values <= 1)).all())
