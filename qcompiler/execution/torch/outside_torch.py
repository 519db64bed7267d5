"""Nodes that no PyTorch function stands for: run by another evaluator, without gradient."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from qcompiler.errors import ModelError, TargetError
from qcompiler.execution.sessions import open_session
from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.element_types import Value, to_numpy, to_torch
from qcompiler.ir.dataflow import bodies_of, standard_domain

Runner = Callable[[dict[str, Any]], Sequence[Any]]
"""Takes arrays by input name, and returns one for each output that has a name."""

_IR_VERSION: Final = 10
_STANDARD_OPSET: Final = 21
"""Imported next to another domain; what it is does not matter there."""
_TEXT_KINDS: Final = "OUS"


class OutsideTorch:
    """Runs one node by ONNX's reference evaluator, or by ONNX Runtime if that lacks the op.

    A gradient that would have to cross it is an error that names the node, raised when a
    backward pass gets there. Results have the types that the model declares.
    """

    def __init__(self, call: Call, opsets: Mapping[str, int]) -> None:
        """Prepare a node.

        Args:
            call: The node.
            opsets: Versions that the model imports, by domain.

        Raises:
            ModelError: Neither evaluator can run the op, or the node has bodies.
        """
        if any(bodies_of(call.node)):
            reason = "PyTorch has no function for it, and nodes with bodies run in PyTorch only"
            raise call.refuse(reason)
        self._opsets = _imports(call, opsets)
        self._runner: Runner | None = None
        try:
            self._runner = _reference_runner(_one_node_model(call, self._opsets, ()))
        except NotImplementedError:
            declared = _declared_types(call)
            # Where a type is not declared, only the first run can tell it.
            if None not in declared:
                self._runner = _runtime_runner(call, self._opsets, declared)

    def __call__(self, call: Call, *inputs: Value) -> Any:
        """Run the node.

        Raises:
            ModelError: ONNX Runtime cannot run the op for the types of these values.
        """
        arrays = [to_numpy(value, call.input_type(at)) for at, value in enumerate(inputs)]
        if self._runner is None:
            types = [_type_of(array) for array in arrays]
            self._runner = _runtime_runner(call, self._opsets, types)
        feeds = {_input_name(at): arrays[at] for at in _given(call)}
        results = iter(self._runner(feeds))
        values = tuple(
            _as_value(call, at, next(results)) if call.wants(at) else None
            for at in range(call.outputs)
        )
        sources = list(_differentiable(inputs))
        if not (sources and torch.is_grad_enabled()):
            return values
        return tuple(_fenced(call, value, sources) for value in values)


def _imports(call: Call, opsets: Mapping[str, int]) -> dict[str, int]:
    domain = standard_domain(call.node.domain)
    imports = {standard_domain(each): version for each, version in opsets.items()}
    return {"": imports.get("", _STANDARD_OPSET), domain: call.version}


def _given(call: Call) -> list[int]:
    inputs = enumerate(call.node.inputs)
    return [at for at, value in inputs if value is not None and value.name]


def _input_name(position: int) -> str:
    return f"input{position}"


def _one_node_model(
    call: Call, opsets: Mapping[str, int], types: Sequence[ir.DataType | None]
) -> ir.Model:
    """Return a model of the node alone, with tensors of these types as inputs, if any are told."""
    node = call.node
    given = {at: ir.Value(name=_input_name(at)) for at in _given(call)}
    for at, dtype in enumerate(types):
        if at in given and dtype is not None:
            given[at].type = ir.TensorType(dtype)
    inputs = [given.get(at) for at in range(len(node.inputs))]
    domain, attributes = standard_domain(node.domain), list(node.attributes.values())
    copy = ir.Node(domain, node.op_type, inputs, attributes, num_outputs=call.outputs)
    for at, output in enumerate(copy.outputs):
        output.name = f"output{at}" if call.wants(at) else ""
    outputs = [output for output in copy.outputs if output.name]
    graph = ir.Graph(
        list(given.values()), outputs, nodes=[copy], opset_imports=dict(opsets), name="node"
    )
    return ir.Model(graph, ir_version=_IR_VERSION)


def _reference_runner(model: ir.Model) -> Runner:
    evaluator = ReferenceEvaluator(ir.to_proto(model))
    return lambda feeds: list(evaluator.run(None, feeds))


def _runtime_runner(
    call: Call, opsets: Mapping[str, int], types: Sequence[ir.DataType | None]
) -> Runner:
    # The standard opset may be newer than what ONNX Runtime knows.
    is_standard = not standard_domain(call.node.domain)
    imports = dict(opsets) if is_standard else {**opsets, "": _STANDARD_OPSET}
    try:
        session = open_session(_one_node_model(call, imports, types), optimize=False)
    except TargetError as error:
        reason = f"neither PyTorch nor the reference evaluator has the op, and {error.message}"
        raise call.refuse(reason) from error
    return lambda feeds: list(session.run(feeds).values())


def _declared_types(call: Call) -> list[ir.DataType | None]:
    given = set(_given(call))
    return [
        call.input_type(at) if at in given else ir.DataType.UNDEFINED
        for at in range(len(call.node.inputs))
    ]


def _type_of(array: Any) -> ir.DataType | None:
    if not isinstance(array, np.ndarray):
        return None
    is_text = array.dtype.kind in _TEXT_KINDS
    return ir.DataType.STRING if is_text else ir.DataType.from_numpy(array.dtype)


def _as_value(call: Call, output: int, result: Any) -> Value:
    if result is None:
        return None
    if isinstance(result, list | tuple):
        return [_as_value(call, output, each) for each in result]
    if isinstance(result, dict):
        reason = "it returns a map, and PyTorch programs have none"
        raise call.refuse(reason)
    array = np.asarray(result)
    if array.dtype.kind in _TEXT_KINDS:
        return array.astype(object)
    declared = call.output_type(output)
    dtype = ir.DataType.from_numpy(array.dtype) if declared is None else declared
    return call.elements.convert(to_torch(array), dtype).to(call.device)


def _differentiable(values: Sequence[Value]) -> Any:
    for value in values:
        if isinstance(value, list):
            yield from _differentiable(value)
        elif isinstance(value, Tensor) and value.requires_grad:
            yield value


class _Fence(torch.autograd.Function):
    """The identity, but no gradient gets past it."""

    @staticmethod
    def forward(context: Any, error: ModelError, result: Tensor, *_sources: Tensor) -> Tensor:
        context.error = error
        return result.view_as(result)

    @staticmethod
    def backward(context: Any, *_gradients: Any) -> Any:
        raise context.error


def _has_live_codes(call: Call, sources: Sequence[Tensor]) -> bool:
    """Whether a gradient is wanted to an input that the model declares as integers."""
    declared = [call.input_type(index) for index in range(len(call.node.inputs))]
    return bool(sources) and any(kind is not None and kind.is_integer() for kind in declared)


def _fenced(call: Call, value: Value, sources: Sequence[Tensor]) -> Value:
    if isinstance(value, list):
        return [_fenced(call, each, sources) for each in value]
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        if value.dtype != torch.bool and _has_live_codes(call, sources):
            reason = "it runs outside of PyTorch, and its inputs are codes that carry gradients"
            raise call.refuse(reason)
        return value
    reason = "it runs outside of PyTorch, where no gradient passes, and one has to cross it"
    fenced: Tensor = _Fence.apply(call.refuse(reason), value, *sources)  # type: ignore[no-untyped-call]
    return fenced
