"""Seeing which kernels ONNX Runtime really runs."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx_ir as ir
import onnxruntime

from qcompiler.errors import TargetError
from qcompiler.execution.segments import Segment, cut, producers_by_name
from qcompiler.execution.sessions import runtime_failure, session_options
from qcompiler.ir.dataflow import all_graphs, all_nodes, int_attribute
from qcompiler.ir.weights import constant_bytes
from qcompiler.progress import Progress, SilentProgress

_PROVIDER: Final = "CPUExecutionProvider"
_EXTERNAL_FROM: Final = 1024
"""Bytes from which the optimized graph's weights go to a file, and are never read back."""

_BITS_OPS: Final = ("MatMulNBits", "GatherBlockQuantized")
_INTEGER_KERNELS: Final = frozenset(
    {
        *_BITS_OPS,
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "QLinearMatMul",
        "QLinearConv",
        "ConvInteger",
        "QGemm",
        "DynamicQuantizeLSTM",
        "QAttention",
    }
)
_FLOAT_KERNELS: Final = frozenset(
    {
        "MatMul",
        "FusedMatMul",
        "Gemm",
        "FusedGemm",
        "Conv",
        "FusedConv",
        "NhwcFusedConv",
        "ConvTranspose",
        "Gather",
        "LSTM",
        "GRU",
        "RNN",
    }
)
_DEPTH: Final = 4
"""Steps between a value and its kernel: casts, layout changes, a fused bias and activation."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """What runs in the place of a node.

    Attributes:
        name: The kernel, such as "MatMulNBits (4-bit)" or "float Conv after DequantizeLinear".
        integer: Whether it reads integer weights.
    """

    name: str
    integer: bool


@dataclass(frozen=True, slots=True)
class Inspection:
    """What loading a model showed.

    Attributes:
        runtime: Name and version of the runtime.
        kernels: The kernel of each node, by node name; a node that was not found is absent.
        failure: Why the runtime cannot load the model, None if it can.
        segments: Into how many stretches the graph was cut; 1 is the whole model.
        loaded: How many of them were loaded.
        reused: How many had the structure of one loaded before.
    """

    runtime: str
    kernels: Mapping[str, Kernel]
    failure: str | None
    segments: int
    loaded: int
    reused: int


def inspect_kernels(
    path: Path,
    nodes: Sequence[str],
    *,
    memory_limit: int,
    custom_op_libraries: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Inspection:
    """Load a written model with full optimization and say which kernel each node became.

    A model whose weights exceed the limit is loaded in segments, one at a time; segments that
    differ in names and weight values only are loaded once, since the choice of a kernel depends
    on neither.

    Args:
        path: The model file.
        nodes: Names of the nodes to look for.
        memory_limit: Bytes of weights that are loaded at once. ONNX Runtime holds up to twice
            as many while it rewrites them.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
        progress: Where the work is shown.
    """
    model = ir.load(path, format="protobuf")
    asked = set(nodes)
    wanted = {node.name: node for node in all_nodes(model) if node.name in asked}
    loader = _Loader(path.absolute().parent, custom_op_libraries)
    if constant_bytes(model) <= memory_limit:
        return _inspect_whole(path, wanted, loader)
    return _inspect_segments(model, wanted, loader, memory_limit, progress or SilentProgress())


class _Loader:
    """Loads models that refer to the weights of one folder, and returns the optimized graphs."""

    def __init__(self, folder: Path, custom_op_libraries: Sequence[Path]) -> None:
        self._folder = folder
        self._libraries = tuple(custom_op_libraries)

    def optimized(self, source: Path | bytes) -> ir.Model:
        """Return the graph that a session would run; its weights are gone.

        Raises:
            TargetError: ONNX Runtime cannot load the model.
        """
        with tempfile.TemporaryDirectory(prefix=".qcompile-", dir=self._folder) as scratch:
            output = Path(scratch) / "optimized.onnx"
            options = self._options(output)
            try:
                for library in self._libraries:
                    options.register_custom_ops_library(str(library))
                onnxruntime.InferenceSession(
                    str(source) if isinstance(source, Path) else source,
                    options,
                    providers=[_PROVIDER],
                )
            except Exception as error:
                raise runtime_failure(error, "it does not load") from error
            return ir.load(output)

    def _options(self, output: Path) -> onnxruntime.SessionOptions:
        options = session_options(optimize=True, threads=1)
        options.optimized_model_filepath = str(output)
        options.enable_cpu_mem_arena = False
        entries = {
            "session.disable_prepacking": "1",
            "session.model_external_initializers_file_folder_path": str(self._folder),
            "session.optimized_model_external_initializers_file_name": "optimized.data",
            "session.optimized_model_external_initializers_min_size_in_bytes": str(_EXTERNAL_FROM),
        }
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        return options


def _inspect_whole(path: Path, wanted: Mapping[str, ir.Node], loader: _Loader) -> Inspection:
    try:
        optimized = loader.optimized(path)
    except TargetError as error:
        return Inspection(_runtime(), {}, str(error), 1, 1, 0)
    made = producers_by_name(list(all_graphs(optimized)))
    kernels = {name: _kernel_of(node, made) for name, node in wanted.items()}
    found = {name: kernel for name, kernel in kernels.items() if kernel is not None}
    return Inspection(_runtime(), found, None, 1, 1, 0)


def _inspect_segments(
    model: ir.Model,
    wanted: Mapping[str, ir.Node],
    loader: _Loader,
    memory_limit: int,
    progress: Progress,
) -> Inspection:
    known: dict[object, list[Kernel | None]] = {}
    kernels: dict[str, Kernel] = {}
    count = loaded = reused = 0
    names = {node: name for name, node in wanted.items()}
    nodes_left = sum(1 for _ in model.graph)
    with progress.task("looking at the runtime's kernels", nodes_left) as advance:
        for segment in cut(model.graph, memory_limit):
            count += 1
            advance(len(segment.nodes))
            looked_for = list(_wanted_in(segment, names))
            if not looked_for:
                continue
            signature = segment.signature()
            answer = known.get(signature) if signature is not None else None
            if answer is None:
                try:
                    answer = _look(segment, model, looked_for, loader)
                except TargetError as error:
                    return Inspection(_runtime(), kernels, str(error), count, loaded + 1, reused)
                loaded += 1
                if signature is not None:
                    known[signature] = answer
            else:
                reused += 1
            for node, kernel in zip(looked_for, answer, strict=True):
                if kernel is not None:
                    kernels[names[node]] = kernel
    return Inspection(_runtime(), kernels, None, count, loaded, reused)


def _look(
    segment: Segment, model: ir.Model, nodes: Sequence[ir.Node], loader: _Loader
) -> list[Kernel | None]:
    serialized: bytes = ir.to_proto(segment.as_model(model)).SerializeToString()
    made = producers_by_name(list(all_graphs(loader.optimized(serialized))))
    return [_kernel_of(node, made) for node in nodes]


def _wanted_in(segment: Segment, names: Mapping[ir.Node, str]) -> Iterator[ir.Node]:
    for node in segment.nodes:
        for inner in ir.traversal.RecursiveGraphIterator([node]):  # type: ignore[arg-type]
            if inner in names:
                yield inner


def _runtime() -> str:
    return f"onnxruntime {onnxruntime.__version__}, {_PROVIDER}"


def _kernel_of(node: ir.Node, made: Mapping[str, ir.Node]) -> Kernel | None:
    """Find what computes a node's result in the optimized graph.

    A fused node keeps the name of its last output, which may be that of a bias or activation
    behind the node; a cast or a change of layout may lie between the kernel and that name.
    """
    replaced = made.get(node.name or "")
    if replaced is not None and replaced.op_type in _INTEGER_KERNELS:
        return _describe(replaced, made)
    pending = [value for value in node.outputs if value.name]
    for _ in range(_DEPTH):
        for value in pending:
            producer = made.get(value.name or "")
            found = _site_behind(producer, made) if producer is not None else None
            if found is not None:
                return _describe(found, made)
        pending = [
            output for value in pending for use in value.uses() for output in use.node.outputs
        ]
    return None


def _site_behind(node: ir.Node, made: Mapping[str, ir.Node]) -> ir.Node | None:
    level = [node]
    for _ in range(_DEPTH):
        for candidate in level:
            if candidate.op_type in _INTEGER_KERNELS or candidate.op_type in _FLOAT_KERNELS:
                return candidate
        sources = [value for candidate in level for value in candidate.inputs if value is not None]
        level = [made[value.name] for value in sources if value.name and value.name in made]
    return None


def _describe(node: ir.Node, made: Mapping[str, ir.Node]) -> Kernel:
    if node.op_type in _BITS_OPS:
        return Kernel(f"{node.op_type} ({int_attribute(node, 'bits', 4)}-bit)", integer=True)
    if node.op_type in _INTEGER_KERNELS:
        return Kernel(node.op_type, integer=True)
    dequantized = any(_is_dequantized(value, made) for value in node.inputs if value is not None)
    if dequantized:
        return Kernel(f"float {node.op_type} after DequantizeLinear", integer=False)
    return Kernel(f"float {node.op_type}, weights decoded at load", integer=False)


def _is_dequantized(value: ir.Value, made: Mapping[str, ir.Node]) -> bool:
    producer = made.get(value.name or "")
    for _ in range(_DEPTH):
        if producer is None or producer.op_type not in ("Transpose", "Cast", "Reshape"):
            break
        source = producer.inputs[0]
        producer = made.get(source.name or "") if source is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"
