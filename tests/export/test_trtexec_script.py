"""The script that builds on a device, run by shells with a `trtexec` that writes down its words."""

import hashlib
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from qcompiler.export.tensorrt_profiles import ShapeRange
from qcompiler.export.to_tensorrt import EngineOptions
from qcompiler.export.trtexec_script import trtexec_script, why_no_script

Run = Callable[..., subprocess.CompletedProcess[str]]

FAKE = """#!/bin/sh
if [ "$1" = --help ]; then
    echo '&&&& RUNNING TensorRT.trtexec [TensorRT v@VERSION@] # trtexec --help'
    exit 1
fi
: > "@SAID@"
for word in "$@"; do
    printf '%s\\0' "$word" >> "@SAID@"
    case $word in --saveEngine=*) printf engine > "${word#--saveEngine=}" ;; esac
done
exit @STATUS@
"""

HOSTILE = [
    "x; touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    '"; touch pwned; "',
    "@MODEL@",
    "@ARGUMENTS@",
    "a\nSUMS\ntouch pwned\n",
    "a:b c",
    "\\",
    "$HOME",
    "--help",
    "äöü*?[]",
]

SHELLS = [shell for shell in ("sh", "bash", "dash", "busybox") if shutil.which(shell)]


def options(*names: str, **others: object) -> EngineOptions:
    shapes = ShapeRange((1, 8), (2, 8), (4, 8))
    return EngineOptions(
        library="tensorrt",
        profile=dict.fromkeys(names, shapes),
        **others,  # type: ignore[arg-type]
    )


def write(folder: Path, chosen: EngineOptions, names: Sequence[str]) -> Path:
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"model")
    (folder / "model.onnx.data").write_bytes(b"data")
    sums = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model.onnx", "model.onnx.data")
    }
    script = folder / "build.sh"
    script.write_text(trtexec_script(chosen, names, "model.onnx", sums), encoding="utf-8")
    return script


def fake(folder: Path, version: str = "100300", status: int = 0) -> Path:
    said = folder / "said"
    tool = folder / "bin" / "trtexec"
    tool.parent.mkdir(exist_ok=True)
    fields = {"@VERSION@": version, "@SAID@": str(said), "@STATUS@": str(status)}
    text = FAKE
    for field, value in fields.items():
        text = text.replace(field, value)
    tool.write_text(text, encoding="utf-8")
    tool.chmod(0o755)
    return said


