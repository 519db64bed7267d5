"""Ops that give elements other places, and padding."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from qcompiler.errors import ModelError
from qcompiler.execution.torch import Program
from tests.support.graphs import Array, build, random_array
from tests.support.torch_programs import agrees_with_runtime, gradients_agree, run_program

_MOVES: dict[str, tuple[str, dict[str, Any]]] = {
    "reshape": ("Reshape(x, a)", {"a": np.array([4, 0, -1])}),
    "transpose": ("Transpose<perm = [2, 0, 1]>(x)", {}),
    "transpose reversed": ("Transpose(x)", {}),
    "squeeze and unsqueeze": ("Unsqueeze(x, a)", {"a": np.array([-1, 0])}),
    "flatten": ("Flatten<axis = -1>(x)", {}),
    "expand": ("Expand(x, a)", {"a": np.array([2, 1, 3, 1])}),
    "expand to fewer axes": ("Expand(x, a)", {"a": np.array([1])}),
    "concat": ("Concat<axis = -1>(x, x)", {}),
    "slice": ("Slice(x, a, b, c)", {"a": [1, 0], "b": [9, -1], "c": [0, -1]}),
    "slice backwards": (
        "Slice(x, a, b, c, d)",
        {"a": [-1, 9], "b": [-99, 0], "c": [0, 2], "d": [-2, -1]},
    ),
    "slice of nothing": ("Slice(x, a, b)", {"a": [3], "b": [1]}),
    "tile": ("Tile(x, a)", {"a": np.array([2, 1, 3])}),
    "pad": ("Pad(x, a)", {"a": np.array([1, 0, 2, 0, 3, -1])}),
    "pad with a value": ("Pad(x, a, b)", {"a": np.array([1, 0, 2, 0, 3, -1]), "b": 5}),
    "pad some axes": ("Pad(x, a, , c)", {"a": np.array([1, 2]), "c": np.array([-1])}),
    "pad reflected": ('Pad<mode = "reflect">(x, a)', {"a": np.array([1, 0, 2, 2, 1, 3])}),
    "pad reflected in space": ('Pad<mode = "reflect">(x, a)', {"a": np.array([0, 0, 2, 0, 0, 3])}),
    "pad edges": ('Pad<mode = "edge">(x, a)', {"a": np.array([1, 0, 2, 2, 1, 5])}),
    "pad edges in space": ('Pad<mode = "edge">(x, a)', {"a": np.array([0, 0, 2, 0, 0, 3])}),
    "pad wrapped": ('Pad<mode = "wrap">(x, a)', {"a": np.array([1, 0, 2, 2, 1, 3])}),
    "pad wrapped and cropped": ('Pad<mode = "wrap">(x, a)', {"a": np.array([0, 0, 2, 0, 0, -1])}),
    "crop and pad": ("CenterCropPad(x, a)", {"a": np.array([2, 6, 5])}),
    "reverse sequence": ("ReverseSequence(x, a)", {"a": np.array([4, 1, 3])}),
    "reverse by rows": (
        "ReverseSequence<time_axis = 1, batch_axis = 0>(x, a)",
        {"a": np.array([3, 0, 1, 2])},
    ),
    "upper triangle": ("Trilu(x)", {}),
    "lower triangle": ("Trilu<upper = 0>(x, a)", {"a": np.array(1)}),
    "far diagonal": ("Trilu(x, a)", {"a": np.array(1 << 40)}),
}


def _moves() -> list[Any]:
    return [pytest.param(*move, id=name) for name, move in _MOVES.items()]


def _graph(expression: str, kind: str) -> str:
    return f"g ({kind}[4, 3, 5] x) => ({kind}[] y) {{ y = {expression} }}"


def _weights(given: dict[str, Any], dtype: Any) -> dict[str, Array]:
    """Return the further inputs: indices, but for the scalar to pad with."""
    arrays = {name: np.asarray(each) for name, each in given.items()}
    return {
        name: array.astype(dtype if name == "b" and not array.ndim else np.int64)
        for name, array in arrays.items()
    }


@pytest.mark.parametrize(("expression", "given"), _moves())
def test_gradients_follow_the_elements(expression: str, given: dict[str, Any]) -> None:
    values = random_array(4, 3, 5, dtype=np.float64)

    gradients_agree(_graph(expression, "double"), {"x": values}, _weights(given, np.float64))


@pytest.mark.parametrize(("expression", "given"), _moves())
@pytest.mark.parametrize("kind", ["float", "int64", "bool"])
def test_elements_go_where_onnx_runtime_puts_them(
    expression: str, given: dict[str, Any], kind: str
) -> None:
    dtype = np.dtype("float32" if kind == "float" else kind)
    values = (random_array(4, 3, 5) * 100).astype(dtype)

    agrees_with_runtime(
        _graph(expression, kind), {"x": values}, _weights(given, dtype), tolerance=0
    )


@pytest.mark.parametrize(("expression", "given"), _moves())
@pytest.mark.parametrize("kind", ["uint16", "uint32", "uint64"])
def test_large_unsigned_integers_move_as_others_do(
    expression: str, given: dict[str, Any], kind: str
) -> None:
    top = int(np.iinfo(kind).max)
    numbers = np.arange(10, 70).reshape(4, 3, 5)
    (wanted,) = run_program(
        _graph(expression, "int64"), {"x": numbers}, _weights(given, np.int64)
    ).values()

    (found,) = run_program(
        _graph(expression, kind),
        {"x": np.array(top, kind) - numbers.astype(kind)},
        _weights(given, kind),
    ).values()

    assert found.dtype == kind
    # What is filled in stays; the elements are at the upper end of their type.
    assert found.tolist() == np.where(wanted < 10, wanted, top - wanted.astype(object)).tolist()


@pytest.mark.parametrize(
    ("expression", "given"), [move for move in _moves() if move.id != "pad with a value"]
)
def test_strings_move_as_numbers_do(expression: str, given: dict[str, Any]) -> None:
    numbers = np.arange(10, 70).reshape(4, 3, 5)
    (wanted,) = run_program(
        _graph(expression, "int64"), {"x": numbers}, _weights(given, np.int64)
    ).values()
    (found,) = run_program(
        _graph(expression, "string"),
        {"x": numbers.astype(str).astype(object)},
        _weights(given, np.int64),
    ).values()

    assert found.shape == wanted.shape
    assert found.tolist() == np.where(wanted == 0, "", wanted.astype(str)).tolist()


@pytest.mark.parametrize(
    ("text", "opset"),
    [
        ("u = Unsqueeze<axes = [0, 4]>(x) y = Squeeze<axes = [0, -1]>(u)", 11),
        ("y = Squeeze(x)", 9),
        ("y = Unsqueeze<axes = [3, 0]>(x)", 7),
        ("y = Slice<starts = [1, -2], ends = [99, -1], axes = [2, 0]>(x)", 7),
        ("y = Slice<starts = [1, -2], ends = [99, -1]>(x)", 9),
        ('y = Pad<pads = [0, 0, 1, -1, 0, 2], mode = "constant", value = 1.5>(x)', 7),
        ('y = Pad<pads = [0, 0, 1, 0, 0, 2], mode = "reflect">(x)', 10),
        ("y, z = Split<axis = 2, split = [2, 3]>(x)", 11),
        ("y, z = Split<axis = 0>(x)", 9),
        ("y = Flatten(x)", 7),
    ],
)
def test_old_forms_with_attributes(text: str, opset: int) -> None:
    graph = f"g (float[4, 3, 5] x) => (float[] y) {{ {text} }}"

    agrees_with_runtime(graph, {"x": random_array(4, 3, 5)}, opset=opset, tolerance=0)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("y = Reshape<shape = [4, 0, -1]>(x)", (4, 3, 5)),
        ("y = Pad<paddings = [0, 0, 1, 0, 0, 2]>(x)", (4, 3, 8)),
        ("y = Concat(x, x)", (4, 6, 5)),
    ],
)
def test_forms_of_version_1(text: str, shape: tuple[int, ...]) -> None:
    graph = f"g (float[4, 3, 5] x) => (float[] y) {{ {text} }}"

    (found,) = run_program(graph, {"x": random_array(4, 3, 5)}, opset=1).values()

    assert found.shape == shape


def test_tile_of_version_1_repeats_one_axis() -> None:
    graph = "g (float[2, 3] x) => (float[] y) { y = Tile(x, n, a) }"

    (found,) = run_program(
        graph, {"x": random_array(2, 3)}, {"n": np.float32(2), "a": np.float32(1)}, opset=5
    ).values()

    np.testing.assert_array_equal(found, np.tile(random_array(2, 3), (1, 2)))


@pytest.mark.parametrize(
    "text",
    [
        "y, z = Split<axis = 2, num_outputs = 2>(x)",
        "y, z = Split<axis = -1>(x, sizes)",
        "y, z, w = Split<num_outputs = 3>(x)",
    ],
)
def test_splits_in_unequal_parts(text: str) -> None:
    outputs = ", ".join(f"float[] {name.strip()}" for name in text.split("=")[0].split(","))
    graph = f"g (float[7, 3, 5] x) => ({outputs}) {{ {text} }}"
    weights = {"sizes": np.array([1, 4])} if "sizes" in text else {}

    agrees_with_runtime(graph, {"x": random_array(7, 3, 5)}, weights, tolerance=0)


def test_reshape_to_no_elements() -> None:
    graph = "g (float[0, 3] x) => (float[] y) { y = Reshape<allowzero = 1>(x, a) }"

    agrees_with_runtime(
        graph, {"x": np.zeros((0, 3), np.float32)}, {"a": np.array([3, 0])}, tolerance=0
    )


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_space_and_depth_are_inverse_and_differentiable(mode: str) -> None:
    graph = f"""
      g (double[2, 8, 2, 3] x) => (double y, double z) {{
        y = DepthToSpace<blocksize = 2, mode = "{mode}">(x)
        z = SpaceToDepth<blocksize = 2, mode = "{mode}">(y)
      }}
    """
    values = random_array(2, 8, 2, 3, dtype=np.float64)

    np.testing.assert_array_equal(
        list(run_program(graph, {"x": values}, opset=28).values())[1], values
    )
    gradients_agree(graph, {"x": values}, opset=28)


def test_pads_with_a_live_value() -> None:
    graph = "g (double[2] x, double v) => (double[] y) { y = Pad(x, a, v) }"
    feeds = {"x": random_array(2, dtype=np.float64), "v": np.array(0.5)}

    gradients_agree(graph, feeds, {"a": np.array([2, 1])})


def test_pads_strings_with_a_string() -> None:
    graph = "g (string[2] x, string v) => (string[] y) { y = Pad(x, a, v) }"
    feeds = {"x": np.array(["a", "b"], object), "v": np.array("c", object)}

    (found,) = run_program(graph, feeds, {"a": np.array([1, 0])}).values()

    assert found.tolist() == ["c", "a", "b"]


def test_pads_with_integers_that_floats_do_not_hold() -> None:
    graph = "g (int64[2] x) => (int64[] y) { y = Pad(x, a, v) }"
    value = (1 << 62) + 1

    (found,) = run_program(
        graph, {"x": np.array([1, 2])}, {"a": np.array([1, 0]), "v": np.array(value)}
    ).values()

    assert found.tolist() == [value, 1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pads_halves(dtype: torch.dtype, mode: str) -> None:
    graph = f'g (float[1, 1, 4, 4] x) => (float[] y) {{ y = Pad<mode = "{mode}">(x, a) }}'
    model = build(graph, {"a": np.array([0, 0, 1, 1, 0, 0, 2, 3])})
    values = torch.arange(16.0).reshape(1, 1, 4, 4)

    half = Program.from_subgraph(model, dtype=dtype)({"x": values})["y"]

    assert half.dtype == dtype
    assert torch.equal(half.float(), Program.from_subgraph(model)({"x": values})["y"])


def test_float_codes_with_gradients_move_next_to_integer_ones() -> None:
    model = build(
        """
        g (float[2, 3] s) => (float[] y) {
          a = Concat<axis = 0>(w, v)
          b = Transpose(a)
          y = DequantizeLinear(b, t)
        }
        """,
        {
            "w": np.ones((2, 3), np.int8),
            "v": np.ones((1, 3), np.int8),
            "t": np.float32(0.5),
        },
    )
    live = torch.ones(2, 3, requires_grad=True)

    result = Program.from_subgraph(model)({"s": live.detach()}, weights={"w": live})["y"]
    (gradient,) = torch.autograd.grad(result.sum(), live)

    assert torch.equal(gradient, torch.full((2, 3), 0.5))


@pytest.mark.parametrize(
    ("text", "opset", "reason"),
    [
        ("y = Squeeze(x, a)", 21, "axis 1 has 3 elements"),
        ("y, z = Split<axis = 2>(x)", 13, "cannot be split into 2 equal parts"),
        ("y, z, u, v = Split<axis = 2>(x)", 18, "cannot be split into 4 equal parts"),
        ('y = Pad<mode = "wrap">(x, b)', 18, "version 18 has no mode wrap"),
        ('y = Pad<mode = "mirror">(x, b)', 21, "no mode mirror"),
        ('y = DepthToSpace<blocksize = 1, mode = "RCD">(x)', 21, "no mode RCD"),
    ],
)
def test_refuses_what_the_operator_does_not_define(text: str, opset: int, reason: str) -> None:
    graph = f"g (float[4, 3, 5] x) => (float[] y) {{ {text} }}"
    if "DepthToSpace" in text:
        graph = graph.replace("[4, 3, 5]", "[1, 4, 3, 5]")
    weights = {"a": np.array([1]), "b": np.zeros(6, np.int64)}
    used = {name: each for name, each in weights.items() if f", {name})" in text}
    program = Program.from_subgraph(build(graph, used, opset=opset))

    with pytest.raises(ModelError, match=reason):
        program({"x": np.ones((1, 4, 3, 5) if "Depth" in text else (4, 3, 5), np.float32)})


@pytest.mark.parametrize(
    ("start", "end", "step"),
    [(-99, 99, 2), (-(1 << 63), (1 << 63) - 1, 1), (3, -(1 << 63), -2), (-99, -99, -1), (4, 1, 3)],
)
def test_slice_clamps_its_bounds_as_the_operator_says(start: int, end: int, step: int) -> None:
    graph = "g (float[4, 3, 5] x) => (float[] y) { y = Slice(x, a, b, c, d) }"
    parts = {"a": start, "b": end, "c": -1, "d": step}

    agrees_with_runtime(
        graph,
        {"x": random_array(4, 3, 5)},
        {name: np.array([each]) for name, each in parts.items()},
        tolerance=0,
    )


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_8_bit_floats_move_as_bits(name: str) -> None:
    kind = name.replace("_", "")
    graph = f"""
      g ({kind}[2, 3] x) => ({kind}[] y) {{
        u = Pad<mode = "edge">(x, a)
        v = Slice(u, b, c, , d)
        y = Gather<axis = 1>(v, e)
      }}
    """
    dtype = np.dtype(getattr(ml_dtypes, name))
    weights = {"a": [0, 0, 1, 0], "b": [-1, 1], "c": [-9, 9], "d": [-1, 1], "e": [-1, 0]}

    (found,) = run_program(
        graph,
        {"x": np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype)},
        {name: np.array(each) for name, each in weights.items()},
        opset=25,
    ).values()

    assert found.dtype == dtype
    assert found.astype(int).tolist() == [[5, 4], [5, 4], [2, 1]]
