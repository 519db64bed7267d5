"""Correcting biases keeps the numbers it does not correct, and is reproducible."""

from pathlib import Path

import numpy as np

from qcompiler.passes.quantize.insert_qdq import InsertQdq
from tests.support.bias_models import (
    correct_bias,
    errors_at,
    gemms,
    parts,
    planned,
    quantized,
    shifted_rows,
)
from tests.support.graphs import initializer, random_array
from tests.support.rewrites import run_pass

CALLS = shifted_rows(8, 24, 32)
W, B = random_array(32, 16, seed=1) / 6, random_array(16, seed=2)


def test_the_float_model_changes_by_the_corrections_alone(tmp_path: Path) -> None:
    text = "g (float[n, 32] x) => (float[n, 16] y) { [op] y = Gemm(x, w, b) }"
    source, model = planned(text, {"w": W, "b": B}), planned(text, {"w": W, "b": B})
    run_pass(correct_bias(CALLS), model, tmp_path)
    choosing, _ = parts(CALLS)
    expected = errors_at(source, quantized(source, tmp_path), "y", choosing).mean(0)
    shift = errors_at(source, model, "y", choosing)
    assert np.abs(shift + expected).max() < 1e-5


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        model = gemms()
        run_pass(correct_bias(CALLS), model, tmp_path)
        found.append(initializer(model, "y.corrected").tobytes())
    assert found[0] == found[1]


def test_a_single_call_judges_itself(tmp_path: Path) -> None:
    assert run_pass(correct_bias(CALLS[:1]), gemms(), tmp_path).rewrites


def test_the_store_of_the_copy_is_closed(tmp_path: Path) -> None:
    run_pass(correct_bias(CALLS, (InsertQdq(),)), gemms(), tmp_path, spill_bytes=1)
    assert len(list(tmp_path.iterdir())) == 1  # the store that the model itself refers to
