"""What a report says of a search: its records, and the same for people."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SearchPoint:
    """One compilation that a search considered.

    Attributes:
        name: What it gives weights.
        outcome: "chosen", "holds" (all bounds, and is larger), "fails", or "not made".
        reason: What of it does not hold, or why it was not made; empty where all holds.
        average_bits: Bits per weight over all weights, codes at the bits of their scheme; None, as
            all below, where it was not made or could not be measured.
        bytes: Of its files.
        sqnr_db: SQNR of the worst output on calls that chose nothing, Q/DQ computed in float.
        divergence: Mean Kullback-Leibler divergence of rows from the float model's, nats; None
            where no output is a distribution.
        metric: The user's measure.
        latency_ratio: Times the float model's latency, median over pairs of runs.
        latency_low: Lower end of the interval that contains it in 19 of 20 cases.
        latency_high: Its upper end.
        predicted_latency: The same ratio by the table of single ops.
        pareto: Whether no other point is as good in size, accuracy and latency and better in one.
    """

    name: str
    outcome: str
    reason: str = ""
    average_bits: float | None = None
    bytes: int | None = None
    sqnr_db: float | None = None
    divergence: float | None = None
    metric: float | None = None
    latency_ratio: float | None = None
    latency_low: float | None = None
    latency_high: float | None = None
    predicted_latency: float | None = None
    pareto: bool = False


@dataclass(frozen=True, slots=True)
class SearchReport:
    """What a search tried, and what came out.

    Attributes:
        bounds: What must hold, as options.
        aim: Which one is taken of those that hold: the "smallest" where accuracy is bounded, else
            the "most accurate".
        judged_on: The calls that accuracy was measured on.
        accuracy: Which figure of points says how accurate they are: "metric", "divergence" (lower
            is better) or "sqnr_db".
        source_metric: The user's measure of the float model, None without.
        points: What was considered, in the order it was.
    """

    bounds: tuple[str, ...]
    aim: str
    judged_on: str
    accuracy: str
    source_metric: float | None
    points: tuple[SearchPoint, ...]


def point_text(point: SearchPoint) -> str:
    """Return the figures of a point that was made, for people."""
    parts = [f"{point.average_bits:.2f} bits"] if point.average_bits is not None else []
    if point.metric is not None:
        parts.append(f"metric {point.metric:.6g}")
    if point.sqnr_db is not None:
        parts.append(f"{point.sqnr_db:.1f} dB")
    if point.latency_ratio is not None:
        parts.append(f"{point.latency_ratio:.2f} of float's time")
    return ", ".join(parts)


def search_lines(search: SearchReport | None) -> Iterator[str]:
    """Yield what was searched for, and every point on a line of its own."""
    if search is None:
        return
    bounds = ", ".join(search.bounds)
    yield f"searched for the {search.aim} that holds {bounds}, judged on {search.judged_on}"
    for point in search.points:
        mark = {"chosen": "->", "holds": " +"}.get(point.outcome, " -")
        figures = point_text(point)
        why = point.outcome if not point.reason else f"{point.outcome}: {point.reason}"
        yield f"{mark} {point.name}: {figures}{'; ' if figures else ''}{why}"
