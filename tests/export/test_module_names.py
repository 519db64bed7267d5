import onnx_ir as ir

from qcompiler.export.module_names import (
    NAME_SCOPES,
    keep_module_names,
    module_of,
    name_after_modules,
)
from tests.support.graphs import build, random_array

GRAPH = """
m (float[2, 8] x) => (float[2, 8] y) {
  [a] t = MatMul(x, w)
  [b] u = Add(t, v)
  [c] r = Relu(u)
  [d] s, i = TopK<axis = 1>(r, k)
  [e] y = Mul(s, two)
}
"""


def labelled(scopes: dict[str, list[str]]) -> ir.Model:
    model = build(
        GRAPH,
        {
            "w": random_array(8, 8),
            "v": random_array(8),
            "k": [8],
            "two": random_array(1),
        },
    )
    model.graph.initializers["w"].name = "fc.weight"
    for node in model.graph:
        if node.name in scopes:
            node.metadata_props[NAME_SCOPES] = repr(scopes[node.name])
    return model


SCOPES = {
    "a": ["", "fc", "linear"],
    "b": ["", "fc", "linear"],
    "c": ["", "act", "relu"],
    "d": ["", "topk"],
    "e": ["", "fc@1", "mul"],
}


def test_names() -> None:
    model = labelled(SCOPES)
    name_after_modules(model, {"fc.weight"})
    names = [node.name for node in model.graph]
    assert names == ["fc", "fc/Add", "act", "TopK", "fc/Mul"]
    values = [output.name for node in model.graph for output in node.outputs]
    assert values == ["fc", "fc/Add", "act", "TopK.0", "TopK.1", "y"]
    assert list(model.graph.initializers) == ["fc.weight", "fc/Add.B", "TopK.K", "fc/Mul.B"]


def test_a_node_without_metadata_belongs_to_its_reader() -> None:
    model = labelled({name: scope for name, scope in SCOPES.items() if name != "b"})
    name_after_modules(model, {"fc.weight"})
    assert [node.name for node in model.graph][:3] == ["fc", "act/Add", "act/Relu"]


def test_scopes_that_are_no_list() -> None:
    model = labelled({})
    node = model.graph.node(0)
    for text in (
        "[",
        "5",
        "__import__('os')",
        "[]",
        "['x']",
        "['', '_empty_nn_module_stack_x', 'y']",
    ):
        node.metadata_props[NAME_SCOPES] = text
        assert module_of(node) == ""


def test_an_unlabelled_graph() -> None:
    model = labelled({})
    name_after_modules(model, ())
    assert [node.name for node in model.graph] == ["fc", "Add", "Relu", "TopK", "Mul"]


def test_notes_of_the_machine_are_dropped() -> None:
    model = labelled(SCOPES)
    node = model.graph.node(0)
    node.metadata_props["pkg.torch.onnx.stack_trace"] = "File /home/me/model.py"
    node.outputs[0].metadata_props["a"] = "b"
    model.graph.metadata_props.update({"kept": "1", "dropped": "2"})
    keep_module_names(model, {"kept"})
    assert set(node.metadata_props) == {NAME_SCOPES}
    assert not node.outputs[0].metadata_props
    assert model.graph.metadata_props == {"kept": "1"}
