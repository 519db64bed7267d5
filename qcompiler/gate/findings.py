"""From figures and bounds to findings: what holds, what does not, and how sure that is."""

from dataclasses import replace

from qcompiler.bounds import Limit
from qcompiler.byte_sizes import parse_size
from qcompiler.calibration.estimates import Estimate
from qcompiler.gate.latency_ratio import Answer
from qcompiler.report.gate_files import number_text
from qcompiler.report.verdict import Finding, Status


def judged(
    bound: str,
    subject: str,
    found: Estimate,
    limit: float,
    unit: str,
    *,
    at_least: bool,
    note: str = "",
    word: str = "asked",
) -> Finding:
    """Hold an estimate against its limit.

    The figure itself decides; where chance could turn that, the sentence says so, and which
    difference so many samples can show.
    """
    passed = found.value >= limit if at_least else found.value <= limit
    certain = None
    if found.low is not None and found.high is not None:
        certain = found.low >= limit if at_least else found.high <= limit
        certain = certain or (found.high < limit if at_least else found.low > limit)
    sentence = f"{_measured(found, unit)}; {'at least' if at_least else 'at most'} "
    sentence += f"{number_text(limit, unit)} {word}{note}"
    if certain is False:
        sentence += _doubt(found, unit)
    status = Status.PASSED if passed else Status.FAILED
    return Finding(
        bound,
        subject,
        status,
        found.value,
        limit,
        unit,
        found.low,
        found.high,
        found.samples,
        certain,
        sentence,
    )


def worse(bound: str, subject: str, found: Estimate, limit: float, unit: str) -> Finding:
    """Judge by how much a model is worse than another, measured on the same samples.

    Two equally good models differ by chance, so it fails only where the difference is above the
    limit and surely one: where the interval leaves out zero.
    """
    result = judged(bound, subject, found, limit, unit, at_least=False, word="of loss allowed")
    if result.status is Status.FAILED and found.low is not None and found.low <= 0:
        sentence = f"{result.sentence}; no failure, since chance alone does that"
        return replace(result, status=Status.PASSED, certain=False, sentence=sentence)
    return result


def skipped(bound: str, subject: str, reason: str) -> Finding:
    """Return a bound that could not be judged."""
    return Finding(bound, subject, Status.SKIPPED, None, None, "", None, None, 0, None, reason)


def latency_finding(
    bound: str, answer: Answer, limit: float, reference: str, inputs: str
) -> Finding:
    """Hold a ratio of latencies against its limit; `inputs` says what it was measured on."""
    timing = answer.timing
    sentence = (
        f"{timing.ratio:.3f} of the time of {reference} ({timing.low:.3f} to {timing.high:.3f} in "
        f"19 of 20 cases), {timing.milliseconds:.3g} ms, {answer.rounds} rounds on {inputs}; "
        f"at most {limit:.3g} asked"
    )
    if answer.attempts > 1:
        sentence += f"; measured {answer.attempts} times"
    if not answer.settled:
        sentence += ", and noise could still turn the verdict: measure on an idle machine"
    return Finding(
        bound,
        "",
        Status.PASSED if answer.passed else Status.FAILED,
        timing.ratio,
        limit,
        "times",
        timing.low,
        timing.high,
        answer.rounds,
        answer.settled,
        sentence,
    )


def size_limit(limit: Limit, base: float | None) -> float:
    """Return a limit of bytes: a size, or a share of the float model's."""
    if isinstance(limit, str):
        return float(parse_size(limit))
    return limit * (base or 0.0)


def exact(value: float) -> Estimate:
    """Return what is measured without samples."""
    return Estimate(value)


def _measured(found: Estimate, unit: str) -> str:
    text = number_text(found.value, unit)
    if found.low is None or found.high is None:
        return f"{text} (one sample, so no interval)" if found.samples == 1 else text
    return (
        f"{text} ({number_text(found.low, unit)} to {number_text(found.high, unit)} in 19 of 20 "
        f"cases, {found.samples} samples)"
    )


def _doubt(found: Estimate, unit: str) -> str:
    text = "; chance could turn that"
    if found.visible is not None:
        percent = unit == "share"
        seen = f"{100 * found.visible:.2g} points" if percent else number_text(found.visible, unit)
        text += f": {found.samples} samples show differences of {seen} and more"
    return text
