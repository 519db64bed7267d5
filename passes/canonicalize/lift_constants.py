"""Makes initializers of Constant nodes."""

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.errors import ModelError
from qcompiler.ir.dataflow import all_nodes, is_op, node_name
from qcompiler.ir.editing import replace_by_constants
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from qcompiler.rewriting.stages import Stage


class LiftConstants(Pass):
    """Turn every Constant node into an initializer of the graph or body it stands in.

    Before: w = Constant<value_floats=[1, 2]>(); y = Mul(x, w)
    After:  y = Mul(x, w), with the initializer w
    Refuses: sparse values, which an initializer of a dense input cannot hold.
    """

    name: ClassVar = "lift-constants"
    consumes: ClassVar = Stage.IMPORTED
    produces: ClassVar = Stage.IMPORTED
    numerics: ClassVar = Numerics.EXACT

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Lift all constants.

        Raises:
            ModelError: A Constant node does not hold exactly one value.
        """
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        for node in list(all_nodes(model)):
            if not is_op(node, "Constant"):
                continue
            label = node_name(node)
            attribute = _only_attribute(node)
            if attribute.name == "sparse_value":
                reason = "its value is a sparse tensor, and initializers are kept dense"
                skips.append(Skip(self.name, label, reason))
                continue
            output = node.outputs[0]
            if not output.name:
                continue  # nobody can read it; eliminate-dead takes it away
            replace_by_constants(node, [_tensor_of(attribute, output.name)])
            rewrites.append(Rewrite(self.name, label))
        return PassResult(tuple(rewrites), tuple(skips))


def _only_attribute(node: ir.Node) -> ir.Attr:
    attributes = list(node.attributes.values())
    if len(attributes) != 1 or len(node.outputs) != 1:
        message = f"a Constant node holds exactly one value, and this one {len(attributes)}"
        raise ModelError(message, where=node_name(node), hint="export the model again")
    return attributes[0]


def _tensor_of(attribute: ir.Attr, name: str) -> ir.TensorProtocol:
    """Return the value of a Constant node (ONNX Constant-13: one attribute per kind of value)."""
    match attribute.name:
        case "value":
            return attribute.as_tensor()
        case "value_float":
            return ir.tensor(np.array(attribute.as_float(), np.float32), name=name)
        case "value_floats":
            return ir.tensor(np.array(attribute.as_floats(), np.float32), name=name)
        case "value_int":
            return ir.tensor(np.array(attribute.as_int(), np.int64), name=name)
        case "value_ints":
            return ir.tensor(np.array(attribute.as_ints(), np.int64), name=name)
        case "value_string":
            return _strings([attribute.as_string()], (), name)
        case "value_strings":
            texts = attribute.as_strings()
            return _strings(texts, (len(texts),), name)
    message = f"a Constant node has no attribute {attribute.name!r}"
    raise ModelError(message, where=name, hint="export the model again")


def _strings(
    texts: list[str] | tuple[str, ...], shape: tuple[int, ...], name: str
) -> ir.TensorProtocol:
    encoded = [text.encode() for text in texts]
    return ir.StringTensor(encoded, shape=ir.Shape(shape), name=name)
