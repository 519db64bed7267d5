"""Writing models: complete or not at all, tied weights once, the same bytes every time."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qcompiler.errors import ModelError, UsageError
from qcompiler.ir.editing import constant_value
from qcompiler.ir.load import load_model
from qcompiler.ir.save import SavedModel, save_model
from qcompiler.ir.weights import WeightStore
from qcompiler.progress import Advance, SilentProgress

Array = npt.NDArray[Any]

_RNG = np.random.default_rng(5)
_W = _RNG.standard_normal((256, 256)).astype(np.float32)
_X = _RNG.standard_normal((2, 256)).astype(np.float32)


class _Recorded:
    """Progress that adds up, and may be interrupted."""

    def __init__(self, *, interrupted: bool = False) -> None:
        self.total = 0.0
        self.done = 0.0
        self._interrupted = interrupted

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        assert description == "writing"
        self.total = total
        yield self._advance

    def _advance(self, amount: float) -> None:
        self.done += amount
        if self._interrupted:
            raise KeyboardInterrupt


def _model() -> ir.Model:
    """Return y = (x @ w) @ v + b, where w and v are the same tensor, 256 KiB."""
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[n,256] x) => (float[n,256] y) {
          h = MatMul(x, w)  k = MatMul(h, v)  y = Add(k, b) }"""
    )
    tied = ir.tensor(_W, name="w")
    undefined = {
        value.name: value for node in model.graph for value in node.inputs if value is not None
    }
    for name, tensor in (("w", tied), ("v", tied), ("b", ir.tensor(_W[0], name="b"))):
        value = undefined[name]
        value.const_value = tensor
        value.type = ir.TensorType(tensor.dtype)
        value.shape = ir.Shape(tensor.shape.numpy())
        model.graph.register_initializer(value)
    return model


def _run(path: Path) -> Array:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    result: Array = onnxruntime.InferenceSession(path, options).run(None, {"x": _X})[0]
    return result


def _save(model: ir.Model, path: Path, *, external: bool | None = None) -> SavedModel:
    return save_model(model, path, progress=SilentProgress(), external_data=external)


@pytest.mark.parametrize("external", [None, False, True])
def test_the_written_model_computes_the_same(external: bool | None, tmp_path: Path) -> None:
    saved = _save(_model(), tmp_path / "m.onnx", external=external)
    expected = _X @ _W @ _W + _W[0]
    np.testing.assert_allclose(_run(saved.path), expected, rtol=1e-4, atol=1e-2)
    onnx.checker.check_model(saved.path, full_check=True)
    files = sorted(tmp_path.iterdir())
    assert files == sorted(path for path in (saved.path, saved.data_path) if path)
    assert (saved.data_path is not None) == bool(external)
    assert saved.bytes == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("external", [False, True])
def test_every_way_of_saving_a_loaded_model_keeps_it(external: bool, tmp_path: Path) -> None:
    first = _save(_model(), tmp_path / "first.onnx", external=external)
    for again in (False, True):
        second = _save(load_model(first.path), tmp_path / f"{again}.onnx", external=again)
        np.testing.assert_array_equal(_run(second.path), _run(first.path))


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    saved = _save(_model(), tmp_path / "m.onnx", external=True)
    assert saved.data_path is not None
    assert saved.data_path.stat().st_size == _W.nbytes + _W[0].nbytes
    loaded = load_model(saved.path)
    again = _save(loaded, tmp_path / "again.onnx", external=True)
    assert again.data_path is not None
    assert again.data_path.read_bytes() == saved.data_path.read_bytes()