def run(
    script: Path, *words: str, shell: str = "sh", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    folder = script.parent.parent
    command = [shell, "sh"] if shell == "busybox" else [shell]
    return subprocess.run(
        [*command, str(script), *words],
        cwd=folder,
        env={"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "HOME": "/", **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def heard(said: Path) -> list[str]:
    return said.read_bytes().decode().split("\0")[:-1]


@pytest.mark.parametrize("shell", SHELLS)
def test_everything_reaches_trtexec_as_it_is(tmp_path: Path, shell: str) -> None:
    chosen = options(
        *HOSTILE,
        flags=("WEIGHT_STREAMING", "REFIT"),
        pools={"WORKSPACE": 1 << 20},
        optimization_level=5,
        hardware_compatibility="AMPERE_PLUS",
    )
    script = write(tmp_path / "a $(touch pwned) 'b'", chosen, HOSTILE)
    said = fake(tmp_path)
    done = run(script, shell=shell)
    assert done.returncode == 0, done.stderr
    here = script.parent
    words = heard(said)
    assert words[0] == f"--onnx={here}/model.onnx"
    assert words[1].startswith(f"--saveEngine={here}/device.engine.partial.")
    assert words[2:4] == [f"--timingCacheFile={here}/timing.cache", "--skipInference"]
    assert words[4] == "--minShapes=" + ",".join(f"'{name}':1x8" for name in HOSTILE).replace(
        "'--help'", "--help"
    )
    assert [word.partition("=")[0] for word in words[5:7]] == ["--optShapes", "--maxShapes"]
    assert words[7:] == [
        *("--refit", "--allowWeightStreaming", "--memPoolSize=workspace:1048576B"),
        *("--builderOptimizationLevel=5", "--hardwareCompatibilityLevel=ampere+"),
        "--stronglyTyped",
    ]
    assert (here / "device.engine").read_text() == "engine"
    assert not list(tmp_path.rglob("pwned"))
    assert not list(here.glob("*.partial.*"))


def test_shells_take_the_syntax(tmp_path: Path) -> None:
    script = write(tmp_path / "bundle", options(*HOSTILE), HOSTILE)
    for shell in set(SHELLS) - {"busybox"}:
        subprocess.run([shell, "-n", str(script)], check=True)


@pytest.mark.parametrize(
    ("version", "words", "status"),
    [
        ("100300", ["--stronglyTyped"], 0),
        ("101302", ["--stronglyTyped"], 0),
        ("110401", [], 0),
        ("8601", None, 4),
        ("", None, 2),
    ],
)
def test_the_version_decides(
    version: str, words: list[str] | None, status: int, tmp_path: Path
) -> None:
    script = write(tmp_path / "bundle", options(), ())
    said = fake(tmp_path, version)
    done = run(script)
    assert done.returncode == status, done.stderr
    if words is None:
        assert not said.exists()
        assert (
            "TensorRT 8; the graph needs 10" in done.stderr or "set TENSORRT_MAJOR" in done.stderr
        )
    else:
        assert heard(said)[4:] == words, "a model of fixed shapes takes none"


def test_a_version_can_be_said(tmp_path: Path) -> None:
    script = write(tmp_path / "bundle", options(), ())
    said = fake(tmp_path, "")
    assert run(script, environment={"TENSORRT_MAJOR": "10"}).returncode == 0
    assert heard(said)[-1] == "--stronglyTyped"
    assert run(script, environment={"TENSORRT_MAJOR": "1;0"}).returncode == 2


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_damaged_files_stop_it(name: str, tmp_path: Path) -> None:
    script = write(tmp_path / "bundle", options(), ())
    said = fake(tmp_path)
    (script.parent / name).write_bytes(b"other")
    done = run(script)
    assert (done.returncode, said.exists()) == (3, False)
    assert "the bundle is damaged" in done.stderr
    (script.parent / name).unlink()
    assert run(script).returncode == 3


def test_a_build_that_fails_leaves_the_older_engine(tmp_path: Path) -> None:
    script = write(tmp_path / "bundle", options(), ())
    fake(tmp_path, status=1)
    (script.parent / "device.engine").write_text("older")
    done = run(script)
    assert done.returncode == 4
    assert "could not build the engine" in done.stderr
    names = {path.name for path in script.parent.iterdir()}
    assert names == {"build.sh", "device.engine", "model.onnx", "model.onnx.data"}
    assert (script.parent / "device.engine").read_text() == "older"


def test_output_and_further_words(tmp_path: Path) -> None:
    script = write(tmp_path / "bundle", options("x"), ("x",))
    said = fake(tmp_path)
    assert run(script, "my engine", "--verbose", "a b").returncode == 0
    assert heard(said)[4:] == [
        *("--minShapes=x:1x8", "--optShapes=x:2x8", "--maxShapes=x:4x8"),
        *("--stronglyTyped", "--verbose", "a b"),
    ]
    assert (tmp_path / "my engine").read_text() == "engine"
    assert run(script, "--verbose").returncode == 2
    assert run(script, "bundle").returncode == 2


def test_no_trtexec_is_one_sentence(tmp_path: Path) -> None:
    script = write(tmp_path / "bundle", options(), ())
    done = run(script)
    assert done.returncode == 2
    assert done.stderr == "build.sh: trtexec is not found: set TRTEXEC to its path\n"


@pytest.mark.parametrize(
    ("chosen", "names", "reason"),
    [
        (EngineOptions(), (), "trtexec builds for TensorRT alone"),
        (options("a,b"), ("a,b",), "trtexec cannot be told of the input 'a,b'"),
        (options("it's"), ("it's",), "trtexec cannot be told of the input"),
        (options(flags=("DEBUG",)), (), "no switch of trtexec is known for the flag DEBUG"),
        (options(pools={"DLA_SRAM": 1}), (), "for the memory pool DLA_SRAM"),
        (options(hardware_compatibility="X"), (), "for the hardware compatibility X"),
    ],
)
def test_what_it_cannot_be_told(chosen: EngineOptions, names: tuple[str, ...], reason: str) -> None:
    assert reason in (why_no_script(chosen, names) or "")
    assert why_no_script(options("a:b"), ("a:b",)) is None
