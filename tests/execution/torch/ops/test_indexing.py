"""Ops that pick and replace elements by index."""

from typing import Any

import numpy as np
import pytest
import torch

from qcompiler.errors import ModelError
from qcompiler.execution.torch import Program
from tests.support.graphs import build, random_array
from tests.support.torch_programs import agrees_with_runtime, gradients_agree, run_program

_PICKS: dict[str, tuple[str, dict[str, Any]]] = {
    "gather rows": ("Gather(x, i)", {"i": [[0, -1], [2, 2]]}),
    "gather one": ("Gather<axis = 1>(x, i)", {"i": -2}),
    "gather columns": ("Gather<axis = -1>(x, i)", {"i": [[0], [-1]]}),
    "gather elements": ("GatherElements<axis = 1>(x, i)", {"i": [[0, -1], [2, 2], [1, 0]]}),
    "gather slices": ("GatherND(x, i)", {"i": [[[0], [-1]]]}),
    "gather tuples": ("GatherND(x, i)", {"i": [[0, -1], [2, 2]]}),
    "gather by batch": ("GatherND<batch_dims = 1>(x, i)", {"i": [[1], [-1], [0]]}),
    "compress": ("Compress<axis = -1>(x, c)", {"c": [True, False, True]}),
    "compress flat": ("Compress(x, c)", {"c": [False, True, True, False, True]}),
}
_REPLACEMENTS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "elements": ("ScatterElements<axis = 1%s>(x, i, u)", {"i": [[0, -1], [2, 1]]}, (2, 2)),
    "slices": ("ScatterND%s(x, i, u)", {"i": [[0], [-1]]}, (2, 4)),
    "tuples": ("ScatterND%s(x, i, u)", {"i": [[[0, -1]], [[2, 1]]]}, (2, 1)),
}


def _picks() -> list[Any]:
    return [pytest.param(*pick, id=name) for name, pick in _PICKS.items()]


def _weights(given: dict[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(each) for name, each in given.items()}


def _graph(expression: str, kind: str, *further: str) -> str:
    inputs = ", ".join((f"{kind}[3, 4] x", *further))
    return f"g ({inputs}) => ({kind}[] y) {{ y = {expression} }}"


def _reducing(expression: str, reduction: str) -> str:
    if reduction == "none":
        return expression % ""
    attribute = f'reduction = "{reduction}"'
    return expression % (f", {attribute}" if "axis" in expression else f"<{attribute}>")


@pytest.mark.parametrize(("expression", "given"), _picks())
def test_gradients_of_picks(expression: str, given: dict[str, Any]) -> None:
    values = random_array(3, 4, dtype=np.float64)

    gradients_agree(_graph(expression, "double"), {"x": values}, _weights(given))


@pytest.mark.parametrize(("expression", "given"), _picks())
@pytest.mark.parametrize("kind", ["float", "int64", "bool"])
def test_picks_as_onnx_runtime_does(expression: str, given: dict[str, Any], kind: str) -> None:
    values = (random_array(3, 4) * 10).astype("float32" if kind == "float" else kind)

    agrees_with_runtime(_graph(expression, kind), {"x": values}, _weights(given), tolerance=0)


@pytest.mark.parametrize(("expression", "given"), _picks())
@pytest.mark.parametrize("kind", ["uint16", "uint64", "string"])
def test_picks_elements_of_other_types(expression: str, given: dict[str, Any], kind: str) -> None:
    numbers = np.arange(12).reshape(3, 4)
    values = numbers.astype(str).astype(object) if kind == "string" else numbers.astype(kind)
    (wanted,) = run_program(_graph(expression, "int64"), {"x": numbers}, _weights(given)).values()

    (found,) = run_program(_graph(expression, kind), {"x": values}, _weights(given)).values()

    assert found.dtype == values.dtype
    assert found.tolist() == wanted.astype(str if kind == "string" else kind).tolist()


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
@pytest.mark.parametrize("name", list(_REPLACEMENTS))
def test_replacements(name: str, reduction: str) -> None:
    expression, given, shape = _REPLACEMENTS[name]
    text = _reducing(expression, reduction)
    updates = ", ".join(map(str, shape))
    feeds = {"x": random_array(3, 4, dtype=np.float64)}
    feeds["u"] = random_array(*shape, dtype=np.float64, seed=1)

    gradients_agree(_graph(text, "double", f"double[{updates}] u"), feeds, _weights(given))
    single = {key: each.astype(np.float32) for key, each in feeds.items()}
    agrees_with_runtime(
        _graph(text, "float", f"float[{updates}] u"), single, _weights(given), tolerance=1e-6
    )


@pytest.mark.parametrize("reduction", ["add", "mul", "max", "min"])
@pytest.mark.parametrize("operator", ["ScatterElements", "ScatterND"])
@pytest.mark.parametrize("kind", ["uint16", "uint32", "uint64"])
def test_reductions_know_that_large_integers_have_no_sign(
    operator: str, reduction: str, kind: str
) -> None:
    top = np.array(np.iinfo(kind).max, kind)
    text = f"""
      g ({kind}[3] x, {kind}[2] u) => ({kind}[] y) {{
        y = {operator}<reduction = "{reduction}">(x, i, u)
      }}
    """
    x, u = np.array([top, 1, 7], kind), np.array([1, top], kind)
    indices = np.array([0, 1]) if operator == "ScatterElements" else np.array([[0], [1]])

    (found,) = run_program(text, {"x": x, "u": u}, {"i": indices}).values()

    arithmetic: Any = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}
    assert found.tolist() == [*arithmetic[reduction](x[:2], u).tolist(), 7]


