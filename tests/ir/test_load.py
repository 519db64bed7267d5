"""Reading models: what is loaded, what is refused, and what is never read."""

import itertools
import resource
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.errors import QCompilerError
from qcompiler.ir.fingerprint import fingerprint
from qcompiler.ir.load import load_model
from qcompiler.ir.tensor_sites import tensor_sites
from qcompiler.ir.weights import read_all
from tests.support.malformed import MALFORMED, MalformedCase, sound_model

_AT_LOAD = [case for case in MALFORMED if case.refused_by == "load"]
_LATER = [case for case in MALFORMED if case.refused_by == "compile"]


def _write(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _externalized(folder: Path) -> Path:
    """Write the sound model with its weight in `model.data`."""
    model = sound_model()
    onnx.external_data_helper.convert_model_to_external_data(
        model, location="model.data", size_threshold=0
    )
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize("case", _AT_LOAD, ids=lambda case: case.name)
def test_refuses(case: MalformedCase, tmp_path: Path) -> None:
    path = case.write(tmp_path)
    with pytest.raises(QCompilerError) as caught:
        load_model(path)
    assert case.expected_text in str(caught.value)
    assert caught.value.exit_code == case.expected_exit
    assert caught.value.where == str(path)
    assert caught.value.hint


@pytest.mark.parametrize("case", _LATER, ids=lambda case: case.name)
def test_leaves_judging_values_to_the_passes(case: MalformedCase, tmp_path: Path) -> None:
    assert load_model(case.write(tmp_path)).graph.initializers["w"].const_value is not None


def test_there_are_thirty_malformed_inputs_with_names_of_their_own() -> None:
    assert len({case.name for case in MALFORMED}) == len(MALFORMED) >= 30


def test_loads_inline_weights(tmp_path: Path) -> None:
    model = load_model(_write(sound_model(), tmp_path))
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    expected = numpy_helper.to_array(sound_model().graph.initializer[0])
    np.testing.assert_array_equal(read_all(tensor), expected)
    assert [node.name for node in model.graph] == ["matmul", "relu"]


def test_external_data_is_not_read(tmp_path: Path) -> None:
    """A sparse file of 14 GiB loads at once and takes no memory."""
    proto = sound_model()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.dims[:]
    tensor.dims.extend([32, 14 << 23])
    tensor.external_data.add(key="location", value="big.data")
    with (tmp_path / "big.data").open("wb") as stream:
        stream.truncate(14 << 30)
    path = _write(proto, tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    model = load_model(path)
    assert time.process_time() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    loaded = model.graph.initializers["w"].const_value
    assert loaded is not None
    assert loaded.nbytes == 14 << 30


def test_external_tensors_everywhere_know_their_folder(tmp_path: Path) -> None:
    """In initializers of a body, in an attribute, and in an attribute of a function."""
    (tmp_path / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())

    def external(name: str) -> TensorProto:
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="w.bin")
        return tensor

    def branch(name: str) -> onnx.GraphProto:
        node = helper.make_node("Identity", [f"{name}w"], [name])
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, [4])
        return helper.make_graph([node], name, [], [output], [external(f"{name}w")])

    nodes = [
        helper.make_node("Constant", [], ["k"], value=external("k")),
        helper.make_node("If", ["c"], ["i"], then_branch=branch("a"), else_branch=branch("b")),
        helper.make_node("f", ["i"], ["j"], domain="local"),
        helper.make_node("Add", ["j", "k"], ["y"]),
    ]
    body = [
        helper.make_node("Constant", [], ["q"], value=external("q")),
        helper.make_node("Add", ["p", "q"], ["r"]),
    ]
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function("local", "f", ["p"], ["r"], body, opsets)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
    )
    opsets.append(helper.make_opsetid("local", 1))
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8)
    tensors = [site.tensor for site in tensor_sites(load_model(_write(model, tmp_path)))]
    assert len(tensors) == 4
    for tensor in tensors:
        np.testing.assert_array_equal(tensor.numpy(), [0, 1, 2, 3])


