"""The tables of `static_int8.json`, and whether our arms reach what was set as their bar."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.int8_arms import NOT_INSTALLED
from benchmarks.markdown_table import MISSING, made_with, measured_with, table

_MIB = 1 << 20
_SCORES = {
    "top1": "top-1 %",
    "zero_shot": "zero-shot %",
    "nearest_neighbour": "1-NN %",
    "perplexity": "perplexity",
    "agreement": "agreement %",
    "mean_abs": "mean difference",
}
_FLOAT_OPS = (
    *("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"),
    *("Attention", "MultiHeadAttention", "LSTM", "GRU"),
)
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_YARDSTICK = "ort-static"

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bar:
    """What a model has to reach natively, all at once.

    Attributes:
        scores: Least scores in percent, by name.
        sqnr_db: Least SQNR of the output in dB.
        latency: Most latency relative to float, in every case that was timed.
        file: Most size relative to the float file.
    """

    scores: Mapping[str, float]
    sqnr_db: float
    latency: float
    file: float


BARS = {
    "cifar_cnn": Bar({"top1": 80.1}, 28.0, 0.86, 0.3),
    "minilm": Bar({"zero_shot": 74.5, "nearest_neighbour": 88.0}, 20.0, 0.75, 0.26),
}


def row_text(models: Record, model: str, arm: str) -> str:
    """Return one line for an arm that was just measured."""
    cells = _cells(models[model]["arms"][arm])
    fields = "  ".join(f"{name} {value}" for name, value in cells.items() if value != MISSING)
    return f"{model:24} {arm:34} {fields}"


def markdown(content: Record, order: Sequence[str], ours: Sequence[str]) -> str:
    """Return the tables of all models, with what they were measured on.

    Args:
        content: What is in the JSON file.
        order: Arms in the order of their rows.
        ours: Arms that are held to the bar.
    """
    parts = ["# Calibrated int8 next to other quantizers", "", *_preamble(content)]
    for name, record in content["models"].items():
        arms = [arm for arm in order if arm in record["arms"]]
        rows = {arm: _cells(record["arms"][arm]) for arm in arms}
        parts += ["", f"## {name}", "", *_model_lines(record), "", *table(rows)]
        parts += _bar_lines(name, record, [arm for arm in arms if arm in ours])
    return "\n".join(parts) + "\n"


def misses(model: str, record: Record, arm: str) -> list[str]:
    """Return what keeps an arm from the bar of its model; what was not measured counts."""
    bar, facts = BARS[model], record["arms"][arm]
    if "failure" in facts:
        return [facts["failure"]]
    found = [*_quality_misses(bar, facts), *_latency_misses(bar, facts)]
    size = facts["file_bytes"] / record["float"]["file_bytes"]
    if size > bar.file:
        found.append(f"file {size:.2f} of float, more than {bar.file}")
    return [*found, *_cost_misses(record, facts)]


def _quality_misses(bar: Bar, facts: Record) -> list[str]:
    quality = facts.get("quality")
    if quality is None:
        return ["quality not measured"]
    scores = quality["native"]
    found = [
        f"{_SCORES[name]} {scores[name]:.2f} under {least}"
        for name, least in bar.scores.items()
        if scores[name] < least
    ]
    if scores["output_sqnr_db"] < bar.sqnr_db:
        found.append(f"SQNR {scores['output_sqnr_db']:.1f} under {bar.sqnr_db:.0f} dB")
    return found


def _latency_misses(bar: Bar, facts: Record) -> list[str]:
    if "latency" not in facts:
        return ["latency not measured"]
    return [
        f"latency of {case} {times['ratio']:.2f}, more than {bar.latency}"
        for case, times in facts["latency"].items()
        if times["ratio"] > bar.latency
    ]


def _cost_misses(record: Record, facts: Record) -> list[str]:
    """Compare seconds and memory with the least that ONNX Runtime's static quantizer took."""
    costs = [
        other["compile"]
        for name, other in record["arms"].items()
        if name.startswith(_YARDSTICK) and "failure" not in other
    ]
    if not costs:
        return [f"{_YARDSTICK} not measured"]
    found = []
    for field, unit, divisor in (("seconds", "s", 1), ("peak_bytes", "MiB", _MIB)):
        least, took = (min(c[field] for c in costs) / divisor, facts["compile"][field] / divisor)
        if took > least:
            found.append(f"{took:.4g} {unit} to compile, {_YARDSTICK} {least:.4g}")
    return found


