"""What a gate found, and its JSON form."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import Any, Final

from qcompiler.errors import ParityError, UsageError
from qcompiler.report.records import FileFacts

SCHEMA: Final = "qcompiler-gate"
SCHEMA_VERSION: Final = 1


class Status(StrEnum):
    """What became of a bound."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    """It could not be judged; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One bound and what was measured.

    Attributes:
        bound: Its name in a recipe, such as "min_sqnr"; "no worse: sqnr" against a release.
        subject: The output it speaks of, or "" for the model.
        status: What became of it.
        measured: The figure; None where none was measured.
        limit: What it may be.
        unit: Unit of both, for people.
        low: Lower end of the interval that holds the true figure in 19 of 20 cases, or None.
        high: Its upper end.
        samples: Samples or rounds of runs it was measured on; 0 where it is exact.
        certain: Whether the interval lies on one side of the limit; None where there is none.
        sentence: What follows, for people.
    """

    bound: str
    subject: str
    status: Status
    measured: float | None
    limit: float | None
    unit: str
    low: float | None
    high: float | None
    samples: int
    certain: bool | None
    sentence: str

    @property
    def title(self) -> str:
        """The bound and its subject, as one name."""
        return f"{self.bound} of {self.subject}" if self.subject else self.bound


@dataclass(frozen=True, slots=True)
class Suspect:
    """What may have made a model fail, the likeliest first.

    Attributes:
        kind: "file", "data", "scheme" or "node".
        name: The node, scheme or input.
        share: Share of the error that it explains, 0 to 1; None where that has no number.
        sentence: Why it is suspected.
    """

    kind: str
    name: str
    share: float | None
    sentence: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a gate found.

    Attributes:
        base: The float model.
        candidate: The model that was judged.
        data: Where the samples come from.
        data_sha256: Hash over them.
        samples: How many there were.
        findings: Every bound.
        suspects: What may have made it fail; empty where it passed.
        measured: All figures by name, for later gates to compare with; infinite ones are None.
        warnings: What makes the verdict doubtful.
    """

    base: FileFacts
    candidate: FileFacts
    data: str
    data_sha256: str
    samples: int
    findings: tuple[Finding, ...]
    suspects: tuple[Suspect, ...] = ()
    measured: dict[str, float | None] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no bound failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The bounds that failed."""
        return tuple(f for f in self.findings if f.status is Status.FAILED)


def lasting_figures(verdict: Verdict) -> dict[str, object]:
    """Return what a manifest keeps of a verdict: nothing that differs between two equal runs."""
    kept = {k: v for k, v in verdict.measured.items() if k not in ("latency", "memory")}
    return {"data_sha256": verdict.data_sha256, "measured": kept}


class GateFailedError(ParityError):
    """A bound does not hold.

    Attributes:
        verdict: What the gate found.
    """

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        first = verdict.failed[0]
        more = len(verdict.failed) - 1
        others = f", and {more} more of {len(verdict.findings)} bounds" if more else ""
        suspect = f"first suspect: {verdict.suspects[0].kind} {verdict.suspects[0].name}; "
        super().__init__(
            f"the gate failed: {first.title}: {first.sentence}{others}",
            where=verdict.candidate.name,
            hint=f"{suspect if verdict.suspects else ''}nothing was written",
        )


def verdict_json(verdict: Verdict) -> str:
    """Return a verdict as JSON; numbers that are not finite become null."""
    content = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "passed": verdict.passed,
        **_plain(asdict(verdict)),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True, slots=True)
class Recorded:
    """What an earlier gate measured.

    Attributes:
        name: The model's file.
        base_sha256: Hash of the float model.
        data_sha256: Hash over the samples.
        measured: Figures by name; None is infinite.
    """

    name: str
    base_sha256: str
    data_sha256: str
    measured: dict[str, float | None]


def recorded(content: Mapping[str, Any], path: Path) -> Recorded:
    """Read what a gate measured back from its JSON.

    Raises:
        UsageError: It is of a schema version this compiler does not know, or damaged.
    """
    try:
        if content["schema_version"] != SCHEMA_VERSION:
            message = f"is not a {SCHEMA} of version {SCHEMA_VERSION}"
            raise UsageError(message, where=str(path))
        measured = {
            str(name): None if value is None else float(value)
            for name, value in content["measured"].items()
        }
        return Recorded(
            str(content["candidate"]["name"]),
            str(content["base"]["sha256"]),
            str(content["data_sha256"]),
            measured,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"cannot be read as the result of a gate: {error}"
        raise UsageError(message, where=str(path)) from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    return value
