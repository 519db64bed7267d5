"""Inferring types and shapes of values."""

from collections.abc import Iterator
from typing import Final

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qcompiler.ir.dataflow import all_nodes, bodies_of, is_op

_NO_TENSORS: Final = ("Sequence", "SplitToSequence", "Optional")


def infer_shapes(model: ir.Model) -> None:
    """Infer what is not known yet, bodies included; weights are not read.

    What the model declares of its outputs stays. Inference that fails leaves the model as it is.

    onnx_ir's pass writes down a sequence of floats as a float tensor where no type was known, and
    ONNX Runtime would then refuse the model: such types are taken back.
    """
    unknown = [value for node in all_nodes(model) for value in node.outputs if value.type is None]
    declared = [(output, output.type, output.shape) for output in model.graph.outputs]
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    for output, kind, shape in declared:
        if kind is not None:
            output.type, output.shape = kind, shape
    wrong = [value for value in unknown if _is_a_sequence(value)]
    while wrong:
        for value in wrong:
            value.type, value.shape = None, None
        wrong = [value for value in unknown if value.type is not None and _is_a_sequence(value)]


def _is_a_sequence(value: ir.Value) -> bool:
    """Whether the producer gives something else than a tensor, or what it is given is none."""
    producer = value.producer()
    if producer is None or producer.op_type.startswith(_NO_TENSORS):
        return producer is not None
    return any(not isinstance(source.type, ir.TensorType) for source in _handed_through(value))


def _handed_through(value: ir.Value) -> Iterator[ir.Value]:
    """Yield the values that one output of an Identity, If or Loop may be."""
    producer, index = value.producer(), value.index() or 0
    if is_op(producer, "Identity") and producer is not None and producer.inputs[0] is not None:
        yield producer.inputs[0]
    elif is_op(producer, "If") and producer is not None:
        yield from (body.outputs[index] for body in bodies_of(producer))
    elif is_op(producer, "Loop") and producer is not None and index < len(producer.inputs) - 2:
        # The body also gives the condition; Loop's last outputs are stacked tensors.
        yield from (body.outputs[index + 1] for body in bodies_of(producer))
