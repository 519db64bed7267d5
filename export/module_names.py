"""Names of nodes and values that are the names of the module's parts.

The node that computes a part's product has its name: `model.layers.3.mlp.down_proj`, and so has
the value it computes. Further nodes of the part have the operator's name behind it:
`model.layers.3.mlp.down_proj/Add`. A part without a product, of one node and without parts of its
own, gives that node its name: `model.norm`.
"""

import ast
import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Final

import onnx
import onnx_ir as ir

from qcompiler.ir.dataflow import all_nodes, standard_domain, standard_opset
from qcompiler.ir.quantizable import Site, find_sites

NAME_SCOPES: Final = "pkg.torch.onnx.name_scopes"
_KEPT: Final = frozenset({NAME_SCOPES, "pkg.torch.onnx.class_hierarchy"})
_NO_MODULE: Final = "_empty_nn_module_stack"
_REPEATED_CALL: Final = re.compile(r"@\d+")


def module_of(node: ir.Node) -> str:
    """Return the name of the module that a node was exported from, empty for the outermost."""
    scopes = _scopes(node)
    inner = scopes[-2] if len(scopes) > 1 else ""
    # A module that is called twice is `name@1` the second time.
    return "" if inner.startswith(_NO_MODULE) else _REPEATED_CALL.sub("", inner)


def _scopes(node: ir.Node) -> list[str]:
    try:
        found = ast.literal_eval(node.metadata_props.get(NAME_SCOPES, "[]"))
    except (ValueError, SyntaxError):
        return []
    return [str(scope) for scope in found] if isinstance(found, list) else []


def name_after_modules(model: ir.Model, parameters: Collection[str]) -> None:
    """Name nodes, the values they compute and constants they alone read after the modules.

    Args:
        model: A graph of PyTorch's exporter, with its metadata. Inputs and outputs keep their
            names.
        parameters: Names of the module's tensors; initializers of these names keep them.
    """
    modules = _modules(model)
    _name_nodes(model, modules)
    _name_values(model)
    _name_constants(model, parameters)


def _modules(model: ir.Model) -> dict[ir.Node, str]:
    """Return each node's module; a node without metadata belongs to who reads its value."""
    modules: dict[ir.Node, str] = {}
    for node in reversed(list(all_nodes(model))):
        if NAME_SCOPES in node.metadata_props:
            modules[node] = module_of(node)
            continue
        readers = (use.node for output in node.outputs for use in output.uses())
        modules[node] = next((modules[r] for r in readers if r in modules), "")
    return modules


def _name_nodes(model: ir.Model, modules: dict[ir.Node, str]) -> None:
    taken: set[str] = set()
    nodes = list(all_nodes(model))
    bare = dict(_products(model, modules)) | dict(_single_nodes(modules))
    # Those that compute a product come first, so that no other node takes their names.
    for node in sorted(nodes, key=lambda node: node not in bare):
        name = bare.get(node, "")
        if not name or name in taken:
            owner = name or modules[node]
            name = f"{owner}/{node.op_type}" if owner else node.op_type
        node.name = _unique(name, taken)


def _products(model: ir.Model, modules: dict[ir.Node, str]) -> Iterator[tuple[ir.Node, str]]:
    sites, _ = find_sites(model)
    for site in sites:
        yield site.node, _owner(site, modules[site.node])


def _owner(site: Site, module: str) -> str:
    """Return whose product a node computes.

    That is the module it was exported from, unless the weight belongs to a part of that module:
    `torch.nn.MultiheadAttention` computes the product of its `out_proj` itself.
    """
    owner = (site.weight.name or "").rpartition(".")[0]
    inside = owner.startswith(f"{module}.") if module else bool(owner)
    return owner if inside else module


def _single_nodes(modules: dict[ir.Node, str]) -> Iterator[tuple[ir.Node, str]]:
    counts = Counter(modules.values())
    outer = {name.rpartition(".")[0] for name in counts}
    for name in list(outer):
        while name:
            outer.add(name)
            name = name.rpartition(".")[0]
    for node, module in modules.items():
        if counts[module] == 1 and module not in outer:
            yield node, module


def _name_values(model: ir.Model) -> None:
    fixed = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    taken = {value.name for value in fixed if value.name}
    for graph in model.graphs():
        taken |= {value.name for value in graph.inputs if value.name}
    outputs = [
        (node, output)
        for node in all_nodes(model)
        for output in node.outputs
        if output.name and not (output.is_graph_output() and output in model.graph.outputs)
    ]
    for node, output in outputs:
        several = len(node.outputs) > 1
        output.name = _unique(
            f"{node.name}.{output.index()}" if several else node.name or "", taken
        )


def _name_constants(model: ir.Model, parameters: Collection[str]) -> None:
    """Name a constant that only one input reads after that input: `norm/Pow.Y`."""
    initializers = model.graph.initializers
    taken = {value.name for value in initializers.values()} | {
        output.name for node in all_nodes(model) for output in node.outputs
    }
    opset = standard_opset(model)
    for name, value in list(initializers.items()):
        uses = list(value.uses())
        if name in parameters or not uses or value.is_graph_output():
            continue
        node, index = uses[0]
        alone = len(uses) == 1
        new = f"{node.name}.{_formal_name(node, index, opset)}" if alone else "constant"
        new = _unique(new, taken)
        value.name = new
        if value.const_value is not None:
            value.const_value.name = new


def _formal_name(node: ir.Node, index: int, opset: int) -> str:
    if standard_domain(node.domain) or not onnx.defs.has(node.op_type):
        return str(index)
    formals = onnx.defs.get_schema(node.op_type, opset, "").inputs
    return formals[index].name if index < len(formals) else str(index)


def _unique(name: str, taken: set[str] | set[str | None]) -> str:
    candidate, number = name, 0
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    taken.add(candidate)
    return candidate


def keep_module_names(model: ir.Model, of_graph: Collection[str]) -> None:
    """Drop what PyTorch noted beside module names: stack traces with paths, and its own graph.

    Args:
        model: The graph.
        of_graph: Keys of the graph's own metadata to keep.
    """
    for graph in model.graphs():
        _keep(graph.metadata_props, of_graph)
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
    _keep(model.metadata_props, ())
    for node in all_nodes(model):
        _keep(node.metadata_props, _KEPT)
        for output in node.outputs:
            output.metadata_props.clear()


def _keep(metadata: dict[str, str], keys: Collection[str]) -> None:
    for key in list(metadata):
        if key not in keys:
            del metadata[key]
