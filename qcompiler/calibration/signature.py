"""The inputs of a model, and matching arrays to them by name, type and shape."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import Feeds
from qcompiler.errors import UsageError, printable

Form = tuple[np.dtype[Any], tuple[int, ...]]
"""Type and shape of an array."""
Dimension = int | str | None
"""A size, the name of a symbolic one, or None where it has no name."""

_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a model.

    Attributes:
        name: Its name.
        dtype: Type of its elements.
        shape: Its dimensions; None if even their number is not known.
        optional: Whether an initializer is its default, so that a call may leave it out.
        label: Whether it is no input, but what is known about the samples of a call.
    """

    name: str
    dtype: ir.DataType
    shape: tuple[Dimension, ...] | None
    optional: bool
    label: bool = False

    def __str__(self) -> str:
        kind = "string" if self.dtype == ir.DataType.STRING else str(self.dtype.numpy())
        if self.shape is None:
            return f"{self.name} {kind} of any shape"
        return f"{self.name} {kind}{_shape_text(self.shape)}"


@dataclass(frozen=True, slots=True)
class Signature:
    """The inputs of a model, in its order."""

    inputs: tuple[Input, ...]

    @property
    def required(self) -> tuple[Input, ...]:
        """The inputs that every call must give."""
        return tuple(i for i in self.inputs if not i.optional)

    def with_label(self, name: str, *, optional: bool) -> "Signature":
        """Return this signature with a label of integers, if no input has its name already."""
        if any(i.name == name for i in self.inputs):
            return self
        return Signature((*self.inputs, Input(name, ir.DataType.INT64, None, optional, label=True)))

    def named(self, name: str) -> Input:
        """Return the input of this name."""
        return next(i for i in self.inputs if i.name == name)

    def only_name(self, where: str) -> str:
        """Return the name of the one required input, for data that has no names.

        Raises:
            UsageError: The model does not have exactly one.
        """
        if len(self.required) == 1:
            return self.required[0].name
        message = f"holds one array without a name, and the model takes {self}"
        raise UsageError(message, where=where, hint="np.savez keeps arrays with their names")

    def check(
        self, forms: Mapping[str, Form], where: str, stored: Mapping[str, Form] | None = None
    ) -> None:
        """Check names, types and shapes of one call.

        Args:
            forms: Type and shape by name.
            where: The file or function, for messages.
            stored: What messages show where it is stored otherwise, as many calls in one array.

        Raises:
            UsageError: They do not fit. The message lists what there is and what is wanted.
        """
        self.check_names(forms, where)
        for name, (dtype, shape) in forms.items():
            problem = _type_problem(self.named(name), dtype) or _shape_problem(
                self.named(name), shape
            )
            if problem:
                raise self._mismatch(stored or forms, where, f"input {name}: {problem}")

    def check_names(self, forms: Mapping[str, Form], where: str) -> None:
        """Check that every required input is there, and nothing that is no input.

        Raises:
            UsageError: It is not so. The message lists what there is and what is wanted.
        """
        missing = [i.name for i in self.required if i.name not in forms]
        known = {i.name for i in self.inputs}
        extra = [name for name in forms if name not in known]
        parts = (("missing", missing), ("not in the model", extra))
        hint = "; ".join(f"{what}: {_listed(names)}" for what, names in parts if names)
        if hint:
            raise self._mismatch(forms, where, hint)

    def feeds(self, arrays: Mapping[str, npt.NDArray[Any]], where: str) -> Feeds:
        """Check the arrays of one call, and cast them to the types of the inputs.

        Raises:
            UsageError: They do not fit, or a value is too large for the type of its input.
        """
        self.check({name: (a.dtype, a.shape) for name, a in arrays.items()}, where)
        return {i.name: _cast(arrays[i.name], i, where) for i in self.inputs if i.name in arrays}

    def _mismatch(self, forms: Mapping[str, Form], where: str, hint: str) -> UsageError:
        found = _listed([f"{n} {d}{_shape_text(s)}" for n, (d, s) in forms.items()])
        message = f"holds {found}, and the model takes {self}"
        return UsageError(printable(message), where=where, hint=printable(hint))

    def __str__(self) -> str:
        return _listed([f"{i} (optional)" if i.optional else str(i) for i in self.inputs])


def read_signature(model: ir.Model) -> Signature:
    """Return the inputs of a model that arrays can be given to.

    Raises:
        UsageError: A required input is no tensor, or one of unknown type.
    """
    inputs = []
    for value in model.graph.inputs:
        name, optional = str(value.name), value.name in model.graph.initializers
        is_tensor = value.type is None or isinstance(value.type, ir.TensorType)
        if is_tensor and value.dtype not in (None, ir.DataType.UNDEFINED):
            assert value.dtype is not None
            inputs.append(Input(name, value.dtype, _dimensions(value.shape), optional))
        elif not optional:
            message = "is no tensor of a known type, and only tensors can be read from samples"
            raise UsageError(message, where=f"input {name}")
    return Signature(tuple(inputs))


def _dimensions(shape: ir.Shape | None) -> tuple[Dimension, ...] | None:
    if shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in shape)


def _type_problem(wanted: Input, dtype: np.dtype[Any]) -> str | None:
    if wanted.dtype == ir.DataType.STRING:
        return None if dtype.kind == "U" else f"{dtype} where text is taken"
    target = wanted.dtype.numpy()
    if dtype == target or _converts(dtype, target):
        return None
    return f"{dtype} does not become {target} without loss; convert it where it is made"


def _converts(dtype: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """Whether a cast is done without asking: between floats, and to wider integers."""
    if _is_float(dtype) and _is_float(target):
        return target.itemsize >= 2
    if dtype.kind in "biu" and target.kind in "iu":
        return bool(np.can_cast(dtype, target, "safe"))
    return bool(dtype.newbyteorder("=") == target)


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype == np.dtype(ml_dtypes.bfloat16)


def _shape_problem(wanted: Input, shape: tuple[int, ...]) -> str | None:
    if wanted.shape is None:
        return None
    if len(wanted.shape) != len(shape):
        return f"{len(shape)} dimensions where {len(wanted.shape)} are taken"
    for axis, (size, dim) in enumerate(zip(shape, wanted.shape, strict=True)):
        if isinstance(dim, int) and dim != size:
            return f"axis {axis} is {size} where {dim} is taken"
    return None


def _cast(array: npt.NDArray[Any], wanted: Input, where: str) -> npt.NDArray[Any]:
    if wanted.dtype == ir.DataType.STRING:
        return array
    target = wanted.dtype.numpy()
    if array.dtype == target:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(target)
    if _is_float(target) and target.itemsize < array.itemsize:
        lost = int((np.isfinite(array) & ~np.isfinite(result)).sum())
        if lost:
            message = f"{lost} values of input {wanted.name} are too large for {target}"
            raise UsageError(message, where=where, hint="scale them where they are made")
    return result


def _shape_text(shape: Sequence[Dimension]) -> str:
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return (", ".join(items[:_SHOWN]) or "nothing") + more
