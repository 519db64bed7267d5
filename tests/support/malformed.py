"""Inputs that must end in one clear error: no traceback, no output file."""

import functools
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Write = Callable[[Path], Path]

_USAGE, _MODEL = 2, 3


@dataclass(frozen=True, slots=True)
class MalformedCase:
    """One input that is refused.

    Attributes:
        name: Short kebab-case name.
        write: Makes the files in an empty folder and returns the path to give to the compiler.
        expected_exit: Exit code of the command line.
        expected_text: Part of the message.
        refused_by: "load" when reading the model refuses it, "compile" when a pass does.
    """

    name: str
    write: Write
    expected_exit: int
    expected_text: str
    refused_by: Literal["load", "compile"] = "load"


def sound_model() -> onnx.ModelProto:
    """Return the model that the cases are made of: y = Relu(x @ w), w float32 [64, 32]."""
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="matmul"),
            helper.make_node("Relu", ["h"], ["y"], name="relu"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, ir_version=8, opset_imports=opsets)


def _edited(edit: Callable[[onnx.ModelProto], None]) -> Write:
    """Write the sound model after a change."""

    def write(folder: Path) -> Path:
        model = sound_model()
        edit(model)
        return _save(model, folder)

    return write


def _save(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _bytes(data: bytes) -> Write:
    def write(folder: Path) -> Path:
        path = folder / "model.onnx"
        path.write_bytes(data)
        return path

    return write


def _external(
    location: str,
    *,
    offset: str | None = None,
    length: str | None = None,
    size: int = 2048,
    prepare: Callable[[Path], None] | None = None,
) -> Write:
    """Write the sound model with its weight (2048 bytes) in another file.

    Args:
        location: Location that the model gives; {folder} stands for the absolute folder.
        offset: Offset that it gives.
        length: Length that it gives.
        size: Size of `weights.bin` in the model's folder; 0 for no such file.
        prepare: Makes other files.
    """

    def write(folder: Path) -> Path:
        inner = folder / "model"
        inner.mkdir()
        (folder / "outside.bin").write_bytes(bytes(4096))
        if size:
            (inner / "weights.bin").write_bytes(bytes(size))
        if prepare is not None:
            prepare(inner)
        model = sound_model()
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": location.format(folder=inner), "offset": offset, "length": length}
        for key, value in entries.items():
            if value is not None:
                tensor.external_data.add(key=key, value=value)
        return _save(model, inner)

    return write


def _weight(model: onnx.ModelProto) -> onnx.TensorProto:
    tensor: onnx.TensorProto = model.graph.initializer[0]
    return tensor


def _set_weight(value: float) -> Write:
    def edit(model: onnx.ModelProto) -> None:
        weight = numpy_helper.to_array(_weight(model)).copy()
        weight[3, 4] = value
        _weight(model).CopyFrom(numpy_helper.from_array(weight, "w"))

    return _edited(edit)


def _set_dims(*dims: int) -> Write:
    def edit(model: onnx.ModelProto) -> None:
        del _weight(model).dims[:]
        _weight(model).dims.extend(dims)

    return _edited(edit)


def _set_opset(version: int) -> Write:
    def edit(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version

    return _edited(edit)


def _typed_data(model: onnx.ModelProto) -> None:
    _weight(model).ClearField("raw_data")
    _weight(model).float_data.extend([1.0, 2.0, 3.0])


def _second_producer(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Neg", ["x"], ["h"], name="again"))


def _input_is_output(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Neg", ["h"], ["x"], name="again"))


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "y"


def _undefined(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "nowhere"


def _undeclared_domain(model: onnx.ModelProto) -> None:
    model.graph.node[1].domain = "com.example"


def _unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[1].op_type = "Rellu"


def _bad_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[1].CopyFrom(helper.make_node("Softmax", ["h"], ["y"], axis="last"))


def _unknown_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[1].CopyFrom(helper.make_node("Softmax", ["h"], ["y"], axes=1))


def _branch(body: onnx.NodeProto) -> onnx.GraphProto:
    value = helper.make_tensor_value_info(body.output[0], TensorProto.FLOAT, None)
    return helper.make_graph([body], "branch", [], [value])


def _missing_branch(model: onnx.ModelProto) -> None:
    then = _branch(helper.make_node("Relu", ["h"], ["a"]))
    node = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=then)
    model.graph.node[1].CopyFrom(node)
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))


def _undefined_in_branch(model: onnx.ModelProto) -> None:
    then = _branch(helper.make_node("Relu", ["h"], ["a"]))
    other = _branch(helper.make_node("Relu", ["nowhere"], ["b"], name="inner"))
    model.graph.node[1].CopyFrom(
        helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    )
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))


