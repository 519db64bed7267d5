"""What values inside a graph hold on one call, of any type."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from qcompiler.execution.sessions import Array, open_session
from qcompiler.execution.taps import keep_only
from qcompiler.ir.editing import fresh_name, value_names, values_of
from qcompiler.ir.shapes import infer_shapes


def shapes_at(
    model: ir.Model,
    names: Sequence[str],
    feeds: Mapping[str, Array],
    *,
    threads: int | None = None,
    custom_op_libraries: Sequence[Path] = (),
) -> dict[str, tuple[int, ...]]:
    """Run a model once and return the shapes of some of its values.

    Args:
        model: The model; not changed.
        names: Values of its main graph that are not constant.
        feeds: A value for every input.
        threads: Threads of one operator; None leaves it to ONNX Runtime.
        custom_op_libraries: Shared libraries with the kernels of custom operators.

    Raises:
        TargetError: ONNX Runtime cannot load or run the model.
    """
    found = {name: feeds[name].shape for name in names if name in feeds}
    copy, wanted = _reduced(model, [name for name in names if name not in feeds])
    taken = value_names(copy)
    outputs: dict[str, str] = {}
    for value in wanted:
        name = fresh_name(f"{value.name}:shape", taken)
        output = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64))
        copy.graph.append(ir.Node("", "Shape", [value], outputs=[output], name=name))
        copy.graph.outputs.append(output)
        outputs[value.name or ""] = name
    results = _run(copy, feeds, threads, custom_op_libraries)
    for name, output_name in outputs.items():
        found[name] = tuple(int(size) for size in results[output_name])
    return found


def values_at(
    model: ir.Model,
    names: Sequence[str],
    feeds: Mapping[str, Array],
    *,
    threads: int | None = None,
    custom_op_libraries: Sequence[Path] = (),
) -> dict[str, Array]:
    """Run a model once and return some of its values; arguments are those of `shapes_at`.

    Raises:
        TargetError: ONNX Runtime cannot load or run the model.
    """
    found = {name: feeds[name] for name in names if name in feeds}
    copy, wanted = _reduced(model, [name for name in names if name not in feeds])
    if any(value.type is None for value in wanted):
        infer_shapes(copy)
    copy.graph.outputs.extend(wanted)
    return found | _run(copy, feeds, threads, custom_op_libraries)


def _reduced(model: ir.Model, names: Sequence[str]) -> tuple[ir.Model, list[ir.Value]]:
    """Return a copy with what computes some values and no outputs, and these values in it."""
    copy = model.clone()
    values = {value.name: value for value in values_of(copy.graph)}
    wanted = [values[name] for name in dict.fromkeys(names)]
    keep_only(copy.graph, wanted)
    return copy, wanted


def _run(
    model: ir.Model,
    feeds: Mapping[str, Array],
    threads: int | None,
    custom_op_libraries: Sequence[Path],
) -> dict[str, Array]:
    if not model.graph.outputs:
        return {}
    with open_session(
        model, optimize=False, threads=threads, custom_op_libraries=custom_op_libraries
    ) as session:
        return session.run(feeds)
    raise AssertionError  # a Session swallows nothing
