"""What the function of an op is told about the node it stands for."""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import onnx_ir as ir
import torch

from qcompiler.errors import ModelError
from qcompiler.execution.torch.element_types import ElementTypes, Value
from qcompiler.ir.dataflow import node_label


class Body(Protocol):
    """An If/Loop/Scan body, ready to run with the values it captures."""

    def __call__(self, *inputs: Value) -> list[Value]:
        """Run the body once."""


class Call:
    """One node: its attributes, and how values are to be made for it.

    Attributes:
        node: The node.
        version: Version of the node's opset that the model imports.
        elements: PyTorch types of the program.
        device: Where the program runs. Shapes and other host values stay on the CPU.
        outputs: How many outputs the node declares, absent ones in between included.
    """

    __slots__ = ("device", "elements", "node", "outputs", "version")

    def __init__(
        self, node: ir.Node, version: int, elements: ElementTypes, device: torch.device
    ) -> None:
        self.node = node
        self.version = version
        self.elements = elements
        self.device = device
        self.outputs = len(node.outputs)

    def has(self, name: str) -> bool:
        """Whether the node has this attribute."""
        return name in self.node.attributes

    def wants(self, output: int) -> bool:
        """Whether the node declares this output."""
        return output < self.outputs and bool(self.node.outputs[output].name)

    def integer(self, name: str, default: int | None = None) -> int:
        """Return an integer attribute."""
        return cast(int, self._value(name, default))

    def number(self, name: str, default: float | None = None) -> float:
        """Return a float attribute."""
        return cast(float, self._value(name, default))

    def text(self, name: str, default: str | None = None) -> str:
        """Return a string attribute."""
        return cast(str, self._value(name, default))

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        """Return an attribute that is a list of integers."""
        return list(self._value(name, default))

    def numbers(self, name: str, default: Sequence[float] | None = None) -> list[float]:
        """Return an attribute that is a list of floats."""
        return list(self._value(name, default))

    def texts(self, name: str, default: Sequence[str] | None = None) -> list[str]:
        """Return an attribute that is a list of strings."""
        return list(self._value(name, default))

    def tensor(self, name: str) -> ir.TensorProtocol:
        """Return a tensor attribute."""
        return cast(ir.TensorProtocol, self._value(name, None))

    def element_type(self, name: str, default: ir.DataType | None = None) -> ir.DataType:
        """Return an attribute that holds the number of an ONNX element type."""
        return ir.DataType(self.integer(name, None if default is None else default.value))

    def input_type(self, index: int) -> ir.DataType | None:
        """Return the ONNX element type of an input, if the model tells it."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return None if value is None else value.dtype

    def output_type(self, index: int = 0) -> ir.DataType | None:
        """Return the ONNX element type of an output, if the model tells it."""
        return self.node.outputs[index].dtype if index < self.outputs else None

    def refuse(self, reason: str) -> ModelError:
        """Return the error for something about this node that cannot be run."""
        return ModelError(f"cannot run {self.node.op_type}: {reason}", where=node_label(self.node))

    def _value(self, name: str, default: Any) -> Any:
        attribute = self.node.attributes.get(name)
        if attribute is not None:
            return attribute.value
        if default is None:
            message = f"{self.node.op_type} lacks the attribute {name}"
            raise ModelError(message, where=node_label(self.node))
        return default
