"""Several nodes as one function: the same numbers, and nothing hidden from whoever looks."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompiler.execution.sessions import open_session
from qcompiler.execution.torch import Program
from qcompiler.execution.torch.plan import Plan
from qcompiler.ir.shapes import infer_shapes
from tests.support.graphs import build, random_array

_NORM = """g (float[N, 3, 8] x) => (float[N, 3, 8] y) {{
    square = Pow(x, two)
    mean = ReduceMean<keepdims = 1>(square, axes)
    shifted = Add(mean, eps)
    root = Sqrt(shifted)
    inverse = Reciprocal(root)
    scaled = Mul({scaled})
    y = Mul(gamma, scaled)
}}"""

_ATTENTION = """g (
    float[B, 2, L, 4] q, float[B, 2, 4, S] k, float[B, 2, S, 4] v, float[B, 1, L, S] mask
) => (float[B, 2, L, 4] y) {
    a = Mul(q, scale)
    b = Mul(k, scale)
    products = MatMul(a, b)
    biased = Add(products, mask)
    p = Softmax<axis = -1>(biased)
    broken = IsNaN(p)
    safe = Where(broken, zero, p)
    y = MatMul(safe, v)
}"""


def _norm(power: float = 2.0, axis: int = -1, scaled: str = "x, inverse") -> ir.Model:
    constants = {
        "two": np.array(power, np.float32),
        "axes": np.array([axis], np.int64),
        "eps": np.array(1e-3, np.float32),
        "gamma": random_array(8),
    }
    return _inferred(build(_NORM.format(scaled=scaled), constants))


def _attention(text: str = _ATTENTION) -> ir.Model:
    constants = {"scale": np.array(0.7, np.float32), "zero": np.array(0, np.float32)}
    return _inferred(build(text, constants))


def _inferred(model: ir.Model) -> ir.Model:
    infer_shapes(model)
    return model


def _feeds() -> dict[str, Any]:
    mask = np.zeros((2, 1, 3, 5), np.float32)
    mask[0, 0, :, 3:] = -np.inf
    mask[1, 0, 1] = -np.inf  # a query that sees nothing
    return {
        "q": random_array(2, 2, 3, 4, seed=1),
        "k": random_array(2, 2, 4, 5, seed=2),
        "v": random_array(2, 2, 5, 4, seed=3),
        "mask": mask,
    }


def _runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets one entry for every step that runs."""
    ran: list[int] = []
    original = Plan._run_step

    def counted(self: Plan, *arguments: Any) -> None:
        ran.append(1)
        original(self, *arguments)

    monkeypatch.setattr(Plan, "_run_step", counted)
    return ran


def _agrees(model: ir.Model, feeds: dict[str, Any]) -> None:
    result = Program.from_subgraph(model)(feeds)["y"].numpy()
    with open_session(model, optimize=False, threads=1) as session:
        np.testing.assert_allclose(result, session.run(feeds)["y"], rtol=1e-5, atol=1e-6)


def test_a_normalization_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = _runs(monkeypatch)
    _agrees(_norm(), {"x": random_array(2, 3, 8)})
    _agrees(_norm(axis=2, scaled="inverse, x"), {"x": random_array(2, 3, 8)})
    assert len(ran) == 2


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(_norm(power=3.0), id="cubes"),
        pytest.param(_norm(axis=1), id="other axis"),
        pytest.param(_norm(scaled="mean, inverse"), id="scales the mean"),
    ],
)
def test_what_only_looks_like_one_stays(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = _runs(monkeypatch)
    _agrees(model, {"x": abs(random_array(2, 3, 8))})
    assert len(ran) == 7


def test_an_attention_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = _runs(monkeypatch)
    _agrees(_attention(), _feeds())
    assert len(ran) == 1


def test_without_the_guard_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = _runs(monkeypatch)
    feeds = _feeds() | {"mask": np.zeros((2, 1, 3, 5), np.float32)}
    _agrees(_attention(_ATTENTION.replace("MatMul(safe", "MatMul(p")), feeds)
    assert len(ran) == 6


def test_what_lies_between_can_be_captured_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Program.from_subgraph(_attention())
    plain = program(_feeds())["y"]
    ran = _runs(monkeypatch)
    result = program(_feeds(), capture=["p"])
    assert len(ran) == 8
    torch.testing.assert_close(result["y"], plain)
    assert result["p"].shape == (2, 2, 3, 5)
    halved = program(_feeds(), replace={"safe": lambda p: p / 2})["y"]
    torch.testing.assert_close(halved, plain / 2)


def test_a_constant_inside_can_be_replaced() -> None:
    program = Program.from_subgraph(_norm())
    feeds = {"x": random_array(2, 3, 8)}
    eps = torch.tensor(2.0, requires_grad=True)
    result = program(feeds, weights={"eps": eps})["y"]
    assert not torch.allclose(result, program(feeds)["y"], rtol=0.1)
    (gradient,) = torch.autograd.grad(result.sum(), [eps])
    assert gradient != 0


def test_gradients_are_those_of_the_single_steps() -> None:
    program = Program.from_subgraph(_attention())
    feeds = {name: torch.from_numpy(array) for name, array in _feeds().items()}
    feeds["mask"] = torch.zeros_like(feeds["mask"])
    live = {name: feeds[name].requires_grad_() for name in ("q", "k", "v")}
    fused = torch.autograd.grad(program(feeds)["y"].square().sum(), list(live.values()))
    result = program(feeds, capture=["p"])["y"]
    single = torch.autograd.grad(result.square().sum(), list(live.values()))
    torch.testing.assert_close(fused, single, rtol=1e-4, atol=1e-5)


def test_a_softmax_on_all_later_axes_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = {"scale": np.array(0.7, np.float32), "zero": np.array(0, np.float32)}
    old = _inferred(build(_ATTENTION.replace("<axis = -1>", ""), constants, opset=11))
    ran = _runs(monkeypatch)
    _agrees(old, _feeds() | {"mask": np.zeros((2, 1, 3, 5), np.float32)})
    assert len(ran) == 8


def test_a_mask_may_be_of_more_batches() -> None:
    feeds = {name: array[:1] for name, array in _feeds().items()}
    feeds["mask"] = np.zeros((3, 1, 3, 5), np.float32)
    program = Program.from_subgraph(_attention())
    single = program(feeds, capture=["p"])["y"]
    assert single.shape == (3, 2, 3, 4)
    torch.testing.assert_close(program(feeds)["y"], single)


def test_gamma_may_be_live_and_of_another_shape() -> None:
    program = Program.from_subgraph(_norm())
    feeds = {"x": random_array(2, 3, 8)}
    gamma = program.weight("gamma").double().reshape(1, 1, 8).requires_grad_()
    result = program(feeds, weights={"gamma": gamma})["y"]
    torch.testing.assert_close(result.float(), program(feeds)["y"])
