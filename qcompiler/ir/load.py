"""Reading ONNX models from untrusted files.

A model is checked as a protobuf message before a graph is built of it, since building already
believes names, sizes and paths. Weights in external files are never read here.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from qcompiler.errors import ModelError, UsageError
from qcompiler.ir.external_files import ExternalFiles, external_tensors
from qcompiler.ir.proto_checks import check_model
from qcompiler.ir.tensor_sites import tensor_sites

_MAX_PROTO_BYTES: Final = (1 << 31) - 1
_FIRST_IR_WITH_CONSTANT_INITIALIZERS: Final = 4

_KNOWN_STARTS: Final = (
    (b"version https://git-lfs", "it is a Git LFS pointer: run `git lfs pull` first"),
    (b"PK\x03\x04", "it is a zip archive: unpack it, or export the checkpoint to ONNX"),
    (b"\x89PNG", "it is a PNG image"),
    (b"\x80\x02", "it is a pickle: export the checkpoint to ONNX first"),
    (b"ORTM", "it is in ONNX Runtime's own format: give the .onnx file it was made of"),
    (b"\x1f\x8b", "it is compressed with gzip: unpack it first"),
    (b"{", "it looks like JSON: give the binary .onnx file"),
    (b"<", "it looks like a web page or XML: the download may have failed"),
)


def load_model(path: str | Path) -> ir.Model:
    """Read an ONNX file lazily and refuse it when it is malformed.

    Tensors in external files stay there. Each is an `ir.ExternalTensor` of the model's folder,
    wherever it hangs: initializers and attributes of the graph, its subgraphs and functions.
    Nodes come in an order in which values are made before they are used, sorted if need be.

    Up to IR version 3 every initializer is also listed as a graph input; these are dropped from
    the inputs. From version 4 on such an input is a default that a caller may override, and stays.

    Args:
        path: The `.onnx` file, at most 2 GiB without its external data.

    Raises:
        UsageError: There is no such file, it is a directory, or it may not be read.
        ModelError: It is no ONNX model, or holds something inconsistent.
    """
    path = Path(path)
    with model_faults(path):
        proto = read_proto(path)
        check_model(proto, str(path))
        files = ExternalFiles(path)
        for owner, tensor in external_tensors(proto):
            files.check(owner, tensor)
        model = ir.serde.deserialize_model(proto)
        _set_base_dir(model, path)
        _drop_initializers_from_inputs(model)
        model.graph.sort()
        for function in model.functions.values():
            function.sort()
    return model


@contextlib.contextmanager
def model_faults(path: Path) -> Iterator[None]:
    """Turn what the libraries raise on a malformed model into a ModelError."""
    try:
        yield
    except (RecursionError, MemoryError) as error:
        message = "the model is nested too deeply, or needs more memory than there is"
        raise ModelError(message, where=str(path)) from error
    except (ir.serde.SerdeError, ValueError, TypeError, NotImplementedError) as error:
        reason = str(first_cause(error)).split("\n", maxsplit=1)[0][:200]
        message = f"the model cannot be turned into a graph: {reason}"
        raise ModelError(message, where=str(path), hint="run onnx.checker on it") from error


def read_proto(path: Path) -> onnx.ModelProto:
    """Parse the file; nothing but its size and shape as a protobuf message is checked."""
    where = str(path)
    try:
        if path.is_dir():
            message = "is a directory"
            raise UsageError(message, where=where, hint="name the .onnx file inside of it")
        if path.exists() and not path.is_file():
            message = "is no regular file"
            raise UsageError(message, where=where, hint="name an .onnx file")
        size = path.stat().st_size
        if size > _MAX_PROTO_BYTES:
            hint = "save it with external data: onnx.save(model, path, save_as_external_data=True)"
            message = "is larger than a protobuf message can be"
            raise ModelError(message, where=where, hint=hint, reason="too-large-for-one-file")
        data = path.read_bytes()
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise UsageError(message, where=where, hint="check the path") from error
    if not data:
        message = "the file is empty"
        raise ModelError(message, where=where, hint="export or download it again")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise _not_a_model(data, where) from error
    if not proto.HasField("graph"):
        raise _not_a_model(data, where)
    return proto


def _not_a_model(data: bytes, where: str) -> ModelError:
    hint = "it may be truncated or nested too deeply: export or download it again"
    for start, meaning in _KNOWN_STARTS:
        if data.startswith(start):
            hint = meaning
    return ModelError("is not an ONNX model: no graph could be read", where=where, hint=hint)


def _set_base_dir(model: ir.Model, path: Path) -> None:
    folder = path.absolute().parent
    for site in tensor_sites(model):
        tensor = site.tensor
        if isinstance(tensor, ir.ExternalTensor) and not Path(tensor.location).is_absolute():
            tensor.base_dir = folder


def _drop_initializers_from_inputs(model: ir.Model) -> None:
    if model.ir_version < _FIRST_IR_WITH_CONSTANT_INITIALIZERS:
        for graph in model.graphs():
            kept = [value for value in graph.inputs if value.name not in graph.initializers]
            graph.inputs[:] = kept
        # Below version 4 an initializer that is no input is not allowed.
        model.ir_version = _FIRST_IR_WITH_CONSTANT_INITIALIZERS


def first_cause(error: BaseException) -> BaseException:
    """Return the error that a chain of `raise ... from ...` began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
