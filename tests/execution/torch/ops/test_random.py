"""Random numbers: shapes, types, distributions, and what a seed is for."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.support.torch_programs import program_of, run_program

_ERROR = 5 / np.sqrt(40_000)
"""Five standard errors of a mean of 40,000 numbers, in standard deviations."""


def _drawn(node: str, dtype: str = "float", feeds: dict[str, Any] | None = None) -> Any:
    text = f"g (float[N, M] x) => ({dtype}[A, B] y) {{ y = {node} }}"
    given = {"x": np.zeros((200, 200), np.float32)} if feeds is None else feeds
    return run_program(text, given)["y"]


@pytest.mark.parametrize(
    "node",
    [
        "RandomNormal <shape = [200, 200], mean = 3.0, scale = 2.0, seed = 1.0> ()",
        "RandomNormalLike <mean = 3.0, scale = 2.0, seed = 1.0> (x)",
    ],
)
def test_normal(node: str) -> None:
    drawn = _drawn(node)
    assert drawn.shape == (200, 200)
    assert abs(drawn.mean() - 3) < 2 * _ERROR
    assert abs(drawn.std() - 2) < 2 * _ERROR


@pytest.mark.parametrize(
    "node",
    [
        "RandomUniform <shape = [200, 200], low = -1.0, high = 3.0, seed = 1.0> ()",
        "RandomUniformLike <low = -1.0, high = 3.0, seed = 1.0> (x)",
    ],
)
def test_uniform(node: str) -> None:
    drawn = _drawn(node)
    assert drawn.min() >= -1
    assert drawn.max() < 3
    assert abs(drawn.mean() - 1) < 4 / np.sqrt(12) * _ERROR


def test_types() -> None:
    assert _drawn("RandomNormal <shape = [2, 3], dtype = 11> ()", "double").shape == (2, 3)
    assert _drawn("RandomUniformLike <dtype = 10> (x)", "float16").shape == (200, 200)
    assert _drawn("Bernoulli <dtype = 9> (x)", "bool").shape == (200, 200)
    assert _drawn("Multinomial <dtype = 7, sample_size = 4> (x)", "int64").shape == (200, 4)


def test_bernoulli() -> None:
    drawn = _drawn("Bernoulli <seed = 2.0> (x)", feeds={"x": np.full((200, 200), 0.3, np.float32)})
    assert set(np.unique(drawn)) == {0, 1}
    assert abs(drawn.mean() - 0.3) < np.sqrt(0.3 * 0.7) * _ERROR


def test_multinomial() -> None:
    chances = np.array([[0.1, 0.6, 0.3], [0.5, 0.0, 0.5]], np.float32)
    with np.errstate(divide="ignore"):
        logarithms = np.log(chances) + 2
    drawn = _drawn("Multinomial <sample_size = 40000, seed = 3.0> (x)", "int32", {"x": logarithms})
    for row, wanted in zip(drawn, chances, strict=True):
        found = np.bincount(row, minlength=3) / row.size
        assert np.abs(found - wanted).max() < 0.5 * _ERROR


@pytest.mark.parametrize(
    "node",
    [
        "RandomNormalLike <{}> (x)",
        "RandomUniform <shape = [2, 3]{}> ()",
        "Bernoulli <{}> (half)",
        "Multinomial <sample_size = 50{}> (half)",
    ],
)
def test_a_seed_repeats_its_numbers(node: str) -> None:
    def draw_twice(seed: str) -> bool:
        comma = ", " if "= " in node else ""
        filled = node.format(f"{comma}seed = {seed}") if seed else node.format("")
        kind = "int32" if "Multinomial" in node else "float"
        head = f"g (float[N, M] x) => ({kind}[A, B] y) {{ "
        half = "half = Constant <value_float = 0.5> () wide = Add (x, half) "
        body = f"y = {filled.replace('<> ', '').replace('half', 'wide')} }}"
        program = program_of(head + half + body)
        first, second = (program({"x": torch.zeros(20, 20)})["y"] for _ in range(2))
        return torch.equal(first, second)

    assert draw_twice("7.0")
    assert not draw_twice("")
