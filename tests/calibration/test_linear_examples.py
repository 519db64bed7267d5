"""Examples of what ops with weights multiply, and what rounding costs on them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.calibration.linear_examples import (
    ExampleCollector,
    Examples,
    channels_of_rows,
    weight_matrix,
)
from qcompiler.calibration.product_error import Noise, QuantizedProduct
from qcompiler.errors import UsageError
from qcompiler.ir.provenance import annotate
from qcompiler.ir.quantizable import Site, find_sites
from qcompiler.ir.shapes import infer_shapes
from qcompiler.ir.weights import read_all
from qcompiler.progress import Advance, SilentProgress
from qcompiler.quant.granularity import PerAxis
from qcompiler.quant.qtype import INT4
from qcompiler.quant.ranges import RangeMethod, quantize_tensor
from qcompiler.quant.scheme import QSpec
from tests.support.graphs import Array, build, random_array
from tests.support.parity import run_model

SIDE = 7
CONVOLUTIONS = {
    "plain": ("", (4, 3, 3, 3)),
    "strides and pads": ("<strides=[2, 1], pads=[1, 0, 2, 1]>", (4, 3, 3, 2)),
    "dilated": ("<dilations=[2, 3]>", (4, 3, 2, 2)),
    "same upper": ('<auto_pad="SAME_UPPER", strides=[2, 2]>', (4, 3, 4, 4)),
    "same lower": ('<auto_pad="SAME_LOWER", strides=[3, 2]>', (4, 3, 4, 3)),
    "valid": ('<auto_pad="VALID">', (4, 3, 2, 2)),
    "grouped": ("<group=3, pads=[1, 1, 1, 1]>", (6, 1, 3, 3)),
}


def calls(shape: tuple[int, ...], count: int = 3) -> Samples:
    def read() -> Iterator[Feeds]:
        for seed in range(count):
            yield {"x": random_array(*shape, seed=seed)}

    return Samples("test", False, count, read)


def examples_of(model: ir.Model, samples: Samples, **options: Any) -> tuple[Site, Examples]:
    infer_shapes(model)
    (site,) = find_sites(model)[0]
    collector = ExampleCollector(
        model, samples, **{"count": 30, "memory_budget": 1 << 30} | options
    )
    (found,) = collector.each([[site]], SilentProgress(), "looking")
    return site, found[site]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_patch_times_the_weights_is_an_output(name: str) -> None:
    attributes, kernel = CONVOLUTIONS[name]
    text = f"g (float[N, 3, 7, 7] x) => (float[N, M, P, Q] y) {{ y = Conv{attributes}(x, w) }}"
    model = build(text, {"w": random_array(*kernel, seed=5)})
    samples = calls((2, 3, SIDE, SIDE))
    site, examples = examples_of(model, samples)
    products = examples.rows @ weight_matrix(site, read_all(site.tensor))
    found = np.concatenate(list(products), axis=1)  # groups side by side: output channels
    outputs = np.concatenate(
        [np.moveaxis(run_model(model, f)["y"], 1, -1).reshape(-1, kernel[0]) for f in samples]
    )
    distances = np.abs(found[:, None] - outputs[None]).max(axis=2)
    assert distances.min(axis=1).max() < 1e-4
    assert len(set(distances.argmin(axis=1))) == len(found) == 30


@pytest.mark.parametrize(
    "node",
    [
        "MatMul(x, w)",
        "Gemm<transB=1>(x, wt)",
        "Gemm<transA=1>(xt, w)",
        "MatMul(wt, xt)",
    ],
)
def test_rows_of_products(node: str) -> None:
    matrix = random_array(8, 5)
    weights = {"w": matrix} if "w)" in node else {"wt": np.ascontiguousarray(matrix.T)}
    given = "float[8, N] xt" if "xt" in node else "float[N, 8] x"
    model = build(f"g ({given}) => (float[A, B] y) {{ y = {node} }}", weights)

    def read() -> Iterator[Feeds]:
        for seed in range(3):
            rows = random_array(20, 8, seed=seed)
            yield {"xt": np.ascontiguousarray(rows.T)} if "xt" in node else {"x": rows}

    site, examples = examples_of(model, Samples("test", False, 3, read))
    assert examples.rows.shape == (1, 30, 8)
    everything = np.concatenate([random_array(20, 8, seed=seed) for seed in range(3)])
    assert all((everything == row).all(axis=1).any() for row in examples.rows[0])
    assert examples.ranges.minimum == pytest.approx(everything.min(axis=0))
    assert examples.ranges.maximum == pytest.approx(everything.max(axis=0))
    assert examples.ranges.mean_magnitude == pytest.approx(np.abs(everything).mean(axis=0))
    assert weight_matrix(site, read_all(site.tensor))[0] == pytest.approx(matrix)


class TaskNames:
    """Progress that keeps the names of tasks."""

    def __init__(self) -> None:
        self.tasks: list[str] = []

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        self.tasks.append(description)
        yield lambda amount: None


def test_rounds_hold_what_fits_and_one_op_must_fit() -> None:
    text = """g (float[N, 8] x) => (float[N, 8] y)
              { a = MatMul(x, v) b = Relu(a) c = MatMul(b, w) d = Relu(c) y = MatMul(d, u) }"""
    model = build(text, {name: random_array(8, 8) for name in "vwu"})
    infer_shapes(model)
    units = [[site] for site in find_sites(model)[0]]
    samples = calls((100, 8))
    # A value takes 3,200 bytes in a call, and its 30 examples 960.
    for budget, rounds in ((1 << 20, 1), (4 * 9000, 2), (4 * 5000, 3)):
        collector = ExampleCollector(model, samples, count=30, memory_budget=budget)
        progress = TaskNames()
        found = list(collector.each(units, progress, "looking"))
        assert [list(each) for each in found] == units
        assert progress.tasks == ["looking", *["collecting examples"] * rounds]
    too_small = ExampleCollector(model, samples, count=30, memory_budget=4 * 4000)
    with pytest.raises(UsageError, match="raise the memory budget"):
        list(too_small.each(units, SilentProgress(), "looking"))


def quantized(
    scheme: str, data: Mapping[str, str] | None = None, **options: Any
) -> tuple[QuantizedProduct, Array, Array]:
    model = build("g (float[N, 16] x) => (float[N, 4] y) { y = MatMul(x, w) }", {"w": WEIGHT})
    site, examples = examples_of(model, calls((50, 16)), count=64)
    annotate(site.node, scheme=scheme, **(data or {}))
    channels = np.arange(16)
    options.setdefault("outlier_limit", 0)
    product = QuantizedProduct(site, channels, examples, **options)
    return product, examples.rows[0], WEIGHT


WEIGHT = random_array(16, 4, seed=7)


def noise_of(product: QuantizedProduct, scales: npt.NDArray[np.float64] | None = None) -> Noise:
    chosen = np.ones(16) if scales is None else scales
    return product.noise(product.data(chosen), chosen)


def test_noise_of_weights_alone_is_that_of_rounding_them() -> None:
    product, rows, weight = quantized("w4a16:sym")
    assert not product.quantizes_data
    found_codes = quantize_tensor(
        weight, QSpec(INT4, PerAxis(1), symmetric=True), RangeMethod.MIN_MAX, np.float32
    )
    rounded = found_codes.codes * found_codes.scale
    for part, found in enumerate((noise_of(product).fit, noise_of(product).judge)):
        half = slice(44) if part == 0 else slice(44, None)  # two of three calls, 22 rows each
        exact = rows[half] @ weight
        signals = (exact**2).sum(axis=1)
        noises = ((rows[half] @ rounded - exact) ** 2).sum(axis=1)
        expected = np.mean(2 * noises / (signals + np.median(signals)))
        assert found == pytest.approx(float(expected), rel=1e-4)


def test_noise_of_rounded_data_falls_when_an_outlier_is_scaled_down() -> None:
    product, _, _ = quantized("w8a8:sym", {"quantized_inputs": "[0]"})
    assert product.quantizes_data
    assert noise_of(product).judge < 1e-2
    worse = np.ones(16)
    worse[3] = 1 / 200  # makes channel 3 two hundred times as large
    assert noise_of(product, worse).judge > 20 * noise_of(product).judge


def test_channels_that_stay_in_float_do_not_widen_the_range() -> None:
    scales = np.ones(16)
    scales[3] = 1 / 200
    noises = [
        noise_of(quantized("w8a8:sym", {"quantized_inputs": "[0]"}, outlier_limit=limit)[0], scales)
        for limit in (0, 8)
    ]
    assert noises[1].judge < noises[0].judge / 20


def test_data_of_few_steps_is_rounded_in_two_terms() -> None:
    scales = np.ones(16)
    scales[3] = 1 / 2000  # all others are a fraction of a step large
    noises = [
        noise_of(
            quantized("w8a8:sym", {"quantized_inputs": "[0]"}, two_terms_below=below)[0], scales
        )
        for below in (0.0, 2.0)
    ]
    assert noises[1].judge < noises[0].judge / 20


def test_channels_of_rows_repeat_for_the_positions_of_a_kernel() -> None:
    text = "g (float[N, 4, 7, 7] x) => (float[N, 4, 6, 6] y) { y = Conv<group=2>(x, w) }"
    (site,) = find_sites(build(text, {"w": random_array(4, 2, 2, 2)}))[0]
    rows = channels_of_rows(site, np.array([5, 6, 7, 8]))
    assert rows.tolist() == [[5] * 4 + [6] * 4, [7] * 4 + [8] * 4]