def test_strings_are_replaced() -> None:
    text = "g (string[2] x, string[1] u) => (string[] y) { y = ScatterElements(x, i, u) }"
    feeds = {"x": np.array(["a", "b"], object), "u": np.array(["c"], object)}

    (found,) = run_program(text, feeds, {"i": np.array([-1])}).values()

    assert found.tolist() == ["a", "c"]


def test_scatter_is_the_old_name() -> None:
    text = "g (float[3, 4] x, float[1, 2] u) => (float[] y) { y = Scatter<axis = 1>(x, i, u) }"
    feeds = {"x": random_array(3, 4), "u": random_array(1, 2)}

    agrees_with_runtime(text, feeds, {"i": np.array([[3, 0]])}, opset=10, tolerance=0)


@pytest.mark.parametrize(
    ("text", "opset", "reason"),
    [
        ('ScatterElements<reduction = "add">(x, i, x)', 13, "version 13 has no reduction add"),
        ('ScatterND<reduction = "max">(x, i, x)', 16, "version 16 has no reduction max"),
        ('ScatterElements<reduction = "mean">(x, i, x)', 21, "no reduction mean"),
        ('TensorScatter<mode = "round">(x, x)', 24, "no mode round"),
    ],
)
def test_refuses_what_the_operator_does_not_define(text: str, opset: int, reason: str) -> None:
    weights = {"i": np.zeros((3, 4), np.int64)} if "i," in text else {}
    program = Program.from_subgraph(build(_graph(text, "float"), weights, opset=opset))

    with pytest.raises(ModelError, match=reason):
        program({"x": random_array(3, 4)})


def test_half_embeddings_keep_their_type() -> None:
    model = build(
        "g (int32[A] i) => (float16[] y) { y = Gather(w, i) }",
        {"w": random_array(5, 2, dtype=np.float16)},
    )
    live = torch.ones(5, 2, dtype=torch.float16, requires_grad=True)

    result = Program.from_subgraph(model)(
        {"i": np.array([-1, 0, 0], np.int32)}, weights={"w": live}
    )["y"]
    (gradient,) = torch.autograd.grad(result.sum(), live)

    assert result.dtype == torch.float16
    assert gradient[:, 0].tolist() == [2, 0, 0, 0, 1]


@pytest.mark.parametrize("opset", [9, 11])
def test_one_hot_counts_negative_indices_from_the_end_since_11(opset: int) -> None:
    text = "g (int64[A] i) => (float[] y) { y = OneHot<axis = 0>(i, d, v) }"
    weights = {"d": np.array(3), "v": np.array([-1, 1], np.float32)}

    (found,) = run_program(text, {"i": np.array([0, -1, 5])}, weights, opset=opset).values()

    last = 1 if opset == 11 else -1
    assert found.tolist() == [[1, -1, -1], [-1, -1, -1], [-1, last, -1]]


def test_one_hot_has_gradients_to_its_values() -> None:
    text = "g (float[2, 2] i, double[2] v) => (double[] y) { y = OneHot<axis = 1>(i, d, v) }"
    feeds = {"i": np.array([[0, 1], [2, -1]], np.float32), "v": np.array([0.5, 2.0])}

    gradients_agree(text, feeds, {"d": np.array([3])})


def test_one_hot_of_strings() -> None:
    text = "g (uint64[2] i, string[2] v) => (string[] y) { y = OneHot(i, d, v) }"
    feeds = {"i": np.array([1, 0], np.uint64), "v": np.array(["off", "on"], object)}

    (found,) = run_program(text, feeds, {"d": np.array(2)}).values()

    assert found.tolist() == [["off", "on"], ["on", "off"]]


@pytest.mark.parametrize("kind", ["float32", "uint64", "bool", "object"])
def test_non_zero_of_any_type(kind: str) -> None:
    name = {"float32": "float", "object": "string"}.get(kind, kind)
    text = f"g ({name}[2, 2] x) => (int64[] y) {{ y = NonZero(x) }}"
    values = [["", "a"], ["b", ""]] if kind == "object" else [[0, 3], [1 << 40, 0]]

    (found,) = run_program(text, {"x": np.array(values).astype(kind)}).values()

    assert found.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("is_sorted", [0, 1])
