"""Decoders whose layers all read a table of positions: reconstruction goes layer by layer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import CompileOptions, compile_model
from qcompiler.options import Reconstruction
from qcompiler.quant.islands import IslandBudget, IslandKind, IslandRequest, Saliency
from qcompiler.quant.reconstruction import PRESETS, Preset
from tests.support.graphs import build, random_array

pytest.importorskip("torch")

_TABLES = {
    "angles": "place = Cast<to=1>(at) turns = MatMul(angle, place) "
    "waves = Transpose<perm=[1, 0]>(turns) table = Cos(waves)",
    "cache": "row = Squeeze(at, first) table = Gather(cosines, row)",
}


@pytest.fixture(params=list(_TABLES.values()), ids=list(_TABLES))
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    text = f"""g (int64[T] ids, int64[1, T] at) => (float[T, 32] y) <int64[1] first = {{0}}> {{
        h0 = Gather(words, ids) {request.param}
        [q0] q_0 = MatMul(h0, w0) r0 = Mul(q_0, table) [o0] o_0 = MatMul(r0, w1) h1 = Add(h0, o_0)
        [q1] q_1 = MatMul(h1, w2) r1 = Mul(q_1, table) [o1] o_1 = MatMul(r1, w3) h2 = Add(h1, o_1)
        [head] y = MatMul(h2, w4) }}"""
    weights = {f"w{i}": random_array(32, 32, seed=i) for i in range(5)}
    weights |= {"words": random_array(90, 32, seed=7), "angle": random_array(32, 1, seed=8)}
    ir.save(build(text, weights | {"cosines": random_array(64, 32, seed=9)}), tmp_path / "m.onnx")
    (tmp_path / "calls").mkdir()
    for seed in range(8):
        ids = np.random.default_rng(seed).integers(0, 90, 12)
        np.savez(tmp_path / "calls" / f"{seed}.npz", ids=ids, at=np.arange(12)[None])
    return tmp_path / "m.onnx"


def test_windows_are_those_of_the_layers(decoder: Path) -> None:
    options = CompileOptions(
        scheme="w2a16:b32",
        calibration=str(decoder.parent / "calls"),
        reconstruct=Reconstruction.CBQ,
        blocks=replace(PRESETS[Preset.FAST], steps=8),
        inspect_kernels=False,
    )
    windows = compile_model(decoder, options, output=decoder.parent / "o.onnx").report.windows
    assert len(windows) == 2
    assert any(window.kept for window in windows)


def test_islands_are_found_in_the_layers(decoder: Path) -> None:
    budget = IslandBudget(average_bits=9.0)
    options = CompileOptions(
        scheme="w2a16:b32",
        calibration=str(decoder.parent / "calls"),
        islands=IslandRequest(Saliency.TACQ, budget, IslandKind.COLUMN),
        inspect_kernels=False,
    )
    report = compile_model(decoder, options, output=decoder.parent / "o.onnx").report
    assert report.islands is not None
    assert report.islands.share > 0
