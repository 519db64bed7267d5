"""Ranges from statistics, against brute force over the values themselves."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.calibration.grid_error import RoundingError, grid_of
from qcompiler.calibration.histogram import Histogram
from qcompiler.calibration.observers import Observer, activation_sqnr_db, choose_range
from qcompiler.calibration.statistics import TensorAccumulator, TensorStatistics
from qcompiler.errors import UsageError
from qcompiler.quant.qtype import FP8, INT4, INT8, UINT4, UINT8, QType

Array = npt.NDArray[Any]

N = 40_000
GENERATOR = np.random.default_rng(0)
TENSORS = {
    "normal": GENERATOR.standard_normal(N),
    "shifted": GENERATOR.standard_normal(N) + 3,
    "relu": np.maximum(GENERATOR.standard_normal(N), 0),
    "negative": -np.abs(GENERATOR.standard_normal(N)),
    "laplace": GENERATOR.laplace(size=N),
    "student": GENERATOR.standard_t(3, N),
    "outlier": np.append(GENERATOR.standard_normal(N) * 1e-3, [20.0]),
    "outliers": np.append(GENERATOR.standard_normal(N) * 0.05, [-900.0, 30.0, 35.0]),
    "softmax": GENERATOR.exponential(size=N) ** 4 / 1e5,
    "gelu": (lambda x: x / (1 + np.exp(-1.702 * x)))(GENERATOR.standard_normal(N) * 2),
    "whole numbers": GENERATOR.integers(-200, 256, N),
    "uniform": GENERATOR.uniform(-1, 1, N),
}
INTEGERS = [(INT8, True), (UINT8, False), (INT8, False), (UINT8, True), (INT4, True)]
INTEGERS += [(UINT4, False)]
CASES = [*INTEGERS, (FP8, True)]
IDS = ["int8-sym", "uint8", "int8", "uint8-sym", "int4-sym", "uint4", "fp8"]


def statistics_of(values: Any) -> TensorStatistics:
    accumulator = TensorAccumulator(histogram=True, channel_axis=None)
    accumulator.add_values(np.asarray(values, np.float32))
    return accumulator.finish()


def true_error(values: Any, lo: float, hi: float, qtype: QType, symmetric: bool) -> float:
    """Return the squared error of the values themselves, computed as QuantizeLinear does."""
    grid = grid_of(lo, hi, qtype, symmetric=symmetric)
    x = np.asarray(values, np.float32).astype(np.float64)
    if qtype.floating:
        steps = np.clip(x / grid.scale, qtype.qmin, qtype.qmax)
        floats = steps.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return float(np.sum((x - floats * grid.scale) ** 2))
    codes = np.clip(np.rint(x / grid.scale) + grid.zero_point, qtype.qmin, qtype.qmax)
    return float(np.sum((x - (codes - grid.zero_point) * grid.scale) ** 2))


@pytest.mark.parametrize(("qtype", "symmetric"), CASES, ids=IDS)
@pytest.mark.parametrize("name", TENSORS)
def test_the_error_from_the_histogram_is_the_true_one(
    name: str, qtype: QType, symmetric: bool
) -> None:
    values = np.asarray(TENSORS[name], np.float32)
    error = RoundingError(Histogram.from_array(values), qtype, symmetric=symmetric)
    assert error.signal == pytest.approx(float(np.sum(values.astype(np.float64) ** 2)), rel=0.005)
    low, high = min(float(values.min()), 0), max(float(values.max()), 0)
    shares = np.array([1.0, 0.9, 0.6, 0.3, 0.1, 0.01])
    found = error.of(low * shares, high * shares)
    for share, estimate in zip(shares, found, strict=True):
        truth = true_error(values, low * share, high * share, qtype, symmetric)
        assert estimate == pytest.approx(truth, rel=0.02), share


@pytest.mark.parametrize(("qtype", "symmetric"), CASES, ids=IDS)
@pytest.mark.parametrize("name", TENSORS)
def test_mse_is_near_the_best_of_many_ranges(name: str, qtype: QType, symmetric: bool) -> None:
    values = TENSORS[name]
    lo, hi = choose_range(statistics_of(values), Observer.MSE, qtype, symmetric)
    found = true_error(values, lo, hi, qtype, symmetric)
    low, high = choose_range(statistics_of(values), Observer.MIN_MAX, qtype, symmetric)
    shares = np.geomspace(0.002, 1, 25)
    best = min(
        true_error(values, low * s, high * t, qtype, symmetric)
        for s in shares
        for t in ([s] if symmetric else shares)
    )
    assert found <= 1.03 * best


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CASES),
    st.sampled_from(["normal", "student", "exponential"]),
    st.integers(0, 1000),
    st.floats(-5, 5),
)
def test_mse_is_never_worse_than_min_max(
    case: tuple[QType, bool], kind: str, seed: int, shift: float
) -> None:
    # Few values would not fill their bins evenly: the errors of 3,000 scatter by 2 %.
    generator = np.random.default_rng(seed)
    drawn = {
        "normal": generator.standard_normal(N),
        "student": generator.standard_t(2, N),
        "exponential": generator.exponential(size=N),
    }[kind]
    values = (drawn + shift).astype(np.float32)
    errors = {
        observer: true_error(values, *choose_range(statistics_of(values), observer, *case), *case)
        for observer in (Observer.MSE, Observer.MIN_MAX)
    }
    assert errors[Observer.MSE] <= 1.02 * errors[Observer.MIN_MAX]


FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(FINITE, min_size=1, max_size=50),
    st.sampled_from(list(Observer)),
    st.sampled_from(INTEGERS),
)
def test_ranges_hold_zero_and_stay_within_the_values(
    values: list[float], observer: Observer, case: tuple[QType, bool]
) -> None:
    lo, hi = choose_range(statistics_of(values), observer, *case)
    whole = choose_range(statistics_of(values), Observer.MIN_MAX, *case)
    assert whole[0] <= lo <= 0 <= hi <= whole[1]
    if case[1]:
        assert lo == -hi
    if any(values):
        assert lo < hi


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("observer", list(Observer))
def test_simple_tensors(observer: Observer, symmetric: bool) -> None:
    def range_of(*values: float) -> tuple[float, float]:
        return choose_range(statistics_of(values), observer, UINT8, symmetric)

    assert range_of() == (0.0, 0.0)
    assert range_of(0.0, -0.0, 0.0) == (0.0, 0.0)
    assert range_of(2.5) == pytest.approx((-2.5 if symmetric else 0.0, 2.5), rel=0.01)
    assert range_of(*[-2.7] * 9) == pytest.approx((-2.7, 2.7 if symmetric else 0.0), rel=0.01)
    lo, hi = range_of(*np.linspace(1, 2, 100))
    assert (lo == 0) is not symmetric
    assert hi == pytest.approx(2, rel=0.02)


def test_min_max_is_exact() -> None:
    statistics = statistics_of([-1.1, 0.3, 2.7])
    low, high = float(np.float32(-1.1)), float(np.float32(2.7))
    assert choose_range(statistics, Observer.MIN_MAX, UINT8, False) == (low, high)
    assert choose_range(statistics, Observer.MIN_MAX, INT8, True) == (-high, high)


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9])
@pytest.mark.parametrize("name", ["normal", "relu", "student", "softmax"])
def test_percentiles_are_those_of_numpy(name: str, percentile: float) -> None:
    values = np.asarray(TENSORS[name], np.float32)
    statistics = statistics_of(values)
    lo, hi = choose_range(statistics, Observer.PERCENTILE, INT8, True, percentile=percentile)
    expected = float(np.percentile(np.abs(values), percentile))
    assert (-lo, hi) == pytest.approx((expected, expected), rel=0.02, abs=1e-9)
    lo, hi = choose_range(statistics, Observer.PERCENTILE, UINT8, False, percentile=percentile)
    cut = 100 - percentile
    if values.min() < 0:
        cut /= 2
        assert lo == pytest.approx(float(np.percentile(values, cut)), rel=0.02)
    assert hi == pytest.approx(float(np.percentile(values, 100 - cut)), rel=0.02, abs=1e-9)


def test_all_percent_are_min_max() -> None:
    statistics = statistics_of(TENSORS["normal"])
    for case in CASES:
        assert choose_range(
            statistics, Observer.PERCENTILE, *case, percentile=100
        ) == pytest.approx(choose_range(statistics, Observer.MIN_MAX, *case))


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1, float("nan")])
def test_what_is_no_percentile_is_refused(percentile: float) -> None:
    with pytest.raises(UsageError, match="is no percentile"):
        choose_range(statistics_of([1, 2]), Observer.PERCENTILE, INT8, True, percentile=percentile)


def uniform_counts(histogram: Histogram) -> Array:
    """Return counts of magnitudes in 2048 uniform bins, each bin of the histogram spread evenly."""
    lower, upper = histogram.edges
    share = (np.arange(64) + 0.5) / 64
    places = np.abs(lower[:, None] + (upper - lower)[:, None] * share)
    weights = np.repeat(histogram.counts / 64, 64)
    largest = max(-histogram.minimum, histogram.maximum)
    keep = places.ravel() > 0
    return np.histogram(places.ravel()[keep], 2048, (0, largest), weights=weights[keep])[0]


def kl_by_definition(counts: Array, codes: int, length: int) -> float:
    """Return KL(P || Q) as the talk defines it, built step by step."""
    p = counts[:length].astype(np.float64)
    q = np.zeros(length)
    for code in range(codes):
        part = slice(length * code // codes, length * (code + 1) // codes)
        filled = p[part] > 0
        if filled.any():
            q[part][filled] = p[part].sum() / filled.sum()
    p[-1] += counts[length:].sum()
    p, q = p / p.sum(), q / q.sum()
    if (q[p > 0] == 0).any():
        return float("inf")
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))


@pytest.mark.parametrize("name", ["normal", "laplace", "student", "relu", "gelu"])
def test_entropy_finds_a_length_of_little_divergence(name: str) -> None:
    statistics = statistics_of(TENSORS[name])
    assert statistics.histogram is not None
    counts = uniform_counts(statistics.histogram)
    _, hi = choose_range(statistics, Observer.ENTROPY, INT8, True)
    divergences = {i: kl_by_definition(counts, 128, i) for i in range(128, 2049, 16)}
    length = round(hi / max(-statistics.minimum, statistics.maximum) * 2048)
    least, most = min(divergences.values()), max(divergences.values())
    assert most > 2 * least
    assert kl_by_definition(counts, 128, length) <= 1.1 * least


def test_entropy_of_magnitudes_is_cut_where_the_values_end() -> None:
    values = np.append(TENSORS["student"], [50.0]).clip(-1.0, None)
    lo, hi = choose_range(statistics_of(values), Observer.ENTROPY, UINT8, False)
    assert lo == -1.0
    assert 1 < hi < 50


@pytest.mark.parametrize("observer", [Observer.PERCENTILE, Observer.MSE, Observer.ENTROPY])
def test_extremes_alone_do_not_suffice(observer: Observer) -> None:
    statistics = TensorStatistics(2, -1.0, 1.0, 0.0, 2.0)
    with pytest.raises(UsageError, match=f"{observer} needs a histogram"):
        choose_range(statistics, observer, INT8, True)


@pytest.mark.parametrize("name", ["normal", "relu", "outliers"])
def test_the_expected_sqnr_is_the_true_one(name: str) -> None:
    values = np.asarray(TENSORS[name], np.float32)
    lo, hi = choose_range(statistics_of(values), Observer.MSE, UINT8, False)
    truth = np.sum(values.astype(np.float64) ** 2) / true_error(values, lo, hi, UINT8, False)
    found = activation_sqnr_db(statistics_of(values), UINT8, lo, hi, False)
    assert found == pytest.approx(10 * np.log10(truth), abs=0.1)


def test_zeros_lose_nothing() -> None:
    assert activation_sqnr_db(statistics_of([0, 0]), INT8, 0.0, 0.0, True) == np.inf


def test_grids() -> None:
    assert grid_of(-1.0, 1.55, UINT8, symmetric=False).zero_point == 100
    assert grid_of(-1.27, 1.27, INT8, symmetric=True).scale == pytest.approx(0.01)
    assert grid_of(-1.27, 1.27, UINT8, symmetric=True).zero_point == 128
    assert grid_of(0.0, 0.0, UINT8, symmetric=False).scale == 1.0
    assert grid_of(0.0, 1.0, UINT8, symmetric=False, scale_dtype=np.float16).scale == float(
        np.float16(1 / 255)
    )
