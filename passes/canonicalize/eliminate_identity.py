"""Removes nodes that return what they are given."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.dataflow import (
    all_nodes,
    constant_of,
    int_attribute,
    ints_attribute,
    is_op,
    node_name,
)
from qcompiler.ir.editing import bypass, drop_unused_initializers, is_used
from qcompiler.ir.weights import read_all
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage

_MAX_NEUTRAL_BYTES: Final = 1 << 20
"""A larger operand is a weight; it is not read to find out whether it is all zeros or ones."""


class EliminateIdentity(Pass):
    """Remove nodes that provably give back their input, bit by bit.

    Before: y = Relu(Mul(Dropout(Identity(x)), 1))
    After:  y = Relu(x)
    Refuses: nodes between a graph input, an initializer or an outer value and a graph output, as
        both names must stay; adding +0.0, which turns -0.0 into +0.0; operands that could
        broadcast the input to a larger shape.
    """

    name: ClassVar = "eliminate-identity"
    consumes: ClassVar = Stage.IMPORTED
    produces: ClassVar = Stage.IMPORTED
    numerics: ClassVar = Numerics.EXACT

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Remove every such node, bodies included."""
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        for node in list(all_nodes(model)):
            same = _TESTS.get(node.op_type)
            if same is None or not is_op(node, node.op_type) or not node.inputs[0]:
                continue
            label = node_name(node)
            if any(is_used(output) for output in node.outputs[1:]) or not is_used(node.outputs[0]):
                continue
            verdict = same(node)
            if verdict is True:
                _put_data_first(node)
                sources = list(node.inputs[1:])
                refusal = bypass(node)
                if refusal is None:
                    drop_unused_initializers(sources)
                    rewrites.append(Rewrite(self.name, label, node.op_type))
                    continue
                verdict = refusal
            if isinstance(verdict, str):
                skips.append(Skip(self.name, label, verdict))
        return PassResult(tuple(rewrites), tuple(skips))


Verdict = bool | str
"""True: the node changes nothing. False: it may. A sentence: it looks so, but must stay."""


def _always(_node: ir.Node) -> Verdict:
    return True


def _dropout(node: ir.Node) -> Verdict:
    # Up to opset 11 Dropout only exists for inference; from 12 on training_mode is an input.
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    if mode is None:
        return True
    tensor = constant_of(mode)
    return tensor is not None and not bool(read_all(tensor).any())


def _cast(node: ir.Node) -> Verdict:
    source = node.inputs[0]
    return source is not None and source.dtype == int_attribute(node, "to", 0)


def _transpose(node: ir.Node) -> Verdict:
    perm = ints_attribute(node, "perm")
    if perm is None:
        dims = _dims(node.inputs[0])
        return dims is not None and len(dims) < 2
    return perm == tuple(range(len(perm)))


def _reshape(node: ir.Node) -> Verdict:
    dims, target = _dims(node.inputs[0]), _ints(node, 1)
    if dims is None or target is None or len(dims) != len(target):
        return False
    keeps_zero = not int_attribute(node, "allowzero", 0)
    fits = [
        wanted == dim or (wanted == 0 and keeps_zero)
        for wanted, dim in zip(target, dims, strict=True)
    ]
    if all(fits):
        return True
    # One -1 takes what the others leave, which is its own size if they all keep theirs (a size of
    # 0 among them makes -1 undetermined, and no result of the node could differ).
    return [wanted for wanted, fit in zip(target, fits, strict=True) if not fit] == [-1]


def _squeeze(node: ir.Node) -> Verdict:
    dims = _dims(node.inputs[0])
    has_axes = "axes" in node.attributes or (len(node.inputs) > 1 and node.inputs[1] is not None)
    return not has_axes and dims is not None and all(dim not in (1, None) for dim in dims)


def _unsqueeze(node: ir.Node) -> Verdict:
    return _ints(node, 1) == ()


def _flatten(node: ir.Node) -> Verdict:
    dims = _dims(node.inputs[0])
    return dims is not None and len(dims) == 2 and int_attribute(node, "axis", 1) in (1, -1)


def _expand(node: ir.Node) -> Verdict:
    dims, target = _dims(node.inputs[0]), _ints(node, 1)
    return dims is not None and target is not None and _broadcasts_into(target, dims)


