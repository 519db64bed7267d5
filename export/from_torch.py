"""PyTorch modules as graphs, through `torch.export` and PyTorch's own ONNX exporter.

PyTorch translates operators one by one. What it would do afterwards is done here instead, because
its optimizer copies weights, merges those that happen to be equal, and renames the rest.
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompiler.errors import ModelError, QCompilerError, UsageError
from qcompiler.export.module_names import keep_module_names, name_after_modules
from qcompiler.export.parameters import (
    fold_moved_parameters,
    is_parameter,
    merge_small_constants,
    merge_tied,
    refuse_without_values,
)
from qcompiler.ir.dataflow import standard_opset

if TYPE_CHECKING:
    import torch

OLDEST_OPSET: Final = 18
"""The version that PyTorch's translations of operators are written in."""
NEWEST_OPSET: Final = 24
"""The last one that PyTorch's exporter and ONNX Runtime both know."""
DYNAMIC_AXES: Final = "qcompiler.dynamic_axes"
"""Metadata of a graph: JSON, name of a dynamic axis to [smallest, largest or null]."""

_FOLDED_ELEMENTS: Final = 1 << 18
_MISSING_PACKAGE: Final = "pip install 'qcompiler[torch]'"
_MUTATIONS: Final = ("BUFFER_MUTATION", "PARAMETER_MUTATION", "USER_INPUT_MUTATION")


def from_torch(
    module: "torch.nn.Module | torch.export.ExportedProgram",
    example_inputs: Sequence[Any] = (),
    example_keywords: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int = 21,
) -> ir.Model:
    """Export a module for inference.

    The graph computes what the module computes, operator by operator; no weight is rounded,
    merged with another or copied. Weights are the module's own tensors, and are read when the
    graph is saved: the module must not change until then.

    - A weight that several modules share is one initializer, with the first of its names.
    - `torch.nn.Linear` becomes Gemm, or MatMul with a weight of [in, out] and Add.
    - Nodes and parameters have the module's names, see `module_names`.

    Args:
        module: The module; exported in inference mode and left in the mode it is in. Of an
            `ExportedProgram` the examples and dynamic shapes are its own.
        example_inputs: Positional arguments of one call.
        example_keywords: Keyword arguments of the same call.
        dynamic_shapes: Which axes of them are free, as `torch.export.export` takes it; strings
            in it name axes.
        input_names: Names for the graph's inputs, in the order of the flattened arguments.
        output_names: Names for the graph's outputs.
        opset: Version of the standard operators, 18 to 24.

    Returns:
        The graph; the metadata entry `DYNAMIC_AXES` of `model.graph` has the ranges of its axes.

    Raises:
        UsageError: torch is not installed, or names or opset cannot be used.
        ModelError: PyTorch cannot export the module, it writes to its own buffers or inputs, or
            its weights have no values (the meta device).
    """
    require_torch()
    _check_opset(opset)
    program = _translate(
        module, tuple(example_inputs), dict(example_keywords or {}), dynamic_shapes, opset
    )
    model: ir.Model = program.model
    exported = program.exported_program
    refuse_without_values(model)
    _refuse_mutations(exported)
    _set_names(model.graph.inputs, input_names, "inputs")
    _set_names(model.graph.outputs, output_names, "outputs")
    _record_dynamic_axes(model, exported)
    merge_tied(model, exported.state_dict)
    _simplify(model)
    fold_moved_parameters(model)
    common_passes.RemoveUnusedNodesPass()(model)
    name_after_modules(model, frozenset(exported.state_dict))
    keep_module_names(model, {DYNAMIC_AXES})
    if standard_opset(model) != opset:
        message = f"PyTorch wrote opset {standard_opset(model)} instead of {opset}"
        raise ModelError(message, hint=f"ask for opset {standard_opset(model)}")
    return model


def require_torch() -> None:
    """Raise UsageError where torch is not installed."""
    try:
        import torch.onnx  # noqa: F401 - only whether it can be
    except ImportError as error:
        message = "exporting a PyTorch module needs torch"
        raise UsageError(message, hint=_MISSING_PACKAGE) from error


def _check_opset(opset: int) -> None:
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        message = f"PyTorch's exporter does not write opset {opset}"
        hint = f"choose {OLDEST_OPSET} to {NEWEST_OPSET}"
        raise UsageError(message, where="opset", hint=hint)


def _translate(
    module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any], shapes: Any, opset: int
) -> Any:
    """Run PyTorch's exporter; it returns a `torch.onnx.ONNXProgram`."""
    import torch

    with inference_mode(module), _quiet():
        try:
            program = torch.onnx.export(
                module,
                inputs,
                kwargs=keywords or None,
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=opset,
                optimize=False,
                verbose=False,
            )
        except Exception as error:  # the exporter raises whatever its parts raise
            raise _cannot_export(module, error) from error
    if program is None or program.exported_program is None:
        message = "PyTorch's exporter returned no program"
        raise ModelError(message, where=type(module).__name__, hint="update torch")
    return program


