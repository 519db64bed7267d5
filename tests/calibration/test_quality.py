"""Comparing outputs of a model and of what was made of it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.calibration.quality import MOST_CALLS, Reference, output_quality
from qcompiler.ir.provenance import COMPUTE_TYPE
from qcompiler.ir.shapes import infer_shapes
from tests.support.graphs import build


def model(factor: float, second: float = 1.0) -> ir.Model:
    """Two outputs: x times one constant, and x times another."""
    return build(
        f"""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[n, 3] x) => (float[n, 3] y, float[n, 3] z)
        <float a = {{{factor}}}, float b = {{{second}}}> {{ y = Mul(x, a)  z = Mul(x, b) }}
        """
    )


def samples(count: int, read: list[int] | None = None) -> Samples:
    def calls() -> Iterator[Feeds]:
        for index in range(count):
            if read is not None:
                read.append(index)
            yield {"x": np.full((index + 1, 3), index + 1, np.float32)}

    return Samples("test", False, count, calls)


def saved(model: ir.Model, path: Path) -> Path:
    ir.save(model, path)
    return path


def test_each_output_has_its_own_distance(tmp_path: Path) -> None:
    source = saved(model(1.0), tmp_path / "a.onnx")
    other = saved(model(1.1, 1.0), tmp_path / "b.onnx")
    first, second = output_quality(source, other, samples(3))
    assert (first.name, second.name) == ("y", "z")
    assert first.native_db == pytest.approx(20.0, abs=0.01)
    assert first.emulated_db == pytest.approx(20.0, abs=0.01)
    assert second.native_db == np.inf


def test_the_worst_output_counts_for_a_variant() -> None:
    reference = Reference(model(1.0), samples(3), memory=1 << 20, most_calls=8)
    assert reference.sqnr_db(model(1.0, 1.01)) == pytest.approx(40.0, abs=0.1)
    assert reference.sqnr_db(model(1.1, 1.01)) == pytest.approx(20.0, abs=0.1)
    assert reference.sqnr_db(model(1.0)) == np.inf


def test_nan_is_infinitely_far() -> None:
    reference = Reference(model(1.0), samples(2), memory=1 << 20, most_calls=8)
    broken = model(1.0)
    broken.graph.initializers["a"].const_value = ir.tensor(np.array([np.nan], np.float32))
    assert reference.sqnr_db(broken) == -np.inf


def test_outputs_are_kept_within_memory() -> None:
    reference = Reference(model(1.0), samples(20), memory=1, most_calls=8)
    assert len(reference) == 1
    assert len(Reference(model(1.0), samples(20), memory=1 << 20, most_calls=8)) == 8


def test_the_calls_used_are_spread_over_all(tmp_path: Path) -> None:
    path = saved(model(1.0), tmp_path / "a.onnx")
    read: list[int] = []
    output_quality(path, path, samples(2 * MOST_CALLS, read))
    assert read == list(range(2 * MOST_CALLS))
    reference = Reference(model(1.0), samples(20), memory=1 << 20, most_calls=5)
    assert [len(feeds["x"]) for feeds in reference.feeds] == [1, 5, 9, 13, 17]


def test_a_cast_model_is_compared_with_every_value_rounded(tmp_path: Path) -> None:
    text = "g (float[N] x) => (float[N] y) { a = Cast<to = 10>(x) s = Mul(a, a) r = Sqrt(s)"
    cast = build(f"{text} y = Cast<to = 1>(r) }}")
    infer_shapes(cast)
    wide = build("g (float[N] x) => (float[N] y) { s = Mul(x, x) y = Sqrt(s) }")
    source = saved(wide, tmp_path / "a")
    calls = Samples("test", False, 1, lambda: iter([{"x": np.array([300, 2], np.float32)}]))
    (plain,) = output_quality(source, saved(cast, tmp_path / "b"), calls)
    assert plain.native_db == plain.emulated_db == np.inf
    cast.metadata_props[COMPUTE_TYPE] = "float16"
    (found,) = output_quality(source, saved(cast, tmp_path / "b"), calls)
    assert found.native_db == np.inf
    assert found.emulated_db == -np.inf
    (found,) = output_quality(source, tmp_path / "b", calls, native=False)
    assert found.native_db is None


def test_bfloat16_is_compared_though_nothing_runs_it_here(tmp_path: Path) -> None:
    text = "g (float[N] x) => (float[N] y) { a = Cast<to = 16>(x) s = Neg(a) y = Cast<to = 1>(s) }"
    narrow = build(text)
    infer_shapes(narrow)
    path = saved(narrow, tmp_path / "b")
    calls = Samples("test", False, 1, lambda: iter([{"x": np.array([1.001, 2], np.float32)}]))
    (same,) = output_quality(path, path, calls)
    assert (same.native_db, same.emulated_db) == (None, np.inf)
    wide = saved(build("g (float[N] x) => (float[N] y) { y = Neg(x) }"), tmp_path / "a")
    narrow.metadata_props[COMPUTE_TYPE] = "bfloat16"
    (found,) = output_quality(wide, saved(narrow, path), calls)
    assert found.native_db is None
    assert 60 < found.emulated_db < 70
