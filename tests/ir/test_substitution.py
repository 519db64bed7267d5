"""What a substituted node takes over and what goes with the old one."""

import onnx_ir as ir

from qcompiler.ir.substitution import needs_microsoft_ops, new_node, remove_unread, substitute
from tests.support.graphs import build, op_types, random_array


def model() -> ir.Model:
    text = """g (float[2, 3] x) => (float[2, 3] y) {
        t = Transpose<perm=[0, 1]>(w)
        [site] y = Add(x, t) }"""
    made = build(text, {"w": random_array(2, 3)})
    made.graph.node("site").metadata_props["qcompiler.scheme"] = "w8a16:sym"
    return made


def test_last_node_takes_over_name_output_and_facts() -> None:
    graph = model().graph
    site = graph.node("site")
    double = new_node("maker", "Add", [site.inputs[0], site.inputs[0]], "site.double")
    half = new_node("maker", "Neg", [double.outputs[0]], "site.new")
    substitute(site, [double, half])
    assert [node.op_type for node in graph] == ["Add", "Neg"]
    assert (half.name, half.outputs[0].name) == ("site", "y")
    assert graph.outputs[0] is half.outputs[0]
    assert half.metadata_props == {
        "qcompiler.scheme": "w8a16:sym",
        "qcompiler.origin_op": "Add",
        "qcompiler.created_by": "maker",
    }
    assert double.metadata_props == {"qcompiler.created_by": "maker"}


def test_weights_nobody_reads_go_too() -> None:
    made = model()
    site = made.graph.node("site")
    substitute(site, [new_node("maker", "Neg", [site.inputs[0]], "n")])
    assert op_types(made) == ["Neg"]
    assert list(made.graph.initializers) == []


def test_weights_somebody_reads_stay() -> None:
    made = model()
    weight = made.graph.initializers["w"]
    remove_unread(weight)
    remove_unread(None)
    assert "w" in made.graph.initializers


def test_outputs_are_named_after_the_node() -> None:
    node = new_node("maker", "DynamicQuantizeLinear", [None], "q", outputs=3)
    assert [output.name for output in node.outputs] == ["q.0", "q.1", "q.2"]
    typed = new_node("maker", "Neg", [None], "n", dtype=ir.DataType.FLOAT16)
    assert typed.outputs[0].dtype == ir.DataType.FLOAT16


def test_the_operator_set_is_declared_once() -> None:
    made = model()
    needs_microsoft_ops(made)
    needs_microsoft_ops(made)
    assert made.opset_imports["com.microsoft"] == 1
