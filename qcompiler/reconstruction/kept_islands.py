"""Islands of a Q/DQ graph as masks for rounding: elements without codes that take up errors."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from qcompiler.ir.islands import Island, island_of
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
        weight.sites[0].weight.const_value = _joined(island, weight.tensor)
    return KeptIslands(masks, keepers)


def _joined(island: Island, rest: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return the weight with its island, as a tensor that is made when it is read."""

    def read() -> ir.TensorProtocol:
        return ir.tensor(island.whole(rest), rest.dtype)

    return ir.LazyTensor(read, rest.dtype, ir.Shape(rest.shape.numpy()), name=rest.name)
