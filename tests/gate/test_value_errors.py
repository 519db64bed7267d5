import numpy as np
import pytest

from qcompiler.gate.value_errors import NodeError, largest_first, node_errors
from qcompiler.progress import SilentProgress
from tests.support.graphs import Array, build, random_array

TEXT = """
m (float[b, 8] x) => (float[b, 4] y) {
    [one] h = MatMul(x, w1)
    r = Relu(h)
    [two] g = MatMul(r, w2)
    s = Relu(g)
    [three] y = MatMul(s, w3)
}
"""
WEIGHTS = {
    "w1": random_array(8, 16),
    "w2": random_array(16, 16, seed=1),
    "w3": random_array(16, 4, seed=2),
}
CALLS = [{"x": random_array(30, 8, seed=seed)} for seed in (3, 4)]


def _errors(weights: dict[str, Array], *, rescaled: bool) -> dict[str, NodeError]:
    found = node_errors(
        build(TEXT, WEIGHTS),
        build(TEXT, weights),
        CALLS,
        rescaled=rescaled,
        progress=SilentProgress(),
    )
    assert [entry.node for entry in found] == ["one", "two", "three"]
    return {entry.node: entry for entry in found}


def _equalized() -> dict[str, Array]:
    scales = np.linspace(0.2, 5, 16, dtype=np.float32)
    return {**WEIGHTS, "w1": WEIGHTS["w1"] / scales, "w2": WEIGHTS["w2"] * scales[:, None]}


def test_equal_models_have_no_error() -> None:
    for rescaled in (False, True):
        errors = _errors(WEIGHTS, rescaled=rescaled)
        assert all(entry.error < 1e-9 for entry in errors.values())
        assert sum(share for _, share in largest_first(list(errors.values()))) <= 1.0


def test_channels_of_another_scale_are_no_error_where_that_may_be() -> None:
    assert _errors(_equalized(), rescaled=False)["one"].error > 0.3
    assert all(e.error < 1e-6 for e in _errors(_equalized(), rescaled=True).values())


@pytest.mark.parametrize("rescaled", [False, True])
def test_the_node_that_adds_most_comes_first(rescaled: bool) -> None:
    weights = _equalized() if rescaled else dict(WEIGHTS)
    weights["w2"] = weights["w2"] * (1 + 0.5 * random_array(16, 16, seed=9))
    errors = _errors(weights, rescaled=rescaled)
    (first, share), *_ = largest_first(list(errors.values()))
    assert first.node == "two"
    assert share > 0.5
    assert first.before == pytest.approx(0.0, abs=1e-6)
    assert errors["three"].before == first.error


def test_broken_values_are_all_wrong() -> None:
    weights = {**WEIGHTS, "w2": np.full((16, 16), np.nan, np.float32)}
    errors = _errors(weights, rescaled=True)
    assert errors["two"].error == 1.0
    assert errors["two"].added == pytest.approx(1.0)


def test_models_without_shared_values() -> None:
    other = build("m (float[b, 8] x) => (float[b, 8] z) { z = Relu(x) }")
    found = node_errors(
        build(TEXT, WEIGHTS), other, CALLS, rescaled=False, progress=SilentProgress()
    )
    assert found == []


def test_models_in_half_precision() -> None:
    text = TEXT.replace("float[", "float16[")
    half = {name: values.astype(np.float16) for name, values in WEIGHTS.items()}
    calls = [{"x": call["x"].astype(np.float16)} for call in CALLS]
    found = node_errors(
        build(text, half),
        build(text, {**half, "w2": -half["w2"]}),
        calls,
        rescaled=False,
        progress=SilentProgress(),
    )
    assert next(iter(largest_first(found)))[0].node == "two"
