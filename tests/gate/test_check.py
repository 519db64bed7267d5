import json
import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.bounds import gate_from_texts
from qcompiler.calibration.calls import SampleOptions
from qcompiler.compile import compile_model
from qcompiler.errors import ModelError, UsageError
from qcompiler.gate.check import run_gate
from qcompiler.gate.setting import GateOptions, candidate_at
from qcompiler.options import CalibrationOptions, CompileOptions
from qcompiler.quant.recipe import Recipe
from qcompiler.report.files import read_manifest
from qcompiler.report.verdict import Finding, GateFailedError, Status, Verdict, verdict_json
from tests.gate.conftest import Files
from tests.support.graphs import build, random_array


def _check(files: Files, candidate: Path, *bounds: str, batch: int | None = None) -> Verdict:
    gate = gate_from_texts([f"data={files.data}", *bounds])
    assert gate is not None
    options = GateOptions(SampleOptions(batch_size=batch))
    return run_gate(files.base, candidate_at(candidate), gate, options)


def _finding(verdict: Verdict, title: str) -> Finding:
    (found,) = (f for f in verdict.findings if f.title == title)
    return found


def test_a_good_model_passes(files: Files) -> None:
    verdict = _check(
        files,
        files.good,
        *("min-sqnr=20", "min-cosine=0.99", "max-kl=0.1", "min-agreement=0.9"),
        *("metric=top1", "max-metric-drop=0.1", "metric-bound=0.9"),
        *("max-size=2", "max-memory=1GiB", "max-bits=9", "max-latency=50", "max-input-shift=0.5"),
    )
    assert verdict.passed
    assert not verdict.suspects
    assert len(verdict.findings) == 11
    assert verdict.samples == 60
    sqnr = _finding(verdict, "min_sqnr of logits")
    assert sqnr.low is not None
    assert sqnr.measured is not None
    assert sqnr.low < sqnr.measured
    assert sqnr.certain == (sqnr.low > 20)
    assert _finding(verdict, "max_bits").measured == pytest.approx(8.4, abs=0.6)


def test_batches_change_nothing(files: Files) -> None:
    bounds = ("min-sqnr=20", "metric=top1", "metric-bound=0.9")
    one, many = (_check(files, files.good, *bounds, batch=batch) for batch in (None, 7))
    assert one.samples == many.samples == 60
    for name, value in one.measured.items():
        assert many.measured[name] == pytest.approx(value, rel=1e-3), name


def test_every_bound_can_fail(files: Files) -> None:
    verdict = _check(
        files,
        files.good,
        *("min-sqnr=90", "min-cosine=0.9999999", "max-kl=1e-9", "min-agreement=1"),
        *("metric=top1", "metric-bound=1.1"),
        *("max-size=0.01", "max-memory=10", "max-bits=2", "max-latency=0.001"),
    )
    failed = {finding.bound for finding in verdict.failed}
    assert failed >= {"min_sqnr", "min_cosine", "max_kl", "metric_bound", "max_size", "max_bits"}
    assert "max_latency" in failed
    assert "measured 2 times" in _finding(verdict, "max_latency").sentence


def test_few_samples_say_what_they_cannot_see(files: Files, tmp_path: Path) -> None:
    with np.load(files.data) as data:
        np.savez(tmp_path / "few.npz", x=data["x"][10:14], label=data["label"][10:14])
    verdict = _check(
        replace(files, data=tmp_path / "few.npz"),
        files.good,
        *("metric=top1", "max-metric-drop=0.01"),
    )
    finding = _finding(verdict, "max_metric_drop of top1")
    assert finding.status is Status.PASSED
    assert finding.certain is False
    assert "4 samples show differences of 53 points and more" in finding.sentence
    assert verdict.warnings == ("4 samples: too few for any figure of accuracy to be certain",)


def test_a_corrupted_layer_is_the_first_node(files: Files) -> None:
    codes = next(
        n
        for n in ir.load(files.good).graph.initializers
        if n.startswith("w3") and n.endswith("codes")
    )
    broken = files.changed(codes, "broken.onnx")
    verdict = _check(files, broken, "min-sqnr=20")
    assert not verdict.passed
    assert (verdict.suspects[0].kind, verdict.suspects[0].name) == ("node", "three")
    shutil.copy(files.good.with_suffix(".manifest.json"), broken.with_suffix(".manifest.json"))
    verdict = _check(files, broken, "min-sqnr=20")
    assert [suspect.kind for suspect in verdict.suspects[:2]] == ["file", "node"]
    assert verdict.suspects[1].name == "three"


def test_a_foreign_model_is_compared_by_names(files: Files) -> None:
    verdict = _check(files, files.changed("w2", "foreign.onnx", files.base), "min-sqnr=20")
    assert (verdict.suspects[0].kind, verdict.suspects[0].name) == ("node", "two")
    with pytest.raises(UsageError, match="how many bits"):
        _check(files, files.base, "max-bits=8")


