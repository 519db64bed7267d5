"""Contents of a weight's initializers, taken out and put in."""

import json
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.provenance import PRODUCT_SQNR, RANGE, SQNR, annotate
from qcompiler.ir.weights import WeightStore, read_all
from qcompiler.quant.ranges import sqnr_db
from qcompiler.reconstruction.starting_point import CodedWeight

Array = npt.NDArray[Any]
_QUALITY: Final = (SQNR, PRODUCT_SQNR)
_AT_ONCE: Final = 1 << 18
"""Elements whose quality is found together: few enough for a processor's cache."""


def contents(weight: CodedWeight) -> dict[str, Array]:
    """Return codes, scales, zero points, and what is noted of their quality.

    All of it in types that NumPy can keep in a file.
    """
    found = {"codes": _plain(weight.codes), "scale": _plain(weight.scale).astype(np.float32)}
    if weight.zero_point is not None:
        found["zero_point"] = _plain(weight.zero_point)
    noted = [[site.node.metadata_props.get(key) for key in _QUALITY] for site in weight.sites]
    found["noted"] = np.frombuffer(json.dumps(noted).encode(), np.uint8)
    return found


def put_contents(weight: CodedWeight, arrays: dict[str, Array], store: WeightStore) -> None:
    """Undo `contents`; zero points and notes may be absent."""
    put_array(weight.codes, arrays["codes"], store)
    put_array(weight.scale, arrays["scale"], store)
    if weight.zero_point is not None and "zero_point" in arrays:
        put_array(weight.zero_point, arrays["zero_point"], store)
    if "noted" in arrays:
        for site, texts in zip(weight.sites, json.loads(arrays["noted"].tobytes()), strict=True):
            noted = zip(_QUALITY, texts, strict=True)
            site.node.metadata_props.update({key: text for key, text in noted if text is not None})


def put_array(value: ir.Value, array: Array, store: WeightStore) -> None:
    """Put numbers into an initializer, whose type and shape stay.

    Args:
        value: The initializer.
        array: int8 or uint8 codes, or float32 that the initializer's type can hold.
        store: Where they go.
    """
    old = value.const_value
    assert old is not None
    shape = old.shape.numpy()
    if array.dtype == np.float32:
        array = array.astype(old.dtype.numpy())
    value.const_value = store.put(value.name or "", array.reshape(shape), old.dtype)


def put_step(scale: ir.Value, array: Array, store: WeightStore) -> None:
    """Put a learned step size of an activation into its initializer, and its range on its value."""
    old = scale.const_value
    assert old is not None
    ratio = float(array.reshape(-1)[0]) / float(read_all(old).astype(np.float32).reshape(-1)[0])
    for use in scale.uses():
        value = use.node.inputs[0]
        if value is not None and RANGE in value.metadata_props:
            limits = json.loads(value.metadata_props[RANGE])
            value.metadata_props[RANGE] = json.dumps([limit * ratio for limit in limits])
    put_array(scale, array, store)


def note_quality(weight: CodedWeight) -> None:
    """Write on the nodes how near the codes are to the float weight."""
    rows, parts = weight.rows, contents(weight)
    exact, codes = rows.rows(read_all(weight.tensor)), rows.rows(parts["codes"])
    index, scales = rows.scale_index(), rows.scale_rows(parts["scale"])
    zeros = (
        rows.scale_rows(parts["zero_point"].astype(np.float32)) if "zero_point" in parts else None
    )
    power = noise = 0.0
    count = max(1, _AT_ONCE // max(1, rows.width))
    for first in range(0, rows.count, count):
        some = slice(first, first + count)
        values, truth = codes[some].astype(np.float32), exact[some].astype(np.float32)
        if zeros is not None:
            values -= zeros[some][:, index]
        values *= scales[some][:, index]
        values -= truth
        noise += float(np.square(values, dtype=np.float64).sum())
        power += float(np.square(truth, dtype=np.float64).sum())
    quality = sqnr_db(power, noise)
    for site in weight.sites:
        annotate(site.node, weight_sqnr_db=quality)
        # That of the op alone says nothing any more: its inputs and its aim are others.
        site.node.metadata_props.pop(PRODUCT_SQNR, None)


def _plain(value: ir.Value) -> Array:
    """Return an initializer; codes below 8 bits take a byte each."""
    tensor = value.const_value
    assert tensor is not None
    array = read_all(tensor)
    if tensor.dtype.bitwidth < 8:
        return array.astype(np.int8 if tensor.dtype.is_signed() else np.uint8)
    return array