def _duplicate_initializer(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(_weight(model))


def _no_outputs(model: onnx.ModelProto) -> None:
    del model.graph.output[:]


def _too_few_inputs(model: onnx.ModelProto) -> None:
    del model.graph.node[0].input[1:]


def _no_opset(model: onnx.ModelProto) -> None:
    del model.opset_import[:]


def _unknown_type(model: onnx.ModelProto) -> None:
    _weight(model).data_type = 99


def _future_ir(model: onnx.ModelProto) -> None:
    model.ir_version = 1000


def _no_graph(folder: Path) -> Path:
    model = sound_model()
    model.ClearField("graph")
    return _save(model, folder)


def _truncated(folder: Path) -> Path:
    data = sound_model().SerializeToString()
    return _bytes(data[: len(data) // 2])(folder)


def _other_message(folder: Path) -> Path:
    return _bytes(sound_model().graph.SerializeToString())(folder)


def _random(folder: Path) -> Path:
    return _bytes(random.Random(0).randbytes(5000))(folder)


def _zip(folder: Path) -> Path:
    path = folder / "model.onnx"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.onnx", sound_model().SerializeToString())
    return path


def _field(number: int, payload: bytes) -> bytes:
    """Encode a length-delimited field of a protobuf message."""
    length, head = len(payload), bytearray([number << 3 | 2])
    while length >= 0x80:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes(head) + bytes([length]) + payload


def _deep_nesting(folder: Path) -> Path:
    """1,000 If nodes inside one another; the protobuf library writes none as deep."""
    graph = b""
    for _ in range(1000):
        attribute = _field(1, b"then_branch") + _field(6, graph)
        graph = _field(1, _field(4, b"If") + _field(5, attribute))
    return _bytes(b"\x08\x08" + _field(7, graph))(folder)


def _huge_string(folder: Path) -> Path:
    """A name that says it is 2 GB long, in a file of a few bytes."""
    return _bytes(b"\x08\x08" + bytes([7 << 3 | 2, 0xFF, 0xFF, 0xFF, 0xFF, 0x07]) + b"name")(folder)


def _bad_utf8(folder: Path) -> Path:
    data = sound_model().SerializeToString().replace(b"matmul", b"mat\xff\xfe\xfd")
    return _bytes(data)(folder)


def _zero_size(model: onnx.ModelProto) -> None:
    _weight(model).CopyFrom(numpy_helper.from_array(np.zeros((64, 0), np.float32), "w"))


def _quantized(model: onnx.ModelProto) -> None:
    """The int8 model of a dynamic quantizer."""
    weight = np.ones((64, 32), np.int8)
    _weight(model).CopyFrom(numpy_helper.from_array(weight, "w"))
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"], name="quantize"),
        helper.make_node("MatMulInteger", ["xq", "w", "xz"], ["acc"], name="matmul"),
        helper.make_node("Cast", ["acc"], ["h"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["h", "xs"], ["y"], name="rescale"),
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _link(target: str, folder: Path) -> None:
    (folder / "link.bin").symlink_to(target)


def _make_directory(folder: Path) -> None:
    (folder / "folder.bin").mkdir()


def _directory(folder: Path) -> Path:
    path = folder / "model.onnx"
    path.mkdir()
    return path


_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

MALFORMED: tuple[MalformedCase, ...] = (
    MalformedCase("no-such-file", lambda folder: folder / "model.onnx", _USAGE, "No such file"),
    MalformedCase("directory", _directory, _USAGE, "is a directory"),
    MalformedCase("empty-file", _bytes(b""), _MODEL, "is empty"),
    MalformedCase("random-bytes", _random, _MODEL, "is not an ONNX model"),
    MalformedCase("text", _bytes(b"hello, this is no model\n" * 20), _MODEL, "is not an ONNX"),
    MalformedCase("json", _bytes(b'{"graph": {"node": []}}\n'), _MODEL, "JSON"),
    MalformedCase("zip", _zip, _MODEL, "zip archive"),
    MalformedCase("png", _bytes(b"\x89PNG\r\n\x1a\n" + bytes(64)), _MODEL, "PNG image"),
    MalformedCase("html", _bytes(b"<!DOCTYPE html><html></html>"), _MODEL, "web page"),
    MalformedCase("git-lfs-pointer", _bytes(_LFS), _MODEL, "git lfs pull"),
    MalformedCase("truncated", _truncated, _MODEL, "truncated"),
    MalformedCase("another-message", _other_message, _MODEL, "is not an ONNX model"),
    MalformedCase("huge-string", _huge_string, _MODEL, "truncated"),
    MalformedCase("deep-nesting", _deep_nesting, _MODEL, "nested too deeply"),
    MalformedCase("bad-utf8", _bad_utf8, _MODEL, "not UTF-8"),
    MalformedCase("no-graph", _no_graph, _MODEL, "no graph"),
    MalformedCase("no-opset", _edited(_no_opset), _MODEL, "declares no opset"),
    MalformedCase("opset-99", _set_opset(99), _MODEL, "opset 99 is not supported"),
    MalformedCase("opset-3", _set_opset(3), _MODEL, "opset 3 is not supported"),
    MalformedCase("future-ir-version", _edited(_future_ir), _MODEL, "IR version 1000"),
    MalformedCase("no-outputs", _edited(_no_outputs), _MODEL, "no outputs"),
    MalformedCase("undeclared-domain", _edited(_undeclared_domain), _MODEL, "'com.example'"),
    MalformedCase("unknown-operator", _edited(_unknown_operator), _MODEL, "no such operator"),
    MalformedCase("bad-attribute-type", _edited(_bad_attribute), _MODEL, "must be of type INT"),
    MalformedCase("unknown-attribute", _edited(_unknown_attribute), _MODEL, "unknown attribute"),
    MalformedCase("missing-branch", _edited(_missing_branch), _MODEL, "'else_branch'"),
    MalformedCase("too-few-inputs", _edited(_too_few_inputs), _MODEL, "has 1 inputs"),
    MalformedCase("undefined-value", _edited(_undefined), _MODEL, "'nowhere'"),
    MalformedCase("undefined-in-branch", _edited(_undefined_in_branch), _MODEL, "'nowhere'"),
    MalformedCase("cycle", _edited(_cycle), _MODEL, "has a cycle"),
    MalformedCase("two-producers", _edited(_second_producer), _MODEL, "'h' is made by"),
    MalformedCase("input-is-output", _edited(_input_is_output), _MODEL, "'x' is made by"),
    MalformedCase(
        "duplicate-initializer", _edited(_duplicate_initializer), _MODEL, "two initializers"
    ),
    MalformedCase("negative-dims", _set_dims(64, -32), _MODEL, "negative dimension"),
    MalformedCase("absurd-dims", _set_dims(1 << 40, 1 << 40), _MODEL, "absurd shape"),
    MalformedCase("absurd-dims-empty", _set_dims(0, 1 << 62, 1 << 62), _MODEL, "absurd shape"),
    MalformedCase("absurd-rank", _set_dims(*[1] * 100), _MODEL, "absurd shape"),
    MalformedCase("raw-size-mismatch", _set_dims(64, 33), _MODEL, "needs 8448 bytes"),
    MalformedCase("typed-size-mismatch", _edited(_typed_data), _MODEL, "needs 2048 numbers"),
    MalformedCase("unknown-element-type", _edited(_unknown_type), _MODEL, "element type 99"),
    MalformedCase("external-missing", _external("weights.bin", size=0), _MODEL, "cannot be opened"),
    MalformedCase("external-short", _external("weights.bin", size=100), _MODEL, "which has 100"),
    MalformedCase(
        "external-offset-beyond-end",
        _external("weights.bin", offset="1000000"),
        _MODEL,
        "ends at byte 1008192",
    ),
    MalformedCase(
        "external-length-mismatch", _external("weights.bin", length="99"), _MODEL, "length says 99"
    ),
    MalformedCase(
        "external-bad-offset", _external("weights.bin", offset="-8"), _MODEL, "not a byte count"
    ),
    MalformedCase("external-no-location", _external(""), _MODEL, "no usable location"),
    MalformedCase("external-parent", _external("../outside.bin"), _MODEL, "has '..'"),
    MalformedCase(
        "external-absolute", _external("{folder}/weights.bin"), _MODEL, "absolute location"
    ),
    MalformedCase("external-windows-path", _external("C:\\weights.bin"), _MODEL, "absolute"),
    MalformedCase(
        "external-link-out",
        _external("link.bin", prepare=functools.partial(_link, "../outside.bin")),
        _MODEL,
        "link out of the model's folder",
    ),
    MalformedCase(
        "external-link-loop",
        _external("link.bin", prepare=functools.partial(_link, "link.bin")),
        _MODEL,
        "cannot be opened",
    ),
    MalformedCase(
        "external-directory",
        _external("folder.bin", prepare=_make_directory),
        _MODEL,
        "not a regular file",
    ),
    MalformedCase(
        "nan-weight",
        _set_weight(float("nan")),
        _MODEL,
        "its weight w cannot be quantized",
        "compile",
    ),
    MalformedCase(
        "infinite-weight",
        _set_weight(float("inf")),
        _MODEL,
        "its weight w cannot be quantized",
        "compile",
    ),
    MalformedCase("zero-size-weight", _edited(_zero_size), _MODEL, "no elements", "compile"),
    MalformedCase("already-quantized", _edited(_quantized), _MODEL, "already", "compile"),
)
