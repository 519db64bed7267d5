"""What the charts of the report page are drawn from, as plain JSON values."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any, Final

from qcompiler.report.islands import IslandGrid, island_grid
from qcompiler.report.records import NodeReport, Report, WindowReport
from qcompiler.report.search_points import SearchReport

_ACCURACY: Final = {
    "metric": "metric",
    "divergence": "divergence, nats",
    "sqnr_db": "SQNR, dB",
}


@dataclass(frozen=True, slots=True)
class Heat:
    """One cell of a heat map.

    Attributes:
        value: What it stands for, 0 to 1.
        shade: The same relative to the largest, 0 to 1.
    """

    value: float
    shade: float


@dataclass(frozen=True, slots=True)
class HeatRow:
    """One layer of a heat map: its label, and a cell for each column; None where nothing is."""

    label: str
    cells: tuple[Heat | None, ...]


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Where in a model something is: layers down, kinds of projection across."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[HeatRow, ...]


def chart_data(report: Report) -> dict[str, Any]:
    """Return the data of all charts; None in place of those that have none."""
    return {
        "growth": _growth(report.nodes),
        "channels": [asdict(profile) for profile in report.channels],
        "windows": _windows(report.windows),
        "search": _search(report.search),
    }


def _growth(nodes: Sequence[NodeReport]) -> dict[str, Any] | None:
    shown = [node for node in nodes if node.output_sqnr_db is not None or node.sqnr_db is not None]
    if len(shown) < 2:
        return None
    measured = any(node.output_sqnr_db is not None for node in shown)
    caption = (
        "SQNR against the float model on samples, Q/DQ computed in float: of what each op returns, "
        "of what it reads, and of its weight alone. A fall shows where error comes in."
        if measured
        else "SQNR of weights by depth. With samples (--calibration) the error of results is "
        "measured as well."
    )
    return {
        "caption": caption,
        "names": [node.name for node in shown],
        "result": [node.output_sqnr_db for node in shown],
        "data": [node.data_sqnr_db for node in shown],
        "weight": [node.sqnr_db for node in shown],
    }


def _windows(windows: Sequence[WindowReport]) -> dict[str, Any] | None:
    if not windows:
        return None
    return {
        "names": [_window_name(window) for window in windows],
        "before": [_number(window.loss_before) for window in windows],
        "after": [_number(window.loss_after) for window in windows],
    }


def _search(search: SearchReport | None) -> dict[str, Any] | None:
    """Return the points of a search that were measured, by size, and the line of the best."""
    made = [p for p in search.points if p.average_bits is not None] if search else []
    if search is None or len(made) < 2:
        return None
    made.sort(key=lambda point: point.average_bits or 0.0)
    accuracy = [_number(getattr(point, search.accuracy)) for point in made]
    lower = search.accuracy == "divergence"
    return {
        "label": _ACCURACY[search.accuracy],
        "names": [f"{point.name} ({point.outcome})" for point in made],
        "bits": [_number(point.average_bits) for point in made],
        "accuracy": accuracy,
        "logarithmic": lower,
        "front": _front(accuracy, -1 if lower else 1),
        "chosen": [
            value if point.outcome == "chosen" else None
            for point, value in zip(made, accuracy, strict=True)
        ],
        "latency": [_number(point.latency_ratio) for point in made],
    }


def _front(accuracy: Sequence[float | None], sign: int) -> list[float | None]:
    """Return what no smaller point is as accurate as, None elsewhere; points come by size."""
    found: list[float | None] = []
    best = -inf
    for value in accuracy:
        ahead = value is not None and sign * value > best
        found.append(value if ahead else None)
        best = sign * value if value is not None and ahead else best
    return found


def _window_name(window: WindowReport) -> str:
    return window.blocks if window.kept else f"{window.blocks} (not kept)"


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)


def heat_maps(report: Report) -> tuple[HeatMap, ...]:
    """Return where the saliency lies, and where the islands; nothing without islands."""
    if report.islands is None or not report.islands.sites:
        return ()
    grid = island_grid(report.islands)
    saliency = [[None if cell is None else cell.saliency for cell in row] for row in grid.rows]
    parts = [[None if cell is None else cell.island_part for cell in row] for row in grid.rows]
    return (
        _heat_map(grid, f"{report.islands.saliency} saliency, share of all", saliency),
        _heat_map(grid, "share of the weight in islands", parts),
    )


def _heat_map(grid: IslandGrid, title: str, values: Sequence[Sequence[float | None]]) -> HeatMap:
    most = max(value for row in values for value in row if value is not None)
    rows = (
        HeatRow(
            "outside" if layer < 0 else str(layer),
            tuple(value if value is None else Heat(value, value / (most or 1.0)) for value in row),
        )
        for layer, row in zip(grid.layers, values, strict=True)
    )
    return HeatMap(title, grid.projections, tuple(rows))
