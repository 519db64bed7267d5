"""Malformed inputs through the command line: one clear error, no traceback, no output."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcompiler.cli.main import main
from tests.support.malformed import MALFORMED, MalformedCase


@pytest.fixture(autouse=True)
def _restored_signal() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.name)
def test_a_malformed_input_is_refused(
    case: MalformedCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    model = case.write(tmp_path / "in")
    with pytest.raises(SystemExit) as stop:
        main([str(model), "-o", str(tmp_path / "out" / "out.onnx")])
    text = capsys.readouterr()
    assert stop.value.code == case.expected_exit, text.err
    assert text.err.count("error: ") == 1, text.err
    assert "internal error" not in text.err
    assert "Traceback" not in text.err + text.out
    assert case.expected_text in text.err
    assert list((tmp_path / "out").iterdir()) == []


def test_there_are_at_least_thirty_cases() -> None:
    assert len({case.name for case in MALFORMED}) >= 30
