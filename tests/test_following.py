"""What several processes are refused for, and how they learn that there is nothing to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from qcompiler.cli import processes
from qcompiler.cli.main import main
from qcompiler.errors import UsageError
from qcompiler.following import leading, require_shareable
from qcompiler.options import CompileOptions, Reconstruction
from qcompiler.plan import make_plan
from qcompiler.quant.reconstruction import BlockReconstruction
from qcompiler.team import Alone, Team

DIGITS = Path(__file__).parents[1] / "examples" / "digits" / "digits.onnx"


class Heard(Alone):
    """A team of two that remembers what it was told."""

    size = 2

    def __init__(self) -> None:
        self.said: list[str] = []

    def leave(self) -> None:
        """Remember it."""
        self.said.append("leave")

    def dismiss(self) -> None:
        """Remember it."""
        self.said.append("dismiss")


LEARNING = CompileOptions(
    scheme="w2a16:b32",
    calibration="calls",
    reconstruct=Reconstruction.CBQ,
    blocks=BlockReconstruction(batch=2),
)


@pytest.mark.parametrize(
    ("options", "reason", "hint"),
    [
        (
            replace(LEARNING, reconstruct=Reconstruction.GPTQ),
            "2 processes were started, and only learning over windows is shared",
            "--reconstruct cbq",
        ),
        (
            replace(LEARNING, blocks=BlockReconstruction()),
            "2 processes cannot share steps of 1 calls",
            "--calls-per-step 2",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(options: CompileOptions, reason: str, hint: str) -> None:
    with pytest.raises(UsageError, match=reason) as refusal:
        require_shareable(make_plan(options), Heard())
    assert hint in (refusal.value.hint or "")
    require_shareable(make_plan(options), Alone())


def test_what_can_be_shared_is_not_refused() -> None:
    require_shareable(make_plan(LEARNING), Heard())


def test_others_are_let_go_where_the_first_one_fails() -> None:
    for error in (ValueError, KeyboardInterrupt):
        team = Heard()
        with pytest.raises(error), leading(team):
            raise error
        assert team.said == ["leave", "dismiss"]
    team = Heard()
    with leading(team):
        pass
    assert team.said == ["dismiss"]


def test_a_bundle_is_made_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def two(*_: object) -> Iterator[Team]:
        yield Heard()

    monkeypatch.setattr(processes, "leading_team", two)
    with pytest.raises(SystemExit) as stop:
        main([str(DIGITS), "-o", str(tmp_path / "m.qbundle"), "--target", "tensorrt"])
    assert stop.value.code == 2
    assert "a bundle is made by one process" in capsys.readouterr().err
