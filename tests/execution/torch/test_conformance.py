"""The ONNX standard's own node tests."""

from collections import Counter
from pathlib import Path

import pytest

from tests.support.conformance import Verdict, as_markdown, outcomes

_PAGE = Path(__file__).parents[3] / "docs" / "onnx-conformance.md"
_MARK = "<!-- written by pytest --update-golden -->\n"


@pytest.mark.filterwarnings("ignore")
def test_conformance(request: pytest.FixtureRequest) -> None:
    found = list(outcomes())
    counts = Counter(outcome.verdict for outcome in found)
    wrong = [str(each) for each in found if each.verdict is Verdict.WRONG]
    assert not wrong
    in_scope = len(found) - counts[Verdict.OUT_OF_SCOPE]
    assert counts[Verdict.PASSED] >= 0.97 * in_scope
    head, _, _ = _PAGE.read_text(encoding="utf-8").partition(_MARK)
    text = f"{head}{_MARK}{as_markdown(found)}"
    if request.config.getoption("--update-golden"):
        _PAGE.write_text(text, encoding="utf-8")
    assert text == _PAGE.read_text(encoding="utf-8")
