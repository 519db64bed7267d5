"""The table of `weight_only.json`, as lines for a terminal and as Markdown."""

from typing import Any

from benchmarks.markdown_table import MISSING, measured_with, table

_MIB = 1 << 20

Record = dict[str, Any]


def row_text(models: Record, model: str, arm: str) -> str:
    """Return one line for an arm that was just measured."""
    cells = _cells(models[model], models[model]["arms"][arm])
    fields = "  ".join(f"{name} {value}" for name, value in cells.items() if value != MISSING)
    return f"{model:24} {arm:34} {fields}"


def markdown(content: Record) -> str:
    """Return the tables of all models, with what they were measured on."""
    parts = ["# Weight-only quantization", "", *_preamble(content)]
    for name, record in content["models"].items():
        parts += ["", f"## {name}", "", *_float_line(record), "", *_table(record)]
    return "\n".join(parts) + "\n"


def _preamble(content: Record) -> list[str]:
    return [
        *measured_with(content),
        "",
        "Scores are as the model ships: qcompiler's MatMulNBits rounds activations to 8 bits, ONNX "
        'Runtime\'s own does not. "Float act." is the score with activations in float on both '
        'sides, so that the rounding of weights alone compares; "8-bit act." is the score with '
        "both in 8 bits. `same-nodes` arms quantize what ONNX Runtime's quantizer (`ort-...`) can "
        "quantize. Latency is the median ratio to the float model in alternation (as shipped; in "
        "brackets with 8-bit activations). Bits count scales and zero points. Compile time "
        "is that of the whole process; qcompiler's includes loading the result in ONNX "
        "Runtime to see which kernels it chooses.",
    ]


def _float_line(record: Record) -> list[str]:
    before = record["float"]
    if not before:
        return []
    quality = before.get("quality", {})
    scores = quality.get("float_activations", {})
    text = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    return [
        f"Float: file {before['file_bytes'] / _MIB:.1f} MiB, "
        f"{before['float_elements'] / 1e6:.2f} M weights{'; ' + text if text else ''}."
    ]


def _table(record: Record) -> list[str]:
    return table({name: _cells(record, facts) for name, facts in record["arms"].items()})


def _cells(record: Record, facts: Record) -> dict[str, str]:
    """Return the columns of an arm, in order."""
    if "failure" in facts:
        return {"kernels": f"failed: {facts['failure']}"}
    before = record["float"]
    cells = {
        "file MiB": f"{facts['file_bytes'] / _MIB:.1f}",
        "weights MiB": f"{facts['weight_bytes'] / _MIB:.1f}",
        "quantized %": f"{100 * _share(facts):.1f}",
        "bits": f"{facts['average_bits']:.2f}" if facts["quantized_elements"] else MISSING,
    }
    cells |= _quality_cells(facts.get("quality", {}), before["metric"])
    cells |= _latency_cells(facts.get("latency", {}))
    cells["compile s"] = f"{facts['compile']['seconds']:.1f}"
    kernels = ", ".join(f"{count} {name}" for name, count in facts["kernels"].items())
    cells["kernels"] = kernels or "float: nothing quantized"
    if facts["quantized_ops"]:
        cells["integer"] = f"{facts['integer_kernels']}/{facts['quantized_ops']}"
    return cells


def _share(facts: Record) -> float:
    """Return the share of the written model's weights that are quantized."""
    quantized: int = facts["quantized_elements"]
    total: int = quantized + facts["float_elements"]
    return quantized / max(total, 1)


def _quality_cells(quality: Record, metric: str) -> dict[str, str]:
    modes = [mode for mode in quality if mode != "items"]
    if not modes:
        return {}
    shipped = quality[modes[0]]
    cells = {metric: f"{shipped[metric]:.2f}", "output SQNR": f"{shipped['output_sqnr_db']:.1f}"}
    if "zero_shot" in shipped:
        cells["zero_shot"] = f"{shipped['zero_shot']:.2f}"
    for mode, label in (("float_activations", "float act."), ("int8_activations", "8-bit act.")):
        if mode in quality:
            scores = quality[mode]
            cells[label] = f"{scores[metric]:.2f} ({scores['output_sqnr_db']:.1f} dB)"
    return cells


def _latency_cells(latency: Record) -> dict[str, str]:
    cells: dict[str, str] = {}
    for number, (mode, cases) in enumerate(latency.items()):
        for case, times in cases.items():
            text = f"{times['ratio']:.2f}"
            if number == 0:
                cells[case] = text
            elif mode == "int8_activations":
                cells[case] += f" [{text}]"
    return cells
