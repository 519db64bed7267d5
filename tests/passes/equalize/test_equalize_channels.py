"""Equalizing moves range between data and weights, and changes nothing else."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.ir.provenance import EQUALIZED, annotate
from qcompiler.ir.shapes import infer_shapes
from qcompiler.passes.equalize.equalize_channels import EqualizeChannels, EqualizeOptions
from qcompiler.passes.equalize.group_scales import ScaleOptions
from qcompiler.passes.equalize.output_check import CheckOptions, Verdict
from qcompiler.quant.equalization import EqualizationMethod, InsertMul
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult
from qcompiler.rewriting.stages import Stage
from tests.support.graphs import Array, build, initializer, node_named, op_types, random_array
from tests.support.parity import assert_parity, run_model
from tests.support.rewrites import assert_idempotent, only_skip, reasons, run_pass

WIDTH = 32
NORMED = """g (float[B, T, 32] x) => (float[B, T, 24] y)
            { [ln] n = LayerNormalization(x, g, b) [fc] y = MatMul(n, w) }"""
BARE = """g (float[B, T, 32] x) => (float[B, T, 24] y)
          { q = Mul(x, x) m = ReduceMean(q, last) r = Sqrt(m) [norm] n = Div(x, r)
            [fc] y = MatMul(n, w) }"""
OUTLIERS = (3, 17)


def weights(dtype: npt.DTypeLike = np.float32) -> dict[str, Array]:
    """Return weights of which the norm's make two channels fifty times as large as the others."""
    gamma = 1 + 0.1 * random_array(WIDTH, seed=1)
    gamma[list(OUTLIERS)] *= 50
    matrix = random_array(WIDTH, 24, seed=2)
    matrix[list(OUTLIERS)] /= 50
    made = {"g": gamma, "b": 0.1 * random_array(WIDTH, seed=3), "w": matrix}
    return {name: values.astype(dtype) for name, values in made.items()}


def samples(seed: int = 0, dtype: npt.DTypeLike = np.float32) -> Samples:
    def read() -> Iterator[Feeds]:
        for call in range(4):
            yield {"x": random_array(2, 40, WIDTH, seed=10 * seed + call, dtype=dtype)}

    return Samples("test", False, 4, read)


def planned(model: ir.Model, scheme: str = "w8a8:sym", *names: str) -> ir.Model:
    """Give ops a scheme, and mark their data as going to be quantized."""
    infer_shapes(model)
    for name in names or ("fc",):
        node = node_named(model, name)
        annotate(node, scheme=scheme)
        if "a8" in scheme:
            annotate(node, quantized_inputs="[0]")
    return model


def normed(scheme: str = "w8a8:sym") -> ir.Model:
    return planned(build(NORMED, weights()), scheme)


def equalize(
    method: str = "auto", insert: str = "never", data: Samples | None = None, **scales: Any
) -> EqualizeChannels:
    options = ScaleOptions(EqualizationMethod(method), **scales)
    return EqualizeChannels(
        EqualizeOptions(data or samples(), options, insert_mul=InsertMul(insert))
    )


def extremes(values: Array) -> Array:
    return np.asarray(np.ptp(values.reshape(-1, values.shape[-1]).astype(np.float64), axis=0))


def data_of(model: ir.Model, name: str = "n") -> Array:
    """Return what the op multiplies, over all samples."""
    copy = model.clone()
    value = next(v for node in copy.graph for v in node.outputs if v.name == name)
    copy.graph.outputs.append(value)
    return np.concatenate([run_model(copy, feeds)[name] for feeds in samples()])


