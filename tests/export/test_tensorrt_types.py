"""The process that builds engines uses TensorRT's API as its stubs describe it."""

import subprocess
import sys
from pathlib import Path

import pytest

from qcompiler.export import tensorrt_worker
from tests.support.tensorrt_stubs import write_stubs

ADAPTER = "from tensorrt_worker import Library\nimport tensorrt\nlibrary: Library = tensorrt\n"
"""The module is what the process takes it for."""


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stubs")
    write_stubs(folder)
    return folder


def complaints(worker: str, stubs: Path, folder: Path) -> list[str]:
    """Return what mypy says of the source of the process, and of the adapter."""
    (folder / "tensorrt_worker.py").write_text(worker, encoding="utf-8")
    (folder / "adapter.py").write_text(ADAPTER, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary"]
    command += ["--cache-dir", str(stubs / "cache"), "tensorrt_worker.py", "adapter.py"]
    done = subprocess.run(
        command, cwd=folder, env={"MYPYPATH": str(stubs)}, capture_output=True, text=True
    )
    own = ("tensorrt_worker.py", "adapter.py")
    # The stubs are not free of faults themselves.
    found = [line for line in done.stdout.splitlines() if line.startswith(own)]
    assert "errors prevented further checking" not in done.stdout, done.stdout
    assert not done.stderr
    return found


SOURCE = Path(tensorrt_worker.__file__).read_text(encoding="utf-8")


def test_the_process_type_checks_against_tensorrt(stubs: Path, tmp_path: Path) -> None:
    assert complaints(SOURCE, stubs, tmp_path) == []


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("builder.build_serialized_network(", "builder.build_network(", "has no attribute"),
        ("config.progress_monitor", "config.monitor", "has no attribute"),
        ("    BuilderFlag:", "    BuilderFlags:", "incompatible"),
        ("error.node_operator()", "error.node_type()", "has no attribute"),
    ],
)
def test_an_attribute_that_does_not_exist_is_found(
    right: str, wrong: str, complaint: str, stubs: Path, tmp_path: Path
) -> None:
    assert right in SOURCE
    found = complaints(SOURCE.replace(right, wrong), stubs, tmp_path)
    assert any(complaint in line.lower() for line in found), found
