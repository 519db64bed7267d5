"""Real models, compiled and run: how far outputs move, what runs, and what it costs in bytes.

The bounds are a few decibels below what was measured with ONNX Runtime 1.32, optimized.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.models import cifar_cnn, minilm, silero_vad, smollm2
from benchmarks.runtime import Feeds, output_sqnr
from qcompiler import CompileOptions, CompileResult, Verification, compile_model
from tests.support.real_models import real_model


def _compile(name: str, scheme: str, folder: Path) -> tuple[Path, CompileResult]:
    source = real_model(name)
    options = CompileOptions(scheme=scheme)
    return source, compile_model(source, options, output=folder / f"{name}.onnx")


def _feeds(name: str) -> Sequence[Feeds]:
    makers: dict[str, Callable[[], Sequence[Feeds]]] = {
        "cifar_cnn": lambda: cifar_cnn.sample_feeds(2),
        "minilm": lambda: minilm.sample_feeds(2),
        "silero_vad": lambda: silero_vad.sample_feeds(8),
        "silero_vad_op18_ifless": lambda: silero_vad.sample_feeds(8),
        "smollm2_folded": lambda: smollm2.sample_feeds(1),
    }
    return makers[name]()


@pytest.mark.parametrize(
    ("name", "scheme", "decibels"),
    [
        ("cifar_cnn", "w8a16", 30),
        ("cifar_cnn", "w4a16:b32", 20),
        ("cifar_cnn", "w8a8-dynamic", 20),
        ("silero_vad", "w8a16", 35),
        ("silero_vad_op18_ifless", "w8a16", 30),
        ("silero_vad_op18_ifless", "w4a16:b32", 20),
        pytest.param("minilm", "w8a16", 18, marks=pytest.mark.slow),
        pytest.param("minilm", "w4a16:b32", 10, marks=pytest.mark.slow),
        pytest.param("minilm", "w8a8-dynamic", 4, marks=pytest.mark.slow),
        pytest.param("smollm2_folded", "w8a16", 20, marks=pytest.mark.slow),
        pytest.param("smollm2_folded", "w4a16:b32", 5, marks=pytest.mark.slow),
    ],
)
def test_outputs_stay_close(name: str, scheme: str, decibels: float, tmp_path: Path) -> None:
    source, result = _compile(name, scheme, tmp_path)
    assert output_sqnr(source, result.path, _feeds(name)) > decibels


@pytest.mark.parametrize("name", ["cifar_cnn", "silero_vad", "silero_vad_op18_ifless"])
def test_every_pass_keeps_its_word(name: str, tmp_path: Path) -> None:
    feeds = _feeds(name)[0]
    np.savez(tmp_path / "samples.npz", **feeds)  # type: ignore[arg-type]
    options = CompileOptions(verify=Verification.NUMERICS, samples=tmp_path / "samples.npz")
    result = compile_model(real_model(name), options, output=tmp_path / "out.onnx")
    changed = {check.name for check in result.report.output_checks}
    assert "insert-qdq" in changed


@pytest.mark.slow
def test_a_tied_embedding_is_stored_once_and_both_sites_run_on_integers(tmp_path: Path) -> None:
    source, result = _compile("smollm2_folded", "w4a16:b32", tmp_path)
    tied = [node for node in result.report.nodes if node.weight == "model.lm_head.weight"]
    assert sorted(node.op_type for node in tied) == ["Gather", "MatMul"]
    assert all(node.integer_kernel for node in tied)
    summary = result.report.summary
    assert summary.quantized == summary.integer_kernels == 212
    # 5.125 bits for 4-bit codes with a float32 scale and a 4-bit zero point per 32.
    assert summary.average_bits == 5.125
    size = source.stat().st_size + source.with_suffix(".onnx.data").stat().st_size
    assert result.report.output.bytes < size / 6


@pytest.mark.slow
def test_blocks_of_real_models_follow_their_structure() -> None:
    from qcompiler.ir.blocks import find_blocks
    from qcompiler.ir.load import load_model

    blocks = find_blocks(load_model(real_model("smollm2_folded")))
    # Embedding, attention and MLP of 30 layers, the head: cut at the residual stream.
    assert len(blocks) >= 61
    assert sum("layers.29" in block.label for block in blocks) >= 2


def test_inspection_speaks_of_every_weight_op(tmp_path: Path) -> None:
    _, result = _compile("silero_vad", "w8a16", tmp_path)
    for node in result.report.nodes:
        assert node.reason
        assert node.rule
        if node.quantized:
            assert node.kernel
            assert node.sqnr_db is None or node.sqnr_db > 25
