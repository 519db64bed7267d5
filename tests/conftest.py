"""Options of the test run."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker has one core for itself. PyTorch reads this when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

GOLDEN = Path(__file__).parent / "golden"
DIGITS = Path(__file__).parent.parent / "examples" / "digits"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switch that rewrites golden files."""
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files")


@pytest.fixture
def digits() -> Path:
    """The example model that ships with the repository."""
    return DIGITS / "digits.onnx"


class Golden:
    """Compares text with a file under tests/golden, or rewrites the file."""

    def __init__(self, update: bool) -> None:
        self._update = update

    def check(self, name: str, text: str) -> None:
        """Fail if `text` differs from the file, unless files are being rewritten."""
        path = GOLDEN / name
        if self._update:
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no golden file {name}: run pytest --update-golden"
        assert text == path.read_text(encoding="utf-8")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """The golden files."""
    return Golden(request.config.getoption("--update-golden"))
