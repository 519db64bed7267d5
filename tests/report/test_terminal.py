"""What the terminal shows: every fact of the report, grouped where there are many ops."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from qcompiler.engine import engine_warnings
from qcompiler.report.records import (
    EngineReport,
    FileFacts,
    NodeReport,
    PassReport,
    Report,
    SkipReport,
    Summary,
    UnplannedWeight,
)
from qcompiler.report.terminal import print_report, size
from tests.support.reports import full_report


def _report(count: int) -> Report:
    nodes = tuple(
        NodeReport(
            name=f"layer[{index}]",
            origins=(f"layer[{index}]",),
            op_type="MatMul",
            scheme="w4a16:b32:asym",
            rule="matmul-nbits-4",
            reason="recipe default asks for it",
            weight=f"w{index}",
            elements=1024,
            bytes_before=4096,
            bytes_after=656,
            sqnr_db=21.5,
            kernel="MatMulNBits (4-bit)",
            integer_kernel=True,
        )
        for index in range(count)
    )
    facts = FileFacts("m.onnx", 1 << 20, "0" * 64, 21)
    summary = Summary(count, count, 4096, 656, 5.125, 5.125, 21.5, count, 1 << 28, 1.5)
    skips = (SkipReport("fold-batch-norm", "layer[0]", "its statistics are computed at run time"),)
    passes = (PassReport("fold-batch-norm", "imported", "reordered", 0.25, 0, skips),)
    return Report("0", "t", "", facts, facts, summary, nodes, passes, (), ("beware",), "runtime 1")


def _printed(report: Report) -> str:
    console = Console(width=200, record=True, force_terminal=False)
    with console.capture() as capture:
        print_report(report, Path("out.onnx"), console)
    return capture.get()


def test_a_small_model_has_a_row_for_every_op() -> None:
    text = _printed(_report(3))
    assert text.count("layer[") == 3 + 3  # a row each, and the line of reasons
    for fact in (
        "w4a16:b32:asym by matmul-nbits-4: 3",
        "recipe default asks for it",
        "21.5",
        "4.0 KiB",
        "656 B",
        "MatMulNBits (4-bit)",
        "3 of 3 quantized ops run on integer weights in runtime 1",
        "peak memory 256.0 MiB",
        "fold-batch-norm 0.25 s",
        "warning: beware",
        "out.onnx",
    ):
        assert fact in text


def test_a_large_model_has_a_row_for_every_kind() -> None:
    text = _printed(_report(100))
    assert "100 nodes" in text
    assert "layer[50]" not in text


def test_many_reasons_are_cut() -> None:
    report = _report(100)
    nodes = tuple(replace(node, reason=f"reason of {node.name}") for node in report.nodes)
    text = _printed(replace(report, nodes=nodes))
    assert text.count("reason of") == 40
    assert "and 60 more reasons" in text


def test_a_search_has_a_line_for_every_candidate() -> None:
    text = _printed(full_report())
    assert "searched for the smallest that holds --min-output-sqnr 20, --max-latency-ratio" in text
    assert "-> w8a16: 8.10 bits, 24.5 dB; chosen" in text
    assert " - mix of first: 2.50 bits, metric 0.8, 12.5 dB, 0.95 of float's time; fails:" in text
    assert " - w4a16:b64: not made: it takes 4.28 bits" in text


def test_sizes_have_units() -> None:
    assert [size(n) for n in (5, 2048, 3 << 20, 5 << 30)] == [
        "5 B",
        "2.0 KiB",
        "3.0 MiB",
        "5.00 GiB",
    ]


def test_latency_is_shown_where_it_was_measured() -> None:
    assert "latency" not in _printed(_report(3))
    report = _report(3)
    nodes = tuple(
        replace(node, float_ms=2.0, quantized_ms=1.25, scheme=scheme)
        for node, scheme in zip(report.nodes, ("w8a8:sym", "w8a8:sym", "float"), strict=True)
    )
    summary = replace(report.summary, float_ms=8.0, compiled_ms=6.0, latency_ratio=0.76)
    text = _printed(replace(report, nodes=nodes, summary=summary))
    assert "latency 8.00 ms -> 6.00 ms on the largest sample, 0.76 of float's time" in text
    assert "regions: 2 ops w8a8:sym, 1 ops float" in text


def test_types_are_told_with_their_reasons() -> None:
    assert "compute in" not in _printed(_report(3))
    report = _report(20)
    nodes = tuple(
        replace(node, compute_type="float32", type_reason=f"reason {min(index // 2, 8)}")
        for index, node in enumerate(report.nodes)
    )
    summary = replace(report.summary, compute_type="float16", narrow_ops=7, float32_ops=20, casts=3)
    text = _printed(replace(report, nodes=nodes, summary=summary))
    assert "7 ops compute in float16, 20 stay in float32; Casts added between them: 3" in text
    assert "float32: 4 (layer[16], layer[17], layer[18], ...): reason 8" in text
    assert "float32: 2 more, for other reasons" in text


def test_an_engine_and_the_weights_in_it() -> None:
    wide = UnplannedWeight("w", "INT4", "FLOAT16", 512, 2048)
    lost = UnplannedWeight("v", "INT4", None, 512, None)
    engine = EngineReport(
        *("m.engine", 3 << 20, "0", "TensorRT-RTX", "1.7", ("SM86",), 2.5, 40, 2 << 20, 9, 7),
        (wide, lost),
        ("slow",),
    )
    text = _printed(replace(_report(3), engine=engine))
    assert "engine m.engine for SM86 by TensorRT-RTX 1.7: 3.0 MiB, constants of the graph" in text
    assert "7 of 9 weights lie in it as planned" in text
    assert "w: planned as INT4, found as FLOAT16" in text
    assert "v: planned as INT4, not found" in text
    assert "TensorRT-RTX warns: slow" in text
    (warning,) = engine_warnings(engine)
    assert "1 weights lie in the engine in a wider type than planned, 1 KiB more: w as" in warning
    large = replace(engine, bytes=20 << 20, other=(lost,))
    (warning,) = engine_warnings(large)
    assert "the engine has 20480 KiB, and constants of the graph take 2048 KiB" in warning
    assert engine_warnings(None) == ()
