"""Sums of errors by channel, and which inputs say what is padding."""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import Feeds
from qcompiler.calibration.channel_means import ErrorSums, padding_inputs, rows_that_count
from tests.support.bias_models import samples
from tests.support.graphs import build, random_array

MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]])


def encoder(kind: str = "int64", attention: str = "p = Softmax(s)") -> ir.Model:
    """Return a model that attends to the tokens of a mask, and looks up token types."""
    return build(
        f"""g ({kind}[b, t] mask, int64[b, t] types, float[b, t, 4] x) => (float[b, t, 4] y) {{
            e = Gather(table, types)
            h = Add(x, e)
            q = MatMul(h, w)
            f = Cast<to=1>(mask)
            one = Constant<value_float=1.0>()
            hidden = Sub(f, one)
            axes = Constant<value_ints=[1]>()
            bias = Unsqueeze(hidden, axes)
            k = Transpose<perm=[0, 2, 1]>(q)
            qk = MatMul(q, k)
            s = Add(qk, bias)
            {attention}
            y = MatMul(p, h) }}""",
        {"table": random_array(2, 4), "w": random_array(4, 4)},
    )


def call(mask: npt.NDArray[np.generic] = MASK) -> Feeds:
    return {"mask": mask, "types": MASK, "x": random_array(2, 4, 4)}


@pytest.mark.parametrize("kind", ["int64", "bool", "float"])
def test_a_mask_is_known_by_what_it_is_used_for(kind: str) -> None:
    dtype = {"int64": np.int64, "bool": np.bool_, "float": np.float32}[kind]
    feeds = call(MASK.astype(dtype))
    assert padding_inputs(encoder(kind), samples([feeds, feeds])) == ("mask",)


@pytest.mark.parametrize(
    "other",
    [np.full((2, 4), 2), np.array([[1, 1, 1, 1], [0, 0, 0, 0]]), np.ones(4, np.int64)],
    ids=["twos", "empty-row", "vector"],
)
def test_one_call_that_holds_something_else_is_enough(other: npt.NDArray[np.int64]) -> None:
    assert padding_inputs(encoder(), samples([call(), call(other)])) == ()


def test_a_mask_that_no_softmax_sees_is_none() -> None:
    assert padding_inputs(encoder(attention="p = Relu(s)"), samples([call()])) == ()


def test_rows_that_count_are_those_of_the_one_mask_that_fits() -> None:
    found = rows_that_count({"mask": MASK}, (2, 4, 8), 2)
    assert found is not None
    assert (found == (MASK != 0)).all()
    assert rows_that_count({"mask": MASK}, (2, 5, 8), 2) is None
    assert rows_that_count({"mask": MASK}, (2, 4), 1) is None
    assert rows_that_count({"mask": MASK}, (2, 4, 8), 1) is None
    assert rows_that_count({"mask": MASK, "other": MASK}, (2, 4, 8), 2) is None


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((6,), 0), ((5, 6), 1), ((2, 4, 6), 2), ((2, 6, 3, 4), 1), ((2, 4, 3, 6), 3)],
)
def test_sums_are_those_of_numpy(shape: tuple[int, ...], axis: int) -> None:
    sums = ErrorSums(6)
    errors, truths = [], []
    for seed in range(3):
        truth, found = random_array(*shape, seed=seed), random_array(*shape, seed=50 + seed)
        sums.add(truth, found, axis, None)
        errors.append(np.moveaxis(found.astype(np.float64) - truth, axis, -1).reshape(-1, 6))
        truths.append(truth.astype(np.float64))
    error = np.concatenate(errors)
    shift = random_array(6, seed=7).astype(np.float64)
    assert sums.rows == len(error)
    assert np.allclose(sums.mean, error.mean(0))
    assert np.isclose(sums.mean_square(), (error**2).mean())
    assert np.isclose(sums.mean_square(shift), ((error + shift) ** 2).mean())
    assert np.isclose(sums.mean_signal, np.square(np.stack(truths)).mean())


@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 4, 3, 6)])
def test_padding_is_left_out(shape: tuple[int, ...]) -> None:
    truth, found = random_array(*shape), random_array(*shape, seed=1)
    kept = (found.astype(np.float64) - truth)[MASK != 0].reshape(-1, 6)
    found[MASK == 0] = 1e6
    sums = ErrorSums(6)
    sums.add(truth, found, len(shape) - 1, MASK != 0)
    assert sums.rows == len(kept)
    assert np.allclose(sums.mean, kept.mean(0))
    assert np.isclose(sums.mean_square(), (kept**2).mean())


def test_large_values_are_added_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, found = random_array(5, 4, 6), random_array(5, 4, 6, seed=1)
    whole, parts = ErrorSums(6), ErrorSums(6)
    whole.add(truth, found, 2, None)
    monkeypatch.setattr("qcompiler.calibration.channel_means._CHUNK_BYTES", 500)
    parts.add(truth, found, 2, None)
    assert parts.rows == whole.rows
    assert np.allclose(parts.error, whole.error)


def test_nothing_is_the_mean_of_nothing() -> None:
    sums = ErrorSums(3)
    assert (sums.mean == 0).all()
    assert sums.mean_square() == 0.0
