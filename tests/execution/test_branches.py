"""Copies of parts of a graph beside the original."""

import numpy as np
import onnx_ir as ir

from qcompiler.execution.branches import Branch, BranchedModel
from qcompiler.execution.sessions import open_session
from qcompiler.execution.taps import Measure, Tap, tap_model
from qcompiler.rewriting.structure import structural_faults
from tests.support.graphs import Array, build, op_types, random_array, serialized

X = random_array(3, 4, seed=9)
W, V = random_array(4, 4, seed=1), random_array(4, 4, seed=2)


def residual() -> ir.Model:
    return build(
        """g (float[3, 4] x) => (float[3, 4] y) {
            [one] a = MatMul(x, w)
            [two] b = MatMul(a, v)
            [sum] c = Add(b, x)
            [relu] y = Relu(c) }""",
        {"w": W, "v": V},
    )


def run(model: ir.Model, values: list[str]) -> list[Array]:
    tapped = tap_model(model, [Tap(name, Measure.VALUES) for name in values])
    with open_session(tapped.model, optimize=False, threads=1) as session:
        found = session.run({"x": X})
    return [found[name] for name in tapped.outputs.values()]


def double(branch: Branch) -> None:
    """Let the weight of the branch's op be twice as large."""
    (node,) = branch.nodes
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() * 2, name=weight.name)


def name_of(branch: Branch, value: str) -> str:
    return branch.values[value].name or ""


def test_a_branch_computes_what_the_model_does_until_it_is_changed() -> None:
    source = residual()
    before = serialized(source)
    branched = BranchedModel(source)
    branch = branched.add(["one"], ["y"])
    assert list(structural_faults(branched.model)) == []
    truth, copy = run(branched.model, ["y", name_of(branch, "y")])
    np.testing.assert_array_equal(copy, truth)
    double(branch)
    truth, copy = run(branched.model, ["y", name_of(branch, "y")])
    np.testing.assert_allclose(truth, np.maximum(X @ W @ V + X, 0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(copy, np.maximum(X @ (2 * W) @ V + X, 0), rtol=1e-5, atol=1e-5)
    assert serialized(source) == before


def test_branches_do_not_touch_each_other() -> None:
    branched = BranchedModel(residual())
    first, second = branched.add(["one"], ["y"]), branched.add(["two"], ["y"])
    double(second)
    truth, one, two = run(branched.model, ["y", name_of(first, "y"), name_of(second, "y")])
    np.testing.assert_array_equal(one, truth)
    np.testing.assert_allclose(two, np.maximum(2 * (X @ W @ V) + X, 0), rtol=1e-5, atol=1e-5)


def test_only_what_depends_on_the_op_and_leads_to_the_place_is_copied() -> None:
    branched = BranchedModel(residual())
    branched.add(["two"], ["c"])
    assert op_types(branched.model) == ["MatMul", "MatMul", "Add", "Relu", "MatMul", "Add"]
    assert set(branched.model.graph.initializers) == {"w", "v", "branch0:v"}


def test_a_place_before_the_op_is_left_out() -> None:
    branched = BranchedModel(residual())
    assert branched.add(["two"], ["a"]).values == {}
    assert len(list(branched.model.graph)) == 4


def test_ops_that_share_a_weight_through_a_transpose_branch_together() -> None:
    model = build(
        """g (int64[3] i) => (float[3, 4] y) {
            [look] e = Gather(w, i)
            [flip] t = Transpose<perm=[1, 0]>(w)
            [head] y = MatMul(e, t) }""",
        {"w": W},
    )
    branched = BranchedModel(model)
    branch = branched.add(["look", "head"], ["y"])
    assert [node.op_type for node in branch.nodes] == ["Gather", "MatMul"]
    assert op_types(branched.model).count("Transpose") == 2
    assert list(branched.model.graph.initializers) == ["w", "branch0:w"]
    assert {use.node.name for use in branched.model.graph.initializers["w"].uses()} == {
        "look",
        "flip",
    }


def test_ops_in_bodies_branch_with_their_owner() -> None:
    model = build(
        """g (float[3, 4] x, bool c) => (float[3, 4] y) {
            [if] y = If(c) <
                then_branch = t () => (float[3, 4] u) { [inner] u = MatMul(x, w) },
                else_branch = e () => (float[3, 4] n) { [other] n = Relu(x) }> }""",
        {"w": W},
    )
    branched = BranchedModel(model)
    branch = branched.add(["inner"], ["y"])
    assert list(structural_faults(branched.model)) == []
    assert [node.name for node in branch.nodes] == ["branch0:inner"]
    double(branch)
    tapped = tap_model(
        branched.model, [Tap(n, Measure.VALUES) for n in ("y", name_of(branch, "y"))]
    )
    with open_session(tapped.model, optimize=False, threads=1) as session:
        truth, copy = session.run({"x": X, "c": np.array(True)}).values()
    np.testing.assert_allclose(
        sorted([truth.sum(), copy.sum()], key=abs)[1], 2 * (X @ W).sum(), rtol=1e-4
    )
