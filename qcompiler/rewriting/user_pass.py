"""Passes written by users, on this compiler's IR or on GraphSurgeon's."""

import importlib
import sys
import typing
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnx_ir as ir

from qcompiler.errors import UsageError
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite
from qcompiler.rewriting.stages import Stage

_PROTOBUF_LIMIT = 2_000_000_000


class RunUserPass(Pass):
    """Run a user's function over the model.

    Before: any canonical model.
    After: what the function made of it; the manager verifies it like any other pass.
    Refuses: functions that cannot be found, whose first parameter is annotated with neither
        `onnx_ir.Model` nor `onnx_graphsurgeon.Graph`, and models over 2 GB for GraphSurgeon
        functions, which need all weights in one message.

    A function on `onnx_ir.Model` rewrites in place or returns a model; one on
    `onnx_graphsurgeon.Graph` rewrites in place or returns a graph.
    """

    name: ClassVar[str] = "run-user-pass"
    consumes: ClassVar[Stage] = Stage.CANONICAL
    produces: ClassVar[Stage] = Stage.CANONICAL
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def __init__(self, reference: str) -> None:
        self.options = reference
        self._function = _find(reference)
        self._surgeon = _takes_graphsurgeon(self._function, reference)

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Call the function and put what it made in place of `model`'s graph."""
        if self._surgeon:
            made = _through_graphsurgeon(self._function, model)
        else:
            made = self._function(model)
        if isinstance(made, ir.Model) and made is not model:
            model.graph = made.graph
            model.functions.clear()
            model.functions.update(made.functions)
        return PassResult((Rewrite("run-user-pass", self.options),))


def _find(reference: str) -> Callable[[Any], Any]:
    module_name, separator, function_name = reference.partition(":")
    if not separator or not module_name or not function_name:
        message = f"{reference!r} is not of the form module:function"
        raise UsageError(message, where="--user-pass", hint="for example my_passes:fuse_gelu")
    with _importable_from(Path.cwd()):
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            message = f"cannot import {module_name}: {error}"
            raise UsageError(message, where="--user-pass") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        message = f"{module_name} has no function {function_name}"
        raise UsageError(message, where="--user-pass", hint=f"it has {', '.join(names) or 'none'}")
    return typing.cast("Callable[[Any], Any]", function)


@contextmanager
def _importable_from(folder: Path) -> typing.Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _takes_graphsurgeon(function: Callable[[Any], Any], reference: str) -> bool:
    """Whether the first parameter is annotated as a GraphSurgeon graph."""
    code = getattr(function, "__code__", None)
    parameters = code.co_varnames[: code.co_argcount] if code is not None else ()
    annotations = getattr(function, "__annotations__", {})
    annotation = annotations.get(parameters[0]) if parameters else None
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__module__", "")
    name = getattr(annotation, "__name__", text)
    if annotation is ir.Model or name.endswith("Model"):
        return False
    if "graphsurgeon" in text or text in ("gs.Graph",):
        return True
    message = (
        "its first parameter must be annotated as onnx_ir.Model or onnx_graphsurgeon.Graph, "
        f"and it is annotated as {annotation!r}"
    )
    raise UsageError(message, where=f"--user-pass {reference}")


def _through_graphsurgeon(function: Callable[[Any], Any], model: ir.Model) -> ir.Model:
    try:
        import onnx_graphsurgeon as gs
    except ImportError as error:
        message = "this user pass takes an onnx_graphsurgeon.Graph, which is not installed"
        raise UsageError(message, hint="pip install 'qcompiler[surgeon]'") from error
    weights = [v.const_value for g in model.graphs() for v in g.initializers.values()]
    if sum(tensor.nbytes for tensor in weights if tensor is not None) > _PROTOBUF_LIMIT:
        message = "GraphSurgeon needs all weights in one message, and these exceed 2 GB"
        raise UsageError(message, hint="write the pass on onnx_ir.Model instead")
    ir.external_data.load_to_model(model)
    graph = gs.import_onnx(ir.to_proto(model))
    made = function(graph)
    proto = gs.export_onnx(made if isinstance(made, gs.Graph) else graph)
    assert isinstance(proto, onnx.ModelProto)
    converted = ir.from_proto(proto)
    converted.graph.opset_imports.update(model.graph.opset_imports)
    return converted
