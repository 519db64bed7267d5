"""How a node of an older ONNX opset is said in a newer one, where the words changed.

One adapter per operator and the version that changed it, from the operators' changelog
(onnx/docs/Changelog.md). An adapter changes its node in place, so that name and metadata stay.
Attributes that became inputs become `Constant` nodes before it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.dataflow import node_name
from qcompiler.ir.editing import fresh_name
from qcompiler.ir.weights import read_all


class CannotConvertError(Exception):
    """A node has no equivalent in the newer opset; the text says why."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """One node on its way across one version.

    Attributes:
        node: The node; its graph is that of the body it stands in.
        taken: Names of all values of the model, for new ones.
    """

    node: ir.Node
    taken: set[str]

    def input(self, index: int) -> ir.Value | None:
        """Return an input, or None when it is left out."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def take(self, name: str) -> Any:
        """Remove an attribute and return its value, or None when it is not there."""
        attribute = self.node.attributes.pop(name, None)
        if attribute is None:
            return None
        if attribute.is_ref():
            refuse(f"its attribute {name!r} is a parameter of a function; inline functions first")
        return attribute.value

    def put(self, name: str, value: int | str) -> None:
        """Set an attribute."""
        make = ir.AttrInt64 if isinstance(value, int) else ir.AttrString
        self.node.attributes[name] = make(name, value)  # type: ignore[arg-type]

    def set_inputs(self, *values: ir.Value | None) -> None:
        """Set all inputs; those left out at the end are dropped."""
        kept = list(values)
        while kept and kept[-1] is None:
            kept.pop()
        self.node.resize_inputs(len(kept))
        for index, value in enumerate(kept):
            self.node.replace_input_with(index, value)

    def ints(self, what: str, values: Sequence[int]) -> ir.Value:
        """Return a new int64 constant of rank 1."""
        return self.constant(what, np.array(values, dtype=np.int64))

    def constant(self, what: str, values: npt.NDArray[Any]) -> ir.Value:
        """Return a new constant."""
        tensor = ir.tensor(values, name=what)
        output = self.before("Constant", (), {"value": tensor}, what)
        output.type = ir.TensorType(tensor.dtype)
        output.shape = ir.Shape(values.shape)
        return output

    def before(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
        what: str,
    ) -> ir.Value:
        """Insert a node before this one and return its output."""
        new = self._make(op_type, inputs, attributes, what)
        self._graph().insert_before(self.node, new)
        return new.outputs[0]

    def after(
        self, op_type: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any], what: str
    ) -> None:
        """Insert a node behind this one that takes over the name and the uses of its output.

        Args:
            op_type: Operator.
            inputs: Its inputs behind the first, which is this node's output.
            attributes: Its attributes.
            what: What the new node is called, behind this node's name.
        """
        output = self.node.outputs[0]
        new = self._make(op_type, (), attributes, what)
        result = new.outputs[0]
        self._graph().insert_after(self.node, new)
        output.replace_all_uses_with(result, replace_graph_outputs=True)
        new.resize_inputs(1 + len(inputs))
        for index, value in enumerate((output, *inputs)):
            new.replace_input_with(index, value)
        result.type, result.shape, name = output.type, output.shape, output.name
        output.name, result.name = result.name, name
        output.shape = None

    def _make(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
        what: str,
    ) -> ir.Node:
        title = f"{node_name(self.node)}/{what}"
        output = ir.Value(name=fresh_name(title, self.taken))
        made = ir.convenience.convert_attributes(attributes)
        metadata = dict(self.node.metadata_props)
        return ir.Node(
            "", op_type, inputs, made, outputs=[output], name=title, metadata_props=metadata
        )

    def _graph(self) -> ir.Graph | ir.Function:
        graph = self.node.graph
        assert graph is not None
        return graph


Adapter = Callable[[Conversion], None]


def refuse(reason: str) -> NoReturn:
    """Give a node up."""
    raise CannotConvertError(reason)


def _attribute_to_input(name: str, *, scalar: bool = False) -> Adapter:
    """Make an integer attribute the second input; without it there is none."""

    def adapt(at: Conversion) -> None:
        value = at.take(name)
        # An empty list of axes has always meant the same as none.
        if value is None or (not scalar and not len(value)):
            return
        at.set_inputs(at.input(0), at.ints(name, [value] if scalar else value))

    return adapt