@pytest.mark.parametrize("method", ["auto", "aweq", "smoothquant", "smoothquant-searched", "awq"])
def test_rewrites_constants_and_keeps_numerics(method: str, tmp_path: Path) -> None:
    after = normed()
    result = run_pass(equalize(method), after, tmp_path)
    assert [rewrite.node for rewrite in result.rewrites] == ["fc"]
    assert op_types(after) == ["LayerNormalization", "MatMul"]
    ratio = initializer(after, "g") / weights()["g"]
    assert ratio.max() / ratio.min() > 2
    assert initializer(after, "b") == pytest.approx(weights()["b"] * ratio, rel=1e-5)
    assert initializer(after, "w") == pytest.approx(weights()["w"] / ratio[:, None], rel=1e-5)
    assert_parity(normed(), after, tolerance=1e-5)


def test_cfp_scales_channels_that_are_outliers_and_no_others(tmp_path: Path) -> None:
    after = normed()
    data = data_of(after)
    (rewrite,) = run_pass(equalize("cfp", outlier_limit=0), after, tmp_path).rewrites
    ratio = weights()["g"] / initializer(after, "g")
    others = [channel for channel in range(WIDTH) if channel not in OUTLIERS]
    assert np.all(ratio[others] == 1)
    sizes = np.abs(data).max(axis=(0, 1))
    (exponent,) = (e for e in (0.5, 0.7) if f"cfp {e:g}" in rewrite.detail)
    expected = (sizes[list(OUTLIERS)] / sizes[others].max()) ** exponent
    assert ratio[list(OUTLIERS)] == pytest.approx(expected, rel=1e-4)
    assert_parity(normed(), after, tolerance=1e-5)


def test_cfp_leaves_channels_that_belong_together(tmp_path: Path) -> None:
    flat = weights() | {"g": np.ones(WIDTH, np.float32), "b": np.zeros(WIDTH, np.float32)}
    flat["w"] = random_array(WIDTH, 24, seed=2)
    alike = [{"x": np.sign(random_array(2, 40, WIDTH, seed=at))} for at in range(4)]
    data = Samples("test", False, 4, lambda: iter(alike))
    model = planned(build(NORMED, flat))
    skip = only_skip(run_pass(equalize("cfp", data=data), model, tmp_path))
    assert "no scales make the outputs of fc better" in skip.reason


def test_aweq_reaches_the_least_product_of_ranges(tmp_path: Path) -> None:
    after = normed()
    before = extremes(data_of(after)), extremes(weights()["w"].T)
    run_pass(equalize("aweq"), after, tmp_path)
    found = extremes(data_of(after)), extremes(initializer(after, "w").T)
    assert found[0].max() * found[1].max() == pytest.approx((before[0] * before[1]).max(), rel=1e-4)
    assert before[0].max() * before[1].max() > 5 * (before[0] * before[1]).max()


def test_smoothquant_of_one_half_divides_by_the_root_of_the_ratio(tmp_path: Path) -> None:
    after = normed()
    data, matrix = data_of(after), weights()["w"]
    run_pass(equalize("smoothquant", alpha=0.5), after, tmp_path)
    expected = np.sqrt(np.abs(data).max(axis=(0, 1)) / np.abs(matrix).max(axis=1))
    expected /= np.exp(np.log(expected).mean())
    assert weights()["g"] / initializer(after, "g") == pytest.approx(expected, rel=1e-4)


def test_a_percentile_ignores_a_value_that_occurs_once(tmp_path: Path) -> None:
    def with_spike() -> Iterator[Feeds]:
        for index, feeds in enumerate(samples()):
            if index == 0:
                feeds["x"][0, 0, 5] = 1e4
            yield feeds

    spiked = Samples("test", False, 4, with_spike)
    found = {}
    for percentile in (None, 99.0):
        model = normed()
        run_pass(equalize("aweq", data=spiked, percentile=percentile), model, tmp_path)
        found[percentile] = float(initializer(model, "g")[5] / weights()["g"][5])
    assert found[None] < 0.9 * found[99.0]


def test_the_error_of_the_op_falls_by_an_order_of_magnitude(tmp_path: Path) -> None:
    result = run_pass(equalize(outlier_limit=0), normed(), tmp_path)
    (rewrite,) = result.rewrites
    before, after = (float(text) for text in _decibels(rewrite.detail))
    assert after - before > 10