@pytest.mark.parametrize("axis", ["", ", axis = 0", ", axis = -1"])
@pytest.mark.parametrize("kind", ["float", "int64"])
def test_unique_with_all_outputs(axis: str, is_sorted: int, kind: str) -> None:
    outputs = f"{kind}[] y, int64[] first, int64[] inverse, int64[] counts"
    text = f"""
      g ({kind}[3, 4] x) => ({outputs}) {{
        y, first, inverse, counts = Unique<sorted = {is_sorted}{axis}>(x)
      }}
    """
    values = np.array([[2, 1, 2, 1], [3, 0, 3, 1], [2, 1, 2, 1]])
    feeds = {"x": values.astype("float32" if kind == "float" else kind)}

    agrees_with_runtime(text, feeds, tolerance=0)


@pytest.mark.parametrize("is_sorted", [0, 1])
@pytest.mark.parametrize("kind", ["uint16", "uint32", "uint64", "string"])
def test_unique_of_types_that_pytorch_cannot_order(kind: str, is_sorted: int) -> None:
    text = f"""
      g ({kind}[5] x) => ({kind}[] y, int64[] first) {{
        y, first = Unique<sorted = {is_sorted}>(x)
      }}
    """
    if kind == "string":
        values = np.array(["d", "b", "d", "c", "a"], object)
    else:
        top = np.array(np.iinfo(kind).max, kind)
        values = np.array([top, 2, top, top - np.array(1, kind), 1], kind)

    found = run_program(text, {"x": values})

    first = [4, 1, 3, 0] if is_sorted else [0, 1, 3, 4]
    assert found["first"].tolist() == first
    assert found["y"].tolist() == values[first].tolist()


def test_unique_has_gradients() -> None:
    text = "g (double[4] x) => (double[] y) { y = Unique(x) }"

    gradients_agree(text, {"x": np.array([0.5, -1.0, 3.0, 2.0])})


def test_top_k_has_gradients() -> None:
    text = """
      g (double[3, 4] x) => (double[] y, int64[] i) { y, i = TopK<axis = 0, largest = 0>(x, k) }
    """

    gradients_agree(text, {"x": random_array(3, 4, dtype=np.float64)}, {"k": np.array([2])})


@pytest.mark.parametrize("form", ["TopK<k = 3>(x)", "TopK(x, k)", "TopK<largest = 0>(x, k)"])
def test_top_k_prefers_the_first_of_equals(form: str) -> None:
    opset = 9 if "k = 3" in form else 11 if "largest" in form else 10
    text = f"g (float[2, 40] x) => (float[] y, int64[] i) {{ y, i = {form} }}"
    weights = {} if "k = 3" in form else {"k": np.array([3])}
    values = np.zeros((2, 40), np.float32)

    agrees_with_runtime(text, {"x": values}, weights, opset=opset, tolerance=0)


@pytest.mark.parametrize("kind", ["uint16", "uint32", "uint64"])
def test_top_k_of_large_unsigned_integers(kind: str) -> None:
    text = f"g ({kind}[3] x) => ({kind}[] y, int64[] i) {{ y, i = TopK(x, k) }}"
    top = np.iinfo(kind).max

    found = run_program(text, {"x": np.array([1, top, 2], kind)}, {"k": np.array([2])})

    assert found["y"].dtype == kind
    assert found["y"].tolist() == [top, 2]
    assert found["i"].tolist() == [1, 2]


@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_tensor_scatter_writes_into_a_cache(mode: str) -> None:
    text = f"""
      g (double[2, 1, 4, 2] x, double[2, 1, 2, 2] u) => (double[] y) {{
        y = TensorScatter<mode = "{mode}">(x, u, i)
      }}
    """
    feeds = {"x": random_array(2, 1, 4, 2, dtype=np.float64)}
    feeds["u"] = random_array(2, 1, 2, 2, dtype=np.float64, seed=1)
    starts = np.array([1, 3 if mode == "circular" else 2])

    gradients_agree(text, feeds, {"i": starts}, opset=24)
    (found,) = run_program(text, feeds, {"i": starts}, opset=24).values()
    wanted = feeds["x"].copy()
    for batch, start in enumerate(starts):
        for step in range(2):
            wanted[batch, :, (start + step) % 4] = feeds["u"][batch, :, step]
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("center", [0, 1])
def test_non_max_suppression_of_many_boxes(center: int) -> None:
    text = f"""
      g (float[2, 60, 4] boxes, float[2, 3, 60] scores) => (int64[] y) {{
        y = NonMaxSuppression<center_point_box = {center}>(boxes, scores, most, overlap, least)
      }}
    """
    generator = np.random.default_rng(0)
    feeds = {
        "boxes": generator.random((2, 60, 4), np.float32),
        "scores": generator.random((2, 3, 60), np.float32).round(1),
    }
    limits = {"most": np.array(20), "overlap": np.float32(0.3), "least": np.float32(0.2)}

    agrees_with_runtime(text, feeds, limits, tolerance=0)


def test_non_max_suppression_keeps_nothing_unless_told_how_many() -> None:
    text = """
      g (float[1, 2, 4] boxes, float[1, 1, 2] scores) => (int64[] y) {
        y = NonMaxSuppression(boxes, scores)
      }
    """
    feeds = {"boxes": random_array(1, 2, 4), "scores": random_array(1, 1, 2)}

    (found,) = run_program(text, feeds).values()

    assert found.shape == (0, 3)