def _slice(at: Conversion) -> None:
    starts, ends, axes = at.take("starts"), at.take("ends"), at.take("axes")
    if starts is None or ends is None:
        refuse("it has no starts or ends")
    values = [at.ints("starts", starts), at.ints("ends", ends)]
    at.set_inputs(at.input(0), *values, at.ints("axes", axes) if axes else None)


def _float_like(at: Conversion, what: str, number: float) -> ir.Value:
    """Return a scalar of the element type of the node's first input."""
    data = at.input(0)
    dtype = data.dtype if data is not None else None
    if dtype is not None:
        return at.constant(what, np.array(number, dtype=dtype.numpy()))
    value = at.constant(what, np.array(number, dtype=np.float32))
    return at.before("CastLike", [value, data], {}, f"{what}_cast")


def _clip(at: Conversion) -> None:
    bounds = [(name, at.take(name)) for name in ("min", "max")]
    values = [None if bound is None else _float_like(at, name, bound) for name, bound in bounds]
    at.set_inputs(at.input(0), *values)


def _pad(at: Conversion) -> None:
    pads, value = at.take("pads"), at.take("value")
    if pads is None:
        refuse("it has no pads")
    fill = _float_like(at, "value", value) if value else None
    at.set_inputs(at.input(0), at.ints("pads", pads), fill)


def _dropout_mask(at: Conversion) -> None:
    """Opset 10 made the mask boolean."""
    mask = at.node.outputs[1] if len(at.node.outputs) > 1 else None
    if mask is not None and (mask.uses() or mask.is_graph_output()):
        refuse("its mask is used, which means training")
    at.node.resize_outputs(1)


def _dropout_ratio(at: Conversion) -> None:
    """Opset 12 made the ratio an input that counts in training only, which is off by default."""
    _dropout_mask(at)
    at.take("ratio")


def _batch_norm_spatial(at: Conversion) -> None:
    if at.take("spatial") == 0:
        refuse("spatial=0 normalizes every position by itself, which newer opsets cannot say")


def _batch_norm_outputs(at: Conversion) -> None:
    if any(output.uses() or output.is_graph_output() for output in at.node.outputs[1:]):
        refuse("its running statistics are used, which means training")
    at.node.resize_outputs(1)


def _upsample_scales(at: Conversion) -> None:
    scales = at.take("scales")
    if scales is None:
        refuse("it has no scales")
    at.set_inputs(at.input(0), at.constant("scales", np.array(scales, dtype=np.float32)))


def _upsample_to_resize(at: Conversion) -> None:
    at.node.op_type = "Resize"


def _resize_coordinates(at: Conversion) -> None:
    """Opset 10 means asymmetric coordinates; nearest rounds down, and up where it shrinks.

    (The standard says nothing; this is what ONNX Runtime computes, `UpsampleNearest`.)
    """
    data, scales = at.input(0), at.input(1)
    at.put("coordinate_transformation_mode", "asymmetric")
    mode = at.node.attributes.get_string("mode", "nearest")
    if mode == "nearest":
        at.put("nearest_mode", _nearest_mode(scales))
    at.set_inputs(data, None, scales)


def _nearest_mode(scales: ir.Value | None) -> str:
    tensor = ir.convenience.get_const_tensor(scales) if scales is not None else None
    if tensor is None:
        refuse("its scales are computed while it runs, and rounding depends on them")
    values = read_all(tensor)
    if (values >= 1).all():
        return "floor"
    if (values <= 1).all():
        return "ceil"
    refuse("it shrinks one axis and enlarges another, which round differently")


def _resize_tf_half_pixel(at: Conversion) -> None:
    """Opset 13 dropped tf_half_pixel_for_nn; floor((i + 0.5) / s) is half_pixel rounded half up.

    It also made the inputs optional that opset 11 asks for as empty tensors.
    """
    if at.node.attributes.get_string("coordinate_transformation_mode", "") == (
        "tf_half_pixel_for_nn"
    ):
        floor = at.node.attributes.get_string("nearest_mode", "") == "floor"
        if not floor or at.node.attributes.get_string("mode", "nearest") != "nearest":
            refuse("tf_half_pixel_for_nn is defined for nearest with floor only")
        at.put("coordinate_transformation_mode", "half_pixel")
        at.put("nearest_mode", "round_prefer_ceil")
    inputs = list(at.node.inputs)
    for index in (1, 2):
        value = inputs[index] if index < len(inputs) else None
        tensor = ir.convenience.get_const_tensor(value) if value is not None else None
        if tensor is not None and tensor.size == 0:
            inputs[index] = None
    at.set_inputs(*inputs)


