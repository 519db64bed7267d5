"""Type and shape inference on models."""

import onnx_ir as ir

from qcompiler.ir.shapes import infer_shapes
from tests.support.graphs import body_of, build


def test_values_of_the_graph_and_of_bodies_get_shapes() -> None:
    model = build("""g (float[N,3] x, bool p) => (y) {
      h = Transpose (x)
      y = If (p) <
        then_branch = then_g () => (a) { t = Neg (h) a = Abs (t) },
        else_branch = else_g () => (b) { b = Abs (h) }
      >
    }""")
    infer_shapes(model)
    h = model.graph[0].outputs[0]
    assert h.shape == ir.Shape([3, "N"])
    assert body_of(model, "then_g")[0].outputs[0].dtype == ir.DataType.FLOAT


def test_declared_outputs_stay() -> None:
    model = build("g (float[2,3] x) => (float[rows,cols] y) { y = Relu (x) }")
    infer_shapes(model)
    assert model.graph.outputs[0].shape == ir.Shape(["rows", "cols"])


def test_a_sequence_does_not_become_a_tensor() -> None:
    model = build("""g (float[4] x) => (float[N] y) {
      s = SplitToSequence (x)  i = Identity (s)  y = ConcatFromSequence <axis = 0> (i)
    }""")
    infer_shapes(model)
    assert not any(
        isinstance(node.outputs[0].type, ir.TensorType) for node in list(model.graph)[:2]
    )


def test_what_an_if_gives_is_a_tensor_only_where_its_bodies_say_so() -> None:
    model = build("""g (float[4] x, bool p) => (y) {
      s = If (p) <
        then_branch = then_g () => (a) { a = SplitToSequence (x) },
        else_branch = else_g () => (b) { n = Neg (x) b = SplitToSequence (n) }
      >
      t = If (p) <
        then_branch = then_h () => (c) { c = Neg (x) },
        else_branch = else_h () => (d) { d = Abs (x) }
      >
      u = ConcatFromSequence <axis = 0> (s)
      y = Add (t, u)
    }""")
    infer_shapes(model)
    assert not isinstance(model.graph[0].outputs[0].type, ir.TensorType)
    assert model.graph[1].outputs[0].shape == ir.Shape([4])
