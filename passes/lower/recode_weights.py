"""Stores weights and biases that other tools quantized in types without zero points."""

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.dataflow import all_nodes, constant_of, int_attribute, is_op, node_name
from qcompiler.ir.editing import (
    add_initializer,
    drop_unused_initializers,
    fresh_name,
    replace_by_constants,
    value_names,
)
from qcompiler.ir.weights import WeightStore, read_all
from qcompiler.passes.lower.quantizer_demands import broken_demand
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage
from qcompiler.targets.rows import Demand

RULE = "recode-weights"
_SIGNED: Final = (("INT4", -8, 7, 4), ("INT8", -128, 127, 8))
"""Types to recode to, the smallest first: name, smallest and largest code, bits."""
_LEGAL: Final = frozenset(("INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"))
_BLOCKS: Final = (Demand.WHOLE_BLOCKS, Demand.BLOCKS_ON_LAST_AXES)

Array = npt.NDArray[Any]
_Made = dict[tuple[ir.Value, ir.Value | None, tuple[int, ...]], ir.Value]
"""New codes, by the old ones, their zero points, and axis and size of blocks."""


@dataclass(frozen=True, slots=True)
class _Weight:
    """A DequantizeLinear of constants."""

    node: ir.Node
    codes: ir.TensorProtocol
    scale: ir.TensorProtocol
    zero_point: ir.TensorProtocol | None

    def spread(self, values: Array) -> Array:
        """Return a scale or zero point in a shape that broadcasts with the codes."""
        shape = self.codes.shape.numpy()
        if values.size == 1:
            return values.reshape(())
        axis = int_attribute(self.node, "axis", 1) % len(shape)
        block = int_attribute(self.node, "block_size", 0)
        if not block:
            return values.reshape([-1 if index == axis else 1 for index in range(len(shape))])
        return np.repeat(values, block, axis=axis).take(np.arange(shape[axis]), axis=axis)

    def centred(self) -> Array:
        """Return the codes less their zero points, int16; for integer types of 8 bits and less."""
        codes = read_all(self.codes).astype(np.int16)
        if self.zero_point is not None:
            codes -= self.spread(read_all(self.zero_point).astype(np.int16))
        return codes

    def decoded(self) -> Array:
        """Return the values, rounded once to the type of the scale."""
        codes = read_all(self.codes).astype(np.float32)
        if self.zero_point is not None:
            codes -= self.spread(read_all(self.zero_point).astype(np.float32))
        codes *= self.spread(read_all(self.scale).astype(np.float32))
        return codes.astype(self.scale.dtype.numpy(), copy=False)


@dataclass(frozen=True, slots=True)
class _Recoding:
    """What was done: `decoded_for` says why no codes are left, "" where they are."""

    detail: str
    decoded_for: str = ""


class RecodeWeights(Pass):
    """Write constant codes as signed integers whose zero point is 0, with the same values.

    Before: w = DequantizeLinear(codes uint8, scale, 128)
    After:  w = DequantizeLinear(codes - 128 int8, scale)
    Refuses: scales and zero points that are not constant.

    Zero points are subtracted from codes; codes of 8 bits stay at 8, since products want both
    operands in one type, and others go to int4 or, where that does not hold the differences, to
    int8. What no type holds, biases of int32 codes, blocks that do not divide
    their axis or lie along an early one, and types that TensorRT does not import, are decoded to
    floats: the same values in a larger file, and the op computes in float.
    """

    name: ClassVar[str] = RULE
    consumes: ClassVar[Stage] = Stage.QDQ
    produces: ClassVar[Stage] = Stage.QDQ
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Recode every constant that is not in such a type already."""
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        taken = value_names(model)
        made: _Made = {}
        for node in list(all_nodes(model)):
            if not is_op(node, "DequantizeLinear") or constant_of(node.inputs[0]) is None:
                continue
            if _is_legal(node):
                continue
            weight = _weight_of(node)
            if weight is None:
                reason = "its scale or zero point is computed at run time"
                skips.append(Skip(RULE, node_name(node), reason))
                continue
            name, recoding = node_name(node), _recode(weight, context.store, taken, made)
            rewrites.append(Rewrite(RULE, name, recoding.detail))
            if recoding.decoded_for:
                skips.append(Skip(RULE, name, f"stored as floats: {recoding.decoded_for}"))
        return PassResult(tuple(rewrites), tuple(skips))


def _is_legal(node: ir.Node) -> bool:
    codes = constant_of(node.inputs[0])
    assert codes is not None
    demands = (Demand.ZERO_POINTS_ARE_ZERO, *_BLOCKS)
    return codes.dtype.name in _LEGAL and not broken_demand(node, demands)


def _weight_of(node: ir.Node) -> _Weight | None:
    codes, scale = constant_of(node.inputs[0]), constant_of(node.inputs[1])
    point = node.inputs[2] if len(node.inputs) > 2 else None
    zero_point = constant_of(point)
    if codes is None or scale is None or (point is not None and zero_point is None):
        return None
    return _Weight(node, codes, scale, zero_point)


def _recode(weight: _Weight, store: WeightStore, taken: set[str], made: _Made) -> _Recoding:
    """Rewrite one DequantizeLinear."""
    why = _why_decode(weight)
    if why:
        return _decode(weight, store, why)
    centred = weight.centred()
    low, high = int(centred.min(initial=0)), int(centred.max(initial=0))
    for name, smallest, largest, bits in _SIGNED:
        if smallest <= low and high <= largest and bits >= weight.codes.dtype.bitwidth:
            narrow = centred.astype(np.int8)
            return _store(weight, narrow, ir.DataType[name], store, taken, made)
    reason = f"codes less zero points go from {low} to {high}, and int8 holds -128 to 127"
    return _decode(weight, store, reason)


def _why_decode(weight: _Weight) -> str:
    """Return why a weight cannot stay codes, "" if it may."""
    dtype = weight.codes.dtype
    if not dtype.is_integer() or dtype.bitwidth > 8:
        return f"{dtype.name} is no type of weights"
    return broken_demand(weight.node, _BLOCKS)


def _store(
    weight: _Weight,
    codes: Array,
    dtype: ir.DataType,
    store: WeightStore,
    taken: set[str],
    made: _Made,
) -> _Recoding:
    node, old = weight.node, list(weight.node.inputs)
    assert old[0] is not None
    graph = old[0].graph
    assert isinstance(graph, ir.Graph)
    # A table that two ops decode stays one table.
    layout = tuple(int_attribute(node, name, 0) for name in ("axis", "block_size"))
    key = (old[0], old[2] if len(old) > 2 else None, layout)
    if key not in made:
        name = fresh_name(f"{old[0].name}.{dtype.name.lower()}", taken)
        made[key] = add_initializer(graph, name, store.put(name, codes, dtype))
    node.replace_input_with(0, made[key])
    if len(old) > 2:
        node.resize_inputs(2)
    drop_unused_initializers([old[0], *old[2:]])
    return _Recoding(f"{weight.codes.dtype.name} to {dtype.name} without zero points")


def _decode(weight: _Weight, store: WeightStore, why: str) -> _Recoding:
    node = weight.node
    old = list(node.inputs)
    output = node.outputs[0]
    values = weight.decoded()
    tensor = store.put(output.name or "", values, ir.DataType.from_numpy(values.dtype))
    replace_by_constants(node, [tensor])
    drop_unused_initializers(old)
    return _Recoding(f"{weight.codes.dtype.name} to {weight.scale.dtype.name}", why)
