"""Statistics of a model that ran on samples, against NumPy over its values."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.calibration.collect import collect_statistics
from qcompiler.calibration.histogram import Histogram
from qcompiler.calibration.statistics import Statistics, Wanted
from qcompiler.errors import InternalError, ModelError, UsageError
from qcompiler.execution.sessions import open_session
from qcompiler.execution.taps import Measure, Tap, tap_model
from qcompiler.progress import Advance
from tests.support.graphs import build, random_array

Array = npt.NDArray[Any]

TEXT = """g (float[b, n, 4] x) => (float[b, n, 3] y) {
    h = MatMul(x, w)
    r = Relu(h)
    s = Sigmoid(h)
    y = Add(r, s) }"""
NAMES = ["x", "h", "r", "s", "y"]
ALL = [Wanted(name, histogram=True, channel_axis=2) for name in NAMES]
PLENTY = 1 << 30


def listed(calls: Sequence[Feeds]) -> Samples:
    return Samples("a list", False, len(calls), lambda: iter(calls))


class Record:
    """Progress that notes what it is told."""

    def __init__(self) -> None:
        self.tasks: dict[str, list[float]] = {}

    def task(self, description: str, total: float) -> AbstractContextManager[Advance]:
        return self._task(description, total)

    @contextmanager
    def _task(self, description: str, total: float) -> Iterator[Advance]:
        entry = self.tasks.setdefault(description, [total, 0.0])

        def advance(amount: float) -> None:
            entry[1] += amount

        yield advance


def model() -> ir.Model:
    return build(TEXT, {"w": random_array(4, 3)})


def ragged(*sizes: tuple[int, int]) -> Samples:
    shapes = sizes or ((1, 3), (2, 7), (1, 1), (0, 5), (3, 2))
    return listed([{"x": random_array(b, n, 4, seed=i)} for i, (b, n) in enumerate(shapes)])


def collect(
    wanted: Sequence[Wanted] = ALL, samples: Samples | None = None, budget: int = PLENTY
) -> Statistics:
    return collect_statistics(
        model(),
        wanted,
        ragged() if samples is None else samples,
        model_fingerprint="model",
        memory_budget=budget,
        threads=1,
    )


def values_of(name: str) -> list[Array]:
    tapped = tap_model(model(), [Tap(name, Measure.VALUES)])
    with open_session(tapped.model, optimize=False, threads=1) as session:
        return [next(iter(session.run(feeds).values())) for feeds in ragged()]


def assert_same(one: Statistics, other: Statistics) -> None:
    assert list(one.tensors) == list(other.tensors)
    for name, left in one.tensors.items():
        right = other.tensors[name]
        for field in ("count", "minimum", "maximum", "total", "total_squares"):
            assert getattr(left, field) == getattr(right, field), (name, field)
        np.testing.assert_array_equal(left.channel_minimum, right.channel_minimum)
        np.testing.assert_array_equal(left.channel_maximum, right.channel_maximum)
        if left.histogram is not None and right.histogram is not None:
            np.testing.assert_array_equal(left.histogram.bins, right.histogram.bins)
            np.testing.assert_array_equal(left.histogram.counts, right.histogram.counts)


@pytest.mark.parametrize("histogram", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_the_values(name: str, histogram: bool) -> None:
    found = collect([Wanted(name, histogram, channel_axis=-1)]).tensors[name]
    calls = values_of(name)
    rows = np.concatenate([call.reshape(-1, call.shape[-1]) for call in calls])
    assert found.count == rows.size
    assert (found.minimum, found.maximum) == (rows.min(), rows.max())
    np.testing.assert_array_equal(found.channel_minimum, rows.min(axis=0))
    np.testing.assert_array_equal(found.channel_maximum, rows.max(axis=0))
    assert found.mean == pytest.approx(rows.astype(np.float64).mean(), rel=1e-5, abs=1e-6)
    assert found.rms == pytest.approx(np.sqrt((rows.astype(np.float64) ** 2).mean()), rel=1e-5)
    assert (found.histogram is not None) == histogram
    if found.histogram is not None:
        expected = Histogram.from_array(rows)
        np.testing.assert_array_equal(found.histogram.bins, expected.bins)
        np.testing.assert_array_equal(found.histogram.counts, expected.counts)


def test_results_do_not_depend_on_the_rounds() -> None:
    whole = collect()
    # Room for one value and its histogram builder in a round.
    divided = collect(budget=4 * ((3 << 18) + 300))
    assert_same(whole, divided)
    alone = [collect([want]).tensors[want.name] for want in ALL]
    assert [tensor.total for tensor in alone] == [whole.tensors[n].total for n in NAMES]


def test_the_origin_is_written_down() -> None:
    statistics = collect([Wanted("h")])
    assert statistics.model_fingerprint == "model"
    assert statistics.samples_fingerprint == ragged().fingerprint()
    assert statistics.calls == 5


def test_without_a_model_fingerprint_the_samples_are_not_hashed() -> None:
    reads = 0

    def read() -> Iterator[Feeds]:
        nonlocal reads
        reads += 1
        yield {"x": random_array(1, 2, 4)}

    samples = Samples("a list", False, 1, read)
    found = collect_statistics(
        model(), [Wanted("h")], samples, model_fingerprint="", memory_budget=PLENTY, threads=1
    )
    assert (found.samples_fingerprint, reads) == ("", 1)


def test_two_wishes_for_one_value_are_both_met() -> None:
    found = collect([Wanted("h", histogram=True), Wanted("h", channel_axis=2)]).tensors["h"]
    assert found.histogram is not None
    assert found.channel_minimum is not None


def test_two_axes_for_one_value_are_refused() -> None:
    with pytest.raises(InternalError, match=r"along the axes \[0, 2\]; one can be kept"):
        collect([Wanted("h", channel_axis=0), Wanted("h", channel_axis=2)])


def test_nothing_wanted_is_nothing_found() -> None:
    assert collect([]).tensors == {}


@pytest.mark.parametrize("histogram", [True, False])
def test_empty_calls_alone_give_zeros(histogram: bool) -> None:
    found = collect([Wanted("h", histogram, 2)], ragged((0, 2), (3, 0))).tensors["h"]
    assert (found.count, found.minimum, found.maximum, found.rms) == (0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("histogram", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 37, 4099])
def test_what_is_not_finite_is_named(histogram: bool, bad: float, place: int) -> None:
    calls = [{"x": random_array(1, 1025, 4, seed=i)} for i in range(3)]
    calls[1]["x"].reshape(-1)[place] = bad
    with pytest.raises(ModelError, match="NaN or infinite, in call 2 of 3") as caught:
        collect([Wanted("x", histogram)], listed(calls))
    assert caught.value.where == "x"


def test_a_sum_that_overflows_is_no_fault() -> None:
    calls = listed([{"x": np.full((1, 2, 4), 3e38, np.float32)}])
    found = collect([Wanted("x")], calls).tensors["x"]
    assert found.maximum == np.float32(3e38)
    assert found.total_squares == np.inf


def test_no_samples_are_refused() -> None:
    with pytest.raises(UsageError, match="no sample"):
        collect(samples=listed([]))


def test_a_value_too_large_for_the_budget_says_what_it_needs() -> None:
    with pytest.raises(UsageError, match="takes 3 MiB in the largest call") as caught:
        collect([Wanted("x", True)], ragged((1, 1), (1, 1 << 17)), budget=4 << 20)
    assert caught.value.where == "x"
    assert caught.value.hint == (
        "raise the budget to 11 MiB, or use smaller samples or the observer min-max"
    )


def test_the_largest_call_is_found_wherever_it_is() -> None:
    # The second call has most elements, the third the longest sequence.
    text = """g (float[b, n] x) => (float[b, n, n] y) {
        r = Unsqueeze(x, two)  c = Unsqueeze(x, one)  y = Mul(r, c) }"""
    weights = {"one": np.array([1]), "two": np.array([2])}
    shapes = [(1, 5), (2000, 3), (1, 1000)]
    samples = listed([{"x": random_array(*shape)} for shape in shapes])
    with pytest.raises(UsageError, match="takes 5 MiB"):
        collect_statistics(
            build(text, weights),
            [Wanted("y", True)],
            samples,
            model_fingerprint="",
            memory_budget=8 << 20,
            threads=1,
        )


@pytest.mark.parametrize("histogram", [True, False])
def test_an_axis_that_is_not_there_is_refused(histogram: bool) -> None:
    with pytest.raises(ModelError, match="has 3 axes, and extremes are wanted along axis 3"):
        collect([Wanted("h", histogram, 3)])


@pytest.mark.parametrize("histogram", [True, False])
def test_an_axis_whose_size_changes_is_refused(histogram: bool) -> None:
    with pytest.raises(ModelError, match="there are 7 channels, and 3 before, in call 2 of 5"):
        collect([Wanted("h", histogram, 1)])


def test_a_value_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match="no such value"):
        collect([Wanted("hh")])


def test_progress_counts_calls() -> None:
    record = Record()
    collect_statistics(
        model(),
        ALL,
        ragged(),
        model_fingerprint="",
        memory_budget=4 * ((3 << 18) + 300),
        progress=record,
        threads=1,
    )
    assert record.tasks == {"measuring activations": [5, 5], "calibrating": [25, 25]}


PEAK = """

import numpy as np
from qcompiler.calibration.calls import Samples
from qcompiler.calibration.collect import collect_statistics
from qcompiler.calibration.statistics import Wanted
from tests.support.graphs import build

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))

def calls():
    for seed in range(2):
        yield {"x": np.random.default_rng(seed).standard_normal(ROOM, np.float32)}

COUNT, ROOM, BUDGET = 24, 4 << 20, 384 << 20
body = " ".join(f"v{i + 1} = Sin(v{i})" for i in range(COUNT))
model = build(f"g (float[n] v0) => (float[n] v{COUNT}) {{ {body} }}".replace("v0", "x"))
wanted = [Wanted(f"v{i + 1}", histogram=HISTOGRAM) for i in range(COUNT)]
samples = Samples("drawn", True, 2, calls)
found = collect_statistics(
    model, wanted, samples, model_fingerprint="", memory_budget=BUDGET, threads=1
)
assert len(found.tensors) == COUNT
assert found.tensors["v1"].count == 2 * ROOM
print(peak())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("histogram", [True, False])
def test_memory_stays_within_the_budget(histogram: bool) -> None:
    # 24 values of 16 MiB: all at once, they alone would take the budget.
    script = PEAK.replace("HISTOGRAM", str(histogram))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 384 << 20
