"""Elements of a quantized weight that are kept at 16 bits in a side path of its product.

The product's node names the initializers (`provenance.ISLAND`), so that whoever finds new codes for
the weight can find what is left of the islands as well.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.channels.weights import MATRIX_OPS
from qcompiler.ir.provenance import ISLAND
from qcompiler.ir.quantizable import Site
from qcompiler.ir.side_paths import SidePath, narrowed
from qcompiler.ir.weights import WeightStore, read_all
from qcompiler.quant.islands import IslandKind

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Island:
    """What a side path holds of a weight.

    Attributes:
        site: The product whose weight it is.
        kind: COLUMN or WEIGHT.
        values: Initializer of the values.
        index: Initializers of the places: input channels; or, of single weights, input and
            output channels.
    """

    site: Site
    kind: IslandKind
    values: ir.Value
    index: tuple[ir.Value, ...]

    def mask(self) -> Mask:
        """Return which elements lie in the island: bool, of the weight's shape."""
        found = np.zeros(self.site.shape, np.bool_)
        self._view(found)[self._places()] = True
        return found

    def whole(self, rest: ir.TensorProtocol) -> Array:
        """Return the weight with the island put back, in the weight's type.

        Args:
            rest: The weight without it.
        """
        full = np.array(read_all(rest))
        stored = _read(self.values).astype(full.dtype)
        single = self.kind is IslandKind.WEIGHT
        self._view(full)[self._places()] = stored.reshape(-1) if single else stored
        return full

    def write(self, kept: Array, store: WeightStore) -> None:
        """Put other values into the side path.

        Args:
            kept: float32, in the order of `weight[mask]`.
            store: Where they go.
        """
        full = np.zeros(self.site.shape, np.float32)
        full[self.mask()] = kept
        old = self.values.const_value
        assert old is not None
        part = self._view(full)[self._places()].reshape(old.shape.numpy())
        narrow = narrowed(np.ascontiguousarray(part), old.dtype)
        self.values.const_value = store.put(self.values.name or "", narrow, old.dtype)

    def _view(self, full: Array) -> Array:
        """Return a tensor of the weight's shape with its axes as the side path has them."""
        is_matrix = self.site.row.op_type in MATRIX_OPS
        return full.T if is_matrix and self.site.axes.reduction == 1 else full

    def _places(self) -> tuple[Any, ...]:
        index = [_read(value).astype(np.int64).reshape(-1) for value in self.index]
        if self.kind is IslandKind.WEIGHT:
            return index[0], index[1]
        before = 0 if self.site.row.op_type in MATRIX_OPS else self.site.axes.reduction
        return (*[slice(None)] * before, index[0])


def mark_island(node: ir.Node, kind: IslandKind, side: SidePath) -> None:
    """Write on a product's node what its side path holds."""
    names = [value.name for value in side.index]
    facts = {"kind": kind.value, "values": side.values.name, "index": names}
    node.metadata_props[ISLAND] = json.dumps(facts)


def island_of(site: Site, graph: ir.Graph) -> Island | None:
    """Return the island of a site, None where it has none.

    Args:
        site: A site; its weight is without the island.
        graph: The graph whose initializers hold the island.
    """
    text = site.node.metadata_props.get(ISLAND)
    if text is None:
        return None
    facts = json.loads(text)
    index = tuple(graph.initializers[name] for name in facts["index"])
    return Island(site, IslandKind(facts["kind"]), graph.initializers[facts["values"]], index)


def side_bytes(side: SidePath) -> int:
    """Return the bytes of a side path's values and indices."""
    tensors = (value.const_value for value in (side.values, *side.index))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _read(value: ir.Value) -> Array:
    tensor = value.const_value
    assert tensor is not None
    return read_all(tensor)
