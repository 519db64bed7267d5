"""What is in a model that could be quantized, as plain data."""

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.ir.blocks import find_blocks
from qcompiler.ir.dataflow import all_nodes
from qcompiler.ir.load import load_model
from qcompiler.ir.quantizable import Site, find_sites
from qcompiler.ir.weights import constant_bytes


def inspect_model(path: Path) -> dict[str, Any]:
    """Describe a model: signature, ops, weight sites, blocks and sizes in bytes.

    The model is read as it is: names are those that recipes and `--exclude` match after
    canonicalization wherever the exporter gave names at all.
    """
    model = load_model(path)
    sites, others = find_sites(model)
    weights = {site.weight: site.tensor.nbytes for site in sites}
    return {
        "model": path.name,
        "ir_version": model.ir_version,
        "opsets": dict(model.opset_imports),
        "producer": f"{model.producer_name or ''} {model.producer_version or ''}".strip(),
        "inputs": [_value(value) for value in model.graph.inputs],
        "outputs": [_value(value) for value in model.graph.outputs],
        "ops": dict(Counter(_op(node) for node in all_nodes(model)).most_common()),
        "constant_bytes": constant_bytes(model),
        "weight_bytes": sum(weights.values()),
        "sites": [_site(site) for site in sites],
        "not_quantizable": [
            {"name": other.node.name or "", "op_type": other.node.op_type, "reason": other.reason}
            for other in others
        ],
        "blocks": _blocks(model, {site.node for site in sites}),
    }


def _value(value: ir.Value) -> str:
    return f"{value.name}: {value.dtype} {value.shape}"


def _op(node: ir.Node) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}:{node.op_type}"


def _site(site: Site) -> dict[str, Any]:
    return {
        "name": site.label,
        "op_type": site.node.op_type,
        "weight": site.weight.name,
        "shape": list(site.shape),
        "dtype": site.tensor.dtype.name,
        "bytes": site.tensor.nbytes,
        "reduction_axis": site.axes.reduction,
        "output_axis": site.axes.output,
    }


def _blocks(model: ir.Model, site_nodes: set[ir.Node]) -> list[dict[str, Any]]:
    return [
        {
            "index": block.index,
            "input": block.input,
            "output": block.output,
            "label": block.label,
            "nodes": len(block.nodes),
            "sites": sum(1 for node in block.nodes if node in site_nodes),
        }
        for block in find_blocks(model)
    ]
