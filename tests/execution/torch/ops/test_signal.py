"""Fourier transforms and windows: gradients, old opsets, odd lengths, refusals."""

from typing import Any

import numpy as np
import pytest

from qcompiler.errors import ModelError
from tests.support.graphs import random_array
from tests.support.torch_programs import (
    agrees_with_runtime,
    gradients_agree,
    program_of,
    run_program,
)

_TOLERANCE = 2e-6
"""Of |error| / max(1, |expected|): float32 sums of up to 10 terms in another order."""


def _dft(attributes: str, inputs: str = "x", dtype: str = "float") -> str:
    return (
        f"g ({dtype}[A, B, C, D] x, int64 size, int64 axis) => ({dtype}[E, F, G, H] y) "
        f"{{ y = DFT {attributes} ({inputs}) }}"
    )


def _feeds(parts: int, dtype: Any = np.float32) -> dict[str, Any]:
    return {
        "x": random_array(2, 5, 4, parts, dtype=dtype),
        "size": np.array(6, np.int64),
        "axis": np.array(1, np.int64),
    }


@pytest.mark.parametrize(
    ("attributes", "parts"),
    [
        ("", 1),
        ("", 2),
        ("<onesided = 1>", 1),
        ("<inverse = 1>", 1),
        ("<inverse = 1>", 2),
        ("<inverse = 1, onesided = 1>", 2),
    ],
)
@pytest.mark.parametrize("inputs", ["x", "x, size", "x, size, axis", 'x, "", axis'])
def test_dft(attributes: str, parts: int, inputs: str) -> None:
    feeds = _feeds(parts, np.float64)
    found = run_program(_dft(attributes, inputs, "double"), feeds)["y"]
    axis = 1 if "axis" in inputs else 2
    size = 6 if "size" in inputs else None
    x = feeds["x"]
    signal = x[..., 0] if parts == 1 else x[..., 0] + 1j * x[..., 1]
    functions: dict[str, Any] = {
        "": np.fft.fft,
        "<onesided = 1>": np.fft.rfft,
        "<inverse = 1>": np.fft.ifft,
        "<inverse = 1, onesided = 1>": np.fft.irfft,
    }
    wanted = functions[attributes](signal, size, axis)
    columns = [wanted.real, wanted.imag] if np.iscomplexobj(wanted) else [wanted]
    np.testing.assert_allclose(found, np.stack(columns, -1), rtol=1e-12, atol=1e-12)
    gradients_agree(_dft(attributes, inputs, "double"), feeds)


@pytest.mark.parametrize(
    ("attributes", "parts"), [("axis = 2", 1), ("onesided = 1", 1), ("inverse = 1, axis = 2", 2)]
)
def test_dft_with_its_axis_as_attribute(attributes: str, parts: int) -> None:
    agrees_with_runtime(_dft(f"<{attributes}>"), _feeds(parts), tolerance=_TOLERANCE, opset=17)


def test_dft_of_halves() -> None:
    wanted = run_program(_dft(""), _feeds(2))["y"]
    found = run_program(_dft("", dtype="float16"), _feeds(2, np.float16))["y"]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found.astype(np.float32), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("attributes", "inputs", "parts", "reason"),
    [
        ("<onesided = 1>", "x", 2, "loses half of it"),
        ("", 'x, "", last', 1, "holds real and imaginary parts"),
    ],
)
def test_dft_refuses(attributes: str, inputs: str, parts: int, reason: str) -> None:
    text = (
        "g (float[A, B, C, D] x) => (float[E, F, G, H] y) "
        f"{{ last = Constant <value_int = -1> () y = DFT {attributes} ({inputs}) }}"
    )
    with pytest.raises(ModelError, match=reason):
        program_of(text)({"x": _feeds(parts)["x"]})


def _stft(attributes: str, inputs: str, dtype: str = "float") -> str:
    return (
        f"g ({dtype}[A, B, C] x, int64 step, {dtype}[W] window, int64 size) "
        f"=> ({dtype}[E, F, G, H] y) {{ y = STFT {attributes} ({inputs}) }}"
    )


@pytest.mark.parametrize("onesided", [0, 1])
@pytest.mark.parametrize(
    "inputs", ["x, step, window", "x, step, window, size", 'x, step, "", size']
)
def test_stft(onesided: int, inputs: str) -> None:
    feeds: dict[str, Any] = {
        "x": random_array(2, 17, 1),
        "step": np.array(3, np.int64),
        "window": np.hanning(8).astype(np.float32),
        "size": np.array(8, np.int64),
    }
    attributes = f"<onesided = {onesided}>"
    agrees_with_runtime(_stft(attributes, inputs), feeds, tolerance=_TOLERANCE)
    feeds = feeds | {name: feeds[name].astype(np.float64) for name in ("x", "window")}
    if "window" not in inputs:
        del feeds["window"]
        text = _stft(attributes, inputs, "double").replace(" double[W] window,", "")
    else:
        text = _stft(attributes, inputs, "double")
    gradients_agree(text, feeds)


def test_stft_of_a_complex_signal() -> None:
    x = random_array(1, 9, 2)
    feeds = {"x": x, "step": np.array(2, np.int64), "size": np.array(4, np.int64)}
    text = _stft("<onesided = 0>", 'x, step, "", size').replace(" float[W] window,", "")
    found = run_program(text, feeds)["y"]
    signal = x[0, :, 0] + 1j * x[0, :, 1]
    for frame in range(3):
        wanted = np.fft.fft(signal[2 * frame : 2 * frame + 4])
        np.testing.assert_allclose(found[0, frame, :, 0], wanted.real, rtol=0, atol=_TOLERANCE)
        np.testing.assert_allclose(found[0, frame, :, 1], wanted.imag, rtol=0, atol=_TOLERANCE)
    with pytest.raises(ModelError, match="loses half of it"):
        run_program(text.replace("onesided = 0", "onesided = 1"), feeds)


@pytest.mark.parametrize("op", ["HannWindow", "HammingWindow", "BlackmanWindow"])
@pytest.mark.parametrize("periodic", [0, 1])
@pytest.mark.parametrize("size", [2, 9, 10])
def test_windows(op: str, periodic: int, size: int) -> None:
    text = f"g (int64 size) => (float[N] y) {{ y = {op} <periodic = {periodic}> (size) }}"
    agrees_with_runtime(text, {"size": np.array(size)}, tolerance=2e-7)


@pytest.mark.parametrize(
    ("bins", "size", "rate"), [(8, 16, 8192), (20, 512, 16000), (40, 64, 16000)]
)
def test_mel_filters(bins: int, size: int, rate: int) -> None:
    text = """g (int64 bins, int64 size, int64 rate, float low, float high) => (float[N, M] y)
        { y = MelWeightMatrix (bins, size, rate, low, high) }"""
    feeds: dict[str, Any] = {
        "bins": np.array(bins, np.int64),
        "size": np.array(size, np.int64),
        "rate": np.array(rate, np.int64),
        "low": np.array(20, np.float32),
        "high": np.array(rate / 2, np.float32),
    }
    agrees_with_runtime(text, feeds, tolerance=1e-6)
