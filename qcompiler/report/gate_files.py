"""A verdict in the forms that pipelines read: JUnit XML, Markdown, GitHub annotations."""

import re
from collections.abc import Iterator
from typing import Final
from xml.etree import ElementTree as Xml

from qcompiler.errors import printable
from qcompiler.report.verdict import Finding, Status, Suspect, Verdict

_NOT_IN_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MARKS: Final = {Status.PASSED: "pass", Status.FAILED: "**FAIL**", Status.SKIPPED: "skipped"}


def junit_xml(verdict: Verdict) -> str:
    """Return the verdict as JUnit XML: a test case for each bound."""
    counts = {
        "tests": len(verdict.findings),
        "failures": len(verdict.failed),
        "skipped": sum(1 for f in verdict.findings if f.status is Status.SKIPPED),
        "errors": 0,
    }
    attributes = {"name": "qcompile gate", **{k: str(n) for k, n in counts.items()}}
    suites = Xml.Element("testsuites", attributes)
    suite = Xml.SubElement(
        suites, "testsuite", {**attributes, "name": _xml(verdict.candidate.name)}
    )
    for finding in verdict.findings:
        case = Xml.SubElement(
            suite,
            "testcase",
            {"classname": "qcompile.gate", "name": _xml(finding.title), "time": "0"},
        )
        if finding.status is Status.FAILED:
            failure = Xml.SubElement(case, "failure", {"message": _xml(finding.sentence)})
            failure.text = _xml("\n".join(suspect_lines(verdict)))
        elif finding.status is Status.SKIPPED:
            Xml.SubElement(case, "skipped", {"message": _xml(finding.sentence)})
        else:
            Xml.SubElement(case, "system-out").text = _xml(finding.sentence)
    Xml.indent(suites)
    text: str = Xml.tostring(suites, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def markdown(verdict: Verdict) -> str:
    """Return the verdict as a Markdown summary."""
    outcome = "passed" if verdict.passed else "failed"
    lines = [
        f"### qcompile gate: {_md(verdict.candidate.name)} {outcome}",
        "",
        f"Against {_md(verdict.base.name)}, on {_md(verdict.data)}.",
        "",
        "| | bound | |",
        "|---|---|---|",
    ]
    lines += [_row(finding) for finding in verdict.findings]
    if verdict.suspects:
        lines += ["", "Suspects, the likeliest first:", ""]
        lines += [
            f"{number}. {_md(text)}" for number, text in enumerate(suspect_lines(verdict), start=1)
        ]
    for warning in verdict.warnings:
        lines += ["", f"> {_md(warning)}"]
    return "\n".join(lines) + "\n"


def annotations(verdict: Verdict) -> Iterator[str]:
    """Yield GitHub workflow commands: an error for each bound that failed, and the suspects."""
    for finding in verdict.failed:
        yield f"::error title={_property(f'qcompile {finding.title}')}::{_data(finding.sentence)}"
    for number, suspect in enumerate(verdict.suspects, start=1):
        title = f"qcompile suspect {number}: {suspect.kind} {suspect.name}"
        yield f"::warning title={_property(title)}::{_data(suspect.sentence)}"
    for warning in verdict.warnings:
        yield f"::notice title=qcompile gate::{_data(warning)}"


def terminal_lines(verdict: Verdict) -> Iterator[str]:
    """Yield the lines that a terminal shows."""
    wide = max((len(f.title) for f in verdict.findings), default=0)
    for finding in verdict.findings:
        yield _line(f"{finding.status.value.upper():7}  {finding.title:{wide}}  {finding.sentence}")
    if verdict.suspects:
        yield "suspects, the likeliest first:"
        for number, line in enumerate(suspect_lines(verdict), start=1):
            yield _line(f"  {number}. {line}")
    for warning in verdict.warnings:
        yield _line(f"warning: {warning}")
    outcome = "passed" if verdict.passed else "FAILED"
    failed = f", {len(verdict.failed)} failed" if verdict.failed else ""
    yield _line(
        f"gate {outcome}: {verdict.candidate.name} against {verdict.base.name} on "
        f"{verdict.data}; {len(verdict.findings)} bounds{failed}"
    )


def suspect_lines(verdict: Verdict) -> list[str]:
    """Return a line for each suspect."""
    return [_suspect(suspect) for suspect in verdict.suspects]


def _suspect(suspect: Suspect) -> str:
    part = "" if suspect.share is None else f" ({suspect.share:.0%} of the error)"
    return f"{suspect.kind} {suspect.name}{part}: {suspect.sentence}"


def _row(finding: Finding) -> str:
    return f"| {_MARKS[finding.status]} | {_md(finding.title)} | {_md(finding.sentence)} |"


def number_text(value: float | None, unit: str) -> str:
    """Return a number with its unit as people write it."""
    if value is None:
        return "-"
    if unit == "bytes":
        return f"{value / 1024**2:.2f} MiB" if value >= 1 << 20 else f"{value / 1024:.1f} KiB"
    if unit == "share":
        return f"{value:.2%}"
    shown = f"{value:.1f}" if unit == "dB" else f"{value:.4g}"
    return f"{shown} {unit}".strip()


def _line(text: str) -> str:
    """Return text on one line: what is printed at its start can be a command to a CI system."""
    return printable(text.replace("\n", " "))


def _xml(text: str) -> str:
    return _NOT_IN_XML.sub("?", text)


def _md(text: str) -> str:
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", printable(text).replace("\n", " "))


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
