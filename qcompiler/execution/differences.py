"""Nodes that compare two values of a graph inside it, so that only numbers leave the runtime."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import onnx_ir as ir

from qcompiler.ir.dataflow import all_nodes, is_op
from qcompiler.ir.editing import constant_value, fresh_name, value_names

SMALLEST_PROBABILITY: Final = 1e-12
"""What smaller probabilities count as in a divergence, so that they have a logarithm."""


class Meaning(StrEnum):
    """What the last axis of a value holds, where it is a distribution."""

    PROBABILITIES = "probabilities"
    LOGITS = "logits"


@dataclass(frozen=True, slots=True)
class Difference:
    """Names of values that say how far one value is from another.

    Attributes:
        truth: The value that is right.
        error: The other value less this one, float32.
        divergence: Kullback-Leibler divergence of the other distribution from this one, in nats
            and summed over all rows: a float32 scalar. None where they are no distributions.
    """

    truth: str
    error: str
    divergence: str | None


def meaning_of(output: ir.Value) -> Meaning | None:
    """Return what an output's last axis holds, by the op that computes it or by its name."""
    producer = output.producer()
    if producer is not None and is_op(producer, "Softmax", "LogSoftmax"):
        axis = producer.attributes.get("axis")
        rank = 0 if output.shape is None else len(output.shape)
        if axis is not None and axis.as_int() not in (-1, rank - 1):
            return None
        return Meaning.PROBABILITIES if producer.op_type == "Softmax" else Meaning.LOGITS
    return Meaning.LOGITS if "logit" in (output.name or "").lower() else None


class Comparisons:
    """Adds the nodes that compare values to the end of a model's main graph."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._taken = value_names(model) | {node.name or "" for node in all_nodes(model)}
        self._made: dict[tuple[str, str], ir.Value] = {}

    def add(self, truth: ir.Value, other: ir.Value, meaning: Meaning | None) -> Difference:
        """Compare a float value with the one that is right."""
        right, found = self._as_float(truth), self._as_float(other)
        error = self._node("Sub", [found, right], "error")
        divergence = None
        if meaning is not None:
            divergence = self._divergence(right, found, meaning).name
        return Difference(truth.name or "", error.name or "", divergence)

    def _divergence(self, right: ir.Value, found: ir.Value, meaning: Meaning) -> ir.Value:
        log_right, log_found = self._logarithm(right, meaning), self._logarithm(found, meaning)
        weight = right if meaning is Meaning.PROBABILITIES else self._once("Exp", [log_right])
        ratio = self._node("Sub", [log_right, log_found], "log_ratio")
        terms = self._node("Mul", [weight, ratio], "terms")
        return self._node("ReduceSum", [terms], "divergence", {"keepdims": 0})

    def _logarithm(self, value: ir.Value, meaning: Meaning) -> ir.Value:
        if meaning is Meaning.LOGITS:
            return self._once("LogSoftmax", [value], {"axis": -1})
        return self._once("Log", [self._once("Max", [value, self._smallest()])])

    def _as_float(self, value: ir.Value) -> ir.Value:
        if value.dtype == ir.DataType.FLOAT:
            return value
        return self._once("Cast", [value], {"to": int(ir.DataType.FLOAT)})

    def _once(
        self, op_type: str, inputs: Sequence[ir.Value], attributes: Mapping[str, int] | None = None
    ) -> ir.Value:
        key = (op_type, inputs[0].name or "")
        if key not in self._made:
            self._made[key] = self._node(op_type, inputs, op_type.lower(), attributes)
        return self._made[key]

    def _smallest(self) -> ir.Value:
        key = ("", "smallest_probability")
        if key not in self._made:
            name = fresh_name(key[1], self._taken)
            tensor = ir.tensor(SMALLEST_PROBABILITY, ir.DataType.FLOAT, name=name)
            self._made[key] = constant_value(name, tensor)
            self._graph.register_initializer(self._made[key])
        return self._made[key]

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        label: str,
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Value:
        name = fresh_name(f"{inputs[0].name}:{label}", self._taken)
        output = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
        made = ir.convenience.convert_attributes(dict(attributes or {}))
        self._graph.append(ir.Node("", op_type, list(inputs), made, outputs=[output], name=name))
        return output
