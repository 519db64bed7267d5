"""Several steps as one PyTorch function, where nobody looks at what lies between them.

Exporters write a normalization as seven nodes and an attention as nine. PyTorch has one function
for each, which saves launching kernels and, for attention, holding the products of all pairs. The
numbers differ by rounding only.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import onnx_ir as ir
from torch import Tensor
from torch.nn import functional

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.steps import Step
from qcompiler.ir.dataflow import constant_of, int_attribute, ints_attribute, is_op, only_reader

_ONE_AXIS: Final = 13
"""Opset from which Softmax works on one axis, by default the last."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """Steps that one function can stand for.

    Attributes:
        steps: The steps, the last of which gives the result.
        fused: What stands for them.
        inner: Slots of what lies between them, and of constants that became part of `fused`:
            where one of these is asked for or replaced, the steps run as they are.
    """

    steps: tuple[Step, ...]
    fused: Step
    inner: frozenset[int]


class Fusions:
    """What can be fused in a plan."""

    def __init__(self, steps: Sequence[Step], slots: dict[ir.Value, int]) -> None:
        """Look for patterns.

        Args:
            steps: Of a plan.
            slots: The slot of every value of the plan.
        """
        self._steps = {step.call.node: step for step in steps}
        self._slots = slots
        found = (find for step in steps for find in self._at(step.call.node))
        self._fusions = tuple(found)

    def applied(self, steps: Sequence[Step], touched: frozenset[int]) -> list[Step]:
        """Return steps with those fused that have nothing to do with some slots."""
        stand_in: dict[int, Step | None] = {}
        for fusion in self._fusions:
            if touched.isdisjoint(fusion.inner):
                stand_in |= {id(step): None for step in fusion.steps}
                stand_in[id(fusion.steps[-1])] = fusion.fused
        chosen = (stand_in.get(id(step), step) for step in steps)
        return [step for step in chosen if step is not None]

    def _at(self, node: ir.Node) -> Iterator[Fusion]:
        if is_op(node, "ReduceMean"):
            yield from self._rms_norm(node)
        elif is_op(node, "Softmax"):
            yield from self._attention(node)

    def _rms_norm(self, mean: ir.Node) -> Iterator[Fusion]:
        """Match `x * (1 / sqrt(mean(x ** 2) + eps)) * gamma`, over the last axis."""
        square = _producer(mean.inputs[0])
        axes = _numbers(mean.inputs[1]) if len(mean.inputs) > 1 else ints_attribute(mean, "axes")
        if not is_op(square, "Pow") or square is None or only_reader(square.outputs[0]) is None:
            return
        shifted = _reader(mean, "Add")
        root = _reader(shifted, "Sqrt")
        inverse = _reader(root, "Reciprocal")
        scaled = _reader(inverse, "Mul")
        x = square.inputs[0]
        if scaled is None or shifted is None or root is None or inverse is None or x is None:
            return
        eps = _number(_other(shifted, mean.outputs[0]))
        last = (-1,) if x.shape is None else (-1, len(x.shape) - 1)
        is_last = axes is not None and len(axes) == 1 and axes[0] in last
        keeps = int_attribute(mean, "keepdims", 1) == 1
        exact = _number(square.inputs[1]) == 2 and is_last and keeps
        if eps is None or not exact or _other(scaled, inverse.outputs[0]) is not x:
            return
        nodes = [square, mean, shifted, root, inverse, scaled]
        weighted = _reader(scaled, "Mul")
        gamma = None if weighted is None else _other(weighted, scaled.outputs[0])
        tensor = constant_of(gamma)
        if weighted is not None and tensor is not None and len(tensor.shape) == 1:
            yield from self._fusion([*nodes, weighted], partial(_rms_norm, eps), [x, gamma])
        else:
            yield from self._fusion(nodes, partial(_rms_norm, eps), [x])

    def _attention(self, softmax: ir.Node) -> Iterator[Fusion]:
        """Match `where(isnan(p), 0, p) @ v` with `p = softmax((q * s) @ (k * s) + mask)`."""
        biased = _producer(softmax.inputs[0])
        probabilities = softmax.outputs[0]
        readers = [use.node for use in probabilities.uses()]
        guard = next((node for node in readers if is_op(node, "IsNaN")), None)
        chosen = _reader(guard, "Where")
        if biased is None or guard is None or chosen is None or not is_op(biased, "Add"):
            return
        mixed = _reader(chosen, "MatMul")
        products = _producer(biased.inputs[0])
        if mixed is None or not is_op(products, "MatMul") or products is None:
            return
        query, key = _scaled(products.inputs[0]), _scaled(products.inputs[1])
        if query is None or key is None or query[2] != key[2]:
            return
        guarded = [guard.outputs[0], probabilities]
        first = self._steps[softmax].call.version >= _ONE_AXIS
        exact = (
            sorted(map(id, readers)) == sorted(map(id, (guard, chosen)))
            and int_attribute(softmax, "axis", -1 if first else 1) in (-1, 3)
            and [chosen.inputs[0], chosen.inputs[2]] == guarded
            and _number(chosen.inputs[1]) == 0
            and mixed.inputs[0] is chosen.outputs[0]
            and _has_rank(biased.inputs[1], 4)
        )
        if exact:
            nodes = [query[0], key[0], products, biased, softmax, guard, chosen, mixed]
            inputs = [query[1], key[1], mixed.inputs[1], biased.inputs[1]]
            yield from self._fusion(nodes, partial(_attend, query[2] * key[2]), inputs)

    def _fusion(
        self, nodes: Sequence[ir.Node], function: object, inputs: Sequence[ir.Value | None]
    ) -> Iterator[Fusion]:
        if any(node not in self._steps for node in nodes):
            return
        last = self._steps[nodes[-1]]
        between = [node.outputs[0] for node in nodes[:-1]]
        values = {value for node in nodes for value in node.inputs if value is not None}
        if any(_is_read_elsewhere(value, nodes) for value in between):
            return
        constants = [v for v in values if constant_of(v) is not None and v not in inputs]
        given = [value for value in inputs if value is not None]
        assert callable(function)
        fused = Step(
            last.call,
            function,
            tuple(self._slots[value] for value in given),
            last.outputs,
            tuple((self._slots[v], v) for v in given if constant_of(v) is not None),
        )
        inner = frozenset(self._slots[value] for value in (*between, *constants))
        yield Fusion(tuple(self._steps[node] for node in nodes), fused, inner)


def _rms_norm(eps: float, _call: Call, x: Tensor, gamma: Tensor | None = None) -> Tensor:
    """Return the RMS normalization over the last axis."""
    if gamma is None or (gamma.shape == x.shape[-1:] and gamma.dtype == x.dtype):
        return functional.rms_norm(x, x.shape[-1:], gamma, eps)
    return functional.rms_norm(x, x.shape[-1:], None, eps) * gamma


def _attend(scale: float, _call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return attention of [B, H, L, E] on keys [B, H, E, S], with a mask that is added.

    A query that sees no key gets zeros, as from the guarded form. (One that holds inf or NaN
    itself gets NaN here and zeros there.)
    """
    together = zip(q.shape[:2], k.shape[:2], mask.shape[:2], strict=True)
    wanted = [0 if 0 in sizes else max(sizes) for sizes in together]
    if list(q.shape[:2]) != wanted:
        q = q.expand(*wanted, *q.shape[2:])
    keys = k.transpose(-1, -2)
    return functional.scaled_dot_product_attention(q, keys, v, attn_mask=mask, scale=scale)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _reader(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """Return what alone reads a node's result, if it is of this type."""
    reader = None if node is None else only_reader(node.outputs[0])
    return reader if is_op(reader, op_type) else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """Return the other one of two inputs."""
    first, second = node.inputs[:2]
    return second if first is value else first


def _numbers(value: ir.Value | None) -> tuple[float, ...] | None:
    tensor = constant_of(value)
    if tensor is None or tensor.size > 1:
        return None
    return tuple(np.asarray(tensor.numpy(), np.float64).reshape(-1).tolist())


def _number(value: ir.Value | None) -> float | None:
    """Return a constant of one element."""
    numbers = _numbers(value)
    return numbers[0] if numbers else None


def _scaled(value: ir.Value | None) -> tuple[ir.Node, ir.Value, float] | None:
    """Return the Mul by a constant that gives a value of four axes, what it scales, and by what."""
    node = _producer(value)
    if not is_op(node, "Mul") or node is None or not _has_rank(value, 4):
        return None
    for data, factor in (node.inputs[:2], node.inputs[1::-1]):
        number = _number(factor)
        if number is not None and data is not None:
            return node, data, number
    return None


def _has_rank(value: ir.Value | None, rank: int) -> bool:
    return value is not None and value.shape is not None and len(value.shape) == rank


def _is_read_elsewhere(value: ir.Value, nodes: Iterable[ir.Node]) -> bool:
    inside = set(nodes)
    return value.is_graph_output() or any(use.node not in inside for use in value.uses())
