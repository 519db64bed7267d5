"""Where a graph is cut, and which stretches count as equal."""

from itertools import pairwise

import onnx_ir as ir
import pytest

from qcompiler.execution.segments import Segment, cut, segments_of
from qcompiler.quant.granularity import PerBlock
from tests.support.coded import coded_weight
from tests.support.graphs import build, random_array

SIZE = 64
WEIGHT_BYTES = SIZE * SIZE * 4


def chain(length: int, *, typed: bool = True, tail: str = "") -> ir.Model:
    body = " ".join(f"[m{i}] v{i + 1} = MatMul(v{i}, w{i})" for i in range(length))
    text = (
        f"g (float[b, {SIZE}] v0) => (float[b, {SIZE}] y) {{ {body} y = Relu(v{length}) {tail} }}"
    )
    model = build(text, {f"w{i}": random_array(SIZE, SIZE, seed=i) for i in range(length)})
    for node in model.graph if typed else ():
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(["b", SIZE])
    return model


def names(segment: Segment) -> list[str]:
    return [node.name or node.op_type for node in segment.nodes]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1, [["m0"], ["m1"], ["m2"], ["m3", "Relu"]]),
        (2, [["m0", "m1"], ["m2", "m3", "Relu"]]),
        (3, [["m0", "m1", "m2"], ["m3", "Relu"]]),
        (9, [["m0", "m1", "m2", "m3", "Relu"]]),
    ],
)
def test_cuts_where_the_limit_is_reached(limit: int, expected: list[list[str]]) -> None:
    segments = list(cut(chain(4).graph, limit * WEIGHT_BYTES))
    assert [names(segment) for segment in segments] == expected
    for one, other in pairwise(segments):
        assert one.outputs == other.inputs


def test_does_not_cut_where_a_type_is_unknown() -> None:
    assert len(list(cut(chain(4, typed=False).graph, WEIGHT_BYTES))) == 1


def test_equal_structure_has_equal_signatures() -> None:
    segments = list(cut(chain(4).graph, WEIGHT_BYTES))
    first, second, _, last = (segment.signature() for segment in segments)
    assert first == second
    assert first != last


def test_other_attributes_types_and_shape_constants_differ() -> None:
    text = "g (float[b, 64] x) => (float[b, n] y) { t = Reshape(x, s) y = Elu<alpha=A>(t) }"

    def signature(alpha: str, shape: list[int], dim: int = 64) -> object:
        model = build(
            text.replace("A>", f"{alpha}>").replace("64", str(dim)),
            {"s": ir.tensor(shape, dtype=ir.DataType.INT64)},
        )
        return next(iter(cut(model.graph, 1))).signature()

    base = signature("1.0", [-1, 8])
    assert base == signature("1.0", [-1, 8])
    assert base != signature("2.0", [-1, 8])
    assert base != signature("1.0", [-1, 4])
    assert base != signature("1.0", [-1, 8], dim=32)


def test_constant_nodes_come_with_their_readers() -> None:
    weights = [
        coded_weight((SIZE, SIZE), PerBlock(0, 32), bits=4, signed=True, name=f"w{i}", seed=i)
        for i in range(2)
    ]
    text = f"""g (float[b, {SIZE}] x) => (float[b, {SIZE}] z) {{
        {weights[0].dequantize("d0", node="q0")} {weights[1].dequantize("d1", node="q1")}
        [a] y = MatMul(x, d0)
        [c] z = MatMul(y, d1) }}"""
    model = build(text, {**weights[0].weights, **weights[1].weights})
    for value in (model.graph.node("a").outputs[0],):
        value.type = ir.TensorType(ir.DataType.FLOAT)
    assert [names(segment) for segment in cut(model.graph, 1)] == [["q0", "a"], ["q1", "c"]]


def test_does_not_cut_through_integer_arithmetic() -> None:
    text = """g (float[b, 64] x) => (float[b, 64] y) {
        [q] l, s, z = DynamicQuantizeLinear(x)
        [m] i = MatMulInteger(l, w, z)
        [f] c = Cast<to=1>(i)
        [t] k = Mul(s, ws)
        [r] y = Mul(c, k) }"""
    codes = coded_weight((64, 64), PerBlock(0, 64), bits=8, signed=True).weights["w"]
    model = build(text, {"w": codes, "ws": random_array(64)})
    for node in model.graph:
        for output in node.outputs:
            output.type = output.type or ir.TensorType(ir.DataType.FLOAT)
    assert len(list(cut(model.graph, 1))) == 1


def test_bodies_are_never_equal() -> None:
    text = """g (bool c, float[2] x) => (float[2] y) {
        y = If (c) <
            then_branch = yes () => (float[2] t) { t = Add(x, w) },
            else_branch = no () => (float[2] e) { e = Neg(x) }
        > }"""
    (segment,) = cut(build(text, {"w": random_array(2)}).graph, 1)
    assert segment.signature() is None
    assert {value.name for value in segment.inputs} == {"c", "x"}
    assert {value.name for value in segment.initializers} == {"w"}


def test_nodes_that_lie_apart_are_a_segment_too() -> None:
    model = build(
        """g (float[2] x) => (float[2] y, float[2] z) {
            [a] p = Add(x, w) [b] q = Neg(p) [c] y = Mul(q, p) [d] z = Exp(p) }""",
        {"w": random_array(2)},
    )
    nodes = {node.name: node for node in model.graph}
    apart, rest = segments_of(model.graph, [[nodes["a"], nodes["c"]], [nodes["b"]]])
    assert names(apart) == ["a", "c"]
    assert [value.name for value in apart.inputs] == ["x", "q"]
    assert [value.name for value in apart.outputs] == ["p", "y"]
    assert [value.name for value in apart.initializers] == ["w"]
    assert ([v.name for v in rest.inputs], [v.name for v in rest.outputs]) == (["p"], ["q"])
