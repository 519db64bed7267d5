"""Graphs as PyTorch programs: what goes in, what comes out, and what is held in between."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompiler.errors import ModelError, UsageError
from qcompiler.execution.torch import Program
from tests.support.graphs import build, externalize, random_array

_MLP = """g (float[N, 4] x, float[N, 3] shift) => (float[N, 3] y) {
    [up] a = MatMul(x, w)
    [act] b = Relu(a)
    [down] c = MatMul(b, v)
    [add] y = Add(c, shift)
}"""


def _weights() -> dict[str, Any]:
    return {"w": random_array(4, 6, seed=1), "v": random_array(6, 3, seed=2)}


def _mlp() -> ir.Model:
    return build(_MLP, _weights())


def _feeds() -> dict[str, Any]:
    return {"x": random_array(5, 4, seed=3), "shift": random_array(5, 3, seed=4)}


def _expected() -> Any:
    weights, feeds = _weights(), _feeds()
    return np.maximum(feeds["x"] @ weights["w"], 0) @ weights["v"] + feeds["shift"]


def test_computes_the_graphs_outputs() -> None:
    program = Program.from_subgraph(_mlp())
    assert program.input_names == ("x", "shift")
    assert program.output_names == ("y",)
    assert set(program.weight_names) == {"w", "v"}
    assert program.outside_torch == ()
    result = program(_feeds())
    np.testing.assert_allclose(result["y"].numpy(), _expected(), rtol=1e-5, atol=1e-6)


def test_a_part_takes_the_values_it_was_cut_at() -> None:
    program = Program.from_subgraph(_mlp(), ["b"], ["c"])
    assert program.input_names == ("b",)
    assert program.weight_names == ("v",)
    b = torch.from_numpy(random_array(2, 6))
    np.testing.assert_allclose(
        program({"b": b})["c"].numpy(), b.numpy() @ _weights()["v"], rtol=1e-5, atol=1e-6
    )


def test_captures_intermediate_values() -> None:
    result = Program.from_subgraph(_mlp())(_feeds(), capture=["b", "x"])
    assert list(result) == ["y", "b", "x"]
    hidden = np.maximum(_feeds()["x"] @ _weights()["w"], 0)
    np.testing.assert_allclose(result["b"].numpy(), hidden, rtol=1e-5, atol=1e-6)


def test_a_replaced_value_is_what_is_read() -> None:
    program = Program.from_subgraph(_mlp())
    zeros = torch.zeros(5, 6)
    result = program(_feeds(), replace={"b": zeros}, capture=["b"])
    np.testing.assert_array_equal(result["y"].numpy(), _feeds()["shift"])
    assert result["b"] is zeros
    changed = program(_feeds(), replace={"c": lambda c: c * 0, "x": lambda x: x * 2})
    np.testing.assert_array_equal(changed["y"].numpy(), _feeds()["shift"])


def test_what_only_led_to_a_replaced_value_is_not_computed() -> None:
    program = Program.from_subgraph(_mlp())
    program(_feeds(), replace={"b": torch.zeros(5, 6)})
    assert program.loaded_bytes == _weights()["v"].nbytes


def test_gradients_reach_inputs_and_weights() -> None:
    program = Program.from_subgraph(_mlp())
    x = torch.from_numpy(_feeds()["x"]).requires_grad_()
    w = program.weight("w").clone().requires_grad_()
    result = program(_feeds() | {"x": x}, weights={"w": w})["y"]
    to_x, to_w = torch.autograd.grad(result.sum(), [x, w])
    active = (_feeds()["x"] @ _weights()["w"] > 0).astype(np.float32)
    hidden = active * _weights()["v"].sum(axis=1)
    np.testing.assert_allclose(to_x.numpy(), hidden @ _weights()["w"].T, rtol=1e-4)
    np.testing.assert_allclose(to_w.numpy(), _feeds()["x"].T @ hidden, rtol=1e-4, atol=1e-5)


def test_live_codes_and_scales_take_the_place_of_integer_weights() -> None:
    model = build(
        """g (float[N, 4] x) => (float[N, 3] y) {
            w = DequantizeLinear<axis = 1>(codes, scale)
            y = MatMul(x, w)
        }""",
        {
            "codes": np.arange(12, dtype=np.int8).reshape(4, 3),
            "scale": np.array([0.5, 1, 2], np.float32),
        },
    )
    program = Program.from_subgraph(model)
    x = torch.eye(4)
    codes = program.weight("codes").float().requires_grad_()
    scale = program.weight("scale").clone().requires_grad_()
    result = program({"x": x}, weights={"codes": codes, "scale": scale})["y"]
    assert torch.equal(result, program({"x": x})["y"])
    to_codes, to_scale = torch.autograd.grad(result.sum(), [codes, scale])
    assert torch.equal(to_codes, torch.tensor([0.5, 1.0, 2.0]).expand(4, 3))
    assert torch.equal(to_scale, codes.detach().sum(0))


def test_weights_are_read_when_a_step_needs_them(tmp_path: Path) -> None:
    model = externalize(_mlp(), tmp_path)
    program = Program.from_subgraph(model)
    assert program.loaded_bytes == 0
    result = program(_feeds())["y"]
    assert program.loaded_bytes == sum(each.nbytes for each in _weights().values())
    program.release()
    assert program.loaded_bytes == 0
    assert torch.equal(program(_feeds())["y"], result)


def test_streamed_weights_are_never_kept() -> None:
    program = Program.from_subgraph(_mlp(), keep_weights=False)
    program(_feeds())
    assert program.loaded_bytes == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_computes_in_another_float_type(dtype: torch.dtype) -> None:
    result = Program.from_subgraph(_mlp(), dtype=dtype)(_feeds())["y"]
    assert result.dtype == dtype
    np.testing.assert_allclose(result.double().numpy(), _expected(), rtol=0.05, atol=0.05)


def test_the_lowest_float_of_a_mask_stays_finite() -> None:
    text = "g (float[N] x) => (float[N] y) { y = Add(x, low) }"
    model = build(text, {"low": np.array([np.finfo(np.float32).min, -np.inf], np.float32)})
    result = Program.from_subgraph(model, dtype=torch.float16)({"x": np.array([0, 0], np.float32)})[
        "y"
    ]
    assert result.tolist() == [torch.finfo(torch.float16).min, -np.inf]


def test_float32_islands_of_a_half_model_stay() -> None:
    text = """g (float16[N, 4] x) => (float[N, 4] wide, float16[N, 4] y) {
        a = MatMul(x, w)
        wide = Cast<to = 1>(a)
        y = Cast<to = 10>(wide)
    }"""
    model = build(text, {"w": random_array(4, 4, dtype=np.float16)})
    x = random_array(2, 4, dtype=np.float16)
    result = Program.from_subgraph(model, dtype=torch.bfloat16)({"x": x})
    assert (result["wide"].dtype, result["y"].dtype) == (torch.float32, torch.bfloat16)
    result = Program.from_subgraph(model, dtype=torch.float32)({"x": x})
    assert (result["wide"].dtype, result["y"].dtype) == (torch.float32, torch.float32)


def test_says_which_inputs_it_takes() -> None:
    program = Program.from_subgraph(_mlp())
    with pytest.raises(UsageError, match=r"inputs are x, shift; it lacks shift; there is no z"):
        program({"x": _feeds()["x"], "z": _feeds()["x"]})
    with pytest.raises(UsageError, match=r"input x: takes torch.float32, and got torch.int64"):
        program(_feeds() | {"x": np.zeros((5, 4), np.int64)})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"capture": ["w"]}, "no value of this name"),
        ({"capture": ["nothing"]}, "no value of this name"),
        ({"replace": {"nothing": torch.zeros(1)}}, "no value of this name"),
        ({"weights": {"a": torch.zeros(1)}}, "no constant of this name"),
    ],
)
def test_refuses_unknown_names(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Program.from_subgraph(_mlp())(_feeds(), **arguments)


def test_refuses_what_nothing_can_run() -> None:
    model = build("g (float[N] x) => (float[N] y) { [odd] y = NoSuchOp(x) }")
    with pytest.raises(ModelError, match=r"odd \(NoSuchOp\)"):
        Program.from_subgraph(model)


def test_an_output_may_be_an_input_or_a_constant() -> None:
    weight = np.array([1, 2], np.float32)
    model = build("g (float[2] x) => (float[2] y) { y = Neg(x) }", {"c": weight})
    program = Program.from_subgraph(model, outputs=["c", "x", "y"])
    result = program({"x": np.array([3, 4], np.float32)})
    assert [result[name].tolist() for name in ("c", "x", "y")] == [[1, 2], [3, 4], [-3, -4]]


def test_outer_weights_and_values_reach_bodies() -> None:
    text = """g (bool c, float[N, 2] x) => (float[N, 2] y) {
        a = Neg(x)
        y = If(c) <
            then_branch = t () => (float[N, 2] p) { p = MatMul(a, w) },
            else_branch = e () => (float[N, 2] q) { q = Identity(a) }
        >
    }"""
    model = build(text, {"w": np.array([[1, 2], [3, 4]], np.float32)})
    program = Program.from_subgraph(model)
    assert program.weight_names == ("w",)
    x = torch.ones(1, 2)
    w = torch.eye(2, requires_grad=True)
    feeds = {"c": torch.tensor(True), "x": x}
    assert program(feeds)["y"].tolist() == [[-4, -6]]
    result = program(feeds, weights={"w": w})["y"]
    assert result.tolist() == [[-1, -1]]
    (to_w,) = torch.autograd.grad(result.sum(), [w])
    assert to_w.tolist() == [[-1, -1], [-1, -1]]
    assert program({"c": torch.tensor(False), "x": x})["y"].tolist() == [[-1, -1]]


_SPLIT = """g (float[4] x) => (float[2] y) {
    a, b = Split<num_outputs = 2>(x)
    y = Add(a, b)
}"""


def test_what_is_given_stays_though_its_node_runs_for_another_output() -> None:
    model = build(_SPLIT)
    x, given = np.arange(4, dtype=np.float32), torch.full((2,), 100.0)
    program = Program.from_subgraph(model)
    assert program({"x": x}, replace={"a": given})["y"].tolist() == [102, 103]
    assert program({"x": x}, replace={"a": lambda a: a * 0 + 100})["y"].tolist() == [102, 103]
    cut = Program.from_subgraph(model, ["a"])
    assert cut({"x": x, "a": given})["y"].tolist() == [102, 103]


def test_a_streamed_weight_is_not_held_for_its_next_reader() -> None:
    text = """g (float[N, 4] x) => (float[N, 4] y) {
        a = MatMul(x, w)
        b = Relu(a)
        y = MatMul(b, w)
    }"""
    program = Program.from_subgraph(build(text, {"w": random_array(4, 4)}), keep_weights=False)
    loaded: list[weakref.ref[torch.Tensor]] = []
    load = program._weights.get

    def watched(value: ir.Value) -> Any:
        tensor = load(value)
        assert isinstance(tensor, torch.Tensor)
        loaded.append(weakref.ref(tensor))
        return tensor

    program._weights.get = watched  # type: ignore[method-assign]
    alive: list[bool] = []

    def look(b: torch.Tensor) -> torch.Tensor:
        alive.append(loaded[0]() is not None)
        return b

    program({"x": random_array(2, 4)}, replace={"b": look})
    assert (len(loaded), alive) == (2, [False])


def test_constants_of_one_name_in_two_bodies_are_ambiguous() -> None:
    text = """g (bool c, float[2] x) => (float[2] y) {
        y = If(c) <
            then_branch = t () => (float[2] p) { p = Mul(x, w) },
            else_branch = e () => (float[2] q) { q = Mul(x, w) }
        >
    }"""
    two, three = np.array([2, 2], np.float32), np.array([3, 3], np.float32)
    program = Program.from_subgraph(build(text, {"t/w": two, "e/w": three}))
    feeds = {"c": torch.tensor(True), "x": torch.ones(2)}
    assert program(feeds)["y"].tolist() == [2, 2]
    with pytest.raises(UsageError, match="several constants, in different bodies"):
        program(feeds, weights={"w": torch.ones(2)})
    with pytest.raises(UsageError, match="several constants, in different bodies"):
        program.weight("w")


def test_an_input_with_a_default_may_be_left_out() -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Mul(x, w) }", {"w": np.ones(2, np.float32)})
    weight = model.graph.initializers["w"]
    model.graph.inputs.append(weight)
    program = Program.from_subgraph(model)
    x = torch.tensor([1.0, 2.0])
    assert program({"x": x})["y"].tolist() == [1, 2]
    assert program({"x": x, "w": x})["y"].tolist() == [1, 4]


def test_an_output_may_be_asked_for_twice() -> None:
    program = Program.from_subgraph(_mlp(), outputs=["y", "y"])
    assert program.output_names == ("y",)
    assert list(program(_feeds())) == ["y"]


def test_items_of_sequences_take_the_programs_type() -> None:
    text = """g (seq(float[2]) s, float[2] x) => (float[2] y) {
        index = Constant<value_int = 0>()
        item = SequenceAt(s, index)
        y = Mul(item, x)
    }"""
    program = Program.from_subgraph(build(text), dtype=torch.bfloat16)
    ones = np.ones(2, np.float32)
    assert program({"s": [torch.ones(2)], "x": ones})["y"].dtype == torch.bfloat16


def test_what_must_be_moved_depends_on_the_size_of_a_run() -> None:
    """Short ranges of indices stay on the CPU, long ones do not, and what they meet follows."""
    model = build("""g (int64[N] x) => (int64[N] y) {
        s = Shape(x)
        n = Squeeze(s)
        zero = Constant<value_int = 0>()
        one = Constant<value_int = 1>()
        r = Range(zero, n, one)
        t = Add(r, s)
        y = Max(t, x)
    }""")
    program = Program.from_subgraph(model, device="meta")
    for length in (3, 3000, 3):
        found = program({"x": np.zeros(length, np.int64)})["y"]
        assert found.shape == (length,)
        assert found.device.type == "meta"
