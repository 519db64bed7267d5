"""Reports are read from the graph, and totals count shared weights once."""

from pathlib import Path

import pytest

from qcompiler.errors import UsageError
from qcompiler.execution.kernels import Kernel
from qcompiler.execution.latency import Timing
from qcompiler.ir.provenance import annotate
from qcompiler.report.build import (
    kernel_warnings,
    latency_warnings,
    node_reports,
    summarize,
)
from qcompiler.report.files import read_report
from qcompiler.report.records import NodeReport
from tests.support.graphs import build, node_named, random_array


def _node(name: str, scheme: str, weight: str, before: int, after: int) -> NodeReport:
    return NodeReport(
        name,
        (name,),
        "MatMul",
        scheme,
        "rule",
        "reason",
        weight,
        before // 4,
        before,
        after,
        20.0,
        None,
        None,
    )


def test_totals_count_a_shared_weight_once() -> None:
    nodes = [
        _node("lookup", "w4a16:b32:sym", "table", 4000, 625),
        _node("head", "w4a16:b32:sym", "table", 4000, 625),
        _node("other", "float", "w", 4000, 4000),
    ]
    summary = summarize(nodes, seconds=1.0)
    assert (summary.sites, summary.quantized) == (3, 2)
    assert (summary.weight_bytes_before, summary.weight_bytes_after) == (8000, 4625)
    assert summary.average_bits == 5.0
    assert summary.average_bits_all == 18.5
    assert summary.peak_memory_bytes > 1 << 20


def test_latency_is_part_of_the_totals() -> None:
    assert summarize([], seconds=1.0).latency_ratio is None
    timings = (Timing(4.0, 1.0, 1.0, 1.0), Timing(3.0, 0.76, 0.7, 0.8))
    summary = summarize([], timings, seconds=1.0)
    assert (summary.float_ms, summary.compiled_ms, summary.latency_ratio) == (4.0, 3.0, 0.76)


def test_a_result_slower_than_float_is_a_warning() -> None:
    float_timing = Timing(4.0, 1.0, 1.0, 1.0)
    assert latency_warnings(()) == ()
    for ratio in (0.98, 1.0049):
        assert latency_warnings((float_timing, Timing(4.0, ratio, 0.9, 1.1))) == ()
    (warning,) = latency_warnings((float_timing, Timing(4.6, 1.15, 1.1, 1.2)))
    assert warning.startswith("SLOWER THAN FLOAT")
    assert "1.15 times" in warning
    assert "4.00 -> 4.60 ms" in warning


def test_nodes_are_read_from_metadata() -> None:
    model = build(
        "g (float[N, 4] x) => (float[N, 4] y) { [mm] y = MatMul(x, w) }", {"w": random_array(4, 4)}
    )
    annotate(node_named(model, "mm"), scheme="w8a16:sym", rule="r", reason="because", weight="w")
    assert node_reports(model, None)[0].float_ms is None
    annotate(node_named(model, "mm"), float_ms=1.25, quantized_ms=0.5)
    (seen,) = node_reports(model, {"mm": Kernel("MatMulNBits (8-bit)", integer=True)})
    assert (seen.name, seen.scheme, seen.kernel) == ("mm", "w8a16:sym", "MatMulNBits (8-bit)")
    assert (seen.float_ms, seen.quantized_ms) == (1.25, 0.5)
    (unseen,) = node_reports(model, {})
    assert unseen.kernel == "not found: the runtime merged or removed the op"
    (nobody_looked,) = node_reports(model, None)
    assert nobody_looked.kernel is None


def test_a_node_that_stands_for_others_is_called_as_in_the_source() -> None:
    model = build(
        "g (float[N, 4] x) => (float[N, 4] y) { [made] y = MatMul(x, w) }",
        {"w": random_array(4, 4)},
    )
    annotate(node_named(model, "made"), scheme="float", origin='["gemm"]')
    assert node_reports(model, None)[0].name == "gemm"
    annotate(node_named(model, "made"), origin='["made", "batch norm"]')
    (seen,) = node_reports(model, None)
    assert (seen.name, seen.origins) == ("made", ("made", "batch norm"))


def test_float_kernels_are_one_warning_a_kernel() -> None:
    def quantized(name: str, kernel: str, integer: bool) -> NodeReport:
        return NodeReport(
            name, (name,), "Conv", "w8a16:sym", "", "", name, 1, 4, 1, 1.0, kernel, integer
        )

    nodes = [quantized(f"conv{i}", "float Conv", False) for i in range(6)]
    nodes.append(quantized("mm", "MatMulNBits (8-bit)", True))
    (warning,) = kernel_warnings(nodes)
    assert warning.startswith("6 ops stored in w8a16:sym get no integer kernel")
    assert "conv3, ..." in warning
    assert "mm" not in warning


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "other"}', '{"schema_version": 1}'])
def test_a_file_that_is_no_report_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UsageError, match=r"r\.json"):
        read_report(tmp_path / "r.json")