def test_channels_without_outliers_stay_or_get_better(tmp_path: Path) -> None:
    plain = {"g": np.ones(WIDTH, np.float32), "b": np.zeros(WIDTH, np.float32)}
    model = planned(build(NORMED, plain | {"w": random_array(WIDTH, 24)}))
    result = run_pass(equalize(), model, tmp_path)
    for text in [*reasons(result), *(rewrite.detail for rewrite in result.rewrites)]:
        before, after = (float(number) for number in _decibels(text))
        assert after >= before - 0.1 or "no scales make" in text


def test_a_group_that_nothing_makes_better_is_left_alone(tmp_path: Path) -> None:
    model = planned(build(NORMED, weights() | {"g": np.ones(WIDTH, np.float32)}), "w8a16:sym")
    before = {name: initializer(model, name).copy() for name in ("g", "b", "w")}
    exact = np.round(random_array(WIDTH, 24) * 40).clip(-127, 127)
    exact[0] = 127.0
    model.graph.initializers["w"].const_value = ir.tensor(exact.astype(np.float32), name="w")
    skip = only_skip(run_pass(equalize(), model, tmp_path))
    assert skip.reason.startswith("no scales make the outputs of fc better")
    assert (initializer(model, "g") == before["g"]).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_models_are_scaled_by_powers_of_two(dtype: Any, tmp_path: Path) -> None:
    name = "float16" if dtype is np.float16 else "bfloat16"
    text = NORMED.replace("float[", f"{name}[")
    model = planned(build(text, weights(dtype)))
    run_pass(equalize("aweq", data=samples(dtype=dtype)), model, tmp_path)
    ratio = initializer(model, "g").astype(np.float64) / weights(dtype)["g"].astype(np.float64)
    assert set(np.log2(ratio) % 1) == {0.0}
    assert ratio.max() > ratio.min()


def test_a_norm_without_a_weight_gets_one(tmp_path: Path) -> None:
    constants = {"last": np.array([-1]), "w": random_array(WIDTH, 24)}
    constants["w"][list(OUTLIERS)] /= 50

    def scaled() -> Iterator[Feeds]:
        for feeds in samples():
            feeds["x"][..., list(OUTLIERS)] *= 50
            yield feeds

    data = Samples("test", False, 4, scaled)
    model = planned(build(BARE, constants))
    refused = only_skip(run_pass(equalize(data=data), model, tmp_path))
    assert refused.reason == "x is an input of the model or of a body"
    after = planned(build(BARE, constants))
    run_pass(equalize(insert="norms", data=data), after, tmp_path)
    assert op_types(after) == ["Mul", "ReduceMean", "Sqrt", "Div", "Mul", "MatMul"]
    assert_parity(build(BARE, constants), after, tolerance=1e-5)


def test_a_mul_is_put_in_anywhere_only_when_asked_for(tmp_path: Path) -> None:
    text = """g (float[B, T, 32] x) => (float[B, T, 24] y)
              { n = Gelu(x) [fc] y = MatMul(n, w) }"""
    for insert, ops in (("norms", ["Gelu", "MatMul"]), ("always", ["Gelu", "Mul", "MatMul"])):
        model = planned(build(text, {"w": weights()["w"]}))
        run_pass(equalize("aweq", insert), model, tmp_path)
        assert op_types(model) == ops
        assert_parity(build(text, {"w": weights()["w"]}), model, tolerance=1e-5)


def test_refuses_with_the_reason_of_the_graph(tmp_path: Path) -> None:
    text = """g (float[B, T, 32] x) => (float[B, T, 24] y)
              { n = LayerNormalization(x, g, b) [act] a = Gelu(n) [fc] y = MatMul(a, w) }"""
    skip = only_skip(run_pass(equalize(), planned(build(text, weights())), tmp_path))
    assert skip.node == "fc"
    assert skip.reason == "act (Gelu) computes a: Gelu does not commute with a scale"


