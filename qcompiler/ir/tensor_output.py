"""Writing the bytes of tensors into a stream, in pieces, so that memory stays flat."""

import contextlib
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Final

import onnx
import onnx_ir as ir

from qcompiler.errors import ModelError
from qcompiler.progress import Advance

_ALIGNED: Final = 1 << 16
_ALIGNMENT: Final = 4096
"""Tensors of at least 64 KiB start on a page, so that a runtime can map them as they are."""
_CHUNK: Final = 1 << 20
_LENGTH_DELIMITED: Final = 2

Key = tuple[str | int, ...]


def content_key(tensor: ir.TensorProtocol) -> Key:
    """Return what two tensors have in common when they are the same bytes."""
    if isinstance(tensor, ir.ExternalTensor):
        return (tensor.path, tensor.offset or 0, tensor.nbytes)
    return (id(tensor),)


class DataFile:
    """Lays tensors out in one file of external data, each once.

    Attributes:
        end: Size of the file so far, in bytes.
    """

    def __init__(self, path: Path, open_file: Callable[[], BinaryIO], advance: Advance) -> None:
        self.end = 0
        self._path = path
        self._open = open_file
        self._advance = advance
        self._offsets: dict[Key, int] = {}

    def place(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """Write a tensor unless it is there already, and return the reference to it.

        Raises:
            ModelError: The tensor's own data cannot be read.
            OSError: The stream cannot be written.
        """
        key = content_key(tensor)
        size = tensor.nbytes
        if key not in self._offsets:
            if size >= _ALIGNED:
                # What a seek skips reads as zeros, and takes no room on most file systems.
                self.end = -(-self.end // _ALIGNMENT) * _ALIGNMENT
            stream = self._open()
            stream.seek(self.end)
            write_bytes(tensor, stream, self._advance)
            self._offsets[key] = self.end
            self.end += size
        return ir.ExternalTensor(
            self._path.name,
            self._offsets[key],
            size,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
            base_dir=self._path.absolute().parent,
        )


def write_bytes(tensor: ir.TensorProtocol, stream: BinaryIO, advance: Advance) -> None:
    """Write a tensor as `TensorProto.raw_data` holds it.

    Raises:
        ModelError: External data cannot be read, or is shorter than it was when it was loaded.
        OSError: The stream cannot be written.
    """
    if isinstance(tensor, ir.ExternalTensor):
        _copy(tensor, stream, advance)
        return
    data = memoryview(tensor.tobytes())
    for start in range(0, len(data), _CHUNK):
        piece = data[start : start + _CHUNK]
        stream.write(piece)
        advance(len(piece))


def _copy(tensor: ir.ExternalTensor, stream: BinaryIO, advance: Advance) -> None:
    missing = tensor.nbytes
    # One buffer for all pieces: fresh memory for each costs more than the copying does.
    buffer = memoryview(bytearray(min(_CHUNK, missing)))
    with _open_input(tensor) as source:
        source.seek(tensor.offset or 0)
        while missing:
            count = source.readinto(buffer[: min(_CHUNK, missing)])
            if not count:
                message = f"external data of {tensor.name!r} ends {missing} bytes early"
                raise _changed(tensor, message)
            stream.write(buffer[:count])
            missing -= count
            advance(count)


@contextlib.contextmanager
def _open_input(tensor: ir.ExternalTensor) -> Iterator[FileIO]:
    """Open external data; that this fails must not look like a fault of the output."""
    try:
        source = Path(tensor.path).open("rb", buffering=0)  # noqa: SIM115 - closed below
    except OSError as error:
        message = f"external data of {tensor.name!r} cannot be read: {error.strerror}"
        raise _changed(tensor, message) from error
    with source:
        yield source


def _changed(tensor: ir.ExternalTensor, message: str) -> ModelError:
    hint = "keep the model's data files unchanged while it is compiled"
    return ModelError(message, where=tensor.path, hint=hint, reason="external-data")


def write_model(
    proto: onnx.ModelProto,
    streamed: dict[str, ir.TensorProtocol],
    stream: BinaryIO,
    advance: Advance,
) -> None:
    """Write a model whose larger initializers are put in while it is written.

    Serializing them would hold two copies of all weights. In a protobuf message fields may come
    in any order, so the model without its graph is followed by the graph, and in it the streamed
    initializers follow everything else.

    Args:
        proto: The model; consumed.
        streamed: By name, the graph's initializers that in `proto` are stand-ins of the same
            name, shape and type.
        stream: Where the bytes go.
        advance: Told the bytes of weights written.

    Raises:
        ModelError: The message would be larger than protobuf allows (2 GiB).
        OSError: The stream cannot be written.
    """
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in streamed]
    headers = {
        tensor.name: _header(tensor, streamed[tensor.name])
        for tensor in proto.graph.initializer
        if tensor.name in streamed
    }
    graph = onnx.GraphProto()
    graph.CopyFrom(proto.graph)
    proto.ClearField("graph")
    del graph.initializer[:]
    graph.initializer.extend(kept)
    body = graph.SerializeToString(deterministic=True)
    tag = _tag(onnx.GraphProto, "initializer")
    size = len(body)
    for name, header in headers.items():
        length = len(header) + streamed[name].nbytes
        size += len(tag) + len(_varint(length)) + length
    envelope = proto.SerializeToString(deterministic=True)
    if size + len(envelope) + 16 >= 1 << 31:
        message = "the model is too large for one file: a protobuf message ends at 2 GiB"
        hint = "save it with external data"
        raise ModelError(message, hint=hint, reason="too-large-for-one-file")
    stream.write(envelope + _tag(onnx.ModelProto, "graph") + _varint(size) + body)
    for name, header in headers.items():
        tensor = streamed[name]
        stream.write(tag + _varint(len(header) + tensor.nbytes) + header)
        write_bytes(tensor, stream, advance)


def _header(stand_in: onnx.TensorProto, tensor: ir.TensorProtocol) -> bytes:
    """Return a serialized tensor up to the point where its raw data begins."""
    proto = onnx.TensorProto()
    proto.CopyFrom(stand_in)
    proto.ClearField("data_location")
    proto.ClearField("external_data")
    data: bytes = proto.SerializeToString(deterministic=True)
    return data + _tag(onnx.TensorProto, "raw_data") + _varint(tensor.nbytes)


def _tag(message: type[onnx.ModelProto | onnx.GraphProto | onnx.TensorProto], name: str) -> bytes:
    """Return what stands before a field in a message; protobuf encoding guide, "Tag"."""
    return _varint(message.DESCRIPTOR.fields_by_name[name].number << 3 | _LENGTH_DELIMITED)


def _varint(number: int) -> bytes:
    """Return a number in groups of 7 bits, lowest first; protobuf encoding guide, "Varint"."""
    data = bytearray()
    while number >= 0x80:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    data.append(number)
    return bytes(data)
