"""Finding a target by name."""

import pytest

from qcompiler.errors import UsageError
from qcompiler.targets.registry import TARGETS, find_target


def test_every_target_is_found_by_its_name() -> None:
    assert all(find_target(name) is target for name, target in TARGETS.items())
    assert "onnxruntime" in TARGETS


def test_an_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(UsageError, match="no target 'onxruntime'") as caught:
        find_target("onxruntime")
    assert "onnxruntime" in str(caught.value)
    with pytest.raises(UsageError, match=r"known: .*onnxruntime"):
        find_target("zzz")