def test_ops_without_a_scheme_are_scaled_along_but_not_looked_at(tmp_path: Path) -> None:
    text = """g (float[B, T, 32] x) => (float[B, T, 24] y)
              { n = LayerNormalization(x, g, b) [fc] a = MatMul(n, w) [f] c = MatMul(n, v)
                y = Add(a, c) }"""
    held = weights() | {"v": random_array(WIDTH, 24, seed=8)}
    after = planned(build(text, held))
    result = run_pass(equalize("aweq"), after, tmp_path)
    assert [rewrite.node for rewrite in result.rewrites] == ["fc"]
    assert not np.allclose(initializer(after, "v"), held["v"])
    assert_parity(planned(build(text, held)), after, tolerance=1e-5)


def test_a_large_tied_weight_is_not_copied(tmp_path: Path) -> None:
    text = """g (float[B, T, 32] x) => (float[B, T, 1024] y)
              { n = LayerNormalization(x, g, b) [fc] a = MatMul(n, w) [other] c = MatMul(x, w)
                y = Add(a, c) }"""
    held = weights() | {"w": random_array(WIDTH, 1024)}
    skip = only_skip(run_pass(equalize(), planned(build(text, held)), tmp_path))
    assert skip.reason.startswith("its weight w is read by other (MatMul) too")


def test_a_small_norm_weight_that_two_norms_share_is_copied(tmp_path: Path) -> None:
    text = """g (float[B, T, 32] x) => (float[B, T, 24] y)
              { n = LayerNormalization(x, g, b) [fc] a = MatMul(n, w)
                m = LayerNormalization(x, g) s = Sigmoid(m) c = MatMul(s, v) y = Add(a, c) }"""
    held = weights() | {"v": random_array(WIDTH, 24, seed=8)}
    after = planned(build(text, held))
    run_pass(equalize("aweq"), after, tmp_path)
    assert (initializer(after, "g") == held["g"]).all()
    assert initializer(after, "g.scaled") is not None
    assert_parity(planned(build(text, held)), after, tolerance=1e-5)


@pytest.mark.parametrize("insert", ["never", "always"])
def test_is_idempotent(insert: str, tmp_path: Path) -> None:
    assert_idempotent(equalize(insert=insert), normed(), tmp_path)


@pytest.mark.parametrize("scheme", ["w4a16:b16:sym", "w3a16:sym", "w8a16:asym"])
def test_weight_only_schemes_get_scales_of_their_own(scheme: str, tmp_path: Path) -> None:
    result = run_pass(equalize(), normed(scheme), tmp_path)
    labels = [rewrite.detail for rewrite in result.rewrites] or reasons(result)
    assert all(" by " in text or "no scales" in text for text in labels)
    assert len(labels) == 1


@pytest.mark.parametrize("scheme", ["w8a8:sym", "w4a16:b16:sym", "w3a16:sym"])
def test_auto_is_as_good_as_the_best_method(scheme: str, tmp_path: Path) -> None:
    found = {}
    for method in ("auto", "aweq", "smoothquant-searched", "awq"):
        (rewrite,) = run_pass(equalize(method), normed(scheme), tmp_path).rewrites
        found[method] = float(_decibels(rewrite.detail)[1])
    # The best on all rows is taken, and what is told of it is measured on half of them.
    assert found["auto"] >= max(found.values()) - 0.1


def test_auto_tries_smoothquant_on_weights_alone(tmp_path: Path) -> None:
    held = weights() | {"g": np.exp(np.linspace(0, 3, WIDTH, dtype=np.float32))}
    held["w"] = random_array(WIDTH, 24, seed=2) / np.sqrt(held["g"])[:, None]
    model = planned(build(NORMED, held), "w4a16:sym")
    (rewrite,) = run_pass(equalize(), model, tmp_path).rewrites
    assert "by smoothquant" in rewrite.detail


