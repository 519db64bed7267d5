"""What the charts of the report page are drawn from, as plain JSON values."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qcompiler.report.records import NodeReport, Report, WindowReport


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Where in a weight something is.

    Attributes:
        weight: The weight.
        most: The largest share of a cell.
        rows: Shares by row and column of cells, relative to the largest, 0 to 1.
    """

    weight: str
    most: float
    rows: tuple[tuple[float, ...], ...]


def chart_data(report: Report) -> dict[str, Any]:
    """Return the data of all charts; None in place of those that have none."""
    return {
        "growth": _growth(report.nodes),
        "channels": [asdict(profile) for profile in report.channels],
        "windows": _windows(report.windows),
        "pareto": _pareto(report.islands),
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
        "before": [_loss(window.loss_before) for window in windows],
        "after": [_loss(window.loss_after) for window in windows],
    }


def _window_name(window: WindowReport) -> str:
    return window.blocks if window.kept else f"{window.blocks} (not kept)"


def _loss(value: float | None) -> float | None:
    return None if value is None else float(value)


def _pareto(islands: Mapping[str, Any] | None) -> dict[str, Any] | None:
    pareto = (islands or {}).get("pareto")
    if not pareto or not pareto["points"]:
        return None
    points = sorted(pareto["points"], key=lambda point: float(point["bits"]))
    return {
        "metric": str(pareto["metric"]),
        "bits": [float(point["bits"]) for point in points],
        "values": [float(point["value"]) for point in points],
        "labels": [str(point["label"]) for point in points],
    }


def heat_maps(report: Report) -> tuple[HeatMap, ...]:
    """Return the heat maps of 16-bit islands, one a weight."""
    return tuple(_heat_map(entry) for entry in (report.islands or {}).get("weights", ()))


def _heat_map(entry: Mapping[str, Any]) -> HeatMap:
    rows = [[float(share) for share in row] for row in entry["shares"]]
    most = max((share for row in rows for share in row), default=0.0)
    scaled = tuple(tuple(share / most if most else 0.0 for share in row) for row in rows)
    return HeatMap(str(entry["name"]), most, scaled)