def test_initializers_of_old_models_are_no_inputs(tmp_path: Path) -> None:
    proto = sound_model()
    proto.ir_version = 3
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [32, 16]))
    model = load_model(_write(proto, tmp_path))
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert model.graph.initializers["w"].is_initializer()


def test_inputs_with_a_default_stay_inputs(tmp_path: Path) -> None:
    proto = sound_model()
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [32, 16]))
    model = load_model(_write(proto, tmp_path))
    assert [value.name for value in model.graph.inputs] == ["x", "w"]


def test_nodes_in_any_order_are_sorted(tmp_path: Path) -> None:
    proto = sound_model()
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    model = load_model(_write(proto, tmp_path))
    assert [node.name for node in model.graph] == ["matmul", "relu"]


def test_dimensions_of_minus_one_become_unknown(tmp_path: Path) -> None:
    proto = sound_model()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    shape = load_model(_write(proto, tmp_path)).graph.inputs[0].shape
    assert shape is not None
    assert not isinstance(shape[0], int)
    assert shape[1] == 64


def test_reads_hard_links(tmp_path: Path) -> None:
    path = _externalized(tmp_path)
    (tmp_path / "other.data").hardlink_to(tmp_path / "model.data")
    tensor = load_model(path).graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy().shape == (64, 32)


def test_reads_a_cache_of_linked_blobs(tmp_path: Path) -> None:
    """Hugging Face's cache: model and data are links into one folder of files named by hash."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    path = _externalized(tmp_path)
    path.rename(blobs / "111")
    (tmp_path / "model.data").rename(blobs / "222")
    (snapshot / "model.onnx").symlink_to("../../blobs/111")
    (snapshot / "model.data").symlink_to("../../blobs/222")
    tensor = load_model(snapshot / "model.onnx").graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy().shape == (64, 32)


def test_works_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _externalized(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = load_model("model.onnx")
    monkeypatch.chdir("/")
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    assert read_all(tensor).shape == (64, 32)


def test_thirty_nested_bodies_load(tmp_path: Path) -> None:
    inner = helper.make_node("Relu", ["h"], ["v"])
    for level in range(25):
        output = helper.make_tensor_value_info(inner.output[0], TensorProto.FLOAT, None)
        body = helper.make_graph([inner], f"b{level}", [], [output])
        inner = helper.make_node("If", ["c"], [f"v{level}"], then_branch=body, else_branch=body)
        if level > 2:
            inner.attribute[1].g.node[0].CopyFrom(
                helper.make_node("Relu", ["h"], [body.output[0].name])
            )
    proto = sound_model()
    inner.output[0] = "y"
    proto.graph.node[1].CopyFrom(inner)
    proto.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    assert sum(1 for _ in load_model(_write(proto, tmp_path)).graph.all_nodes()) > 25


def test_checks_are_no_square_of_the_nodes(tmp_path: Path) -> None:
    proto = sound_model()
    names = ["h", *(f"v{index}" for index in range(4998)), "y"]
    del proto.graph.node[1:]
    for index, (source, result) in enumerate(itertools.pairwise(names)):
        proto.graph.node.append(helper.make_node("Relu", [source], [result], name=f"n{index}"))
    path = _write(proto, tmp_path)
    start = time.process_time()
    load_model(path)
    # 0.6 s here; checks that look at all nodes for each node take minutes.
    assert time.process_time() - start < 10


def test_fingerprint_covers_external_data(tmp_path: Path) -> None:
    path = _externalized(tmp_path)
    first = fingerprint(path)
    assert first == fingerprint(path)
    assert len(first) == 64
    data = bytearray((tmp_path / "model.data").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.data").write_bytes(data)
    assert fingerprint(path) != first


@pytest.mark.parametrize(
    "name", ["external-missing", "external-parent", "truncated", "no-such-file"]
)
def test_fingerprint_refuses(name: str, tmp_path: Path) -> None:
    (case,) = [case for case in MALFORMED if case.name == name]
    with pytest.raises(QCompilerError, match=case.expected_text):
        fingerprint(case.write(tmp_path))