def _bar_lines(model: str, record: Record, ours: Sequence[str]) -> list[str]:
    if model not in BARS or not ours:
        return []
    bar = BARS[model]
    scores = ", ".join(f"{_SCORES[name]} {least}" for name, least in bar.scores.items())
    lines = [
        "",
        f"The bar, natively and at once: {scores}, {bar.sqnr_db:.0f} dB, latency {bar.latency}, "
        f"file {bar.file} of float, less time and memory than any `{_YARDSTICK}`.",
    ]
    for arm in ours:
        found = misses(model, record, arm)
        lines.append(f"- `{arm}` {'misses: ' + '; '.join(found) if found else 'reaches it'}.")
    return [lines[0], lines[1], "", *lines[2:]]


def _preamble(content: Record) -> list[str]:
    return [
        *measured_with(content),
        "",
        "All arms calibrate with the same samples (ONNX Runtime's histograms want one shape: they "
        "get MiniLM's padded with zeros to the longest). Scores and SQNR of the output are "
        "*native*: with all optimizations, so that integer kernels run as they do for users. "
        '"Emulated" are the same without optimizations, Q/DQ nodes run as written: the '
        "quantizer's own quality. (Ops that are integer in the file, such as MatMulInteger, "
        "saturate either way.) Latency is the median ratio to the float model in alternation. "
        "Seconds and peak memory are those of the process that makes the model, imports and "
        "calibration included. The last column counts what runs after optimization: products and "
        "lookups in integers, those left in float, and conversions between the two.",
        "",
        *made_with(content, _family),
    ]


def _family(arm: str) -> str:
    return arm.replace("/", ":").partition(":")[0]


def _model_lines(record: Record) -> list[str]:
    before = record["float"]
    quality = before.get("quality", {})
    scores = [
        f"{_SCORES[name]} {value:.4g}"
        for name, value in quality.get("float", {}).items()
        if name in _SCORES
    ]
    size = f"file {before['file_bytes'] / _MIB:.1f} MiB"
    return [
        f"Float: {', '.join([size, *scores])}. "
        f"Calibrated with {before['calls']} calls: {before['samples']}. SQNR on "
        f"{before['feeds']}."
    ]


def _cells(facts: Record) -> dict[str, str]:
    """Return the columns of an arm, in order."""
    cells = {}
    if "file_bytes" in facts:
        cells["file MiB"] = f"{facts['file_bytes'] / _MIB:.1f}"
    cells |= _quality_cells(facts.get("quality", {}))
    for case, times in facts.get("latency", {}).items():
        cells[case] = f"{times['ratio']:.2f}"
    failure = facts.get("failure")
    if failure is None or not failure.startswith(NOT_INSTALLED):
        cells["seconds"] = f"{facts['compile']['seconds']:.1f}"
        cells["peak MiB"] = f"{facts['compile']['peak_bytes'] / _MIB:.0f}"
    cells["runs"] = failure.replace("|", "/") if failure else _executed(facts["executed"])
    return cells


def _quality_cells(quality: Record) -> dict[str, str]:
    if not quality:
        return {}
    native, emulated = quality["native"], quality["emulated"]
    names = [name for name in _SCORES if name in native]
    cells = {_SCORES[name]: f"{native[name]:.4g}" for name in names}
    cells["SQNR dB"] = f"{native['output_sqnr_db']:.1f}"
    scores = " / ".join(f"{emulated[name]:.4g}" for name in names)
    cells["emulated"] = f"{scores} ({emulated['output_sqnr_db']:.1f} dB)"
    if quality["items"] != quality.get("full", quality["items"]):
        cells["of"] = f"{quality['items']} items"
    return cells


def _executed(ops: Mapping[str, int]) -> str:
    integer = {op: count for op, count in ops.items() if _is_integer(op)}
    floats = {op: count for op, count in ops.items() if op in _FLOAT_OPS}
    conversions = sum(ops.get(op, 0) for op in _CONVERSIONS)
    parts = [f"{count} {op}" for op, count in integer.items()] or ["nothing in integers"]
    parts += [f"{count} float {op}" for op, count in floats.items()]
    return ", ".join(parts + [f"{conversions} conversions"] * bool(conversions))


def _is_integer(op: str) -> bool:
    if op in _CONVERSIONS:
        return False
    known = ("QLinear", "QGemm", "QAttention", "DynamicQuantize", "MatMulNBits")
    return op.startswith(known) or "Integer" in op or op == "GatherBlockQuantized"
