"""What a report says of a search, for people."""

from collections.abc import Iterator

from qcompiler.report.records import SearchPoint, SearchReport


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
