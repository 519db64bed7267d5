"""What builds and runs engines uses TensorRT's API as its stubs describe it."""

import subprocess
import sys
from pathlib import Path

import pytest

from qcompiler.export import engine_session, tensorrt_worker
from tests.support.tensorrt_stubs import write_stubs

ADAPTER = "from user import Library\nimport tensorrt\nlibrary: Library = tensorrt\n"
"""The module is what its user takes it for."""


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stubs")
    write_stubs(folder)
    return folder


def complaints(user: str, stubs: Path, folder: Path) -> list[str]:
    """Return what mypy says of the source of a user, and of the adapter.

    Nothing but TensorRT's API is known to it.
    """
    (folder / "user.py").write_text(user, encoding="utf-8")
    (folder / "adapter.py").write_text(ADAPTER, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary"]
    command += ["--no-site-packages", "--ignore-missing-imports", "--no-warn-return-any"]
    command += ["--cache-dir", str(stubs / "cache"), "user.py", "adapter.py"]
    done = subprocess.run(
        command, cwd=folder, env={"MYPYPATH": str(stubs)}, capture_output=True, text=True
    )
    own = ("user.py", "adapter.py")
    # The stubs are not free of faults themselves.
    found = [line for line in done.stdout.splitlines() if line.startswith(own)]
    assert "errors prevented further checking" not in done.stdout, done.stdout
    assert not done.stderr
    return found


BUILDS, RUNS = (
    Path(str(module.__file__)).read_text(encoding="utf-8")
    for module in (tensorrt_worker, engine_session)
)


@pytest.mark.parametrize("source", [BUILDS, RUNS], ids=["builds", "runs"])
def test_it_type_checks_against_tensorrt(source: str, stubs: Path, tmp_path: Path) -> None:
    assert complaints(source, stubs, tmp_path) == []


@pytest.mark.parametrize(
    ("source", "right", "wrong", "complaint"),
    [
        (BUILDS, "builder.build_serialized_network(", "builder.build_network(", "has no attribute"),
        (BUILDS, "config.progress_monitor", "config.monitor", "has no attribute"),
        (BUILDS, "    BuilderFlag:", "    BuilderFlags:", "incompatible"),
        (BUILDS, "error.node_operator()", "error.node_type()", "has no attribute"),
        (RUNS, "execute_async_v3(", "execute_async_v4(", "has no attribute"),
        (RUNS, "engine.num_io_tensors", "engine.num_tensors", "has no attribute"),
        (RUNS, "    TensorIOMode:", "    TensorMode:", "incompatible"),
    ],
)
def test_an_attribute_that_does_not_exist_is_found(
    source: str, right: str, wrong: str, complaint: str, stubs: Path, tmp_path: Path
) -> None:
    assert right in source
    found = complaints(source.replace(right, wrong), stubs, tmp_path)
    assert any(complaint in line.lower() for line in found), found
