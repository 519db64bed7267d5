"""Two artefacts are compared node by node; what cannot be seen is no difference."""

import json
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from qcompiler.cli.main import main
from qcompiler.errors import UsageError
from qcompiler.ir.provenance import annotate
from qcompiler.report.difference import compare, difference_lines, read_artefact
from qcompiler.report.files import report_json
from qcompiler.report.records import Report
from tests.support.graphs import build, node_named, random_array
from tests.support.reports import full_report, node_report


def written(report: Report, path: Path) -> Path:
    path.write_text(report_json(report))
    return path


def model(path: Path, *, scheme: str | None = None, extra: str = "") -> Path:
    made = build(
        "g (float[2, 4] x) => (float[2, 4] y)"
        f" {{ [mm] m = MatMul(x, w) {extra} [end] y = Relu(m) }}",
        {"w": random_array(4, 4)},
    )
    if scheme is not None:
        annotate(node_named(made, "mm"), scheme=scheme, rule="r", reason="because")
    ir.save(made, path)
    return path


def test_nodes_that_differ_and_nodes_of_one_side(tmp_path: Path) -> None:
    first = full_report("a", "b", "c")
    nodes = (
        replace(node_report("a"), scheme="w8a16:sym", output_sqnr_db=30.04),
        replace(first.nodes[1], float_ms=5.0, output_sqnr_db=29.01),
        node_report("new"),
    )
    second = replace(first, nodes=nodes, settings={**first.settings, "weight_range": "min-max"})
    a = read_artefact(written(first, tmp_path / "a.report.json"))
    b = read_artefact(written(second, tmp_path / "b.report.json"))
    found = compare(a, b)
    assert found.facts == {"setting weight_range": ("mse", "min-max")}
    assert [(node.name, node.where) for node in found.nodes] == [
        ("a", "both"),
        ("c", "a"),
        ("new", "b"),
    ]
    assert found.nodes[0].changes == {"scheme": ("w8a8:sym", "w8a16:sym")}
    assert found.same == 1, "times, and a hundredth of a decibel, are no difference"
    text = "\n".join(difference_lines(found))
    assert "  scheme: w8a8:sym -> w8a16:sym" in text
    assert "c: only in a" in text
    assert text.endswith("1 nodes differ, 2 are in one only, 1 are the same")
    plain = json.loads(found.to_json())
    assert (plain["schema"], plain["schema_version"]) == ("qcompiler-diff", 1)
    assert plain["nodes"][0]["changes"] == {"scheme": ["w8a8:sym", "w8a16:sym"]}


def test_an_artefact_does_not_differ_from_itself(tmp_path: Path) -> None:
    path = written(full_report(), tmp_path / "a.json")
    found = compare(read_artefact(path), read_artefact(path))
    assert (found.facts, found.nodes, found.same) == ({}, (), 3)


def test_models_without_reports_tell_what_they_can(tmp_path: Path) -> None:
    plain = read_artefact(model(tmp_path / "plain.onnx"))
    more = read_artefact(model(tmp_path / "more.onnx", extra="[neg] n = Neg(m)"))
    found = compare(plain, more)
    assert [(node.name, node.where) for node in found.nodes] == [("neg", "b")]
    one = read_artefact(model(tmp_path / "one.onnx", scheme="w8a16:sym"))
    other = read_artefact(model(tmp_path / "other.onnx", scheme="w4a16:b32:sym"))
    (node,) = compare(one, other).nodes
    assert node.changes == {"scheme": ("w8a16:sym", "w4a16:b32:sym")}


def test_a_report_beside_a_model_is_read(tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx")
    written(full_report("mm", "b", "c"), tmp_path / "m.report.json")
    assert list(read_artefact(path).nodes) == ["mm", "b", "c"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = written(full_report("a", "b", "c"), tmp_path / "a.json")
    b = written(full_report("a", "b", "d"), tmp_path / "b.json")
    with pytest.raises(SystemExit) as stop:
        main(["diff", str(a), str(b)])
    assert not stop.value.code
    assert "d: only in b" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["diff", str(a), str(b), "--report", "json"])
    assert json.loads(capsys.readouterr().out)["same"] == 2


def test_what_is_no_artefact_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UsageError):
        read_artefact(tmp_path / "x.json")