def test_a_scheme_that_is_too_low_is_named(files: Files, tmp_path: Path) -> None:
    options = CompileOptions(scheme="w2a16:b16", inspect_kernels=False)
    low = compile_model(files.base, options, output=tmp_path / "low.onnx").path
    verdict = _check(files, low, "min-sqnr=20")
    assert verdict.suspects[0].kind == "scheme"
    assert verdict.suspects[0].name == "w2a16"
    assert "ops in it" in verdict.suspects[0].sentence


def test_foreign_calibration_data_is_named(files: Files, tmp_path: Path) -> None:
    np.savez(tmp_path / "shifted.npz", x=random_array(64, 16, seed=8) + np.float32(3))
    calibration = CalibrationOptions(str(tmp_path / "shifted.npz"))
    options = CompileOptions(calibration=calibration, never_slower=False, inspect_kernels=False)
    wrong = compile_model(files.base, options, output=tmp_path / "wrong.onnx").path
    verdict = _check(files, wrong, "min-sqnr=60", "max-input-shift=0.1")
    assert {f.bound for f in verdict.failed} == {"min_sqnr", "max_input_shift"}
    assert (verdict.suspects[0].kind, verdict.suspects[0].name) == ("data", "input x")
    assert "standard deviations from those of calibration" in verdict.suspects[0].sentence


def test_no_worse_than_a_release_that_is_there(files: Files, tmp_path: Path) -> None:
    manifest = files.good.with_suffix(".manifest.json")
    same = _check(files, files.good, f"baseline={manifest}", "tolerance.latency=9", "metric=top1")
    assert same.passed
    assert _finding(same, "no worse: sqnr of logits").measured == 0.0
    assert _finding(same, "no worse: metric of top1").measured == 0.0
    options = CompileOptions(scheme="w2a16:b16", inspect_kernels=False)
    low = compile_model(files.base, options, output=tmp_path / "low.onnx").path
    worse = _check(files, low, f"baseline={manifest}", "tolerance.latency=9")
    assert "no worse: sqnr" in {f.bound for f in worse.failed}
    assert "no worse: size" not in {f.bound for f in worse.failed}


def test_no_worse_than_what_was_recorded(files: Files, tmp_path: Path) -> None:
    options = CompileOptions(scheme="w2a16:b16", inspect_kernels=False)
    low = compile_model(files.base, options, output=tmp_path / "low.onnx").path
    earlier = tmp_path / "earlier.json"
    earlier.write_text(verdict_json(_check(files, files.good, "min-sqnr=20")))
    verdict = _check(files, low, f"baseline={earlier}")
    assert _finding(verdict, "no worse: sqnr of logits").status is Status.FAILED
    np.savez(tmp_path / "other.npz", x=random_array(5, 16))
    other = _check(replace(files, data=tmp_path / "other.npz"), low, f"baseline={earlier}")
    assert _finding(other, "no worse: outputs").status is Status.SKIPPED
    alone = tmp_path / "alone.manifest.json"
    shutil.copy(files.good.with_suffix(".manifest.json"), alone)
    sizes = _check(files, low, f"baseline={alone}")
    assert {f.bound for f in sizes.findings} == {"no worse: size", "no worse: outputs"}


def test_compile_writes_nothing_that_fails(files: Files, tmp_path: Path) -> None:
    gate = gate_from_texts([f"data={files.data}", "min-sqnr=20"])
    out = tmp_path / "out.onnx"
    low = CompileOptions(scheme="w2a16:b16", inspect_kernels=False, gate=gate)
    with pytest.raises(
        GateFailedError, match=r"min_sqnr of logits: .* at least 20.0 dB asked"
    ) as caught:
        compile_model(files.base, low, output=out)
    assert caught.value.exit_code == 5
    assert caught.value.verdict.candidate.name == "out.onnx"
    assert caught.value.verdict.suspects[0].kind == "scheme"
    assert not list(tmp_path.iterdir())
    result = compile_model(files.base, replace(low, scheme="w8a16"), output=out)
    assert result.verdict is not None
    assert result.verdict.passed
    kept = read_manifest(result.manifest_path).gate
    assert kept["measured"]["sqnr logits"] == result.verdict.measured["sqnr logits"]
    assert kept["data_sha256"] == result.verdict.data_sha256