def _softmax(at: Conversion) -> None:
    """Before opset 13 all axes from `axis` on count as one; from 13 on one axis is meant."""
    data = at.input(0)
    axis = at.node.attributes.get_int("axis", 1)
    shape = data.shape if data is not None else None
    if axis == -1 or (shape is not None and axis == len(shape) - 1):
        at.put("axis", -1)
        return
    sizes = at.before("Shape", [data], {}, "shape")
    at.set_inputs(at.before("Flatten", [data], {"axis": axis}, "flat"))
    at.put("axis", -1)
    at.after("Reshape", [sizes], {}, "restored")


def _split(at: Conversion) -> None:
    if at.input(1) is None:
        at.put("num_outputs", len(at.node.outputs))


def _roi_align(at: Conversion) -> None:
    at.put("coordinate_transformation_mode", "output_half_pixel")


def _grid_sample(at: Conversion) -> None:
    mode = at.node.attributes.get_string("mode", "bilinear")
    at.put("mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode))


def _dft(at: Conversion) -> None:
    axis = at.take("axis")
    value = at.constant("axis", np.array(1 if axis is None else axis, dtype=np.int64))
    at.set_inputs(at.input(0), at.input(1), value)


def _group_norm(at: Conversion) -> None:
    """Opset 21 has a scale and bias per channel, where there was one per group."""
    data, groups = at.input(0), at.node.attributes.get_int("num_groups", 0)
    shape = data.shape if data is not None else None
    channels = shape[1] if shape is not None and len(shape) > 1 else None
    if not isinstance(channels, int):
        refuse("its number of channels is not known, and its scale must be repeated that often")
    if channels == groups:
        return
    repeated = []
    for index, what in ((1, "scale"), (2, "bias")):
        column = at.before("Unsqueeze", [at.input(index), at.ints("axis", [1])], {}, what)
        size = at.ints("size", [groups, channels // groups])
        spread = at.before("Expand", [column, size], {}, f"{what}_spread")
        flat = at.before("Reshape", [spread, at.ints("flat", [-1])], {}, f"{what}_per_channel")
        repeated.append(flat)
    at.set_inputs(data, *repeated)


def _scatter(at: Conversion) -> None:
    at.node.op_type = "ScatterElements"


def _scan(at: Conversion) -> None:
    refuse(
        "the Scan of opset 8 has a batch axis and sequence lengths; export with opset 9 or later"
    )


_REDUCTIONS: Final = (
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSumSquare",
)

ADAPTERS: Final[Mapping[tuple[str, int], Adapter]] = {
    ("Upsample", 9): _upsample_scales,
    ("BatchNormalization", 9): _batch_norm_spatial,
    ("Scan", 9): _scan,
    ("Upsample", 10): _upsample_to_resize,
    ("Slice", 10): _slice,
    ("TopK", 10): _attribute_to_input("k", scalar=True),
    ("Dropout", 10): _dropout_mask,
    ("Resize", 11): _resize_coordinates,
    ("Clip", 11): _clip,
    ("Pad", 11): _pad,
    ("Scatter", 11): _scatter,
    ("Dropout", 12): _dropout_ratio,
    ("Resize", 13): _resize_tf_half_pixel,
    ("ReduceSum", 13): _attribute_to_input("axes"),
    ("Squeeze", 13): _attribute_to_input("axes"),
    ("Unsqueeze", 13): _attribute_to_input("axes"),
    ("Split", 13): _attribute_to_input("split"),
    ("Softmax", 13): _softmax,
    ("LogSoftmax", 13): _softmax,
    ("Hardmax", 13): _softmax,
    ("BatchNormalization", 14): _batch_norm_outputs,
    ("RoiAlign", 16): _roi_align,
    ("Split", 18): _split,
    **{(name, 18): _attribute_to_input("axes") for name in _REDUCTIONS},
    ("DFT", 20): _dft,
    ("GridSample", 20): _grid_sample,
    ("GroupNormalization", 21): _group_norm,
}
"""What to do to a node of this operator when this version is reached."""

NEEDS_SHAPES: Final = frozenset(
    {"Softmax", "LogSoftmax", "Hardmax", "Clip", "Pad", "GroupNormalization"}
)
"""Operators whose adapters do better when they know the type and shape of the data."""
