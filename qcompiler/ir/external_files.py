"""Where external data lies, and whether a model may read it."""

import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir

from qcompiler.errors import ModelError

_HINT_INSIDE = "external data must lie in the model's own folder"


def proto_tensors(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Yield every tensor of a model with words for where it hangs.

    Graph, subgraphs and functions are walked; initializers and tensor attributes are found.
    """
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        yield from _node_tensors(function.node)


def external_tensors(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Yield those of `proto_tensors` that lie in other files."""
    for owner, tensor in proto_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield owner, tensor


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    for tensor in graph.initializer:
        yield f"initializer {tensor.name[:80]!r}", tensor
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, onnx.TensorProto]]:
    for node in nodes:
        for attribute in node.attribute:
            owner = f"attribute {attribute.name[:80]!r} of node {node.name[:80]!r}"
            if attribute.HasField("t"):
                yield owner, attribute.t
            for tensor in attribute.tensors:
                yield owner, tensor
            if attribute.HasField("g"):
                yield from _graph_tensors(attribute.g)
            for graph in attribute.graphs:
                yield from _graph_tensors(graph)


class ExternalFiles:
    """Checks the external data of one model against the files that are there.

    A location is followed only inside of the model's folder. Symbolic links are followed when
    they end there, or beside the file that the model's own path is a link to: so a model in the
    Hugging Face cache, where the model and its data are links into one folder of blobs, loads.

    A file with several hard links is read: an ordinary copy by link (`cp -l`, a deduplicating
    cache) has them, and who can make a hard link into the folder could as well write there.
    """

    def __init__(self, model: Path) -> None:
        self._where = str(model)
        self._folder = model.absolute().parent
        self._allowed = (self._folder.resolve(), model.resolve().parent)
        self._files: dict[str, tuple[Path, os.stat_result]] = {}

    def locate(self, owner: str, tensor: onnx.TensorProto) -> tuple[str, Path]:
        """Return the location as the model gives it, and the file that it means.

        Raises:
            ModelError: There is none, it is absolute, leads out of the folder or to no file.
        """
        location = _entries(tensor).get("location", "")
        if location not in self._files:
            self._files[location] = self._resolve(owner, location)
        return location, self._files[location][0]

    def check(self, owner: str, tensor: onnx.TensorProto) -> None:
        """Check that the file holds the tensor's bytes, without reading them.

        `onnx_ir` reads through no hard link and no link that leaves the folder. A location that
        was found good here all the same is rewritten to the absolute path of the file.

        Raises:
            ModelError: As `locate`; or offset and length do not fit file, shape and type.
        """
        location, path = self.locate(owner, tensor)
        status = self._files[location][1]
        offset = self._number(owner, tensor, "offset") or 0
        length = self._number(owner, tensor, "length")
        bits = math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth
        expected = -(-bits // 8)
        if length is not None and length != expected:
            message = f"{owner} takes {expected} bytes by shape and type, its length says {length}"
            raise self._fault(message, "export the model again")
        if offset + expected > status.st_size:
            message = (
                f"{owner} ends at byte {offset + expected} of {location[:80]!r}, "
                f"which has {status.st_size}"
            )
            raise self._fault(message, "the data file is truncated or belongs to another model")
        if status.st_nlink > 1 or not path.is_relative_to(self._allowed[0]):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = str(path)

    def _resolve(self, owner: str, location: str) -> tuple[Path, os.stat_result]:
        if not location or "\0" in location:
            message = f"external data of {owner} has no usable location"
            raise self._fault(message, "export the model again")
        shown = location[:80]
        if PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor:
            message = f"external data of {owner} has the absolute location {shown!r}"
            raise self._fault(message, _HINT_INSIDE)
        if ".." in PureWindowsPath(location).parts:
            message = f"external data of {owner} has '..' in its location {shown!r}"
            raise self._fault(message, _HINT_INSIDE)
        try:
            path = (self._folder / location).resolve(strict=True)
            status = path.stat()
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "a loop of links"
            message = f"external data file {shown!r} of {owner} cannot be opened: {reason}"
            hint = "put the data file beside the model; it was written together with it"
            raise self._fault(message, hint) from error
        if not any(path.is_relative_to(folder) for folder in self._allowed):
            message = f"external data {shown!r} of {owner} is a link out of the model's folder"
            raise self._fault(message, _HINT_INSIDE)
        if not stat.S_ISREG(status.st_mode):
            message = f"external data {shown!r} of {owner} is not a regular file"
            raise self._fault(message, _HINT_INSIDE)
        return path, status

    def _number(self, owner: str, tensor: onnx.TensorProto, key: str) -> int | None:
        text = _entries(tensor).get(key)
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            message = f"{key} of the external data of {owner} is {text[:40]!r}, not a byte count"
            raise self._fault(message, "export the model again")
        return int(text)

    def _fault(self, message: str, hint: str) -> ModelError:
        return ModelError(message, where=self._where, hint=hint, reason="external-data")


def _entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}
