"""Engines, built by a library that runs in a process of its own."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import QCompilerError, TargetError, UsageError
from qcompiler.export.tensorrt_profiles import ShapeRange
from qcompiler.export.to_tensorrt import LIBRARIES, EngineOptions, build_engine, capability_of
from qcompiler.progress import Advance
from tests.support.fake_tensorrt import Does, library
from tests.support.graphs import build

__all__ = ["library"]


def make(folder: Path, **options: Any) -> tuple[Any, list[Any]]:
    """Build an engine and return it with the calls that the library saw."""
    options.setdefault("profile", {"x": ShapeRange((1, 8), (2, 8), (4, 8))})
    engine = build_engine(folder / "model.onnx", folder / "model.engine", EngineOptions(**options))
    return engine, json.loads(engine.path.read_text(encoding="utf-8"))


def failure(folder: Path, **options: Any) -> QCompilerError:
    with pytest.raises(QCompilerError) as caught:
        make(folder, **options)
    assert not (folder / "model.engine").exists()
    assert [path.name for path in folder.iterdir()] == ["library"]
    return caught.value


def test_everything_that_is_asked_for_reaches_the_library(library: Does, tmp_path: Path) -> None:
    library(log=[[2, "slow"], [2, "slow"], [3, "chatter"]])
    engine, calls = make(
        tmp_path, flags=("REFIT",), pools={"WORKSPACE": 1 << 20}, capabilities=("SM86",)
    )
    assert calls == [
        ["flag", "REFIT"],
        ["pool", "WORKSPACE", 1 << 20],
        ["sm", "SM86"],
        ["profile", {"x": [[1, 8], [2, 8], [4, 8]]}],
    ]
    assert (engine.layers, engine.version, engine.warnings) == (3, "9.9", ("slow",))
    assert engine.size == engine.path.stat().st_size


def test_parse_errors_name_our_nodes(library: Does, tmp_path: Path) -> None:
    library(parse=["layer1/relu", "layer2/relu"])
    error = failure(tmp_path)
    assert isinstance(error, TargetError)
    assert error.where == "layer1/relu"
    assert "TensorRT-RTX does not take the model" in error.message
    assert "layer2/relu (Relu): not today" in error.message


def test_a_crash_of_the_library_is_an_error_here(library: Does, tmp_path: Path) -> None:
    library(abort=True, log=[[1, "something is wrong"]])
    error = failure(tmp_path)
    assert isinstance(error, TargetError)
    assert "crashed with SIGABRT: something is wrong" in error.message


def test_a_build_that_fails_says_what_was_logged(library: Does, tmp_path: Path) -> None:
    library(nothing=True, log=[[1, "no kernel for node 7"]])
    assert "cannot build the engine: no kernel for node 7" in failure(tmp_path).message


def test_memory_is_limited(library: Does, tmp_path: Path) -> None:
    library(hog=True)
    error = failure(tmp_path, memory_limit=200 << 20)
    assert error.message == "building the engine took more than 200 MiB"


def test_inputs_of_unknown_size_need_a_profile(library: Does, tmp_path: Path) -> None:
    error = failure(tmp_path, profile={})
    assert isinstance(error, UsageError)
    assert "input x has shape (-1, 8), and no profile says which shape it takes" in error.message


def test_values_that_decide_shapes_come_from_samples(library: Does, tmp_path: Path) -> None:
    library(rounds=True)
    shapes = {"x": ShapeRange((1, 8), (2, 8), (4, 8))}
    assert "which values it takes" in failure(tmp_path, profile=shapes).message
    values = ShapeRange((), (), (), ((1,), (3,), (9,)))
    _, calls = make(tmp_path, profile={**shapes, "n": values})
    assert calls == [
        ["profile", {"x": [[1, 8], [2, 8], [4, 8]], "n values": [[1], [3], [9]]}],
    ]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"flags": ("FP16",)}, "BuilderFlag has no FP16; there are REFIT"),
        ({"capabilities": ("SM10",)}, "ComputeCapability has no SM10; there are SM86"),
        ({"pools": {"MOON": 1}}, "MemoryPoolType has no MOON"),
    ],
)
def test_unknown_names_list_the_known(
    options: dict[str, Any], fault: str, library: Does, tmp_path: Path
) -> None:
    error = failure(tmp_path, **options)
    assert isinstance(error, UsageError)
    assert fault in error.message


def test_a_missing_library_is_one_sentence(tmp_path: Path) -> None:
    options = EngineOptions(library="tensorrt")
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    elsewhere = replace(options, python=Path(sys.executable))
    for each, fault in ((options, "is not installed"), (elsewhere, "cannot be imported")):
        with pytest.raises(UsageError, match=f"TensorRT {fault}") as caught:
            build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", each)
        assert caught.value.hint == "pip install 'qcompiler[tensorrt]'"
    with pytest.raises(UsageError, match="no library for engines"):
        build_engine(tmp_path / "m", tmp_path / "e", EngineOptions(library="openvino"))


def test_timings_are_kept_and_reused(library: Does, tmp_path: Path) -> None:
    cache = tmp_path / "library" / "timings"
    make(tmp_path, timing_cache=cache)
    make(tmp_path, timing_cache=cache)
    assert cache.read_bytes() == b"++"


def test_progress_shows_the_outer_phases(library: Does, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Shown:
        @contextmanager
        def task(self, description: str, total: float) -> Iterator[Advance]:
            seen.append((description, total))
            yield seen.append

    options = EngineOptions(profile={"x": ShapeRange((1, 8), (2, 8), (4, 8))})
    build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", options, progress=Shown())
    assert seen == [("engine: Building", 4), 1, 3]


@pytest.mark.parametrize("text", ["86", "8.6", "sm86", "SM_86", " 86 "])
def test_names_of_processors(text: str) -> None:
    assert capability_of(text) == "SM86"


def test_refuses_other_names_of_processors() -> None:
    with pytest.raises(UsageError, match="is no compute capability"):
        capability_of("ampere")


@pytest.mark.skipif(
    importlib.util.find_spec(LIBRARIES["tensorrt-rtx"].module) is None,
    reason="TensorRT-RTX is not installed",
)
def test_the_real_library_builds_and_refuses(tmp_path: Path) -> None:
    text = "g (float16[N, 8] x) => (float16[N, 8] y) { h = MatMul(x, w) [act] y = Relu(h) }"
    ir.save(build(text, {"w": np.eye(8, dtype=np.float16)}), tmp_path / "model.onnx")
    options = EngineOptions(
        profile={"x": ShapeRange((1, 8), (2, 8), (4, 8))}, capabilities=("SM86", "SM89")
    )
    engine = build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", options)
    assert engine.path.stat().st_size == engine.size > 1000
    mixed = "g (float16[N, 8] x, float[8] b) => (float16[N, 8] y) { [add] y = Add(x, b) }"
    ir.save(build(mixed), tmp_path / "mixed.onnx")
    with pytest.raises(TargetError, match=r"does not take the model|cannot build"):
        build_engine(tmp_path / "mixed.onnx", tmp_path / "mixed.engine", options)
