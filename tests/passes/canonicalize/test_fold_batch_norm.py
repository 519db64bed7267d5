"""fold-batch-norm: constant statistics go into the weights beside them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.provenance import CREATED_BY, ORIGIN
from qcompiler.passes.canonicalize.fold_batch_norm import FoldBatchNorm
from tests.support.graphs import build, externalize, initializer, node_named, op_types, random_array
from tests.support.parity import assert_parity
from tests.support.rewrites import assert_idempotent, only_skip, run_pass

_NORM = "BatchNormalization <epsilon = 0.01> (h, gamma, beta, mean, var)"
_AFTER_CONV = f"g (float[N,4,6,6] x) => (y) {{ [conv] h = Conv (x, w) [bn] y = {_NORM} }}"


def _norm(channels: int, seed: int = 10) -> dict[str, Any]:
    names = ("gamma", "beta", "mean", "var")
    made = {name: random_array(channels, seed=seed + i) for i, name in enumerate(names)}
    return {**made, "var": np.abs(made["var"]) + np.float32(0.1)}


def _check(
    text: str, weights: dict[str, Any], ops: list[str], folder: Path, tolerance: float = 2e-6
) -> ir.Model:
    model = build(text, weights)
    result = run_pass(FoldBatchNorm(), model, folder)
    assert op_types(model) == ops, result.skips
    assert_parity(build(text, weights), model, tolerance=tolerance, dims={"N": 3})
    return model


@pytest.mark.parametrize("group", [1, 2, 4])
def test_after_conv(tmp_path: Path, group: int) -> None:
    text = _AFTER_CONV.replace("Conv (", f"Conv <group = {group}, pads = [1, 1, 1, 1]> (")
    weights = {"w": random_array(8, 4 // group, 3, 3), **_norm(8)}
    model = _check(text, weights, ["Conv"], tmp_path)
    assert list(model.graph.initializers) == ["w", "conv_bias"]
    assert node_named(model, "conv").metadata_props[ORIGIN] == '["conv", "bn"]'
    assert [value.name for value in model.graph.outputs] == ["y"]


@pytest.mark.parametrize("group", [1, 2])
def test_after_conv_transpose(tmp_path: Path, group: int) -> None:
    text = f"""g (float[N,4,5,5] x) => (y) {{
      h = ConvTranspose <group = {group}, strides = [2, 2]> (x, w, b)  y = {_NORM} }}"""
    weights = {"w": random_array(4, 6 // group, 3, 3), "b": random_array(6, seed=1), **_norm(6)}
    model = _check(text, weights, ["ConvTranspose"], tmp_path)
    assert "b" in model.graph.initializers


@pytest.mark.parametrize("attributes", ["", "<transB = 1>", "<alpha = 0.5, beta = 3.0>"])
@pytest.mark.parametrize("bias", [None, (5,), (1, 5), (1,)])
def test_after_gemm(tmp_path: Path, attributes: str, bias: tuple[int, ...] | None) -> None:
    inputs = "x, w" if bias is None else "x, w, b"
    text = f"g (float[N,3] x) => (y) {{ h = Gemm {attributes} ({inputs})  y = {_NORM} }}"
    weight = random_array(*((5, 3) if "transB" in attributes else (3, 5)))
    weights = {"w": weight, **_norm(5)}
    if bias is not None:
        weights["b"] = random_array(*bias, seed=2)
    _check(text, weights, ["Gemm"], tmp_path)


def test_after_matmul_and_its_bias(tmp_path: Path) -> None:
    text = f"""g (float[N,3] x) => (y) <float[N,5] h> {{
      m = MatMul (x, w)  [bias] h = Add (b, m)  y = {_NORM} }}"""
    weights = {"w": random_array(3, 5), "b": random_array(5, seed=1), **_norm(5)}
    _check(text, weights, ["MatMul", "Add"], tmp_path)


def test_after_matmul_an_add_stays_recognizable(tmp_path: Path) -> None:
    text = f"g (float[N,3] x) => (y) <float[N,5] h> {{ [mm] h = MatMul (x, w)  y = {_NORM} }}"
    model = _check(text, {"w": random_array(3, 5), **_norm(5)}, ["MatMul", "Add"], tmp_path)
    assert node_named(model, "mm_bias").metadata_props[CREATED_BY] == "fold-batch-norm"


@pytest.mark.parametrize("group", [1, 2])
def test_before_conv_without_padding(tmp_path: Path, group: int) -> None:
    norm = _NORM.replace("(h,", "(x,")
    text = f"g (float[N,4,6,6] x) => (y) {{ n = {norm}  y = Conv <group = {group}> (n, w, b) }}"
    weights = {"w": random_array(6, 4 // group, 3, 3), "b": random_array(6, seed=1), **_norm(4)}
    _check(text, weights, ["Conv"], tmp_path, tolerance=1e-5)


def test_before_padded_conv_without_shift(tmp_path: Path) -> None:
    norm = _NORM.replace("(h,", "(x,")
    text = f"g (float[N,4,6,6] x) => (y) {{ n = {norm}  y = Conv <pads = [1, 1, 1, 1]> (n, w) }}"
    zeros = np.zeros(4, np.float32)
    weights = {"w": random_array(6, 4, 3, 3), **_norm(4), "beta": zeros, "mean": zeros}
    _check(text, weights, ["Conv"], tmp_path)


@pytest.mark.parametrize("attributes", ["<transB = 1, alpha = 0.5>", "<beta = 2.0>"])
def test_before_gemm(tmp_path: Path, attributes: str) -> None:
    norm = _NORM.replace("(h,", "(x,")
    text = f"g (float[N,3] x) => (y) {{ n = {norm}  y = Gemm {attributes} (n, w, b) }}"
    weight = random_array(*((5, 3) if "transB" in attributes else (3, 5)))
    weights = {"w": weight, "b": random_array(5, seed=3), **_norm(3)}
    _check(text, weights, ["Gemm"], tmp_path, tolerance=1e-5)


def test_before_matmul_that_is_an_output(tmp_path: Path) -> None:
    norm = _NORM.replace("(h,", "(x,")
    text = f"g (float[N,3] x) => (y) {{ n = {norm}  y = MatMul (n, w) }}"
    model = _check(text, {"w": random_array(3, 5), **_norm(3)}, ["MatMul", "Add"], tmp_path, 1e-5)
    assert [value.name for value in model.graph.outputs] == ["y"]


@pytest.mark.parametrize(
    "middle",
    [
        "MaxPool <kernel_shape = [2, 2], pads = [1, 1, 0, 0]> (n)",
        "MaxPool <kernel_shape = [1, 1]> (n)",
    ],
)
def test_before_conv_through_a_pool(tmp_path: Path, middle: str) -> None:
    norm = _NORM.replace("(h,", "(x,")
    text = f"g (float[N,4,6,6] x) => (y) {{ n = {norm}  p = {middle}  y = Conv (p, w) }}"
    weights = {"w": random_array(6, 4, 3, 3), **_norm(4)}
    weights["gamma"] = np.abs(weights["gamma"])
    _check(text, weights, ["MaxPool", "Conv"], tmp_path, tolerance=1e-5)
    weights["gamma"] = -weights["gamma"]
    assert only_skip(run_pass(FoldBatchNorm(), build(text, weights), tmp_path)).reason == (
        "a factor that is not positive does not change places with the maximum behind it"
    )


def test_before_gemm_through_pool_and_flatten(tmp_path: Path) -> None:
    norm = _NORM.replace("(h,", "(x,")
    text = f"""g (float[N,4,6,6] x) => (y) {{ n = {norm}
      p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (n)  f = Flatten (p)
      y = Gemm (f, w, b) }}"""
    weights = {"w": random_array(36, 5), "b": random_array(5, seed=1), **_norm(4)}
    weights["gamma"] = np.abs(weights["gamma"])
    _check(text, weights, ["MaxPool", "Flatten", "Gemm"], tmp_path, tolerance=1e-5)


def test_norms_on_both_sides(tmp_path: Path) -> None:
    before = _NORM.replace("(h,", "(x,")
    text = f"g (float[N,4,6,6] x) => (y) {{ n = {before}  h = Conv (n, w)  y = {_NORM} }}"
    _check(text, {"w": random_array(4, 4, 3, 3), **_norm(4)}, ["Conv"], tmp_path, tolerance=1e-5)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1, 1), (1,), ()])
def test_an_unfused_norm_behind_conv(tmp_path: Path, shape: tuple[int, ...]) -> None:
    text = """g (float[N,4,6,6] x) => (y) {
      h = Conv (x, w)  a = Sub (h, m)  b = Mul (s, a)  c = Div (b, d)  y = Add (c, t) }"""
    weights = {
        "w": random_array(8, 4, 3, 3),
        **{name: random_array(*shape, seed=i) + 3 for i, name in enumerate("msdt")},
    }
    weights = {name: np.asarray(value, np.float32) for name, value in weights.items()}
    _check(text, weights, ["Conv"], tmp_path, tolerance=5e-6)


def test_half_precision(tmp_path: Path) -> None:
    text = _AFTER_CONV.replace("float[", "float16[")
    weights = {"w": random_array(8, 4, 3, 3), **_norm(8)}
    half = {name: np.asarray(value, np.float16) for name, value in weights.items()}
    model = _check(text, half, ["Conv"], tmp_path, tolerance=2e-3)  # float16 has 10 bits
    assert initializer(model, "w").dtype == np.float16


def test_weights_in_and_around_bodies(tmp_path: Path) -> None:
    text = f"""g (float[N,4,6,6] x, bool p) => (y) {{
      y = If (p) <
        then_branch = then_g () => (a) {{ h = Conv (x, w)  a = {_NORM} }},
        else_branch = else_g () => (b) {{ k = Conv (x, v)  c = Conv (x, v)  d = Add (k, c)
          b = Relu (d) }}
      >
    }}"""
    weights = {
        "then_g/w": random_array(8, 4, 3, 3),
        "v": random_array(8, 4, 3, 3, seed=1),
        **_norm(8),
    }
    model = build(text, weights)
    run_pass(FoldBatchNorm(), model, tmp_path)
    assert op_types(model) == ["If", "Conv", "Conv", "Conv", "Add", "Relu"]
    feeds = {"x": random_array(2, 4, 6, 6, seed=7), "p": np.array(True)}
    assert_parity(build(text, weights), model, tolerance=2e-6, feeds=feeds)


def test_external_weights(tmp_path: Path) -> None:
    weights = {"w": random_array(8, 4, 3, 3), **_norm(8)}
    model = externalize(build(_AFTER_CONV, weights), tmp_path)
    run_pass(FoldBatchNorm(), model, tmp_path, spill_bytes=1)
    assert_parity(build(_AFTER_CONV, weights), model, tolerance=2e-6)


_BEFORE = "n = BatchNormalization (x, gamma, beta, mean, var)"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            f"g (float[N,4,6,6] x) => (y, h) {{ h = Conv (x, w)  y = {_NORM} }}",
            "its input h is a graph output too",
        ),
        (
            f"g (float[N,4,6,6] x) => (y) {{ h = Conv (x, w)  n = {_NORM}  y = Add (n, h) }}",
            "its input h is also read elsewhere",
        ),
        (
            f"g (float[N,4,6,6] x) => (y) {{ h = Conv (x, w)  k = Conv (x, w)  n = {_NORM}"
            "  y = Add (n, k) }",
            "the weight w is read elsewhere too, and would be stored twice",
        ),
        (
            f"g (float[N,4,6,6] x) => (y) {{ v = Neg (w) h = Conv (x, v)  y = {_NORM} }}",
            "the weight is computed at run time",
        ),
        (
            f"g (float[N,4,6,6] x, float[4] gamma) => (y) {{ h = Conv (x, w)  y = {_NORM} }}",
            "its statistics are computed at run time",
        ),
        (
            "g (float[N,4,6,6] x) => (y) { h = Conv (x, w) "
            "y, m, v = BatchNormalization <training_mode = 1> (h, gamma, beta, mean, var) }",
            "it is in training mode, where statistics come from the data",
        ),
        (
            f"g (float[N,4,6,6] x) => (y) {{ {_BEFORE}  y = Conv <pads = [1, 1, 1, 1]> (n, w) }}",
            "it shifts the input of a padded Conv, and the padding is not shifted",
        ),
        (
            f"g (float[N,4,6,6] x) => (y) {{ {_BEFORE}  y = ConvTranspose (n, w) }}",
            "it shifts the input of a ConvTranspose, which the border sees only in part",
        ),
        (
            f"g (float[N,4,6,6] x) => (n) {{ {_BEFORE} }}",
            "no weight stands before it, and its result is a graph output",
        ),
        (
            f"g (float[N,4,6,6] x) => (y) {{ {_BEFORE}  [act] y = Relu (n) }}",
            "no weight stands before it, and act behind it has none",
        ),
    ],
)
def test_refuses(tmp_path: Path, text: str, reason: str) -> None:
    weights = {"w": random_array(4, 4, 3, 3), **_norm(4)}
    if "(n) {" in text:
        del weights["w"]
    assert only_skip(run_pass(FoldBatchNorm(), build(text, weights), tmp_path)).reason == reason


def test_refuses_channels_that_are_not_columns(tmp_path: Path) -> None:
    text = f"g (float[N,5,3] x) => (y) <float[N,5,5] h> {{ h = MatMul (x, w)  y = {_NORM} }}"
    model = build(text, {"w": random_array(3, 5), **_norm(5)})
    reason = only_skip(run_pass(FoldBatchNorm(), model, tmp_path)).reason
    assert reason == "its channels are not known to be the columns of the MatMul's weight"


def test_refuses_what_float16_cannot_hold(tmp_path: Path) -> None:
    weights = {"w": random_array(8, 4, 3, 3), **_norm(8), "gamma": np.full(8, 6e4)}
    half = {name: np.asarray(value, np.float16) for name, value in weights.items()}
    model = build(_AFTER_CONV.replace("float[", "float16["), half)
    skip = only_skip(run_pass(FoldBatchNorm(), model, tmp_path))
    assert skip.reason == "a product is beyond the range of float16"
    assert np.array_equal(initializer(model, "w"), half["w"])


def test_a_constant_per_position_is_refused(tmp_path: Path) -> None:
    text = "g (float[N,4,6,6] x) => (y) { h = Conv (x, w)  y = Mul (h, s) }"
    model = build(text, {"w": random_array(8, 4, 3, 3), "s": random_array(4)})
    skip = only_skip(run_pass(FoldBatchNorm(), model, tmp_path))
    assert skip.reason == "its constant is not one number per channel"


def test_is_idempotent(tmp_path: Path) -> None:
    assert_idempotent(
        FoldBatchNorm(), build(_AFTER_CONV, {"w": random_array(8, 4, 3, 3), **_norm(8)}), tmp_path
    )


@pytest.mark.parametrize("seed", range(3))
def test_keeps_numerics_within_the_declared_tolerance(tmp_path: Path, seed: int) -> None:
    weights = {"w": random_array(8, 4, 3, 3, seed=seed), **_norm(8, seed + 20)}
    model = build(_AFTER_CONV, weights)
    run_pass(FoldBatchNorm(), model, tmp_path)
    assert FoldBatchNorm.tolerance == 1e-4
    assert_parity(build(_AFTER_CONV, weights), model, tolerance=1e-4, seed=seed)


_BETWEEN = """g (float[N,4,6,6] x) => (y) {{
    [first] a = Conv (x, w)  {between}  [bn] n = {norm}  [second] y = Conv (n, v) }}"""


def _between(between: str, **changed: Any) -> tuple[str, dict[str, Any]]:
    norm = _norm(8)
    norm["gamma"] = np.abs(norm["gamma"]) + np.float32(0.1)
    weights = {"w": random_array(8, 4, 3, 3), "v": random_array(5, 8, 2, 2, seed=3), **norm}
    return _BETWEEN.format(between=between, norm=_NORM), {**weights, **changed}


@pytest.mark.parametrize(
    ("between", "ops"),
    [
        ("h = Relu (a)", ["Conv", "Relu", "Conv"]),
        ("h = LeakyRelu (a)", ["Conv", "LeakyRelu", "Conv"]),
        (
            "r = Relu (a)  h = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)",
            ["Conv", "Relu", "MaxPool", "Conv"],
        ),
    ],
)
def test_positive_factors_go_into_the_op_before_an_activation(
    tmp_path: Path, between: str, ops: list[str]
) -> None:
    text, weights = _between(between)
    # One channel that hardly varies has a factor thousands of times that of the others.
    weights["var"] = np.array([1e4] * 7 + [1e-7], np.float32)
    model = _check(text, weights, ops, tmp_path)
    np.testing.assert_array_equal(initializer(model, "v"), weights["v"])
    factors = weights["gamma"] / np.sqrt(weights["var"] + 0.01)
    scaled = weights["w"] * factors[:, None, None, None]
    np.testing.assert_allclose(initializer(model, "w"), scaled, rtol=1e-6)
    assert node_named(model, "first").metadata_props[ORIGIN] == '["first", "bn"]'


@pytest.mark.parametrize("between", ["h = Relu (a)", "h = Sigmoid (a)"])
def test_other_factors_go_into_the_op_behind(tmp_path: Path, between: str) -> None:
    gamma = random_array(8, seed=4)
    assert gamma.min() < 0
    text, weights = _between(between, gamma=gamma if "Relu" in between else np.abs(gamma))
    model = _check(text, weights, ["Conv", between.split()[2], "Conv"], tmp_path, 5e-6)
    np.testing.assert_array_equal(initializer(model, "w"), weights["w"])
