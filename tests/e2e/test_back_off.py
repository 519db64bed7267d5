"""Engines that can be built only with a few ops in float: the fewest are found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from qcompiler import CompileOptions, CompileResult
from qcompiler.back_off import compile_backing_off
from qcompiler.cli.main import main
from qcompiler.engine import EngineBuildError
from qcompiler.export.tensorrt_profiles import ShapeRange
from qcompiler.export.to_tensorrt import EngineOptions
from qcompiler.report.files import read_manifest, read_report
from tests.support.fake_tensorrt import Does, library
from tests.support.graphs import build, random_array

__all__ = ["library"]

DEPTH = 8
SHAPES = EngineOptions(profile={"x": ShapeRange((1, 64), (2, 64), (8, 64))})


def deep() -> ir.Model:
    """Eight products; one name looks like a pattern that selects all."""
    lines, last = [], "x"
    for index in range(DEPTH):
        name = "fc" if index == 5 else f"fc{index}"
        after = "y" if index == DEPTH - 1 else f"a{index}"
        lines.append(f"[{name}] {after} = MatMul({last}, w{index})")
        last = after
    weights = {f"w{index}": random_array(64, 64, seed=index) / 8 for index in range(DEPTH)}
    model = build(f"g (float[N, 64] x) => (float[N, 64] y) {{ {' '.join(lines)} }}", weights)
    for node in model.graph:
        node.name = "fc*" if node.name == "fc" else node.name
    return model


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., CompileResult]:
    folder = tmp_path / "out"
    folder.mkdir()

    def run(**arguments: Any) -> CompileResult:
        options = CompileOptions(
            scheme="w8a16",
            target="tensorrt-rtx",
            engine_options=SHAPES,
            inspect_kernels=False,
            exclude=("fc0",),
        )
        return compile_backing_off(deep(), options, output=folder / "o.engine", **arguments)

    return run


@pytest.mark.parametrize("culprits", [["fc3"], ["fc1", "fc7"], ["fc*"]])
def test_exactly_the_culprits_stay_in_float(
    culprits: list[str], compiled: Callable[..., CompileResult], library: Does, tmp_path: Path
) -> None:
    library(refuses=culprits, log=[[1, "no kernel for it"]])
    result = compiled()
    nodes = {node.name: node for node in result.report.nodes}
    floats = {name for name, node in nodes.items() if node.scheme == "float"}
    assert floats == {"fc0", *culprits}
    for name in culprits:
        assert nodes[name].rule.startswith("back-off: ")
        assert "no engine could be built with it" in nodes[name].reason
        assert "no kernel for it" in nodes[name].reason
    assert result.report == read_report(result.report_path)
    assert "back-off" in read_manifest(result.manifest_path).recipe
    assert result.engine_path is not None
    assert json.loads(result.engine_path.read_text())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("o.engine", "o.engine.manifest.json", "o.lowered.manifest.json"),
        *("o.lowered.onnx", "o.lowered.report.html", "o.lowered.report.json"),
    ]


def test_what_builds_is_built_once(compiled: Callable[..., CompileResult], library: Does) -> None:
    library(refuses=[])
    result = compiled(most_builds=2)
    assert [node.name for node in result.report.nodes if node.scheme == "float"] == ["fc0"]


def test_what_fails_in_float_is_an_error(
    compiled: Callable[..., CompileResult], library: Does, tmp_path: Path
) -> None:
    library(nothing=True, log=[[1, "no memory"]])
    with pytest.raises(EngineBuildError, match="no memory; it fails with all ops in float, too"):
        compiled()
    assert list((tmp_path / "out").iterdir()) == []


def test_builds_are_bounded(compiled: Callable[..., CompileResult], library: Does) -> None:
    """With two builds there is only: none in float, all in float."""
    library(refuses=["fc3"])
    result = compiled(most_builds=2)
    assert {node.scheme for node in result.report.nodes} == {"float"}
    reasons = {node.reason for node in result.report.nodes if node.rule.startswith("back-off")}
    assert reasons
    assert all("fewer may do, 2 builds tried" in reason for reason in reasons)


def test_the_command_line_can_leave_it(library: Does, tmp_path: Path) -> None:
    library(refuses=["fc3"])
    ir.save(deep(), tmp_path / "m.onnx")
    command = [str(tmp_path / "m.onnx"), "--target", "tensorrt-rtx", "--scheme", "w8a16"]
    command += ["--profile", "x:1x64..2x64..8x64"]
    for further, status in (
        (["-o", "m.engine", "--no-back-off"], 4),
        (["-o", "m.engine"], 0),
        (["-o", "m.qbundle", "--engine", "here.engine"], 0),
    ):
        further[1] = str(tmp_path / further[1])
        with pytest.raises(SystemExit) as stop:
            main([*command, *further])
        assert int(stop.value.code or 0) == status
    assert (tmp_path / "m.qbundle" / "here.engine").exists()
