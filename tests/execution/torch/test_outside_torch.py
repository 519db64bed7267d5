"""Nodes that run in other evaluators."""

import ml_dtypes
import numpy as np
import pytest
import torch

from qcompiler.errors import ModelError
from qcompiler.execution.torch import Program
from qcompiler.execution.torch.element_types import to_numpy
from tests.support.graphs import Array, build, random_array
from tests.support.parity import run_model

_CONTRIB = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n'
# An op on strings never runs in PyTorch, and CDist is no op of exporters.
_TEXTS = "g (string[2] a, string[2] b) => (string[] y) { y = StringConcat(a, b) }"
_DISTANCES = """
  g (float[2, 3] a, float[4, 3] b) => (float[] y, float[] z) {
    y = com.microsoft.CDist<metric = "sqeuclidean">(a, b)
    z = Neg(a)
  }
"""


def _distances(dtype: torch.dtype | None = None) -> Program:
    program = Program.from_subgraph(build(_CONTRIB + _DISTANCES), dtype=dtype)
    assert len(program.outside_torch) == 1
    assert "CDist" in program.outside_torch[0]
    return program


def _points() -> dict[str, Array]:
    return {"a": random_array(2, 3), "b": random_array(4, 3, seed=1)}


def test_strings_go_through_the_reference_evaluator() -> None:
    program = Program.from_subgraph(build(_TEXTS))

    result = program({"a": np.array(["x", "y"], object), "b": np.array(["1", "2"], object)})["y"]

    assert len(program.outside_torch) == 1
    assert to_numpy(result).tolist() == ["x1", "y2"]


def test_large_unsigned_integers_keep_their_type() -> None:
    model = build("g (uint64[2] a) => (uint64[] y) { y = Mul(a, a) }")
    program = Program.from_subgraph(model)

    result = program({"a": np.array([3, 1 << 32], np.uint64)})["y"]

    assert program.outside_torch
    assert result.dtype == torch.uint64
    assert to_numpy(result).tolist() == [9, 0]


def test_an_op_of_another_domain_goes_through_onnx_runtime() -> None:
    wanted = run_model(build(_CONTRIB + _DISTANCES), _points())

    result = _distances()(_points())["y"]

    np.testing.assert_array_equal(to_numpy(result), wanted["y"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_have_the_program_s_type(dtype: torch.dtype) -> None:
    exact = _distances()(_points())["y"]

    result = _distances(dtype)(_points())["y"]

    assert result.dtype == dtype
    assert torch.allclose(result.float(), exact, rtol=0.02, atol=0.02)


def test_a_type_that_the_model_does_not_declare_comes_from_the_first_run() -> None:
    text = """
      g (float[2, 3] a, float[4, 3] b) => (float[] y) {
        m = Neg(a)
        y = com.microsoft.CDist<metric = "sqeuclidean">(m, b)
      }
    """
    feeds = _points()

    result = Program.from_subgraph(build(_CONTRIB + text))(feeds)["y"]

    wanted = ((-feeds["a"][:, None] - feeds["b"]) ** 2).sum(-1)
    np.testing.assert_allclose(to_numpy(result), wanted, rtol=1e-5)


def test_a_gradient_that_has_to_cross_is_an_error_that_names_the_node() -> None:
    a = torch.ones(2, 3, requires_grad=True)
    results = _distances()({**_points(), "a": a})

    with pytest.raises(ModelError, match=r"CDist.*no gradient passes"):
        torch.autograd.grad(results["y"].sum(), a)


def test_a_gradient_that_passes_by_is_none_of_its_business() -> None:
    a = torch.ones(2, 3, requires_grad=True)
    results = _distances()({**_points(), "a": a})

    (gradient,) = torch.autograd.grad(results["z"].sum(), a)

    assert torch.equal(gradient, -torch.ones(2, 3))


def test_a_gradient_stops_at_integers() -> None:
    text = """
      g (float[2] a, string[1] t) => (float[] y) {
        b = Cast<to = 8>(a)
        c = StringConcat(b, t)
        d = Cast<to = 1>(c)
        y = Mul(a, d)
      }
    """
    a = torch.tensor([1.0, 2.0], requires_grad=True)

    result = Program.from_subgraph(build(text))({"a": a, "t": np.array(["5"], object)})["y"]
    (gradient,) = torch.autograd.grad(result.sum(), a)

    assert gradient.tolist() == (result / a).tolist()


def test_refuses_an_op_that_nobody_knows() -> None:
    text = '<ir_version: 10, opset_import: ["" : 21, "nowhere" : 1]>\n'
    text += "g (float[2] a) => (float[] y) { y = nowhere.Guess(a) }"

    with pytest.raises(ModelError, match="neither PyTorch nor the reference evaluator"):
        Program.from_subgraph(build(text))


def test_refuses_an_unknown_op_with_a_body() -> None:
    text = '<ir_version: 10, opset_import: ["" : 21, "nowhere" : 1]>\n'
    text += """
      g (float[2] a) => (float[] y) {
        y = nowhere.Each<body = b (float[2] u) => (float[2] v) { v = Neg(u) }>(a)
      }
    """

    with pytest.raises(ModelError, match="nodes with bodies run in PyTorch only"):
        Program.from_subgraph(build(text))


@pytest.mark.parametrize("name", ["bfloat16", "int4", "uint2", "float8_e4m3fn"])
def test_types_of_few_bits_arrive_as_the_evaluator_has_them(name: str) -> None:
    kind = {"float8_e4m3fn": "float8e4m3fn"}.get(name, name)
    values = np.array([1, 0, 1]).astype(getattr(ml_dtypes, name))
    text = f"g ({kind}[3] x, string[1] t) => (string[] y) {{ y = Cast<to = 8>(x) }}"
    program = Program.from_subgraph(build(text, opset=25))

    found = to_numpy(program({"x": values, "t": np.array(["a"], object)})["y"])

    assert [float(each) for each in found.tolist()] == [1, 0, 1]


def test_sequences_come_and_go() -> None:
    text = 'g (string[1] a) => (string[] y, int64[] n) { y, n = StringSplit<delimiter = ",">(a) }'

    results = Program.from_subgraph(build(text))({"a": np.array(["p,q,r"], object)})

    assert to_numpy(results["y"]).tolist() == [["p", "q", "r"]]
    assert results["n"].tolist() == [3]
