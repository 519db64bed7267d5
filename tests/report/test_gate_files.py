import json
from xml.etree import ElementTree as Xml

from qcompiler.report.gate_files import annotations, junit_xml, markdown, terminal_lines
from qcompiler.report.records import FileFacts
from qcompiler.report.verdict import (
    Finding,
    GateFailedError,
    Status,
    Suspect,
    Verdict,
    verdict_json,
)

FACTS = FileFacts("a<b>.onnx", 10, "0" * 64, 21)


def _finding(status: Status, subject: str = "y|z") -> Finding:
    return Finding(
        "min_sqnr", subject, status, float("-inf"), 20.0, "dB", None, None, 3, None, "50%\nlost\x01"
    )


VERDICT = Verdict(
    FACTS,
    FACTS,
    "3 calls",
    "1" * 64,
    3,
    (_finding(Status.FAILED), _finding(Status.PASSED, ""), _finding(Status.SKIPPED, "w")),
    (Suspect("node", "conv:1,a", 0.5, "it is"), Suspect("data", "input x", None, "shifted")),
    {"sqnr y": None},
    ("few samples",),
)


def test_junit() -> None:
    root = Xml.fromstring(junit_xml(VERDICT))
    (suite,) = root
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    assert suite.get("name") == "a<b>.onnx"
    failed, passed, skipped = suite
    failure = failed.find("failure")
    assert failure is not None
    assert failure.text is not None
    assert "node conv:1,a (50% of the error): it is" in failure.text
    assert passed.find("failure") is None
    assert skipped.find("skipped") is not None


def test_markdown_escapes_what_it_is_given() -> None:
    text = markdown(VERDICT)
    assert "### qcompile gate: a\\<b\\>.onnx failed" in text
    assert "| **FAIL** | min\\_sqnr of y\\|z | 50% lost\\\\x01 |" in text
    assert "1. node conv:1,a" in text
    assert "> few samples" in text


def test_annotations_name_bounds_and_suspects() -> None:
    error, first, second, notice = annotations(VERDICT)
    assert error.startswith("::error title=qcompile min_sqnr of y|z::50%25%0Alost")
    assert first == "::warning title=qcompile suspect 1%3A node conv%3A1%2Ca::it is"
    assert "\n" not in error + first + second + notice


def test_json_has_no_infinite_numbers() -> None:
    content = json.loads(verdict_json(VERDICT))
    assert content["passed"] is False
    assert content["findings"][0]["measured"] is None
    assert content["measured"] == {"sqnr y": None}


def test_terminal_and_error() -> None:
    lines = list(terminal_lines(VERDICT))
    assert lines[0].startswith("FAILED   min_sqnr of y|z")
    assert lines[-1].endswith("3 bounds, 1 failed")
    assert not any("\n" in line for line in lines)
    text = str(GateFailedError(VERDICT))
    assert "first suspect: node conv:1,a" in text
