"""Ranges of marked values, from samples and from a file of statistics."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.calibration.observers import Observer
from qcompiler.errors import ModelError, UsageError
from qcompiler.passes.quantize.calibrate import Calibrate, CalibrateOptions
from qcompiler.passes.quantize.insert_activation_qdq import InsertActivationQdq
from qcompiler.passes.quantize.split_outlier_channels import SplitOutlierChannels
from tests.support.graphs import build, node_named, random_array, serialized
from tests.support.parity import assert_parity
from tests.support.rewrites import reasons, run_pass

Array = npt.NDArray[Any]
TEXT = "g (float[N, 64] x) => (float[N, 8] y) { [r] h = Relu(x) [mm] y = MatMul(h, w) }"
CALLS = [random_array(4, 64, seed=seed) for seed in range(3)]


def samples(calls: Sequence[Array] = CALLS) -> Samples:
    def read() -> Iterator[Feeds]:
        for call in calls:
            yield {"x": call}

    return Samples("test", False, len(calls), read)


def marked(text: str = TEXT, **shares: str) -> ir.Model:
    """Return a model whose value `h` is to be quantized, and others that share scales."""
    model = build(text, {"w": random_array(64, 8)})
    for node in model.graph:
        for value in node.outputs:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            if value.name == "h":
                value.shape = ir.Shape(["N", 64])
                value.metadata_props["qcompiler.quantizer"] = "uint8:asym"
            if value.name in shares:
                value.metadata_props["qcompiler.quantizer"] = "uint8:asym"
                value.metadata_props["qcompiler.shares"] = shares[value.name]
    node_named(model, "mm").metadata_props["qcompiler.quantized_inputs"] = "[0]"
    node_named(model, "mm").metadata_props["qcompiler.placement"] = "matmul"
    return model


def calibrate(data: Samples | None = None, **options: Any) -> Calibrate:
    options.setdefault("observer", Observer.MIN_MAX)
    trial = (SplitOutlierChannels(), InsertActivationQdq())
    return Calibrate(CalibrateOptions(data or samples(), lambda: "model", trial=trial, **options))


def range_of(model: ir.Model, name: str = "h") -> list[float] | None:
    (value,) = [v for node in model.graph for v in node.outputs if v.name == name]
    text = value.metadata_props.get("qcompiler.range")
    return None if text is None else json.loads(text)


def test_writes_the_range_over_all_calls(tmp_path: Path) -> None:
    model = marked()
    result = run_pass(calibrate(), model, tmp_path)
    assert [rewrite.node for rewrite in result.rewrites] == ["h"]
    assert range_of(model) == [0.0, float(np.maximum(CALLS, 0).max())]
    assert model.metadata_props["qcompiler.observer"] == "min-max"


@pytest.mark.parametrize("observer", list(Observer))
def test_every_observer_stays_within_what_was_seen(observer: Observer, tmp_path: Path) -> None:
    model = marked()
    run_pass(calibrate(observer=observer), model, tmp_path)
    low, high = range_of(model) or (0, 0)
    assert low == 0
    assert 0 < high <= np.max(CALLS) * 1.01


def test_the_best_observer_is_chosen_and_named(tmp_path: Path) -> None:
    calls = [call.copy() for call in CALLS]
    calls[0][0, :] *= 0.01
    calls[1][0, 3] = 500.0  # one value that min-max would give half of all codes to
    model = marked()
    run_pass(calibrate(samples(calls), observer=None, outlier_limit=0), model, tmp_path)
    assert model.metadata_props["qcompiler.observer"] in [observer.value for observer in Observer]
    assert range_of(model) is not None


def test_values_that_share_a_scale_get_no_range(tmp_path: Path) -> None:
    text = TEXT.replace("[mm] y = MatMul(h, w)", "t = Identity(h) [mm] y = MatMul(t, w)")
    model = marked(text, t="h")
    run_pass(calibrate(), model, tmp_path)
    assert range_of(model, "t") is None
    assert range_of(model) is not None


def test_outlier_channels_leave_the_range(tmp_path: Path) -> None:
    calls = [call * np.where(np.arange(64) == 9, 80, 1).astype(np.float32) for call in CALLS]
    model = marked()
    node_named(model, "r").op_type = "Identity"
    run_pass(calibrate(samples(calls)), model, tmp_path)
    (value,) = node_named(model, "r").outputs
    assert value.metadata_props["qcompiler.outlier_channels"] == "[9]"
    others = np.delete(np.array(calls), 9, axis=-1)
    assert range_of(model) == [float(others.min()), float(others.max())]
    whole = marked()
    node_named(whole, "r").op_type = "Identity"
    run_pass(calibrate(samples(calls), outlier_limit=0), whole, tmp_path)
    assert "qcompiler.outlier_channels" not in node_named(whole, "r").outputs[0].metadata_props


def test_what_integers_compute_has_no_outlier_channels(tmp_path: Path) -> None:
    calls = [call * np.where(np.arange(64) == 9, 80, 1).astype(np.float32) for call in CALLS]
    model = marked()
    node_named(model, "r").metadata_props["qcompiler.placement"] = "clipping"
    run_pass(calibrate(samples(calls)), model, tmp_path)
    assert "qcompiler.outlier_channels" not in node_named(model, "r").outputs[0].metadata_props


def test_refuses_a_value_that_no_sample_fills(tmp_path: Path) -> None:
    model = marked()
    result = run_pass(calibrate(samples([np.zeros((0, 64), np.float32)])), model, tmp_path)
    assert reasons(result) == ["h has no element in any sample, and so no range"]
    assert range_of(model) is None


def test_empty_calls_among_others_do_no_harm(tmp_path: Path) -> None:
    model = marked()
    run_pass(calibrate(samples([np.zeros((0, 64), np.float32), *CALLS])), model, tmp_path)
    assert range_of(model) == [0.0, float(np.maximum(CALLS, 0).max())]


def test_a_value_of_zeros_has_a_range(tmp_path: Path) -> None:
    model = marked()
    run_pass(calibrate(samples([np.zeros((2, 64), np.float32)])), model, tmp_path)
    assert range_of(model) == [0.0, 0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_an_error(bad: float, tmp_path: Path) -> None:
    call = random_array(2, 64)
    call[1, 5] = bad
    model = marked()
    node_named(model, "r").op_type = "Identity"
    with pytest.raises(ModelError, match="h"):
        run_pass(calibrate(samples([call])), model, tmp_path)


def test_statistics_are_kept_and_reused(tmp_path: Path) -> None:
    file = tmp_path / "seen.npz"
    first, second = marked(), marked()
    run_pass(calibrate(statistics=file), first, tmp_path)
    assert file.exists()
    kept = file.read_bytes()
    run_pass(calibrate(statistics=file), second, tmp_path)
    assert serialized(first) == serialized(second)
    assert file.read_bytes() == kept


def test_statistics_of_other_samples_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "seen.npz"
    run_pass(calibrate(statistics=file), marked(), tmp_path)
    with pytest.raises(UsageError, match="samples"):
        run_pass(calibrate(samples(CALLS[:2]), statistics=file), marked(), tmp_path)


def test_statistics_without_a_histogram_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "seen.npz"
    run_pass(calibrate(statistics=file, two_terms_below=0), marked(), tmp_path)
    with pytest.raises(UsageError, match="needs a histogram"):
        run_pass(calibrate(statistics=file, observer=Observer.MSE), marked(), tmp_path)


@pytest.mark.parametrize(("power", "terms"), [(1, None), (9, "2")])
def test_values_of_few_steps_get_two_terms_and_no_outlier_channels(
    power: int, terms: str | None, tmp_path: Path
) -> None:
    calls = [np.maximum(call, 0) ** power for call in CALLS]
    calls[0][:, 5] *= 100
    model = marked()
    run_pass(calibrate(samples(calls), observer=Observer.MSE), model, tmp_path)
    (value,) = [v for node in model.graph for v in node.outputs if v.name == "h"]
    assert value.metadata_props.get("qcompiler.terms") == terms
    assert ("qcompiler.outlier_channels" in value.metadata_props) == (terms is None)
    if terms:
        assert range_of(model) == [0.0, float(max(call.max() for call in calls))]


def test_two_terms_are_for_products_alone_and_can_be_turned_off(tmp_path: Path) -> None:
    calls = [np.maximum(call, 0) ** 9 for call in CALLS]
    off = marked()
    run_pass(calibrate(samples(calls), two_terms_below=0), off, tmp_path)
    shared = marked("""g (float[N, 64] x) => (float[N, 8] y, float[N, 64] z) {
        h = Relu(x)
        [mm] y = MatMul(h, w)
        [other] z = Neg(h)
    }""")
    node_named(shared, "other").metadata_props["qcompiler.quantized_inputs"] = "[0]"
    run_pass(calibrate(samples(calls)), shared, tmp_path)
    for model in (off, shared):
        (value,) = [v for node in model.graph for v in node.outputs if v.name == "h"]
        assert "qcompiler.terms" not in value.metadata_props


def test_nothing_marked_is_nothing_to_do(tmp_path: Path) -> None:
    model = build(TEXT, {"w": random_array(64, 8)})
    assert run_pass(calibrate(), model, tmp_path).rewrites == ()


def test_a_second_run_writes_the_same_and_keeps_numerics(tmp_path: Path) -> None:
    model = marked()
    run_pass(calibrate(observer=None), model, tmp_path)
    once = serialized(model)
    run_pass(calibrate(observer=None), model, tmp_path)
    assert serialized(model) == once
    assert_parity(marked(), model, tolerance=0)


def floats() -> ir.Model:
    model = marked()
    (value,) = [v for node in model.graph for v in node.outputs if v.name == "h"]
    value.metadata_props["qcompiler.quantizer"] = "fp8:sym"
    return model


def test_floats_of_8_bits_have_no_outlier_channels_and_no_second_term(tmp_path: Path) -> None:
    calls = [call.copy() for call in CALLS]
    for call in calls:
        call[:, 3] *= 1000
    model = floats()
    run_pass(calibrate(samples(calls)), model, tmp_path)
    (value,) = [v for node in model.graph for v in node.outputs if v.name == "h"]
    assert not {"qcompiler.outlier_channels", "qcompiler.terms"} & value.metadata_props.keys()
    # Integers would lose all channels but that one; floats keep what their mantissa holds.
    assert float(value.metadata_props["qcompiler.activation_sqnr_db"]) > 28


def test_the_observer_that_counts_equal_steps_is_none_for_floats(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="entropy counts codes of equal width, which fp8 has not"):
        run_pass(calibrate(observer=Observer.ENTROPY), floats(), tmp_path)
    model = floats()
    run_pass(calibrate(observer=None), model, tmp_path)
    assert model.metadata_props["qcompiler.observer"] != "entropy"
    assert range_of(model) is not None


def test_observers_are_tried_on_a_model_of_16_bits_too(tmp_path: Path) -> None:
    text = "g (float16[N, 64] x) => (float16[N, 8] y) { [r] h = Relu(x) [mm] y = MatMul(h, w) }"
    model = build(text, {"w": random_array(64, 8).astype(np.float16)})
    (value,) = node_named(model, "r").outputs
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT16), ir.Shape(["N", 64])
    value.metadata_props["qcompiler.quantizer"] = "int8:sym"
    node_named(model, "mm").metadata_props["qcompiler.quantized_inputs"] = "[0]"
    node_named(model, "mm").metadata_props["qcompiler.placement"] = "matmul"
    calls = [call.astype(np.float16) for call in CALLS]
    run_pass(calibrate(samples(calls), observer=None), model, tmp_path)
    assert range_of(model) is not None