def _cannot_export(module: Any, error: Exception) -> QCompilerError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    reason = f"{type(cause).__name__}: {lines[0][:300]}" if lines else type(cause).__name__
    message = f"PyTorch cannot export it: {reason}"
    hint = "torch.export.export(module, inputs) alone says more; check the example inputs"
    return ModelError(message, where=type(module).__name__, hint=hint)


@contextlib.contextmanager
def inference_mode(module: Any) -> Iterator[None]:
    """Put a module and its parts into inference mode, and each back into its own mode.

    Modules of an `ExportedProgram` have one mode, and other callables none; they stay as they are.
    """
    import torch

    parts = list(module.modules()) if isinstance(module, torch.nn.Module) else []
    training = [part for part in parts if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep PyTorch from warning of what no user of this function can change."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _refuse_mutations(exported: "torch.export.ExportedProgram") -> None:
    for spec in exported.graph_signature.output_specs:
        if spec.kind.name in _MUTATIONS:
            message = f"the module writes to {spec.target}, and a graph has no state"
            hint = "return the new value as an output, and take the old one as an input"
            raise ModelError(message, where=str(spec.target), hint=hint)


def _set_names(values: Sequence[ir.Value], names: Sequence[str] | None, what: str) -> None:
    if names is None:
        return
    if len(names) != len(values):
        message = f"{len(names)} names for {len(values)} {what}"
        has = ", ".join(value.name or "" for value in values)
        raise UsageError(message, where=what, hint=f"the graph has: {has}")
    if len(set(names)) != len(names) or "" in names:
        message = f"names of {what} must differ and not be empty"
        raise UsageError(message, where=what, hint=", ".join(names))
    for value, name in zip(values, names, strict=True):
        value.name = name


def _simplify(model: ir.Model) -> None:
    """Inline functions, fold what is constant but for weights, and remove what does nothing."""
    from onnxscript.optimizer import fold_constants
    from onnxscript.rewriter import RewritePass

    common_passes.InlinePass()(model)
    for _ in range(2):  # what the rules leave can be folded further
        fold_constants(
            model,
            onnx_shape_inference=True,
            input_size_limit=_FOLDED_ELEMENTS,
            output_size_limit=_FOLDED_ELEMENTS,
            should_fold=_without_parameters,
        )
        RewritePass(_exact_rules())(model)
        common_passes.RemoveUnusedNodesPass()(model)
    common_passes.IdentityEliminationPass()(model)
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    merge_small_constants(model)
    passes: tuple[Callable[..., Any], ...] = (
        common_passes.CommonSubexpressionEliminationPass,
        common_passes.RemoveUnusedNodesPass,
        common_passes.RemoveUnusedFunctionsPass,
        common_passes.RemoveUnusedOpsetsPass,
        common_passes.OutputFixPass,
    )
    for make in passes:
        make()(model)


def _exact_rules() -> Any:
    """Return the rewrites of onnxscript that change no bit of an output and read no weight."""
    from onnxscript.rewriter import RewriteRuleSet
    from onnxscript.rewriter.rules import common as rules

    return RewriteRuleSet(
        [
            rules.materialize_reshape_shape_rule,
            rules.no_op_cast_rule,
            rules.no_op_dynamic_scatter_nd_rule,
            rules.no_op_expand_rule,
            rules.no_op_static_scatter_nd_rule,
            rules.no_op_transpose_rule,
            rules.remove_optional_bias_from_conv_rule,
            rules.remove_optional_bias_from_conv_transpose_rule,
            rules.reshape_reshape_rule,
            rules.squeeze_reshape_1d_rule,
            rules.transpose_transpose_rule,
            rules.unsqueeze_unsqueeze_rule,
        ]
    )


def _without_parameters(node: ir.Node) -> bool | None:
    """Forbid folding of nodes that read a parameter; leave the rest to the pass."""
    return False if any(is_parameter(value) for value in node.inputs) else None


def _record_dynamic_axes(model: ir.Model, exported: "torch.export.ExportedProgram") -> None:
    """Write into the graph's metadata how long its dynamic axes may be."""
    names = exported.graph_signature.user_inputs
    examples = {
        node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"
    }
    tensors = [examples[name] for name in names if hasattr(examples.get(str(name)), "shape")]
    axes: dict[str, list[int | None]] = {}
    for value, tensor in zip(model.graph.inputs, tensors, strict=False):
        for size, dim in zip(tensor.shape, value.shape or (), strict=False):
            bounds = _bounds(size, exported)
            if bounds is not None and isinstance(dim, ir.SymbolicDim) and dim.value:
                axes.setdefault(dim.value, bounds)
    model.graph.metadata_props[DYNAMIC_AXES] = json.dumps(axes, sort_keys=True)


def _bounds(size: Any, exported: "torch.export.ExportedProgram") -> list[int | None] | None:
    expression = None if isinstance(size, int) else size.node.expr
    bounds = exported.range_constraints.get(expression)
    if bounds is None:
        return None
    upper = bounds.upper
    return [int(bounds.lower), int(upper) if upper.is_Integer else None]
