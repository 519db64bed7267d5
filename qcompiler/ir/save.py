"""Writing ONNX models so that a failure leaves nothing half done.

`ir.save` keeps much of what is wanted, and not all: it writes a tied weight once per name, renames
the data file before it knows that the model can be written, leaves tensor attributes pointing at
the source model's data file, and holds all inline weights in memory three times over.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import onnx
import onnx_ir as ir

from qcompiler.errors import UsageError
from qcompiler.ir.atomic_file import AtomicFile
from qcompiler.ir.dataflow import standard_opset
from qcompiler.ir.tensor_output import DataFile, content_key, write_model
from qcompiler.ir.tensor_sites import TensorSite, tensor_sites
from qcompiler.ir.weights import disk_errors, read_all
from qcompiler.progress import Advance, Progress

_INLINE_LIMIT: Final = 1 << 27
"""Weights of this many bytes in total go to a file of their own. Protobuf would hold 2 GiB, but
whoever reads the file must then hold all of them at once, ONNX Runtime included."""
_SMALL: Final = 1024
"""Tensors below this size stay in the model file: shapes and axes that shape inference reads."""
_STREAMED: Final = 1 << 16
"""Inline initializers of this size are copied while the file is written."""

_IR_FOR_METADATA: Final = 10
"""The first IR version with `NodeProto.metadata_props`."""
_IR_OF_TYPES: Final = {
    ir.DataType.INT4: 10,
    ir.DataType.UINT4: 10,
    ir.DataType.FLOAT4E2M1: 11,
    ir.DataType.FLOAT8E8M0: 12,
    ir.DataType.INT2: 13,
    ir.DataType.UINT2: 13,
    ir.DataType.FLOAT6E2M3: 14,
    ir.DataType.FLOAT6E3M2: 14,
}


@dataclass(frozen=True, slots=True)
class SavedModel:
    """What was written.

    Attributes:
        path: The model file.
        data_path: The file of weights beside it, or None when they are in the model file.
        bytes: Size of both together.
    """

    path: Path
    data_path: Path | None
    bytes: int


def save_model(
    model: ir.Model,
    path: str | Path,
    *,
    progress: Progress,
    external_data: bool | None = None,
) -> SavedModel:
    """Write a model; the output appears complete or not at all.

    Weights stay in the model file while they take less than 128 MiB together, else they go to one
    file `<name>.data` beside it, where what several initializers share is written once (inline
    it cannot be; a pass merges such initializers). Either way weights are streamed. The model is
    the same after the call, but for its IR version: it is raised to what opset, element types
    and node metadata need, and never lowered.

    The data file gets its name first. A process killed between the two renames of a save that
    replaces an older pair leaves the older model file beside the new data.

    Args:
        model: The model. Its tensors may lie in files; these are not changed.
        path: The output; an older file of that name is replaced at the end.
        progress: Shows the task "writing", in bytes.
        external_data: Whether weights go to a file of their own; None decides by size.

    Raises:
        UsageError: The folder cannot be written, the disk is full, or the output would overwrite
            a file that the model's own weights are read from.
        ModelError: The weights do not fit into one file without external data, or cannot be read.
    """
    path = Path(path)
    data_path = path.with_name(path.name + ".data")
    sites = list(tensor_sites(model))
    _refuse_inputs(sites, (path, data_path))
    model.ir_version = max(model.ir_version, _needed_ir_version(model, sites))
    unique = sum({content_key(site.tensor): site.tensor.nbytes for site in sites}.values())
    outside = unique >= _INLINE_LIMIT if external_data is None else external_data
    total = unique if outside else sum(site.tensor.nbytes for site in sites)
    with (
        progress.task("writing", total) as advance,
        AtomicFile(path) as model_file,
        AtomicFile(data_path) as data_file,
        disk_errors(path.absolute().parent),
    ):
        written = 0.0

        def count(amount: float) -> None:
            nonlocal written
            written += amount
            advance(amount)

        data = DataFile(data_path, data_file.stream, count)
        _write(model, sites, model_file.stream(), data if outside else None, count)
        # What is too small to stream was written with the graph.
        advance(total - written)
        size = data.end + model_file.stream().tell()
        if data.end:
            data_file.commit()
        model_file.commit()
    return SavedModel(path, data_path if data.end else None, size)


def _write(
    model: ir.Model,
    sites: list[TensorSite],
    stream: BinaryIO,
    data: DataFile | None,
    advance: Advance,
) -> None:
    streamed: dict[str, ir.TensorProtocol] = {}
    if data is None:
        streamed = {
            name: value.const_value
            for name, value in model.graph.initializers.items()
            if value.const_value is not None and _is_large(value.const_value, _STREAMED)
        }
    standing_in = {id(tensor) for tensor in streamed.values()}
    with contextlib.ExitStack() as undo:
        for site in sites:
            undo.callback(site.replace, site.tensor)
            if data is not None and _is_large(site.tensor, _SMALL):
                site.replace(data.place(site.tensor))
            elif id(site.tensor) in standing_in and site.graph is model.graph:
                site.replace(_stand_in(site.tensor))
            elif isinstance(site.tensor, ir.ExternalTensor):
                site.replace(_in_memory(site.tensor))
        proto = ir.to_proto(model)
    write_model(proto, streamed, stream, advance)


def _is_large(tensor: ir.TensorProtocol, limit: int) -> bool:
    return tensor.dtype != ir.DataType.STRING and tensor.nbytes >= limit


def _stand_in(tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    """Return a tensor without data that serializes to the same name, shape and type."""
    return ir.ExternalTensor(
        "",
        None,
        None,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _in_memory(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    return ir.Tensor(read_all(tensor), dtype=tensor.dtype, name=tensor.name)


def _refuse_inputs(sites: list[TensorSite], outputs: tuple[Path, Path]) -> None:
    inputs = {site.tensor.path for site in sites if isinstance(site.tensor, ir.ExternalTensor)}
    for output in outputs:
        if output.is_dir():
            message = "the output is a directory"
            raise UsageError(message, where=str(output), hint="name a file in it")
        for source in sorted(inputs):
            if output.exists() and Path(source).exists() and output.samefile(source):
                message = "the output would overwrite the data file that the weights are read from"
                raise UsageError(message, where=str(output), hint="choose another output name")


def _needed_ir_version(model: ir.Model, sites: list[TensorSite]) -> int:
    versions = [_IR_OF_TYPES.get(site.tensor.dtype, 0) for site in sites]
    versions += _ir_version_of_opset(standard_opset(model))
    bodies: tuple[ir.Graph | ir.Function, ...] = (model.graph, *model.functions.values())
    if any(node.metadata_props for body in bodies for node in body.all_nodes()):
        versions.append(_IR_FOR_METADATA)
    return max(versions, default=0)


def _ir_version_of_opset(opset: int) -> list[int]:
    """Return the IR version of the first onnx release that had the opset."""
    return [row[1] for row in onnx.helper.VERSION_TABLE if row[2] >= opset][:1]
