"""Where a decision about a node is written: on the node.

The graph is the only state, so the plan (scheme), its reason and what was measured travel as
`metadata_props` of nodes (ONNX IR version 10+) and of the model. Everything here is a string.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import onnx_ir as ir

from qcompiler.quant.qtype import QType, qtype_named
from qcompiler.quant.scheme import FLOAT, QScheme, parse_scheme

PREFIX: Final = "qcompiler."

SCHEME: Final = "qcompiler.scheme"
"""On a node: the scheme it gets, as text (`quant.scheme`), or "float"."""
RULE: Final = "qcompiler.rule"
"""On a node: which recipe rule or target row decided."""
REASON: Final = "qcompiler.reason"
"""On a node: why it got this scheme, one sentence."""
SQNR: Final = "qcompiler.weight_sqnr_db"
"""On a node: signal to quantization noise ratio of its weight, in dB."""
PRODUCT_SQNR: Final = "qcompiler.product_sqnr_db"
"""On a node whose weight was rounded for its output: SQNR of that on the samples, in dB."""
BYTES_BEFORE: Final = "qcompiler.weight_bytes_before"
"""On a node: bytes of its weight in the source model."""
BYTES_AFTER: Final = "qcompiler.weight_bytes_after"
"""On a node: bytes of its codes, scales and zero points."""
WEIGHT: Final = "qcompiler.weight"
"""On a node: name of the source weight, which tied sites share."""
ELEMENTS: Final = "qcompiler.weight_elements"
"""On a node: number of elements of its weight."""
PAIR_LIMIT: Final = "qcompiler.pair_limit"
"""On a node: what neighbouring codes of its weight may add up to (`quant.scheme.PairLimit`)."""
PLACEMENT: Final = "qcompiler.placement"
"""On a node that works on quantized activations: the rule of the target's placement table."""
QUANTIZED_INPUTS: Final = "qcompiler.quantized_inputs"
"""On such a node: positions of the inputs it reads quantized, a JSON list."""
REGION: Final = "qcompiler.region"
"""On such a node: number of the stretch of nodes that hand each other quantized values."""
PLACEMENT_REASON: Final = "qcompiler.placement_reason"
"""On such a node, and on one between quantized values that stays in float: why."""
QUANTIZER: Final = "qcompiler.quantizer"
"""On a value that is to be quantized: integer type and symmetry of its codes, "uint8:asym"."""
SHARES: Final = "qcompiler.shares"
"""On such a value: name of the value whose scale it has."""
RANGE: Final = "qcompiler.range"
"""On such a value: the numbers its smallest and largest code stand for, a JSON list."""
OUTLIERS: Final = "qcompiler.outlier_channels"
"""On such a value: channels of its last axis that stay in float, a JSON list."""
TERMS: Final = "qcompiler.terms"
"""On such a value: "2" where its codes are too coarse alone, and what they leave out gets codes of
its own."""
ACTIVATION_SQNR: Final = "qcompiler.activation_sqnr_db"
"""On such a value: signal to rounding noise ratio on the samples, in dB, without its outliers."""
EQUALIZED: Final = "qcompiler.equalized"
"""On a node whose data was equalized, or considered for it: with which scales."""
SUPPRESSED: Final = "qcompiler.suppressed"
"""On a node whose weight was looked at for outliers: how many were cut off, and what that did."""
BIAS_CORRECTED: Final = "qcompiler.bias_corrected"
"""On a node whose bias was corrected, or considered for it: SQNR of its result on held-out calls,
in dB, without and with the correction."""
FLOAT_MS: Final = "qcompiler.float_ms"
"""On a node of a measured region: milliseconds that the region takes in float."""
QUANTIZED_MS: Final = "qcompiler.quantized_ms"
"""On such a node: what the region takes as it was left, or, where it was left in float, what it
would have taken quantized."""
ISLAND: Final = "qcompiler.island"
"""On a node part of whose weight keeps more bits: of what kind, and the initializers that hold
values and places (`ir.islands`), a JSON map."""
ISLAND_ELEMENTS: Final = "qcompiler.island_elements"
"""On such a node: elements of its weight in islands."""
ISLAND_BYTES: Final = "qcompiler.island_bytes"
"""On such a node: bytes of the islands' values and indices."""
SALIENCY: Final = "qcompiler.saliency"
"""On a node that could have had islands: its weight's part of the saliency of all, from 0 to 1."""
ISLAND_SALIENCY: Final = "qcompiler.island_saliency"
"""On such a node: the part of that which lies in islands, from 0 to 1."""
LAYER: Final = "qcompiler.layer"
"""On such a node: number of the layer it lies in (`ir.blocks.find_layers`)."""
PROJECTION: Final = "qcompiler.projection"
"""On such a node: what it is in its layer, such as "self_attn.q_proj"."""
ISLANDS: Final = "qcompiler.islands"
"""On the model: how islands were chosen and what they cost, a JSON map."""
COMPUTE_TYPE: Final = "qcompiler.compute_type"
"""On the model: the 16-bit type that it was cast to. On a node: float32, where it stays that."""
TYPE_REASON: Final = "qcompiler.type_reason"
"""On a node that stays in float32: why."""
SENSITIVITY: Final = "qcompiler.sensitivity_db"
"""On a node that was ranked: SQNR in dB that quantizing it alone leaves."""
CREATED_BY: Final = "qcompiler.created_by"
"""On a node that a pass made: the pass's name."""
ORIGIN: Final = "qcompiler.origin"
"""On a node that stands for others: the names of the source model's nodes, a JSON list."""
ORIGIN_OP: Final = "qcompiler.origin_op"
"""On a node that replaced another op: the op type of the source model."""
OBSERVER: Final = "qcompiler.observer"
"""On the model: how ranges of activations were chosen."""
MADE_UP: Final = "qcompiler.calibrated_on_made_up_data"
"""On the model, "true": ranges of activations come from random inputs and fit no real data."""
METRIC: Final = "qcompiler.metric"
"""On the model: name, source's and result's figure of a metric that was asked for, as JSON."""
STAGE: Final = "qcompiler.stage"
"""On the model: the stage it has reached."""


