"""Weights of every layout as rows, and back."""

import numpy as np
import pytest

from qcompiler.ir.quantizable import find_sites
from qcompiler.quant.arithmetic import dequantize
from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock, scale_shape
from qcompiler.reconstruction.weight_rows import WeightRows
from tests.support.graphs import Array, build, random_array

_LAYOUTS = {
    "matmul": ("y = MatMul(x, w)", (6, 4), 4),
    "gemm": ("y = Gemm<transB = 1>(x, w)", (4, 6), 4),
    "left": ("y = MatMul(w, x)", (4, 6), 4),
    "vector": ("y = MatMul(x, w)", (6,), 1),
    "turned": ("t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t)", (4, 6), 4),
    "conv": ("y = Conv(x, w)", (4, 6, 3, 2), 4),
    "grouped": ("y = Conv<group = 2>(x, w)", (4, 3, 3), 4),
}


def _rows(layout: str, granularity: Granularity | None = None) -> tuple[WeightRows, Array]:
    nodes, shape, _ = _LAYOUTS[layout]
    values = random_array(*shape)
    model = build(f"g (float[A, B] x) => (float[C, D] y) {{ {nodes} }}", {"w": values})
    ((site,), _others) = find_sites(model)
    return WeightRows.of(site, granularity or PerBlock(site.axes.reduction, 4)), values


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_rows_are_output_channels(layout: str) -> None:
    rows, values = _rows(layout)
    _, _, count = _LAYOUTS[layout]
    assert rows.rows(values).shape == (count, values.size // count) == (rows.count, rows.width)
    np.testing.assert_array_equal(rows.restored(rows.rows(values)), values)


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_scales_lie_as_the_elements_that_share_them(layout: str) -> None:
    rows, values = _rows(layout)
    scale = random_array(*scale_shape(rows.shape, rows.granularity), seed=1) ** 2 + 0.1
    spread = rows.scale_rows(scale)[:, rows.scale_index()]
    codes = np.arange(values.size).reshape(values.shape).astype(np.int8)
    expected = dequantize(codes, scale.astype(np.float32), None, rows.granularity)
    np.testing.assert_allclose(
        rows.restored(rows.rows(codes) * spread.astype(np.float32)), expected, rtol=1e-6
    )
    np.testing.assert_array_equal(rows.restored_scale(rows.scale_rows(scale)), scale)
    index = rows.scale_index().tolist()
    assert index == sorted(index)


def test_one_scale_for_every_output_channel() -> None:
    rows, _ = _rows("matmul", PerAxis(1))
    scale = random_array(4)
    assert rows.scale_rows(scale).shape == (4, 1)
    assert set(rows.scale_index().tolist()) == {0}
    np.testing.assert_array_equal(rows.restored_scale(rows.scale_rows(scale)), scale)


def test_a_convolution_sums_channels_last() -> None:
    rows, values = _rows("conv")
    np.testing.assert_array_equal(rows.rows(values)[0, :6], values[0, :, 0, 0])
    assert rows.scale_index()[:6].tolist() == [0, 0, 0, 0, 1, 1]
    assert rows.scale_index()[6] == 2
