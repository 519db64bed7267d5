"""Losses: their gradients, and forms that the standard's own tests leave out."""

from typing import Any

import numpy as np
import pytest

from tests.support.graphs import random_array
from tests.support.torch_programs import agrees_with_runtime, gradients_agree, run_program

_TOLERANCE = 1e-6
"""Of |error| / max(1, |expected|): float32 sums in another order."""
_OPS = ("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss")


def _text(op: str, attributes: str, dtype: str = "float", target: str = "int64") -> str:
    return (
        f"g ({dtype}[N, C, D] x, {target}[N, D] target, {dtype}[C] weight) => ({dtype} y) "
        f"{{ y = {op} <{attributes}> (x, target, weight) }}"
    )


def _feeds(dtype: Any = np.float32, target: Any = np.int64) -> dict[str, Any]:
    classes = np.array([[0, 2, 4, 1], [3, 3, 0, 2]], target)
    weight = np.linspace(0.5, 2.0, 5).astype(dtype)
    return {"x": random_array(2, 5, 4, dtype=dtype), "target": classes, "weight": weight}


@pytest.mark.parametrize("op", _OPS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", ["", ", ignore_index = 3", ", ignore_index = -100"])
def test_gradients(op: str, reduction: str, ignored: str) -> None:
    gradients_agree(_text(op, f'reduction = "{reduction}"{ignored}', "double"), _feeds(np.float64))


def test_gradients_pass_through_the_logarithms() -> None:
    text = """g (double[N, C, D] x, int64[N, D] target) => (double y, double[N, C, D] logs)
        { y, logs = SoftmaxCrossEntropyLoss (x, target) }"""
    feeds = _feeds(np.float64)
    del feeds["weight"]
    gradients_agree(text, feeds)


@pytest.mark.parametrize("op", _OPS)
@pytest.mark.parametrize("opset", [12, 13])
@pytest.mark.parametrize("target", ["int32", "int64"])
def test_agrees_with_runtime(op: str, opset: int, target: str) -> None:
    feeds = _feeds(np.float32, np.dtype(target))
    text = _text(op, 'reduction = "mean", ignore_index = 2', target=target)
    agrees_with_runtime(text, feeds, tolerance=_TOLERANCE, opset=opset)


@pytest.mark.parametrize("op", _OPS)
def test_an_ignored_class_may_be_out_of_range(op: str) -> None:
    feeds = _feeds()
    wanted = run_program(_text(op, 'reduction = "none"'), feeds)["y"]
    feeds["target"] = np.where(feeds["target"] == 3, -100, feeds["target"])
    found = run_program(_text(op, 'reduction = "none", ignore_index = -100'), feeds)["y"]
    np.testing.assert_array_equal(found, np.where(feeds["target"] == -100, 0, wanted))


@pytest.mark.parametrize("op", _OPS)
def test_halves_keep_their_type(op: str) -> None:
    wanted = run_program(_text(op, 'reduction = "sum"'), _feeds())["y"]
    found = run_program(_text(op, 'reduction = "sum"', "float16"), _feeds(np.float16))["y"]
    # Inputs and terms rounded to 2^-11, eight of them.
    np.testing.assert_allclose(found.astype(np.float32), wanted, rtol=5e-3, atol=5e-3)
