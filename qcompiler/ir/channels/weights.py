"""Scaled channels at ops with weights and at norms, where scales are taken up."""

import numpy as np
import onnx_ir as ir

from qcompiler.ir.channels.classes import Ids
from qcompiler.ir.channels.tracer import (
    CannotScaleError,
    Factor,
    OpKey,
    Place,
    Relation,
    Tracer,
    extents_of,
)
from qcompiler.ir.dataflow import MICROSOFT, constant_of, int_attribute, is_op
from qcompiler.ir.quantizable import Site

MATRIX_OPS = ("MatMul", "Gemm", "FusedMatMul")


def data_input(site: Site) -> int | None:
    """Return the position of the input that meets a site's weight.

    None for a looked-up table, and for what a recurrent op multiplies by its own state.
    """
    if site.row.data is None or site.role == "R":
        return None
    return 1 if site.left else site.row.data


def data_axis(site: Site) -> int | None:
    """Return the axis of a site's data along which its input channels lie, None without data."""
    if data_input(site) is None:
        return None
    if site.row.op_type in ("Conv", "ConvTranspose"):
        return 1
    if site.row.op_type not in MATRIX_OPS:
        return -1
    turned = int_attribute(site.node, "transB" if site.left else "transA", 0)
    return -1 if bool(turned) == site.left else -2


def _matrix_product(tracer: Tracer, place: Place, ids: Ids) -> None:
    node, site = place.node, _site(tracer, place.node)
    if site is None:
        _product_of_activations(tracer, place, ids)
        return
    if not place.is_output and place.index == 2:
        tracer.give(node.outputs[0], ids)  # Gemm adds a value that is no constant
        return
    axis = data_axis(site)
    if place.is_output:
        axis = -2 if site.left and not _reads_vector(site) else -1
    assert axis is not None
    vector = tracer.confined(ids, [axis if ids.ndim > 1 else -1]).reshape(-1)
    _scale_weight(tracer, site, vector, is_output=place.is_output)
    if place.is_output and is_op(node, "Gemm") and len(node.inputs) > 2:
        tracer.give_operand(node, 2, ids)


def _reads_vector(site: Site) -> bool:
    """Whether the data of a matrix has a single axis, or an unknown number of them."""
    data = extents_of(site.node.inputs[data_input(site) or 0])
    return data is None or len(data) < 2


def _scale_weight(tracer: Tracer, site: Site, vector: Ids, *, is_output: bool) -> None:
    """Scale a weight along its output or its reduction axis."""
    axis = site.axes.output if is_output else site.axes.reduction
    if axis is None:
        message = "its weight is a vector and has no such channels"
        raise CannotScaleError(message)
    shape = [1] * len(site.shape)
    shape[axis] = vector.size
    _add(tracer, site, vector.reshape(shape), power=-1 if is_output else 1)


def _add(tracer: Tracer, site: Site, ids: Ids, *, power: int) -> None:
    tracer.add_factor(Factor(site.node, site.weight_input, site.weight, ids, power))