def test_a_recipe_gates_too_and_no_byte_depends_on_it(files: Files, tmp_path: Path) -> None:
    text = 'version = 1\ndefault = "w8a16"\n'
    gated = f'{text}[gate]\ndata = "{files.data}"\nmin_sqnr = 20\n'
    made = []
    for name, recipe in (("a", text), ("b", gated)):
        folder = tmp_path / name
        folder.mkdir()
        options = CompileOptions(recipe=Recipe.from_text(recipe, "r"), inspect_kernels=False)
        made.append(compile_model(files.base, options, output=folder / "m.onnx"))
    assert made[0].verdict is None
    assert made[1].verdict is not None
    assert made[0].path.read_bytes() == made[1].path.read_bytes()
    assert made[0].report.recipe == made[1].report.recipe
    strict = replace(
        options, gate=gate_from_texts(["min-sqnr=300"])
    )  # over the recipe's own, which keeps its data
    with pytest.raises(GateFailedError):
        compile_model(files.base, strict, output=tmp_path / "c.onnx")


def test_faults_are_found_before_the_work(files: Files, tmp_path: Path) -> None:
    def compiled(*bounds: str) -> None:
        options = CompileOptions(scheme="w8a16", gate=gate_from_texts(bounds))
        compile_model(files.base, options, output=tmp_path / "x.onnx")

    with pytest.raises(UsageError, match="no data to judge on"):
        compiled("min-sqnr=20")
    with pytest.raises(UsageError, match="there is no metric"):
        compiled(f"data={files.data}", "metric=speed", "metric-bound=1")
    with pytest.raises(UsageError, match="cannot be read"):
        compiled(f"data={files.data}", "baseline=missing.json")
    with pytest.raises(UsageError, match="nothing that could fail"):
        compiled(f"data={files.data}")


def test_what_cannot_be_judged(files: Files, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no float output 'logit'"):
        _check(files, files.good, "output.logit.min-sqnr=3")
    other = build("m (float[2] x) => (float[2] y) { y = Relu(x) }")
    ir.save(other, tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="has the outputs y"):
        _check(files, tmp_path / "other.onnx", "min-sqnr=3")
    (tmp_path / "no.json").write_text(json.dumps({"schema": "?"}))
    with pytest.raises(UsageError, match="manifest"):
        _check(files, files.good, f"baseline={tmp_path / 'no.json'}")


def test_outputs_that_are_no_distributions_have_to_be_named(files: Files, tmp_path: Path) -> None:
    model = ir.load(files.base)
    model.graph.outputs[0].name = "y"
    ir.save(model, tmp_path / "y.onnx")
    plain = replace(files, base=tmp_path / "y.onnx")
    with pytest.raises(UsageError, match="known to be a distribution"):
        _check(plain, tmp_path / "y.onnx", "max-kl=0.1")
    assert _check(plain, tmp_path / "y.onnx", "output.y.max-kl=0.1").passed


def test_outputs_without_floats_have_no_fidelity(files: Files, tmp_path: Path) -> None:
    model = build("m (float[b, 16] x) => (int64[b] y) { y = ArgMax<axis=1, keepdims=0>(x) }")
    ir.save(model, tmp_path / "ids.onnx")
    plain = replace(files, base=tmp_path / "ids.onnx")
    with pytest.raises(UsageError, match="min_sqnr: no output holds floats"):
        _check(plain, tmp_path / "ids.onnx", "min-sqnr=3")


def test_the_samples_of_calibration_are_noticed(files: Files) -> None:
    seen = replace(files, data=files.base.with_name("calibration.npz"))
    verdict = _check(seen, files.good, "min-sqnr=3")
    assert verdict.warnings == (
        "judged on the samples it was calibrated on: others will come out worse",
    )


def test_bfloat16_is_run_in_its_place_and_not_timed(tmp_path: Path) -> None:
    weight = (random_array(64, 64) / 8).astype(ml_dtypes.bfloat16)
    text = """m (float[b, 64] x) => (float[b, 64] y) {
        a = Cast<to=16>(x)
        h = MatMul(a, w)
        y = Cast<to=1>(h)
    }"""
    base = tmp_path / "base.onnx"
    ir.save(build(text, {"w": weight}), base)
    options = CompileOptions(scheme="w2a16:b16", inspect_kernels=False)
    low = compile_model(base, options, output=tmp_path / "low.onnx").path
    np.savez(tmp_path / "d.npz", x=random_array(40, 64))
    files = Files(base, low, tmp_path / "d.npz")
    verdict = _check(files, low, "min-sqnr=30")
    assert not verdict.passed
    assert verdict.suspects[0].name == "w2a16"
    with pytest.raises(UsageError, match="no kernels for bfloat16"):
        _check(files, low, "max-latency=2")


def test_another_target_is_not_timed(files: Files, tmp_path: Path) -> None:
    def options(*bounds: str) -> CompileOptions:
        gate = gate_from_texts([f"data={files.data}", *bounds])
        return CompileOptions(scheme="w8a16", target="tensorrt-11", gate=gate)

    with pytest.raises(UsageError, match="max_latency cannot be measured here"):
        compile_model(files.base, options("max-latency=2"), output=tmp_path / "x.onnx")
    result = compile_model(files.base, options("min-sqnr=20"), output=tmp_path / "x.onnx")
    assert result.verdict is not None
    assert result.verdict.passed
