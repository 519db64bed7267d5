"""Scales as they lie over weights: as the standard's DequantizeLinear has it."""

import numpy as np
import pytest
import torch

from qcompiler.quant.arithmetic import dequantize
from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock, PerTensor, scale_shape
from qcompiler.reconstruction.scale_grid import ScaleGrid, rounded_to


@pytest.mark.parametrize(
    ("shape", "granularity"),
    [
        ((8, 6), PerAxis(1)),
        ((8, 6), PerAxis(0)),
        ((8, 6), PerBlock(0, 4)),
        ((10, 6), PerBlock(0, 4)),
        ((6, 32), PerBlock(1, 16)),
        ((4, 6, 3, 3), PerBlock(1, 4)),
        ((4, 6, 3, 3), PerAxis(0)),
        ((4, 6), PerTensor()),
    ],
)
def test_every_element_meets_its_scale(shape: tuple[int, ...], granularity: Granularity) -> None:
    random = np.random.default_rng(0)
    codes = random.integers(-8, 8, shape).astype(np.int8)
    scale = random.random(scale_shape(shape, granularity)).astype(np.float32)
    grid = ScaleGrid(shape, granularity)
    found = grid.join(grid.split(torch.from_numpy(codes)) * grid.spread(torch.tensor(scale)))
    expected = dequantize(codes, np.asarray(scale), None, granularity)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_scales_are_rounded_to_what_stores_them_and_keep_their_gradient() -> None:
    scale = torch.tensor([0.1, 1.0, 3.3], requires_grad=True)
    stored = rounded_to(scale, torch.float16)
    assert torch.equal(stored, scale.half().float())
    torch.autograd.backward(stored.sum())
    assert scale.grad is not None
    assert torch.equal(scale.grad, torch.ones(3))
    assert rounded_to(scale, torch.float32) is scale
