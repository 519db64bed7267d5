"""Running ONNX models in ONNX Runtime."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Final, Self

import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from qcompiler.errors import TargetError

Array = npt.NDArray[Any]

_INLINE_LIMIT: Final = 3 << 29
"""A protobuf message ends at 2 GiB; with the graph itself, 1.5 GiB of weights are safe."""
_SILENT: Final = 4
_FLOATS: Final = {"tensor(float)": "float32", "tensor(float16)": "float16"}
_NODE_IN_MESSAGE: Final = (
    re.compile(r"node:? ?\(?'?name:? ?'?([^\s')]+)", re.IGNORECASE),
    re.compile(r"Name:'([^']+)'"),
    re.compile(r"[Nn]ode:? ?\(([^()\s]+)\)"),
    re.compile(r"node with name '([^']+)'"),
)


class Session(AbstractContextManager["Session"]):
    """A loaded model that can be run any number of times.

    Attributes:
        input_names: Names of the inputs a run needs, in order.
        output_names: Names of the outputs, in order.
    """

    def __init__(self, session: onnxruntime.InferenceSession, cleanup: ExitStack) -> None:
        self._session = session
        self._cleanup = cleanup
        self.input_names: tuple[str, ...] = tuple(value.name for value in session.get_inputs())
        kinds = {value.name: _FLOATS.get(value.type) for value in session.get_inputs()}
        self._floats = {name: kind for name, kind in kinds.items() if kind is not None}
        self.output_names: tuple[str, ...] = tuple(value.name for value in session.get_outputs())

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model.

        Args:
            feeds: A value for every input.

        Returns:
            The outputs by name, in the model's order.

        Raises:
            TargetError: ONNX Runtime failed; `where` is the node, when it names one.
        """
        try:
            results = self._session.run(None, dict(feeds))
        except Exception as error:
            raise runtime_failure(error, "ONNX Runtime failed to run the model") from error
        return dict(zip(self.output_names, results, strict=True))

    def fitting(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return a call with its float inputs in the types that the model takes."""
        return {
            name: values.astype(self._floats[name])
            if name in self._floats and values.dtype.kind in "fV"
            else values
            for name, values in feeds.items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        del self._session
        self._cleanup.close()


def open_session(
    model: Path | bytes | ir.Model,
    *,
    optimize: bool,
    threads: int | None = None,
    in_turns: bool = False,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    custom_op_libraries: Sequence[Path] = (),
) -> Session:
    """Load a model.

    Args:
        model: A file, a serialized model without external data, or a model in memory. One in
            memory with 1.5 GiB of weights or more is written to a scratch folder first.
        optimize: Whether ONNX Runtime rewrites the graph; without, the operators run as written.
        threads: Threads of one operator; None leaves it to ONNX Runtime.
        in_turns: Whether other sessions run in turns with this one: its threads then rest between
            runs, rather than spin on the processors that the next one needs.
        providers: Execution providers in order of preference.
        custom_op_libraries: Shared libraries with the kernels of custom operators.

    Raises:
        TargetError: ONNX Runtime cannot load the model; `where` is the node, when it names one.
    """
    options = session_options(optimize=optimize, threads=threads)
    if in_turns:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    with ExitStack() as cleanup:
        source = _loadable(model, cleanup)
        try:
            for library in custom_op_libraries:
                options.register_custom_ops_library(str(library))
            session = onnxruntime.InferenceSession(source, options, providers=list(providers))
        except Exception as error:
            raise runtime_failure(error, "ONNX Runtime cannot load the model") from error
        return Session(session, cleanup.pop_all())
    raise AssertionError  # an ExitStack swallows nothing here


def session_options(*, optimize: bool, threads: int | None) -> onnxruntime.SessionOptions:
    """Return options that log nothing: what matters comes back as an exception."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def runtime_failure(error: Exception, what: str) -> TargetError:
    """Return an exception of ONNX Runtime as ours, with the node it names."""
    text = " ".join(str(error).split())
    reason = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    found = (pattern.search(reason) for pattern in _NODE_IN_MESSAGE)
    node = next((match[1] for match in found if match and match[1]), None)
    return TargetError(
        f"{what}: {reason}",
        where=node,
        hint="`qcompile doctor` shows the installed version and its execution providers",
    )


def _loadable(model: Path | bytes | ir.Model, cleanup: ExitStack) -> str | bytes:
    if isinstance(model, bytes):
        return model
    if isinstance(model, Path):
        return str(model)
    weights = [
        value.const_value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    ]
    if sum(tensor.nbytes for tensor in weights) < _INLINE_LIMIT and not any(
        isinstance(tensor, ir.ExternalTensor) for tensor in weights
    ):
        proto: bytes = ir.to_proto(model).SerializeToString()
        return proto
    folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="qcompile-run-")))
    path = folder / "model.onnx"
    ir.save(model, path, external_data="model.onnx.data")
    return str(path)
