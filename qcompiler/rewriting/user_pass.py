"""Passes written by users, on this compiler's IR or on GraphSurgeon's."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import onnx
import onnx_ir as ir

from qcompiler.errors import QCompilerError, UsageError
from qcompiler.function_reference import import_function
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
    written_by_user: ClassVar[bool] = True
    options: str

    def __init__(self, reference: str) -> None:
        self.options = reference
        self._function = import_function(
            reference, where="--user-pass", example="my_passes:fuse_gelu"
        )
        self._surgeon = _takes_graphsurgeon(self._function, self.label)

    @property
    def label(self) -> str:
        """What messages call the pass: the option that asked for it."""
        return f"--user-pass {self.options}"

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Call the function and put what it made in place of `model`'s graph.

        Raises:
            UsageError: The function raised, made a graph that cannot be read back, or cannot be
                given the model.
        """
        try:
            if self._surgeon:
                made = _through_graphsurgeon(self._function, model)
            else:
                made = self._function(model)
        except QCompilerError:
            raise
        except Exception as error:  # whatever the user's code raises
            message = f"failed with {type(error).__name__}: {error}"
            hint = "--traceback shows where in the function"
            raise UsageError(message, where=self.label, hint=hint) from error
        if isinstance(made, ir.Model) and made is not model:
            model.graph = made.graph
            model.functions.clear()
            model.functions.update(made.functions)
        return PassResult((Rewrite("run-user-pass", self.options),))


def _takes_graphsurgeon(function: Callable[[Any], Any], where: str) -> bool:
    """Whether the first parameter is annotated as a GraphSurgeon graph."""
    annotation = _first_annotation(function, where)
    if annotation is ir.Model:
        return False
    # By name, as GraphSurgeon may not be installed where no pass needs it.
    place = str(getattr(annotation, "__module__", "")).partition(".")[0]
    if (place, getattr(annotation, "__name__", "")) == ("onnx_graphsurgeon", "Graph"):
        return True
    found = "without annotation" if annotation is inspect.Parameter.empty else f"{annotation!r}"
    message = (
        "its first parameter must be annotated as onnx_ir.Model or onnx_graphsurgeon.Graph, "
        f"and it is {found}"
    )
    raise UsageError(message, where=where)


def _first_annotation(function: Callable[[Any], Any], where: str) -> Any:
    try:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
    except Exception as error:  # annotations are code, which may raise anything
        message = f"its annotations cannot be read: {type(error).__name__}: {error}"
        hint = "import what they name outside `if TYPE_CHECKING`"
        raise UsageError(message, where=where, hint=hint) from error
    return next((parameter.annotation for parameter in parameters), inspect.Parameter.empty)


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
