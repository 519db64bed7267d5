"""Scales of least weighted error, next to an exhaustive search."""

import numpy as np
import pytest
import torch

from qcompiler.quant.granularity import PerAxis
from qcompiler.quant.qtype import qtype_of
from qcompiler.quant.scheme import QSpec
from qcompiler.reconstruction.scale_search import ScaleSearch
from tests.support.graphs import Array, random_array


def _spec(bits: int, symmetric: bool) -> QSpec:
    return QSpec(qtype_of(bits, signed=symmetric), PerAxis(0), symmetric)


def _error(values: Array, importance: Array, scale: Array, zero: Array, spec: QSpec) -> Array:
    """Return the weighted squared error of every row; all `[n, rows]` or `[rows]`."""
    codes = np.clip(np.rint(values / scale) + zero, spec.qtype.qmin, spec.qtype.qmax)
    error: Array = (np.square((codes - zero) * scale - values) * importance[:, None]).sum(axis=0)
    return error


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_scale_is_much_better(bits: int, symmetric: bool) -> None:
    spec = _spec(bits, symmetric)
    values, importance = random_array(64, 40), np.exp(random_array(64, seed=1))
    found = ScaleSearch(spec, torch.float32)(
        torch.from_numpy(values)[None], torch.from_numpy(importance)[None]
    )
    scale, zero = (each[0].numpy() for each in found)
    whole = values.max(axis=0).clip(min=0) - values.min(axis=0).clip(max=0)
    whole = whole / (spec.qtype.qmax - spec.qtype.qmin)
    if symmetric:
        down, up = -spec.qtype.qmin, spec.qtype.qmax
        whole = np.maximum(values.max(axis=0) / up, -values.min(axis=0) / down)
    least = np.min(
        [_error(values, importance, whole * r, zero, spec) for r in np.linspace(0.2, 1.05, 400)],
        axis=0,
    )
    error = _error(values, importance, scale, zero, spec)
    # A coarse search with a least-squares step behind it.
    assert (error / least).mean() < 1.04
    assert error.sum() < 0.9 * _error(values, importance, whole, zero, spec).sum()


def test_what_counts_nothing_does_not_choose() -> None:
    values = random_array(32, 5)
    importance = np.ones(32, np.float32)
    importance[:4] = 0
    values[:4] = random_array(4, 5, seed=1) * 0.1
    search = ScaleSearch(_spec(2, False), torch.float32)
    one = search(torch.from_numpy(values)[None], torch.from_numpy(importance)[None])
    values[:4] *= -3
    other = search(torch.from_numpy(values)[None], torch.from_numpy(importance)[None])
    assert torch.equal(one[0], other[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_can_be_stored(dtype: torch.dtype) -> None:
    values = torch.from_numpy(random_array(32, 5))[None]
    values[0, :, 3] = 0
    values[0, :, 4] *= 1e-9
    scale, zero = ScaleSearch(_spec(4, True), dtype)(values, torch.ones(1, 32))
    assert torch.equal(scale.to(dtype).to(torch.float32), scale)
    assert scale[0, 3] == 1
    assert scale[0, 4] >= torch.finfo(dtype).tiny
    assert not zero.any()
