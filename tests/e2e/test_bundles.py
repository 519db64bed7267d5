"""`-o NAME.qbundle` and `qcompile build`: from a model to an engine that a device builds."""

import hashlib
import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import CompileOptions, ModelError, UsageError, compile_model
from qcompiler.bundle import BundleResult, build_bundle, compile_bundle
from qcompiler.bundle_files import read_bundle
from qcompiler.cli.main import main
from qcompiler.export.tensorrt_profiles import ShapeRange
from qcompiler.export.to_tensorrt import EngineOptions
from qcompiler.report.files import read_manifest, read_report
from tests.support.fake_tensorrt import Does, library
from tests.support.graphs import build, random_array

__all__ = ["library"]

Bundled = Callable[..., BundleResult]
Run = Callable[..., tuple[int, str, str]]

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="builds engines: pip install 'qcompiler[tensorrt-rtx]'",
)
PROFILE = {"x": ShapeRange((1, 256), (2, 256), (8, 256))}
REPORTS = ["model.report.html", "model.report.json"]
FILES = ["build.sh", "bundle.json", "model.manifest.json", "model.onnx", *REPORTS]


def net() -> ir.Model:
    text = "g (float[N, 256] x) => (float[N, 256] y) { [fc1] a = MatMul(x, w)"
    weights = {key: random_array(256, 256, seed=seed) / 16 for seed, key in enumerate("wv")}
    return build(f"{text} [act] r = Relu(a) [fc2] y = MatMul(r, v) }}", weights)


@pytest.fixture
def bundled(tmp_path: Path) -> Bundled:
    def run(name: str = "m.qbundle", target: str = "tensorrt", **options: Any) -> BundleResult:
        options.setdefault("engine_options", EngineOptions(profile=PROFILE))
        options = {"scheme": "w8a16", "target": target, **options}
        return compile_bundle(net(), CompileOptions(**options), tmp_path / name)

    return run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        text = capsys.readouterr()
        return int(stop.value.code or 0), text.out, text.err

    return call


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_bundle_has_all_that_a_device_needs(bundled: Bundled, tmp_path: Path) -> None:
    result = bundled(external_data=True)
    folder = tmp_path / "m.qbundle"
    assert names(folder) == sorted([*FILES, "model.onnx.data"])
    assert names(tmp_path) == ["m.qbundle"]
    assert result.model.path == folder / "model.onnx"
    assert result.model.report == read_report(folder / "model.report.json")
    assert read_manifest(folder / "model.manifest.json").output.name == "model.onnx"
    content = json.loads((folder / "bundle.json").read_text())
    listed = {file["name"]: file for file in content["files"]}
    assert sorted(listed) == sorted(set(names(folder)) - {"bundle.json", *REPORTS})
    for name, facts in listed.items():
        data = (folder / name).read_bytes()
        assert facts["bytes"] == len(data)
        assert facts["sha256"] == hashlib.sha256(data).hexdigest()
    script = (folder / "build.sh").read_text()
    assert f"{listed['model.onnx.data']['sha256']}  model.onnx.data" in script
    assert "--minShapes=x:1x256" in script
    assert (folder / "build.sh").stat().st_mode & 0o111
    assert read_bundle(folder).options.profile == PROFILE
    subprocess.run(["bash", "-n", folder / "build.sh"], check=True)


def test_equal_compilations_give_equal_bundles(bundled: Bundled, tmp_path: Path) -> None:
    """All but the report, which says how long it took."""
    for name in ("a.qbundle", "b.qbundle"):
        bundled(name)
    for name in set(FILES) - set(REPORTS):
        assert (tmp_path / "a.qbundle" / name).read_bytes() == (
            tmp_path / "b.qbundle" / name
        ).read_bytes(), name


def test_shapes_come_from_the_samples(bundled: Bundled, tmp_path: Path) -> None:
    np.savez(tmp_path / "calls.npz", x=random_array(8, 256, seed=3))
    calibration = str(tmp_path / "calls.npz")
    bundled(calibration=calibration, engine_options=EngineOptions())
    profile = read_bundle(tmp_path / "m.qbundle").options.profile
    assert profile == {"x": ShapeRange((8, 256), (8, 256), (8, 256))}


def test_without_shapes_nothing_is_compiled(bundled: Bundled, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing says which shapes the input x takes"):
        bundled(engine_options=EngineOptions())
    assert names(tmp_path) == []


def test_a_bundle_replaces_a_bundle_and_nothing_else(bundled: Bundled, tmp_path: Path) -> None:
    folder = tmp_path / "m.qbundle"
    folder.mkdir()
    bundled()
    for built in ("device.engine", "timing.cache"):
        (folder / built).write_text("older")
    bundled(external_data=True)
    assert names(folder) == sorted([*FILES, "model.onnx.data"])
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"a file that is not its own: notes\.txt"):
        bundled()
    other = tmp_path / "other.qbundle"
    other.mkdir()
    (other / "precious").write_text("mine")
    with pytest.raises(UsageError, match="something else in it"):
        bundled("other.qbundle")
    (tmp_path / "file.qbundle").write_text("mine")
    (tmp_path / "link.qbundle").symlink_to(folder)
    for name in ("file.qbundle", "link.qbundle"):
        with pytest.raises(UsageError, match="is no folder"):
            bundled(name)
    assert names(other) == ["precious"]
    assert names(tmp_path) == ["file.qbundle", "link.qbundle", "m.qbundle", "other.qbundle"]