def annotate(node: ir.Node | ir.Value, **facts: str | float | int) -> None:
    """Write facts on a node or value; keys come without the prefix, floats keep three decimals.

    `annotate(node, scheme="w8a16", weight_sqnr_db=43.1)` sets `qcompiler.scheme` and
    `qcompiler.weight_sqnr_db`.
    """
    for key, value in facts.items():
        node.metadata_props[PREFIX + key] = (
            f"{value:.3f}" if isinstance(value, float) else str(value)
        )


def scheme_of(node: ir.Node) -> QScheme | None:
    """Return the scheme a node was given; None where it stays in float, or has none yet.

    Raises:
        UsageError: What is written on it is no scheme.
    """
    return parse_scheme(node.metadata_props.get(SCHEME, FLOAT))


def quantizer_of(value: ir.Value) -> tuple[QType, bool]:
    """Return integer type and symmetry of the codes of a value that is to be quantized."""
    name, _, symmetry = value.metadata_props[QUANTIZER].partition(":")
    return qtype_named(name), symmetry == "sym"


def origins_of(node: ir.Node) -> tuple[str, ...]:
    """Return the names of the source model's nodes that a node stands for; else its own name."""
    text = node.metadata_props.get(ORIGIN)
    names = json.loads(text) if text is not None else [node.name]
    return tuple(str(name) for name in names if name)


def forget(model: ir.Model) -> None:
    """Remove what this compiler wrote on a model before, so that no stale claim is believed."""
    owners: list[ir.Model | ir.Node | ir.Value] = [model, *model.graph.inputs]
    nodes = [*model.graph.all_nodes()]
    for function in model.functions.values():
        nodes += function.all_nodes()
    for node in nodes:
        owners += [node, *node.outputs]
    for owner in owners:
        for key in [key for key in owner.metadata_props if key.startswith(PREFIX)]:
            del owner.metadata_props[key]


@contextmanager
def without_times(model: ir.Model) -> Iterator[None]:
    """Take measured times off all nodes for a while, so that what is written does not vary."""
    taken = [
        (node, key, node.metadata_props.pop(key))
        for node in model.graph.all_nodes()
        for key in (FLOAT_MS, QUANTIZED_MS)
        if key in node.metadata_props
    ]
    try:
        yield
    finally:
        for node, key, value in taken:
            node.metadata_props[key] = value


def facts_of(node: ir.Node) -> dict[str, str]:
    """Return what this compiler wrote on the node, keys without the prefix."""
    return {
        key.removeprefix(PREFIX): value
        for key, value in node.metadata_props.items()
        if key.startswith(PREFIX)
    }
