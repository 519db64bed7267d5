"""Which of the candidates that were made is kept, and which are worth a look."""

import shutil
from collections.abc import Sequence
from dataclasses import replace

from qcompiler.report.search_points import SearchPoint
from qcompiler.search.trial import Made


def accuracy_of(point: SearchPoint, figure: str) -> float:
    """Return how accurate a point is, higher is better; no difference has no number."""
    value: float | None = getattr(point, figure)
    if value is None:
        return float("inf")
    return -value if figure == "divergence" else value


def better(best: Made | None, made: Made, figure: str, *, smallest: bool) -> Made | None:
    """Return the better of two, and remove the files of the other."""
    if made.result is None:
        return best
    worse: Made | None = made
    if made.holds and (
        best is None or _rank(made, figure, smallest) < _rank(best, figure, smallest)
    ):
        best, worse = made, best
    if worse is not None and worse.result is not None:
        shutil.rmtree(worse.result.path.parent, ignore_errors=True)
    return best


def _rank(made: Made, figure: str, smallest: bool) -> tuple[float, float]:
    size, accuracy = float(made.point.bytes or 0), accuracy_of(made.point, figure)
    return (size, -accuracy) if smallest else (-accuracy, size)


def marked(points: Sequence[SearchPoint], best: Made | None, figure: str) -> list[SearchPoint]:
    """Say which point was chosen, and which are not dominated by any other."""
    made = [point for point in points if point.bytes is not None]
    vectors = [(float(p.bytes or 0), -accuracy_of(p, figure), p.latency_ratio or 0.0) for p in made]
    efficient = {
        point.name
        for point, vector in zip(made, vectors, strict=True)
        if not any(
            other != vector and all(a <= b for a, b in zip(other, vector, strict=True))
            for other in vectors
        )
    }
    chosen = None if best is None else best.point.name
    return [
        replace(
            point,
            pareto=point.name in efficient,
            outcome="chosen" if point.name == chosen else point.outcome,
        )
        for point in points
    ]