def test_auto_takes_no_scales_that_gain_little(tmp_path: Path) -> None:
    steps = np.random.default_rng(0).permutation(np.linspace(0, 1.5, WIDTH))
    held = weights() | {"g": np.exp(steps).astype(np.float32), "b": np.zeros(WIDTH, np.float32)}
    held["w"] = random_array(WIDTH, 24, seed=2) * np.sqrt(held["g"])[:, None]
    forced = run_pass(equalize("awq"), planned(build(NORMED, held), "w4a16:sym"), tmp_path)
    before, after = (float(text) for text in _decibels(forced.rewrites[0].detail))
    assert 0.1 < after - before < 0.4
    model = planned(build(NORMED, held), "w4a16:sym")
    assert "no scales make the outputs" in only_skip(run_pass(equalize(), model, tmp_path)).reason


class _RoundData(Pass):
    """Puts the data of `fc` on 255 steps between its extremes: what a real calibration would do."""

    name = "round-data"
    consumes = produces = Stage.ASSIGNED
    numerics = Numerics.LOSSY

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        node = node_named(model, "fc")
        data = node.inputs[0]
        assert data is not None
        step = np.float32(np.abs(data_of(model, data.name or "")).max() / 127)
        tape = ir.tape.Tape(model.graph)
        zero = np.int8(0)
        grid = [tape.initializer(ir.tensor(v, name=n)) for n, v in (("step", step), ("zero", zero))]
        codes = tape.op("QuantizeLinear", [data, *grid])
        node.replace_input_with(0, tape.op("DequantizeLinear", [codes, *grid]))
        model.graph.sort()
        return PassResult()


def checked(*quantize: Pass) -> EqualizeChannels:
    options = equalize().options
    check = CheckOptions(quantize, samples(seed=1))
    return EqualizeChannels(EqualizeOptions(options.samples, options.scales, check=check))


def test_what_the_outputs_gain_by_is_kept_and_both_figures_told(tmp_path: Path) -> None:
    model = normed()
    account, rewrite = run_pass(checked(_RoundData()), model, tmp_path).rewrites
    assert account.rule == "equalized-outputs"
    before, after = (float(text) for text in _decibels(account.detail))
    assert after > before + 3
    assert "(4 calls)" in account.detail
    assert rewrite.node == "fc"
    assert op_types(model) == ["LayerNormalization", "MatMul"]
    ratio = initializer(model, "g") / weights()["g"]
    assert ratio.max() / ratio.min() > 2


def test_what_the_outputs_gain_nothing_by_is_undone(tmp_path: Path) -> None:
    model = normed()
    # Nothing is rounded, so that no scales can make the outputs better.
    result = run_pass(checked(), model, tmp_path)
    assert not result.rewrites
    skip = only_skip(result)
    assert (skip.rule, skip.node) == ("equalized-outputs", "fc")
    assert "inf dB as they are" in skip.reason
    for name, values in weights().items():
        assert np.array_equal(initializer(model, name), values)
    assert node_named(model, "fc").metadata_props[EQUALIZED].startswith("no, inf dB")
    assert_idempotent(checked(), normed(), tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (20.0, 20.3, True),
        (20.0, 20.2, False),
        (float("inf"), float("inf"), True),
        (float("-inf"), 3.0, True),
        (3.0, float("-inf"), False),
        (3.0, float("nan"), False),
    ],
)
def test_a_quarter_of_a_decibel_decides(before: float, after: float, *, expected: bool) -> None:
    assert Verdict(before, after, 1).equalizes is expected


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        model = normed()
        run_pass(equalize(), model, tmp_path)
        found.append([initializer(model, name).tobytes() for name in ("g", "b", "w")])
    assert found[0] == found[1]


def _decibels(text: str) -> tuple[str, str]:
    """Return the two figures of a sentence about a group, before and after."""
    match = re.search(
        r"from ([-.\d]+) to ([-.\d]+) dB|([-.\d]+) dB as they are, ([-.\d]+) dB", text
    )
    assert match is not None
    before, after = (number for number in match.groups() if number is not None)
    return before, after