def test_outputs_that_cannot_be(bundled: Bundled, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the folder does not exist"):
        bundled("nowhere/m.qbundle")
    for name in ("device.engine", "../m.engine", "model.onnx"):
        with pytest.raises(UsageError, match="plain file name"):
            bundled(engine=Path(name))
    with pytest.raises(UsageError, match="it has no engines"):
        bundled(target="onnxruntime")
    with pytest.raises(UsageError, match="a bundle is a folder"):
        compile_model(net(), CompileOptions(), output=tmp_path / "m.qbundle")
    bundled()
    with pytest.raises(UsageError, match="take the place of the model"):
        compile_bundle(
            tmp_path / "m.qbundle" / "model.onnx", CompileOptions(), tmp_path / "m.qbundle"
        )


def test_a_library_without_trtexec_gets_no_script(run: Run, tmp_path: Path, library: Does) -> None:
    """And `qcompile build` builds all the same, with what the bundle says."""
    ir.save(net(), tmp_path / "m.onnx")
    folder = tmp_path / "m.qbundle"
    status, out, err = run(
        *(tmp_path / "m.onnx", "-o", f"{folder}/", "--target", "tensorrt-rtx", "--scheme", "w8a16"),
        *("--profile", "x:1x256..2x256..8x256", "--builder-flag", "refit", "--sm", "86"),
        *("--workspace", "1MiB"),
    )
    assert status == 0, err
    assert "no build.sh: trtexec builds for TensorRT alone; use `qcompile build" in out
    assert names(folder) == sorted(set(FILES) - {"build.sh"})
    status, out, err = run("build", folder)
    assert status == 0, err
    assert "engine device.engine for SM86 by TensorRT-RTX 9.9" in out
    assert f"wrote {folder}/device.engine" in out
    assert json.loads((folder / "device.engine").read_text()) == [
        ["flag", "REFIT"],
        ["pool", "WORKSPACE", 1 << 20],
        ["sm", "SM86"],
        ["profile", {"x": [[1, 256], [2, 256], [8, 256]]}],
    ]
    assert (folder / "timing.cache").read_bytes() == b"+"
    manifest = json.loads((folder / "device.engine.manifest.json").read_text())
    report = json.loads((folder / "model.report.json").read_text())
    assert manifest["graph"] == report["output"]
    assert run("build", folder, "-o", tmp_path / "e.plan")[0] == 0
    assert (tmp_path / "e.plan.manifest.json").exists()
    assert run("build", folder, "-o", folder / "model.onnx")[0] == 2


def test_an_engine_may_lie_in_it(bundled: Bundled, tmp_path: Path, library: Does) -> None:
    result = bundled(target="tensorrt-rtx", engine=Path("sm.engine"))
    folder = tmp_path / "m.qbundle"
    assert {"sm.engine", "sm.engine.manifest.json"} <= set(names(folder))
    assert result.model.engine_path == folder / "sm.engine"
    bundle = read_bundle(folder)
    assert bundle.engine == "sm.engine"
    assert "sm.engine" in {file.name for file in bundle.files}


def test_changed_files_are_found_before_the_library_is_asked(
    bundled: Bundled, run: Run, tmp_path: Path, library: Does
) -> None:
    bundled(target="tensorrt-rtx", external_data=True)
    folder = tmp_path / "m.qbundle"
    library(abort=True)
    assert run("build", folder)[0] == 4
    data = folder / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(content)
    status, _, err = run("build", folder)
    assert status == 3
    assert "its size or its hash differs" in err
    data.unlink()
    with pytest.raises(ModelError, match="a file of the bundle is missing"):
        build_bundle(folder)
    listed = json.loads((folder / "bundle.json").read_text())
    listed["files"] = [file for file in listed["files"] if file["name"] != data.name]
    (folder / "bundle.json").write_text(json.dumps(listed))
    data.write_bytes(content)
    with pytest.raises(ModelError, match=r"does not have model\.onnx\.data"):
        build_bundle(folder)
    assert not (folder / "device.engine").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"files": [{"name": "../m", "bytes": 1, "sha256": ""}]},
        {"files": [{"name": "/etc/passwd", "bytes": 1, "sha256": ""}]},
        {"engine": "a/b"},
        {"build": {}},
        {"files": 3},
    ],
)
def test_lists_that_cannot_be_read(
    change: dict[str, Any], bundled: Bundled, run: Run, tmp_path: Path
) -> None:
    bundled(target="tensorrt-rtx")
    path = tmp_path / "m.qbundle" / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    status, _, err = run("build", path.parent)
    assert status == 2
    assert "bundle" in err


def test_a_missing_library_is_one_sentence(bundled: Bundled, run: Run, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    bundled()
    status, _, err = run("build", tmp_path / "m.qbundle")
    assert status == 2
    assert "TensorRT is not installed" in err
    assert run("build", tmp_path)[0] == 2


@needs_rtx
def test_a_real_engine_from_a_bundle(bundled: Bundled, tmp_path: Path) -> None:
    options = EngineOptions(profile=PROFILE, capabilities=("SM86",))
    bundled(target="tensorrt-rtx", engine_options=options, external_data=True)
    report = build_bundle(tmp_path / "m.qbundle").report
    assert (report.weights, report.as_planned) == (2, 2)