def test_large_tensors_start_on_a_page(tmp_path: Path) -> None:
    model = _model()
    tensor = ir.tensor(np.ones(700, np.float32), name="a")
    value = constant_value("a", tensor)
    initializers = list(model.graph.initializers.values())
    model.graph.initializers.clear()
    for each in (value, *initializers):
        model.graph.register_initializer(each)
    saved = _save(model, tmp_path / "m.onnx", external=True)
    offsets = {
        name: value.const_value.offset
        for name, value in load_model(saved.path).graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    assert offsets == {"a": 0, "w": 4096, "v": 4096, "b": 4096 + _W.nbytes}


@pytest.mark.parametrize("external", [False, True])
def test_the_same_model_gives_the_same_bytes(external: bool, tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        _save(_model(), folder / "m.onnx", external=external)
        contents.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert contents[0] == contents[1]


def test_inline_weights_are_what_the_library_would_write(tmp_path: Path) -> None:
    """Streaming changes the order of initializers in the file, and nothing else."""
    model = _model()
    expected = ir.to_proto(model).graph.initializer
    found = onnx.load(_save(model, tmp_path / "m.onnx").path).graph.initializer
    by_name = {tensor.name: tensor for tensor in found}
    assert len(found) == len(expected)
    for tensor in expected:
        assert by_name[tensor.name].SerializeToString() == tensor.SerializeToString()


def test_packed_weights_of_a_store_can_be_saved(tmp_path: Path) -> None:
    codes = _RNG.integers(-8, 8, (256, 256)).astype(np.int8)
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["": 21]>
        g (float[n,256] x) => (float[n,256] y) <float s = {0.5}> {
          w = DequantizeLinear(q, s)  y = MatMul(x, w) }"""
    )
    value = next(iter(model.graph)).inputs[0]
    assert value is not None
    with WeightStore(tmp_path, 1) as store:
        value.const_value = store.put("q", codes, ir.DataType.INT4)
        model.graph.register_initializer(value)
        saved = [_save(model, tmp_path / f"{e}.onnx", external=e) for e in (False, True)]
    for each in saved:
        np.testing.assert_allclose(_run(each.path), _X @ (codes * 0.5), rtol=1e-3, atol=1e-3)


def test_bodies_and_attributes_are_saved(tmp_path: Path) -> None:
    """Also when they lie in the external data of the model that was read."""
    big = _RNG.standard_normal(1000).astype(np.float32)

    def constant() -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(big, "k")

    output = onnx.helper.make_tensor_value_info("a", 1, [1000])
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Neg", ["k"], ["a"])], "b", [], [output], [constant()]
    )
    nodes = [
        onnx.helper.make_node("Constant", [], ["c"], value=constant()),
        onnx.helper.make_node("If", ["x"], ["i"], then_branch=body, else_branch=body),
        onnx.helper.make_node("Sub", ["c", "i"], ["y"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.BOOL, [])],
        [onnx.helper.make_tensor_value_info("y", 1, [1000])],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    proto = onnx.helper.make_model(graph, ir_version=8, opset_imports=opsets)
    for external in (True, False):
        saved = _save(ir.from_proto(proto), tmp_path / f"{external}.onnx", external=external)
        again = _save(load_model(saved.path), tmp_path / f"{external}2.onnx", external=False)
        for path in (saved.path, again.path):
            session = onnxruntime.InferenceSession(path)
            (result,) = session.run(None, {"x": np.array(True)})
            np.testing.assert_array_equal(result, 2 * big)


def test_the_model_is_unchanged_by_saving(tmp_path: Path) -> None:
    model = _model()
    before = [value.const_value for value in model.graph.initializers.values()]
    _save(model, tmp_path / "m.onnx", external=True)
    after = [value.const_value for value in model.graph.initializers.values()]
    assert all(old is new for old, new in zip(before, after, strict=True))


@contextmanager
def _file_size_limit(size: int) -> Iterator[None]:
    """Make the kernel refuse longer files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("external", [False, True])
def test_a_full_disk_leaves_what_was_there(external: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_text("older output")
    with _file_size_limit(100_000), pytest.raises(UsageError, match="no room left") as caught:
        _save(_model(), path, external=external)
    assert caught.value.where == str(tmp_path)
    assert caught.value.hint
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_text() == "older output"


@pytest.mark.parametrize("external", [False, True])
def test_an_interrupt_leaves_what_was_there(external: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_text("older output")
    with pytest.raises(KeyboardInterrupt):
        save_model(_model(), path, progress=_Recorded(interrupted=True), external_data=external)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_text() == "older output"


def test_an_older_output_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_text("older output")
    _save(_model(), path)
    assert load_model(path).graph.initializers["w"].const_value is not None


@pytest.mark.parametrize("name", ["missing/m.onnx", "file/m.onnx"])
def test_a_folder_that_cannot_be_written_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UsageError, match="cannot be written") as caught:
        _save(_model(), tmp_path / name)
    assert caught.value.where == str((tmp_path / name).parent)


def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="Permission denied"):
        _save(_model(), tmp_path / "m.onnx")


def test_a_directory_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory"):
        _save(_model(), tmp_path)


@pytest.mark.parametrize("link", [False, True])
def test_the_models_own_data_is_not_overwritten(link: bool, tmp_path: Path) -> None:
    saved = _save(_model(), tmp_path / "m.onnx", external=True)
    target = tmp_path / "other.onnx" if link else saved.path
    if link:
        assert saved.data_path is not None
        (tmp_path / "other.onnx.data").symlink_to(saved.data_path)
    before = _run(saved.path)
    with pytest.raises(UsageError, match="would overwrite"):
        _save(load_model(saved.path), target, external=True)
    np.testing.assert_array_equal(_run(saved.path), before)


def test_data_that_went_away_is_a_fault_of_the_model(tmp_path: Path) -> None:
    saved = _save(_model(), tmp_path / "m.onnx", external=True)
    model = load_model(saved.path)
    assert saved.data_path is not None
    os.truncate(saved.data_path, 1000)
    for external in (False, True):
        with pytest.raises(ModelError, match="bytes early"):
            _save(model, tmp_path / "out.onnx", external=external)
    assert not (tmp_path / "out.onnx").exists()


def test_two_gigabytes_do_not_fit_inline(tmp_path: Path) -> None:
    with (tmp_path / "big.data").open("wb") as stream:
        stream.truncate(2 << 30)
    model = _model()
    model.graph.initializers["w"].const_value = ir.ExternalTensor(
        "big.data",
        0,
        2 << 30,
        ir.DataType.INT8,
        shape=ir.Shape([1 << 15, 1 << 16]),
        name="w",
        base_dir=tmp_path,
    )
    with pytest.raises(ModelError, match="ends at 2 GiB"):
        _save(model, tmp_path / "m.onnx", external=False)


@pytest.mark.parametrize("external", [False, True])
def test_progress_counts_every_byte(external: bool, tmp_path: Path) -> None:
    progress = _Recorded()
    save_model(_model(), tmp_path / "m.onnx", progress=progress, external_data=external)
    # Inline, the tied weight is written twice.
    assert progress.total == (1 if external else 2) * _W.nbytes + _W[0].nbytes
    assert progress.done == progress.total


def test_the_ir_version_follows_what_is_in_the_model(tmp_path: Path) -> None:
    model = _model()
    _save(model, tmp_path / "m.onnx")
    assert model.ir_version == 8
    next(iter(model.graph)).metadata_props["key"] = "value"
    _save(model, tmp_path / "m.onnx")
    assert model.ir_version == 10
    value = model.graph.initializers["b"]
    value.const_value = ir.tensor(np.zeros(4, np.int8), dtype=ir.DataType.INT2, name="b")
    _save(model, tmp_path / "m.onnx")
    assert model.ir_version == 13
    model.ir_version = 14
    _save(model, tmp_path / "m.onnx")
    assert model.ir_version == 14


def test_the_ir_version_follows_the_opset(tmp_path: Path) -> None:
    model = ir.from_onnx_text(
        '<ir_version: 3, opset_import: ["": 21]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
    )
    _save(model, tmp_path / "m.onnx")
    assert model.ir_version == 10


def test_the_output_has_the_rights_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    saved = _save(_model(), tmp_path / "m.onnx", external=True)
    assert saved.data_path is not None
    expected = (tmp_path / "ordinary").stat().st_mode
    assert saved.path.stat().st_mode == saved.data_path.stat().st_mode == expected


def test_the_ir_version_follows_the_opset_under_its_other_name(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["ai.onnx": 21]> g (float[2] x) => (y) { y = Relu(x) }'
    model = ir.from_proto(onnx.parser.parse_model(text))
    save_model(model, tmp_path / "m.onnx", progress=SilentProgress())
    assert model.ir_version == 10
