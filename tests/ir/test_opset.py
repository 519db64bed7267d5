"""Opset conversion keeps what a model computes, and its names."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qcompiler.errors import InternalError, ModelError
from qcompiler.ir.opset import REVIEWED_OPSET, OperatorChange, change_of, convert_opset
from qcompiler.ir.opset_adapters import ADAPTERS
from tests.support.opset_cases import CASES, OpsetCase

Array = npt.NDArray[Any]

_TOLERANCE = 1e-6
"""Of `|after - before|` against 1 + |before|: another kernel may add in another order."""

_NOT_COMPARED = {
    "Bernoulli": "random",
    "Multinomial": "random",
    "RandomNormal": "random",
    "RandomNormalLike": "random",
    "RandomUniform": "random",
    "RandomUniformLike": "random",
    "OptionalGetElement": "takes no tensor",
    "OptionalHasElement": "takes no tensor",
}
_NO_KERNEL = {
    ("GlobalLpPool", 25),
    ("MaxRoiPool", 25),
    ("RoiAlign", 25),
}
"""ONNX Runtime 1.32 runs these on the CPU up to opset 21 only."""


def _run(model: onnx.ModelProto) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    rng = np.random.default_rng(7)
    feeds = {value.name: _sample(value, rng) for value in session.get_inputs()}
    outputs: list[Array] = session.run(None, feeds)
    return outputs


def _sample(value: Any, rng: np.random.Generator) -> Array:
    shape = [dim if isinstance(dim, int) else 2 for dim in value.shape]
    if value.type == "tensor(float)":
        return rng.standard_normal(shape).astype(np.float32)
    if value.type == "tensor(bool)":
        return np.full(shape, True)
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    return rng.integers(1, 4, shape).astype(kind)


def _converted(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    graph = ir.from_proto(model)
    assert convert_opset(graph, version)
    return ir.to_proto(graph)


def _text(opset: int, body: str, *, extra: str = "", head: str = "") -> ir.Model:
    """Parse a model of the given nodes; `extra` are functions behind it, `head` more domains."""
    return ir.from_onnx_text(f'<ir_version: 8, opset_import: ["": {opset}{head}]>\n{body}\n{extra}')


@pytest.mark.parametrize("version", [21, 25])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_keeps_what_the_operator_computes(case: OpsetCase, version: int) -> None:
    if case.opset >= version:
        pytest.skip("written in a newer opset")
    if (case.operator, version) in _NO_KERNEL:
        pytest.skip("ONNX Runtime has no kernel of that version")
    model = case.model()
    before = _run(model)
    after = _run(_converted(model, version))
    for old, new in zip(before, after, strict=True):
        assert old.dtype == new.dtype
        np.testing.assert_allclose(new, old, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)


@pytest.mark.parametrize(
    "name",
    [
        "Softmax-1-11",
        "GroupNormalization-18",
        "GridSample-bicubic-16",
        "RoiAlign-10",
        "Clip-both-7",
        "DFT-default-17",
        'Resize-mode="nearest"-1,1,0.6,0.7-10',
    ],
)
def test_a_new_label_alone_is_noticed(name: str) -> None:
    """What the comparison above is worth: a relabelled model computes something else, or fails."""
    (case,) = [case for case in CASES if case.name == name]
    before = _run(case.model())
    relabelled = case.model()
    relabelled.opset_import[0].version = 21
    with pytest.raises(Exception, match=r"Not equal to tolerance|Mismatch|ONNXRuntimeError"):
        np.testing.assert_allclose(_run(relabelled)[0], before[0], rtol=_TOLERANCE)


def _known_changes() -> set[tuple[str, int]]:
    """Return operator and version of every change of ai.onnx since each operator's first."""
    versions: dict[str, list[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            versions.setdefault(schema.name, []).append(schema.since_version)
    return {(name, since) for name, all_of in versions.items() for since in sorted(all_of)[1:]}


def _widens(change: OperatorChange) -> bool:
    """Whether every node of the version before means the same in this one, by its schema."""
    return not (change.deprecated or change.attributes or change.defaults or any(change.types))


def test_every_operator_that_changed_has_a_case() -> None:
    changed = {name for name, version in _known_changes() if 7 < version <= 25}
    assert changed - {case.operator for case in CASES} == set(_NOT_COMPARED)


def test_every_change_of_form_has_an_adapter() -> None:
    """Of what is left, integers were taken from three operators, and such nodes are refused."""
    changes = {key: change_of(*key) for key in _known_changes() if 7 < key[1] <= REVIEWED_OPSET}
    bare = {key for key, change in changes.items() if change and not _widens(change)}
    assert bare - set(ADAPTERS) == {("Erf", 13), ("ReduceLogSum", 28), ("ReduceLogSumExp", 28)}


def test_the_installed_onnx_has_been_reviewed() -> None:
    """When this fails, read the changelog of the new opsets and raise REVIEWED_OPSET."""
    assert onnx.defs.onnx_opset_version() <= REVIEWED_OPSET


def test_keeps_names_metadata_and_weights() -> None:
    model = _text(
        9,
        """g (float[2,3,4] x) => (float[2,3,4] y) <float[4] w = {1,2,3,4}> {
          a = Add(x, w)  b = Clip<min=0.0>(a)  y = Softmax<axis=1>(b) }""",
    )
    for index, node in enumerate(model.graph):
        node.name = f"layer{index}"
        node.metadata_props["scope"] = f"scope{index}"
    weight = model.graph.initializers["w"].const_value
    assert convert_opset(model, 21)
    assert model.graph.initializers["w"].const_value is weight
    assert model.opset_imports == {"": 21}
    assert [value.name for value in model.graph.outputs] == ["y"]
    named = {node.name: node for node in model.graph}
    for index, op_type in enumerate(("Add", "Clip", "Softmax")):
        assert named[f"layer{index}"].op_type == op_type
    scopes = {node.metadata_props["scope"] for node in model.graph if node.op_type == "Constant"}
    assert scopes == {"scope1"}
    assert {node.name for node in model.graph if "/" in (node.name or "")} == {
        "layer1/min",
        "layer2/shape",
        "layer2/flat",
        "layer2/restored",
    }
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_softmax_of_unknown_rank_keeps_its_meaning() -> None:
    model = _text(
        11,
        """g (float[2,3,4] x, int64[n] s) => (float[] y) {
          r = Reshape(x, s)  y = Softmax<axis=1>(r) }""",
    )
    feeds = {
        "x": np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32),
        "s": np.array([3, 2, 2, 2]),
    }
    results = []
    for _ in range(2):
        proto = ir.to_proto(model)
        session = onnxruntime.InferenceSession(proto.SerializeToString())
        results.append(session.run(None, feeds)[0])
        convert_opset(model, 21)
    assert results[0].shape == (3, 2, 2, 2)
    np.testing.assert_allclose(results[1], results[0], rtol=1e-6)


def test_other_domains_pass_through() -> None:
    model = _text(
        11,
        "g (float[1,3] x) => (float[3] y) { z = com.microsoft.Gelu(x)  y = Squeeze<axes=[0]>(z) }",
        head=', "com.microsoft": 1',
    )
    assert convert_opset(model, 21)
    assert [node.op_type for node in model.graph] == ["Gelu", "Constant", "Squeeze"]
    assert model.opset_imports == {"": 21, "com.microsoft": 1}


def test_functions_are_converted() -> None:
    model = _text(
        11,
        "g (float[1,3] x) => (float[3] y) { y = local.f(x) }",
        head=', "local": 1',
        extra='<domain: "local", opset_import: ["": 11]> f (x) => (y) { y = Squeeze<axes=[0]>(x) }',
    )
    assert convert_opset(model, 21)
    (function,) = model.functions.values()
    assert function.opset_imports == {"": 21}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_a_function_parameter_that_became_an_input_is_refused() -> None:
    model = _text(
        11,
        "g (float[1,3] x) => (float[3] y) { y = local.f<axes=[0]>(x) }",
        head=', "local": 1',
        extra='<domain: "local", opset_import: ["": 11]> f <axes> (x) => (y)'
        " { y = Squeeze<axes: ints = @axes>(x) }",
    )
    with pytest.raises(ModelError, match="inline functions first"):
        convert_opset(model, 21)


@pytest.mark.parametrize("version", [18, 21])
def test_an_opset_that_is_high_enough_is_left_alone(version: int) -> None:
    model = _text(21, "g (float[3] x) => (float[3] y) { y = Relu(x) }")
    before = ir.to_proto(model).SerializeToString()
    assert not convert_opset(model, version)
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("version", [17, 29])
def test_only_reviewed_opsets_are_targets(version: int) -> None:
    model = _text(7, "g (float[3] x) => (float[3] y) { y = Relu(x) }")
    with pytest.raises(InternalError, match="not one to convert to"):
        convert_opset(model, version)


_REFUSED = {
    "scan of opset 8": (
        8,
        "g (float[1,3] a, float[1,4,3] x) => (float[] y, float[] z) {"
        " y, z = Scan<num_scan_inputs=1, body = b (float[3] s, float[3] e)"
        " => (float[3] t, float[3] o) { t = Add(s, e)  o = Identity(t) }>(, a, x) }",
        "batch axis",
    ),
    "batch norm by position": (
        7,
        "g (float[1,2,3] x, float[2,3] s) => (float[] y)"
        " { y = BatchNormalization<spatial=0>(x, s, s, s, s) }",
        "spatial=0",
    ),
    "batch norm in training": (
        9,
        "g (float[1,2,3] x, float[2] s) => (float[] y, float[] m)"
        " { y, m = BatchNormalization(x, s, s, s, s) }",
        "training",
    ),
    "dropout mask": (
        7,
        "g (float[3] x) => (float[] y, float[] m) { y, m = Dropout(x) }",
        "its mask is used",
    ),
    "computed nearest scales": (
        10,
        'g (float[1,1,3,3] x, float[4] s) => (float[] y) { y = Resize<mode="nearest">(x, s) }',
        "computed while it runs",
    ),
    "mixed nearest scales": (
        10,
        "g (float[1,1,4,4] x) => (float[] y) <float[4] s = {1,1,2,0.5}>"
        ' { y = Resize<mode="nearest">(x, s) }',
        "round differently",
    ),
    "unknown channels": (
        18,
        "g (float[n,c,3,3] x, float[2] s) => (float[] y)"
        " { y = GroupNormalization<num_groups=2>(x, s, s) }",
        "number of channels",
    ),
    "integer Erf": (9, "g (int32[3] x) => (int32[] y) { y = Erf(x) }", "no longer takes int32"),
    "linear tf_half_pixel_for_nn": (
        11,
        "g (float[1,1,4,4] x) => (float[] y) <float[4] s = {1,1,2,2}, float[0] r = {}>"
        ' { y = Resize<mode="linear",'
        ' coordinate_transformation_mode="tf_half_pixel_for_nn">(x, r, s) }',
        "nearest with floor",
    ),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_refuses_and_names_the_node(name: str) -> None:
    opset, body, reason = _REFUSED[name]
    model = _text(opset, body)
    node = next(iter(model.graph))
    node.name = "culprit"
    with pytest.raises(ModelError, match=reason) as caught:
        convert_opset(model, 21)
    assert caught.value.where == "node 'culprit'"
    assert node.op_type in caught.value.message
    assert "export the model with opset" in (caught.value.hint or "")