def _convolution(tracer: Tracer, place: Place, ids: Ids) -> None:
    node, site = place.node, _site(tracer, place.node)
    if site is None or (not place.is_output and place.index != 0):
        message = "its weight is computed at run time"
        raise CannotScaleError(message)
    vector = tracer.confined(ids, [1]).reshape(-1)
    group = int_attribute(node, "group", 1)
    if vector.size == 1:
        vector = np.repeat(vector, group)  # channels that all have one scale
    turned = is_op(node, "ConvTranspose")
    if group == 1 or turned != place.is_output:
        _scale_weight(tracer, site, vector, is_output=place.is_output)
    elif site.transposes:
        message = "its weight is transposed, and it has groups"
        raise CannotScaleError(message)
    else:
        # Axis 1 of the weight holds the channels of one group, axis 0 goes through all groups.
        rows = np.repeat(vector.reshape(group, -1), site.shape[0] // group, axis=0)
        shape = [*rows.shape, *[1] * (len(site.shape) - 2)]
        _add(tracer, site, rows.reshape(shape), power=-1 if place.is_output else 1)
    if place.is_output and len(node.inputs) > 2 and node.inputs[2] is not None:
        tracer.give_operand(node, 2, vector)


def _recurrent(tracer: Tracer, place: Place, ids: Ids) -> None:
    sites = [s for s in tracer.sites.get(place.node, ()) if s.role == "W"]
    if place.is_output or place.index != 0 or not sites:
        message = "what it returns went through its gates"
        raise CannotScaleError(message)
    vector = tracer.confined(ids, [-1]).reshape(-1)
    _scale_weight(tracer, sites[0], vector, is_output=False)


def lookup(tracer: Tracer, place: Place, ids: Ids) -> bool:
    """Scale a table of weights whose rows a Gather returns; return whether it is one."""
    site = _site(tracer, place.node)
    if site is None or not place.is_output:
        return False
    shape = [1] * len(site.shape)
    shape[site.axes.reduction] = -1
    vector = tracer.confined(ids, [-1]).reshape(-1)
    _add(tracer, site, vector.reshape(shape), power=-1)
    return True


def _product_of_activations(tracer: Tracer, place: Place, ids: Ids) -> None:
    """Channels of a product that both sides compute: attention takes those of its values."""
    node = place.node
    result = extents_of(node.outputs[0])
    if not is_op(node, "MatMul") or ids.ndim < 2 or result is None or len(result) != ids.ndim:
        message = "it multiplies two computed values"
        raise CannotScaleError(message)
    free, summed = (-1, -2) if place.is_output or place.index == 1 else (-2, -1)
    if not place.is_output:
        if ids.shape[summed] > 1:
            message = f"it sums over the channels of {_name(node.inputs[place.index])}"
            raise CannotScaleError(message)
        if node.inputs[1 - place.index] in tracer.layouts:
            message = "both of its operands would be scaled"
            raise CannotScaleError(message)
        tracer.give(node.outputs[0], ids)
        return
    side = 1 if ids.shape[summed] == 1 else 0
    if node.inputs[1 - side] in tracer.layouts:
        message = "both of its operands would be scaled"
        raise CannotScaleError(message)
    if ids.shape[free] > 1 and side == 0:
        message = "its result has channels along both axes of the product"
        raise CannotScaleError(message)
    _check_batch(node, side, ids)
    tracer.give(node.inputs[side], ids)


def _check_batch(node: ir.Node, side: int, ids: Ids) -> None:
    shape = extents_of(node.inputs[side])
    if shape is None or len(shape) != ids.ndim:
        message = f"{_name(node.inputs[side])} is broadcast over the channels"
        raise CannotScaleError(message)


def _attention(tracer: Tracer, place: Place, ids: Ids) -> None:
    """The values of Attention-23 and MultiHeadAttention are mixed over positions only."""
    node = place.node
    standard = is_op(node, "Attention")
    if len(node.inputs) < 3 or node.inputs[2] is None:
        message = "its values are packed with queries and keys"
        raise CannotScaleError(message)
    if ids.shape[-2] > 1:
        message = "it mixes positions, along which the channels lie"
        raise CannotScaleError(message)
    values, result = node.inputs[2], node.outputs[0]
    further = node.inputs[4 if standard else 3 :]  # the other op adds a bias to the values
    extras = [v for v in (*further, *node.outputs[1:]) if v is not None and v.name]
    if extras or (place.is_output and place.index) or (not place.is_output and place.index != 2):
        message = "only the values of an attention without a cache commute with a scale"
        raise CannotScaleError(message)
    heads = int_attribute(node, "q_num_heads" if standard else "num_heads", 0)
    held = int_attribute(node, "kv_num_heads", 0) if standard else heads
    if ids.ndim == 4:
        shapes = extents_of(values), extents_of(result)
        counts = [shape[1] if shape is not None else None for shape in shapes]
        if not all(isinstance(count, int) for count in counts):
            message = "its number of heads is not known"
            raise CannotScaleError(message)
        held, heads = (count for count in counts if isinstance(count, int))
    if not heads or not held or heads % held:
        message = "its number of heads is not known"
        raise CannotScaleError(message)
    if place.is_output:
        tracer.give(values, _folded_heads(tracer, ids, heads, held))
    else:
        tracer.give(result, _repeated_heads(ids, heads, held))


def _folded_heads(tracer: Tracer, ids: Ids, heads: int, held: int) -> Ids:
    """Join the channels of query heads that share a head of values."""
    if ids.ndim == 4:
        wide = np.broadcast_to(ids, [ids.shape[0], heads, *ids.shape[2:]])
        parts = wide.reshape(ids.shape[0], held, heads // held, *ids.shape[2:])
        tracer.classes.unite(parts[:, :, :1], parts)
        return np.ascontiguousarray(parts[:, :, 0])
    if ids.shape[-1] == 1:
        return ids
    parts = ids.reshape(*ids.shape[:2], held, heads // held, -1)
    tracer.classes.unite(parts[..., :1, :], parts)
    return np.ascontiguousarray(parts[..., 0, :]).reshape(*ids.shape[:2], -1)


def _repeated_heads(ids: Ids, heads: int, held: int) -> Ids:
    if ids.ndim == 4:
        return ids if ids.shape[1] == 1 else np.repeat(ids, heads // held, axis=1)
    if ids.shape[-1] == 1:
        return ids
    parts = ids.reshape(*ids.shape[:2], held, -1)
    return np.repeat(parts, heads // held, axis=2).reshape(*ids.shape[:2], -1)


def _norm(tracer: Tracer, place: Place, ids: Ids) -> None:
    node = place.node
    first = 2 if node.op_type.startswith("Skip") else 1
    if not place.is_output or place.index:
        message = "a norm mixes the channels of what it reads"
        raise CannotScaleError(message)
    axis = int_attribute(node, "axis", -1) % ids.ndim
    ids = tracer.confined(ids, range(axis, ids.ndim))
    shifts = 2 if node.op_type in ("LayerNormalization", "SkipLayerNormalization") else 1
    _scale_all(tracer, node, range(first, first + shifts), ids)


def _norm_of_images(tracer: Tracer, place: Place, ids: Ids) -> None:
    node = place.node
    if not place.is_output or place.index:
        message = "a norm takes a scale out of what it reads, up to its epsilon"
        raise CannotScaleError(message)
    vector = tracer.confined(ids, [1]).reshape(-1)
    gamma = constant_of(node.inputs[1])
    if gamma is None or gamma.size != vector.size:
        message = "it has a scale per group, not per channel"
        raise CannotScaleError(message)
    _scale_all(tracer, node, range(1, 3), vector)


def _scale_all(tracer: Tracer, node: ir.Node, indices: range, ids: Ids) -> None:
    for index in indices:
        if index < len(node.inputs) and node.inputs[index] is not None:
            tracer.scale(node, index, ids, power=-1)


def _site(tracer: Tracer, node: ir.Node) -> Site | None:
    return next(iter(tracer.sites.get(node, ())), None)


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""


RELATIONS: dict[OpKey, Relation] = {
    ("", "MatMul"): _matrix_product,
    ("", "Gemm"): _matrix_product,
    (MICROSOFT, "FusedMatMul"): _matrix_product,
    ("", "Conv"): _convolution,
    ("", "ConvTranspose"): _convolution,
    **{("", op): _recurrent for op in ("LSTM", "GRU", "RNN")},
    ("", "Attention"): _attention,
    (MICROSOFT, "MultiHeadAttention"): _attention,
    **{
        ("", op): _norm
        for op in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
    },
    **{
        (MICROSOFT, op): _norm
        for op in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
    },
    **{
        ("", op): _norm_of_images
        for op in ("InstanceNormalization", "GroupNormalization", "BatchNormalization")
    },
}