def _pad(node: ir.Node) -> Verdict:
    pads = _ints(node, 1)
    return pads is not None and not any(pads)


def _slice(node: ir.Node) -> Verdict:
    dims, starts, ends = _dims(node.inputs[0]), _ints(node, 1), _ints(node, 2)
    if dims is None or starts is None or ends is None or any(starts):
        return False
    axes = _ints(node, 3) if _has_input(node, 3) else tuple(range(len(starts)))
    steps = _ints(node, 4) if _has_input(node, 4) else (1,) * len(starts)
    if axes is None or steps is None or any(step != 1 for step in steps):
        return False
    endless = np.iinfo(np.int32).max  # exporters' mark for "to the end"
    return all(
        end >= endless or (size is not None and end >= size)
        for size, end in zip((dims[axis] for axis in axes), ends, strict=True)
    )


def _concat(node: ir.Node) -> Verdict:
    return len(node.inputs) == 1


def _add(node: ir.Node) -> Verdict:
    return _neutral(node, 0)


def _sub(node: ir.Node) -> Verdict:
    return _neutral(node, 0)


def _mul(node: ir.Node) -> Verdict:
    return _neutral(node, 1)


def _neutral(node: ir.Node, wanted: int) -> Verdict:
    """Whether the constant operand leaves the other as it is, in value and shape."""
    data, operand = _data_and_operand(node)
    tensor = constant_of(operand)
    if tensor is None or tensor.nbytes > _MAX_NEUTRAL_BYTES or _kind(tensor) not in "biufV":
        return False
    values = read_all(tensor).astype(np.float64)
    if not np.all(values == wanted):
        return False
    dims = _dims(data)
    shape = tensor.shape.numpy()
    if shape and (dims is None or not _broadcasts_into(shape, dims)):
        return "its constant operand may broadcast the other to a larger shape"
    if wanted == 0 and tensor.dtype.is_floating_point():
        # x + 0.0 is +0.0 for x = -0.0; x - 0.0 and x + -0.0 are -0.0 (IEEE 754, 6.3).
        exact = np.all(np.signbit(values) == is_op(node, "Add"))
        if not exact:
            return "a zero of this sign turns -0.0 into +0.0, which is not exact"
    return True


def _data_and_operand(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Return the operand that is computed, and the one that may be a neutral constant."""
    first, second = node.inputs
    swapped = constant_of(first) is not None and constant_of(second) is None
    return (second, first) if swapped and is_op(node, "Add", "Mul") else (first, second)


def _put_data_first(node: ir.Node) -> None:
    """Let the first input of a commutative node be the computed one."""
    if is_op(node, "Add", "Mul"):
        data, operand = _data_and_operand(node)
        node.replace_input_with(0, data)
        node.replace_input_with(1, operand)


def _kind(tensor: ir.TensorProtocol) -> str:
    """Return NumPy's kind of an element type; "O" for texts."""
    return "O" if tensor.dtype == ir.DataType.STRING else tensor.dtype.numpy().kind


def _dims(value: ir.Value | None) -> tuple[int | None, ...] | None:
    if value is None or value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else None for dim in value.shape)


def _has_input(node: ir.Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _ints(node: ir.Node, index: int) -> tuple[int, ...] | None:
    """Return a small constant integer input as a flat tuple, None if it is not constant."""
    tensor = constant_of(node.inputs[index]) if _has_input(node, index) else None
    if tensor is None:
        return None
    values: npt.NDArray[Any] = read_all(tensor).reshape(-1)
    return tuple(int(value) for value in values)


def _broadcasts_into(shape: Sequence[int], dims: tuple[int | None, ...]) -> bool:
    """Whether broadcasting `shape` with `dims` gives `dims`, whatever the unknown sizes are."""
    if len(shape) > len(dims):
        return False
    tail = dims[len(dims) - len(shape) :]
    return all(size in (1, dim) for size, dim in zip(shape, tail, strict=True))


_TESTS: Final[dict[str, Callable[[ir.Node], Verdict]]] = {
    "Identity": _always,
    "Dropout": _dropout,
    "Cast": _cast,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Flatten": _flatten,
    "Expand": _expand,
    "Pad": _pad,
    "Slice": _slice,
    "Concat": _concat,
    "Add": _add,
    "Sub": _sub,
    "Mul": _mul,
    "Div": _mul,
}
