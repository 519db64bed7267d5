"""The tables of `float16.json`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.markdown_table import MISSING, made_with, measured_with, table

_MIB = 1 << 20

Record = Mapping[str, Any]


def row_text(models: Record, model: str, arm: str) -> str:
    """Return one line for an arm that was just measured."""
    cells = _cells(models[model]["arms"][arm])
    fields = "  ".join(f"{name} {value}" for name, value in cells.items() if value != MISSING)
    return f"{model:24} {arm:24} {fields}"


def markdown(content: Record, order: Sequence[str]) -> str:
    """Return the tables of all models, with what they were measured on.

    Args:
        content: What is in the JSON file.
        order: Arms in the order of their rows.
    """
    parts = ["# Casts to 16 bits next to ModelOpt's AutoCast", "", *_preamble(content)]
    for name, record in content["models"].items():
        arms = {arm: record["arms"][arm] for arm in order if arm in record["arms"]}
        parts += ["", f"## {name}", "", _model_line(record["float"]), ""]
        parts += table({arm: _cells(facts) for arm, facts in arms.items()})
        parts += _failures(arms)
    return "\n".join(parts) + "\n"


def _preamble(content: Record) -> list[str]:
    return [
        *measured_with(content),
        "",
        "SQNR is that of the worst output against float32, on inputs that no arm has seen. *As "
        "stored*: in float32, every value rounded to the type that it has in the graph, no "
        "optimizations. *As run*: the file in ONNX Runtime on a CPU with all optimizations, which "
        "computes in float32 what it has no float16 kernel for and so hides what overflows. "
        "bfloat16 does not run there. Inf, NaN: numbers of the outputs, and values anywhere in "
        "the graph, as stored, that hold some and in float32 none. Casts: beyond those of the "
        "model. float32 nodes: those that read or make float32, without Casts and constants. "
        "Seconds and peak memory are those of the process that makes the model, imports and "
        "calibration included. Engines are for SM86, by TensorRT-RTX without a GPU: built, not "
        "run.",
        "",
        *made_with(content),
    ]


def _model_line(before: Record) -> str:
    planted = f", {before['planted']} channels planted" if before["planted"] else ""
    return (
        f"float32: file {before['file_bytes'] / _MIB:.1f} MiB, {before['nodes']} nodes, "
        f"{before['casts']} Casts; {before['out_of_float16']} of {before['values']} values exceed "
        f"65504{planted}. Calibrated with {before['calls']} calls, {before['samples']}; "
        f"compared on {before['feeds']}."
    )


def _cells(facts: Record) -> dict[str, str]:
    """Return the columns of an arm, in order."""
    cells = {}
    if "failure" not in facts:
        stored, ran = facts["as_stored"], facts["as_run"]
        engine = facts["engine"]
        cells = {
            "as stored dB": _decibels(stored),
            "as run dB": _decibels(ran),
            "inf, NaN": _spoiled(stored),
            "Casts": str(facts["casts_added"]),
            "float32 nodes": f"{facts['float32_nodes']} of {facts['nodes']}",
            "float32 weights MiB": _mib(facts["float32_weight_bytes"]),
            "file MiB": _mib(facts["file_bytes"]),
            "engine MiB": "none" if "failure" in engine else _mib(engine["bytes"]),
            "built in s": MISSING if "failure" in engine else f"{engine['seconds']:.1f}",
        }
    took = facts["compile"]
    return cells | {
        "seconds": f"{took['seconds']:.1f}",
        "peak MiB": f"{took['peak_bytes'] / _MIB:.0f}",
    }


def _decibels(facts: Record) -> str:
    if not facts:
        return MISSING
    if "failure" in facts:
        return "does not run"
    if facts["output_sqnr_db"] is None:
        return "inf, NaN"
    if math.isinf(facts["output_sqnr_db"]):
        return "equal"
    return f"{facts['output_sqnr_db']:.1f}{'*' * ('failure_with_reuse' in facts)}"


def _spoiled(stored: Record) -> str:
    if "failure" in stored:
        return MISSING
    return f"{stored['not_finite']}, {stored['spoiled_values']} values"


def _mib(count: int) -> str:
    return f"{count / _MIB:.1f}"


def _failures(arms: Mapping[str, Record]) -> list[str]:
    """Return what went wrong, in the words of what complained."""
    lines = []
    for name, facts in arms.items():
        parts = {
            "": facts,
            **{key: facts.get(key, {}) for key in ("as_stored", "as_run", "engine")},
        }
        for part, found in parts.items():
            where = f"`{name}` {part.replace('_', ' ')}".strip()
            if "failure_with_reuse" in found:
                text = found["failure_with_reuse"]
                lines.append(f"- * {where}: only with reuse of buffers off; else: {text}")
            if "failure" in found:
                lines.append(f"- {where}: {found['failure']}")
    return ["", *lines] if lines else []
