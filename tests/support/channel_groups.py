"""Scaling the channels of small graphs, and checking that nothing changes, in double precision."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from qcompiler.ir.channels.groups import ChannelGroup, Refusal, find_groups
from qcompiler.ir.channels.scaling import per_position
from qcompiler.ir.quantizable import find_sites
from qcompiler.ir.shapes import infer_shapes
from tests.support.graphs import Array, build

SPREAD = 3.0
"""Scales in tests lie between exp(-SPREAD) and exp(SPREAD)."""


def groups_of(model: ir.Model) -> tuple[list[ChannelGroup], list[Refusal]]:
    """Return groups and refusals of all ops with weights."""
    infer_shapes(model)
    sites, _ = find_sites(model)
    return find_groups(sites, sites)


def random_scales(group: ChannelGroup, seed: int = 0) -> Array:
    """Return scales over two and a half orders of magnitude either way."""
    return np.exp(np.random.default_rng(seed).uniform(-SPREAD, SPREAD, group.count))


def error_in_double(
    text: str, weights: Mapping[str, Array], feeds: Mapping[str, Array], *, opset: int = 21
) -> float:
    """Scale every group of a graph at random; return the largest change of an output.

    The groups are those of the float32 graph; the numbers are float64, and so is the arithmetic,
    that of ONNX's reference evaluator. The change is relative to the largest output.
    """
    groups, _ = groups_of(build(text, weights, opset=opset))
    wide = {
        name: values.astype(np.float64) if values.dtype == np.float32 else values
        for name, values in weights.items()
    }
    scaled = dict(wide)
    for seed, group in enumerate(groups):
        done: set[tuple[str, int]] = set()
        for factor in group.factors:
            key = (factor.value.name or "", factor.power)
            if key not in done:
                done.add(key)
                factors = per_position(factor.ids, random_scales(group, seed)) ** factor.power
                scaled[key[0]] = scaled[key[0]] * factors
    before, after = (_run(text, each, feeds, opset) for each in (wide, scaled))
    return max(
        float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(after, before, strict=True)
    )


def _run(
    text: str, weights: Mapping[str, Array], feeds: Mapping[str, Array], opset: int
) -> list[Array]:
    model = build(text.replace("float[", "double["), weights, opset=opset)
    wide = {
        name: values.astype(np.float64) if values.dtype == np.float32 else values
        for name, values in feeds.items()
    }
    results = ReferenceEvaluator(ir.to_proto(model)).run(None, wide)
    return [np.asarray(result) for result in results]
