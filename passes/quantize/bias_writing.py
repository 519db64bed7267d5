"""Gives a linear op another bias, and one to an op that had none."""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.dataflow import is_op
from qcompiler.ir.editing import constant_value, drop_unused_initializers, fresh_name
from qcompiler.ir.linear_ops import LinearOp
from qcompiler.ir.substitution import new_node
from qcompiler.ir.weights import WeightStore

F64 = npt.NDArray[np.float64]


def write_bias(
    op: LinearOp, bias: F64, store: WeightStore, created_by: str, taken: set[str]
) -> ir.Value:
    """Give a linear op a new bias; its weight stays as it is.

    A MatMul without a bias gets an Add behind it. Then the sum is called as the product was, and
    has what is written on that value, such as its range; a bias that is read elsewhere too stays
    as it is there.

    Args:
        op: The op.
        bias: float64 `[channels_out]`; it is cast to the type of the weight.
        store: Where the values go.
        created_by: Name of the pass.
        taken: Names of the model's values and nodes.

    Returns:
        The value that now is the bias.
    """
    node, old, dtype = op.node, op.bias, op.tensor.dtype
    name = fresh_name(f"{(old or op.output).name}.corrected", taken)
    value = constant_value(name, store.put(name, bias.astype(dtype.numpy()), dtype))
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    graph.register_initializer(value)
    if op.adder is not None:
        op.adder.replace_input_with(0 if op.adder.inputs[0] is old else 1, value)
    elif is_op(node, "MatMul"):
        _add_behind(node, value, graph, created_by, taken)
    else:
        node.resize_inputs(3)
        node.replace_input_with(2, value)
        if "beta" in node.attributes:
            node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
    drop_unused_initializers([old])
    return value


def _add_behind(
    node: ir.Node, bias: ir.Value, graph: ir.Graph, created_by: str, taken: set[str]
) -> None:
    product, name = node.outputs[0], node.outputs[0].name
    label = fresh_name(f"{name}.biased", taken)
    added = new_node(created_by, "Add", [product, bias], label, dtype=product.dtype)
    total = added.outputs[0]
    total.shape = product.shape
    graph.insert_after(node, added)
    product.replace_all_uses_with(total, replace_graph_outputs=True)
    added.replace_input_with(0, product)
    total.metadata_props.update(product.metadata_props)
    product.metadata_props.clear()
    product.name, total.name = fresh_name(f"{name}.product", taken), name
