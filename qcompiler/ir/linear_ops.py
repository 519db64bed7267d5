"""Weights and biases of linear ops, as rewrites that rescale channels change them.

All arithmetic is float64; results are cast once.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.dataflow import constant_of, int_attribute, ints_attribute, is_op
from qcompiler.ir.editing import constant_value, drop_unused_initializers, fresh_name
from qcompiler.ir.quantizable import FLOAT_TYPES, row_of
from qcompiler.ir.weights import WeightStore, read_all

Array = npt.NDArray[Any]

LINEAR_OPS: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CHUNK_BYTES: Final = 8 << 20


class NotFoldableError(Exception):
    """A linear op cannot be changed; the message says why, as a clause."""


@dataclass(frozen=True, slots=True)
class LinearOp:
    """A Conv, ConvTranspose, Gemm or MatMul whose weight and bias are constants of its own.

    Attributes:
        node: The op.
        weight: The initializer at its second input.
        bias: The initializer that is added, or None.
        adder: The Add behind a MatMul that adds the bias, else None.
        input_axis: The weight's axis of input channels.
        output_axis: The weight's axis of output channels.
    """

    node: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    adder: ir.Node | None
    input_axis: int
    output_axis: int

    @classmethod
    def of(cls, node: ir.Node) -> "LinearOp":
        """Take a linear op apart.

        Raises:
            NotFoldableError: Weight or bias are computed, shared, or in an uncommon form.
        """
        if not is_op(node, *LINEAR_OPS):
            message = f"{node.op_type} has no weight to fold into"
            raise NotFoldableError(message)
        weight = node.inputs[1]
        tensor = constant_of(weight)
        if weight is None or tensor is None or not weight.is_initializer():
            message = "the weight is computed at run time"
            raise NotFoldableError(message)
        if tensor.dtype not in FLOAT_TYPES:
            message = f"the weight has type {tensor.dtype.name}"
            raise NotFoldableError(message)
        if len(weight.uses()) > 1 or weight.is_graph_output():
            message = f"the weight {weight.name} is read elsewhere too, and would be stored twice"
            raise NotFoldableError(message)
        axes = _axes_of(node, len(tensor.shape))
        if is_op(node, "MatMul"):
            columns = tensor.shape.numpy()[axes[1]]
            return cls(node, weight, *_added_bias(node, columns), *axes)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        op = cls(node, weight, bias, None, *axes)
        op.read_bias()
        return op

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The weight itself."""
        tensor = self.weight.const_value
        assert tensor is not None
        return tensor

    @property
    def output(self) -> ir.Value:
        """What the op gives, its bias added."""
        return (self.adder or self.node).outputs[0]

    @property
    def group(self) -> int:
        """Number of groups of a convolution, 1 elsewhere."""
        return int_attribute(self.node, "group", 1)

    @property
    def padded(self) -> bool:
        """Whether a Conv sees zeros that are not in its input."""
        pads, auto = ints_attribute(self.node, "pads"), self.node.attributes.get("auto_pad")
        automatic = auto is not None and auto.as_string() not in ("NOTSET", "VALID")
        return is_op(self.node, "Conv") and (automatic or any(pads or ()))

    @property
    def channels_out(self) -> int:
        """Number of output channels."""
        return self._channels(self.output_axis)

    @property
    def channels_in(self) -> int:
        """Number of input channels."""
        return self._channels(self.input_axis)

    def read_bias(self) -> Array:
        """Return the bias as it is added: float64 `[channels_out]`, Gemm's beta applied.

        Raises:
            NotFoldableError: It is computed, or not one number per output channel.
        """
        if self.bias is None:
            return np.zeros(self.channels_out)
        tensor = constant_of(self.bias)
        if tensor is None:
            message = "the bias is computed at run time"
            raise NotFoldableError(message)
        vector = per_channel(tensor, self.channels_out, after=0)
        if vector is None:
            message = "the bias is not one number per output channel"
            raise NotFoldableError(message)
        return vector * self._float_attribute("beta") if is_op(self.node, "Gemm") else vector

    def output_factors(self, scale: Array) -> Array:
        """Shape factors of output channels so that they multiply the weight."""
        return self._factors(scale, self.output_axis)

    def input_factors(self, scale: Array) -> Array:
        """Shape factors of input channels so that they multiply the weight."""
        return self._factors(scale, self.input_axis)

    def scaled_weight(self, factors: Array) -> Array:
        """Return the weight times `factors`, in its own type.

        Raises:
            NotFoldableError: A product is beyond the range of that type.
        """
        values = read_all(self.tensor)
        result = np.empty(values.shape, self.tensor.dtype.numpy())
        rows = max(1, _CHUNK_BYTES // max(1, values[:1].size * 8))
        for start in range(0, len(values), rows):
            part = slice(start, start + rows)
            factor = factors if factors.shape[0] == 1 else factors[part]
            result[part] = cast_finite(values[part].astype(np.float64) * factor, result.dtype)
        return result

    def shift_of_inputs(self, shift: Array) -> Array:
        """Return what adding `shift` to the input channels adds to each output channel.

        A ConvTranspose has no such number, nor has a Conv with padding: there it depends on the
        position.
        """
        values = read_all(self.tensor).astype(np.float64) * self.input_factors(shift)
        summed = tuple(axis for axis in range(values.ndim) if axis != self.output_axis)
        total = np.asarray(values.sum(axis=summed))
        return total * self._float_attribute("alpha") if is_op(self.node, "Gemm") else total

    def write(
        self, weight: Array, bias: Array, store: WeightStore, name: str, taken: set[str]
    ) -> ir.Node | None:
        """Give the op a new weight and bias; a bias that is and stays zero is not added.

        A MatMul without a bias gets an Add behind it, and a graph output keeps its name.

        Args:
            weight: Of the same shape and type as before.
            bias: `[channels_out]`, of the type of the weight.
            store: Where the values go.
            name: What a bias (and its Add) is called that was not there before.
            taken: Names of the model's values.

        Returns:
            The Add that was put behind a MatMul, else None.
        """
        dtype, node = self.tensor.dtype, self.node
        self.weight.const_value = store.put(self.weight.name or "", weight, dtype)
        if self.bias is None and not np.any(bias):
            return None
        wanted = name if self.bias is None else self.bias.name or name
        alone = self.bias is not None and len(self.bias.uses()) == 1
        made = wanted if alone and not self._bias_is_fixed else fresh_name(wanted, taken)
        value = constant_value(made, store.put(made, bias, dtype))
        added = None
        if self.adder is not None:
            index = 0 if self.adder.inputs[0] is self.bias else 1
            self.adder.replace_input_with(index, value)
        elif is_op(node, "MatMul"):
            added = _insert_add(
                node, value, name, fresh_name(f"{node.outputs[0].name}_biased", taken)
            )
        else:
            node.resize_inputs(3)
            node.replace_input_with(2, value)
            if "beta" in node.attributes:
                node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        drop_unused_initializers([self.bias])
        assert node.graph is not None
        node.graph.register_initializer(value)
        return added

    def _channels(self, axis: int) -> int:
        # Axis 1 of a convolution's weight holds the channels of one group (ONNX Conv-11,
        # ConvTranspose-11); other ops have one group.
        size = int(self.tensor.shape.numpy()[axis])
        return size * self.group if axis == 1 else size

    def _factors(self, scale: Array, axis: int) -> Array:
        shape = self.tensor.shape.numpy()
        if axis == 1 and self.group > 1:
            rows = np.repeat(scale.reshape(self.group, -1), shape[0] // self.group, axis=0)
            return rows.reshape(*shape[:2], *(1,) * (len(shape) - 2))
        return scale.reshape([-1 if index == axis else 1 for index in range(len(shape))])

    @property
    def _bias_is_fixed(self) -> bool:
        """Whether the bias stays when the op lets go of it, and its name with it."""
        bias, graph = self.bias, self.node.graph
        return bias is not None and (bias.is_graph_output() or bias.graph is not graph)

    def _float_attribute(self, name: str) -> float:
        attribute = self.node.attributes.get(name)
        return 1.0 if attribute is None else attribute.as_float()


def per_channel(tensor: ir.TensorProtocol, channels: int, *, after: int) -> Array | None:
    """Return a constant operand as one float64 number per channel, or None if it is not that.

    Args:
        tensor: The operand, as it is broadcast to the data.
        channels: Number of channels.
        after: Number of axes of the data behind the channel axis.
    """
    shape = list(tensor.shape.numpy())
    # An operand of a higher rank than the data would not keep its shape.
    padded = [1] * (after + 2 - len(shape)) + shape
    axis = len(padded) - 1 - after
    others = [size for index, size in enumerate(padded) if index != axis]
    if len(padded) > after + 2 or any(size != 1 for size in others):
        return None
    if padded[axis] not in (1, channels) or tensor.dtype not in FLOAT_TYPES:
        return None
    return np.array(np.broadcast_to(read_all(tensor).astype(np.float64).reshape(-1), (channels,)))


def cast_finite(values: Array, dtype: np.dtype[Any]) -> Array:
    """Cast float64 values.

    Raises:
        NotFoldableError: A finite value is beyond the range of the type.
    """
    with np.errstate(over="ignore"):
        result = values.astype(dtype)
    if np.any(np.isfinite(values) & ~np.isfinite(result)):
        message = f"a product is beyond the range of {dtype}"
        raise NotFoldableError(message)
    return result


def _axes_of(node: ir.Node, rank: int) -> tuple[int, int]:
    """Return the axes of input and of output channels of the weight at the second input.

    Raises:
        NotFoldableError: The weight has a rank that the op has no channels in.
    """
    row = row_of(node)
    assert row is not None
    axes = next(entry.axes(node, rank) for entry in row.weights if entry.index == 1)
    if is_op(node, "MatMul") and rank != 2:
        message = "the weight of the MatMul is not a matrix"
        raise NotFoldableError(message)
    if axes is None or axes.output is None:
        message = f"{node.op_type} has no weights of {rank} axes"
        raise NotFoldableError(message)
    return axes.reduction, axes.output


def _added_bias(node: ir.Node, columns: int) -> tuple[ir.Value | None, ir.Node | None]:
    """Return the constant added behind a MatMul and the Add, or two Nones."""
    output = node.outputs[0]
    users = output.consumers()
    if len(output.uses()) != 1 or output.is_graph_output() or not is_op(users[0], "Add"):
        return None, None
    adder = users[0]
    other = next((value for value in adder.inputs if value is not output), None)
    tensor = constant_of(other)
    if tensor is None or adder.graph is not node.graph:
        return None, None
    if per_channel(tensor, columns, after=0) is None:
        return None, None
    return other, adder


def _insert_add(node: ir.Node, bias: ir.Value, name: str, output_name: str) -> ir.Node:
    output, graph = node.outputs[0], node.graph
    assert graph is not None
    total = ir.Value(name=output_name, type=output.type, shape=output.shape)
    for user, index in output.uses():
        user.replace_input_with(index, total)
    if output.is_graph_output():
        for index, value in enumerate(graph.outputs):
            if value is output:
                graph.outputs[index] = total
        output.name, total.name = total.name, output.name
    add = ir.node("Add", [output, bias], outputs=[total], name=name)
    graph.insert_after(node, add)
    return add
