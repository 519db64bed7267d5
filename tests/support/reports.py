"""A report with something of everything, made by hand."""

from qcompiler.calibration.channel_profiles import ChannelProfile
from qcompiler.report.records import (
    CalibrationReport,
    ChangeReport,
    EngineReport,
    FileFacts,
    IslandSite,
    IslandsReport,
    MetricReport,
    NodeReport,
    PassReport,
    QualityReport,
    Report,
    SkipReport,
    Summary,
    UnplannedWeight,
    WindowReport,
)
from qcompiler.report.search_points import SearchPoint, SearchReport

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
)
"""A name that becomes markup, and runs, wherever a page does not escape it."""


def node_report(
    name: str, scheme: str = "w8a8:sym", *, result_db: float | None = 30.0
) -> NodeReport:
    """Return an op with a weight of 1,000 elements."""
    return NodeReport(
        name=name,
        origins=(name,),
        op_type="MatMul",
        scheme=scheme,
        rule="qlinear-matmul" if scheme != "float" else "conv-low-bit",
        reason=f"reason of {name}",
        weight=f"{name}.weight",
        elements=1000,
        bytes_before=4000,
        bytes_after=4000 if scheme == "float" else 1010,
        sqnr_db=None if scheme == "float" else 40.0,
        kernel="QLinearMatMul" if scheme != "float" else None,
        integer_kernel=scheme != "float" or None,
        data_sqnr_db=35.0,
        output_sqnr_db=result_db,
        compute_type="float32",
        type_reason=f"range of {name}",
    )


def full_report(*names: str) -> Report:
    """Return a report with every section; its ops have these names, the last one is float."""
    names = names or ("first", "second", "third")
    last = names[-1]
    nodes = [node_report(name, result_db=30.0 - index) for index, name in enumerate(names[:-1])]
    nodes.append(node_report(last, "float", result_db=None))
    return Report(
        qcompiler="1.2.3",
        target="onnxruntime",
        recipe='version = 1\ndefault = "w8a8"\n',
        source=FileFacts(f"{names[0]}.onnx", 8 << 20, "ab" * 32, 21),
        output=FileFacts(f"{names[0]}.w8a8.onnx", 2 << 20, "cd" * 32, 21),
        summary=Summary(
            *(3, 2, 12000, 6020, 8.08, 16.05, 40.0, 2, 1 << 28, 12.5, 4.0, 3.0, 0.75),
            *("float16", 31, 5, 2),
        ),
        nodes=tuple(nodes),
        passes=(
            PassReport(
                *("assign-schemes", "assigned", "exact", 0.25, 1),
                (SkipReport("conv-low-bit", last, f"no kernel for {last}"),),
                (ChangeReport("assign", f"as {names[0]} asks", names),),
                12,
                {"MatMul": 1},
                (names[0],),
            ),
            PassReport("insert-qdq", "qdq", "lossy", 1.5, 0, ()),
        ),
        output_checks=(),
        warnings=(f"a warning about {names[0]}",),
        runtime="onnxruntime 1.32.0",
        calibration=CalibrationReport(
            "4 calls", 4, "ef" * 32, False, "mse", (QualityReport(names[0], 24.5, 25.0),)
        ),
        metric=MetricReport("mine:accuracy", 0.81, 0.805),
        settings={"weight_range": "mse", "metric": "mine:accuracy", "user_passes": ["my:pass"]},
        channels=(
            ChannelProfile(
                names[0], 3, (8.0, 2.0, 1.0), (3.0, 2.0, 1.5), (0.1, 0.2, 0), (0.3, 0.2, 0)
            ),
        ),
        engine=EngineReport(
            *("m.engine", 3 << 20, "0", "TensorRT-RTX", "1.7", ("SM86",), 2.5, 40, 2 << 20, 9, 8),
            (UnplannedWeight(f"{names[0]}.weight", "INT8", "FLOAT16", 1000, 2000),),
            (f"{names[0]} is slow",),
        ),
        windows=(
            WindowReport(names[0], 2.0, 0.5, True, 1000, 40, 3.5, 1 << 20),
            WindowReport("window 2", None, 0.25, False, 1000, 0, 3.5, 1 << 20),
        ),
        islands=IslandsReport(
            *("column", "tacq", "average-bits 3.1", "answers", 1.5, 3000, 60, 3.1, 2.9, 0.4),
            {"1% of channels": 0.3},
            (
                IslandSite(names[0], 0, names[0], "w3a16:b64", 1000, 0.5, 20, 0.2, 40),
                IslandSite(last, 1, "up", "w3a16:b64", 1000, 0.2, 40, 0.3, 80),
                IslandSite(last, -1, names[0], "w3a16:b64", 1000, 0.3, 0, 0.0, 0),
            ),
        ),
        search=SearchReport(
            ("--min-output-sqnr 20", "--max-latency-ratio 0.9"),
            "smallest",
            f"the last 4 calls of {names[0]}",
            "sqnr_db",
            0.9,
            (
                SearchPoint(
                    *(f"mix of {names[0]}", "fails", f"{last} is slow", 2.5, 1 << 20, 12.5, 0.01),
                    *(0.8, 0.95, 0.9, 1.0, 0.9, True),
                ),
                SearchPoint("w8a16", "chosen", "", 8.1, 2 << 20, 24.5, pareto=True),
                SearchPoint("w4a16:b64", "not made", "it takes 4.28 bits", predicted_latency=0.7),
            ),
        ),
    )
