"""Islands of a Q/DQ graph as masks for rounding: elements without codes that take up errors."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from qcompiler.ir.islands import island_of
from qcompiler.ir.weights import WeightStore
from qcompiler.reconstruction.rounding import Keeper
from qcompiler.reconstruction.starting_point import StartingPoint
from qcompiler.reconstruction.weight_rounding import Mask


@dataclass(frozen=True, slots=True)
class KeptIslands:
    """What `round_model` needs to know of islands, by name of the float weight.

    Attributes:
        masks: Which elements lie in them.
        keepers: Put what is left of these into the graph.
    """

    masks: Mapping[str, Mask]
    keepers: Mapping[str, Keeper]


def open_islands(start: StartingPoint, store: WeightStore) -> KeptIslands:
    """Find the islands of a graph, and put them back into the float weights it started from.

    The float weight of an island's product is zero where the island lies, and rounding must see
    the whole one. It is joined again each time it is read, so that no copy of it is kept.

    Args:
        start: The graph, from `quantize_to_start`.
        store: Where new values of islands go.
    """
    masks: dict[str, Mask] = {}
    keepers: dict[str, Keeper] = {}
    for weight in start.weights:
        island = island_of(weight.sites[0], start.model.graph)
        if island is None:
            continue
        masks[weight.name] = island.mask()
        keepers[weight.name] = partial(island.write, store=store)
        rest = weight.tensor
        whole = partial(island.whole, rest)
        weight.sites[0].weight.const_value = ir.LazyTensor(
            lambda read=whole, rest=rest: ir.tensor(read(), rest.dtype),
            dtype=rest.dtype,
            shape=ir.Shape(rest.shape.numpy()),
            name=weight.name,
        )
    return KeptIslands(masks, keepers)
