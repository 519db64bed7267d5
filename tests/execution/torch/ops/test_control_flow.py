"""If, Loop and Scan."""

import numpy as np
import pytest
import torch

from qcompiler.errors import ModelError
from qcompiler.execution.torch import Program
from tests.support.graphs import build, random_array
from tests.support.torch_programs import agrees_with_runtime, gradients_agree, run_program

_BRANCHES = """
  g (bool c, {kind}[3] x, {kind}[3] w) => ({kind}[] y) {{
    h = Mul(x, w)
    y = If(c) <
      then_branch = yes () => ({kind}[3] a) {{ a = Mul(h, x) }},
      else_branch = no () => ({kind}[3] b) {{ k = Sin(h) b = Add(k, bias) }}
    >
  }}
"""

_LOOP = """
  g ({kind}[2] x, {kind}[2] w) => ({kind}[] y, {kind}[] s) {{
    y, s = Loop(n, go, x) <body = step (int64 i, bool c, {kind}[2] a)
      => (bool d, {kind}[2] o, {kind}[2] z) {{
        z = Mul(a, w)
        t = Sin(z)
        o = Add(t, x)
        d = Less(i, last)
      }}>
  }}
"""

_NESTED = """
  g ({kind}[2] x, int64 n) => ({kind}[] y, int64[] counts) {{
    y, counts = Loop(n, , x) <body = outer (int64 i, bool c, {kind}[2] a)
      => (bool d, {kind}[2] o, int64 seen) {{
        d = Identity(c)
        seen = Identity(i)
        even = Less(i, two)
        o = If(even) <
          then_branch = deep () => ({kind}[2] p) {{
            p = Loop(two, , a) <body = inner (int64 j, bool e, {kind}[2] b)
              => (bool f, {kind}[2] q) {{ f = Identity(e) t = Mul(b, x) q = Add(t, a) }}>
          }},
          else_branch = flat () => ({kind}[2] r) {{ r = Sin(a) }}
        >
      }}>
  }}
"""

_SCAN = """
  g ({kind}[2] h, {kind}[3, 2] x, {kind}[2, 3] v) => ({kind}[] last, {kind}[] all, {kind}[] back) {{
    last, all, back = Scan<
      num_scan_inputs = 2, scan_input_axes = [0, -1], scan_input_directions = [0, 1],
      scan_output_axes = [1, 0], scan_output_directions = [0, 1],
      body = step ({kind}[2] s, {kind}[2] u, {kind}[2] t)
        => ({kind}[2] n, {kind}[2] o, {kind}[2] p) {{
          m = Mul(s, u)
          n = Add(m, t)
          o = Sin(n)
          p = Mul(t, h)
        }}>(h, x, v)
  }}
"""


def _loop_weights(last: int = 2) -> dict[str, np.ndarray]:
    return {"n": np.array(5), "go": np.array(True), "last": np.array(last)}


@pytest.mark.parametrize("condition", [True, False])
def test_if_runs_one_branch_with_what_it_captures(condition: bool) -> None:
    feeds = {"c": np.array(condition), "x": random_array(3), "w": random_array(3, seed=1)}
    wide = {name: each if name == "c" else each.astype(float) for name, each in feeds.items()}

    bias = np.array([1, 2, 3])
    agrees_with_runtime(
        _BRANCHES.format(kind="float"), feeds, {"bias": bias.astype(np.float32)}, tolerance=1e-6
    )
    gradients_agree(_BRANCHES.format(kind="double"), wide, {"bias": bias.astype(float)})


def test_loop_stops_at_a_false_condition() -> None:
    feeds = {"x": random_array(2), "w": random_array(2, seed=1)}
    text = _LOOP.format(kind="float")

    assert run_program(text, feeds, _loop_weights())["s"].shape == (3, 2)
    agrees_with_runtime(text, feeds, _loop_weights(), tolerance=1e-6)
    agrees_with_runtime(text, feeds, _loop_weights(last=99), tolerance=1e-6)


def test_gradients_pass_through_a_loop_to_carried_and_captured_values() -> None:
    feeds = {name: random_array(2, dtype=np.float64, seed=at) for at, name in enumerate("xw")}

    gradients_agree(_LOOP.format(kind="double"), feeds, _loop_weights())


def test_loop_that_never_runs_returns_what_it_was_given() -> None:
    feeds = {"x": random_array(2), "w": random_array(2, seed=1)}
    weights = {**_loop_weights(), "n": np.array(0)}

    found = run_program(_LOOP.format(kind="float"), feeds, weights)

    np.testing.assert_array_equal(found["y"], feeds["x"])
    assert found["s"].shape[0] == 0
    assert found["s"].dtype == np.float32


@pytest.mark.parametrize("trips", [1, 4])
def test_bodies_in_bodies_reach_outwards(trips: int) -> None:
    feeds = {"x": random_array(2), "n": np.array(trips)}
    wide = {"x": feeds["x"].astype(np.float64), "n": feeds["n"]}
    weights = {"two": np.array(2)}

    agrees_with_runtime(_NESTED.format(kind="float"), feeds, weights, tolerance=1e-6)
    gradients_agree(_NESTED.format(kind="double"), wide, weights)


def test_loop_carries_sequences() -> None:
    text = """
      g (float[2] x, int64 n) => (float[] y) {
        s = SequenceConstruct(x)
        t = Loop(n, , s) <body = step (int64 i, bool c, seq(float[2]) a)
          => (bool d, seq(float[2]) o) {
            d = Identity(c)
            last = SequenceAt(a, end)
            twice = Add(last, last)
            o = SequenceInsert(a, twice)
          }>
        y = ConcatFromSequence<axis = 0>(t)
      }
    """
    feeds = {"x": random_array(2), "n": np.array(3)}

    agrees_with_runtime(text, feeds, {"end": np.array(-1)}, tolerance=0)


def test_live_weights_reach_into_bodies() -> None:
    model = build(_BRANCHES.format(kind="float"), {"bias": np.zeros(3, np.float32)})
    live = torch.ones(3, requires_grad=True)
    feeds = {"c": np.array(False), "x": random_array(3), "w": random_array(3)}

    result = Program.from_subgraph(model)(feeds, weights={"bias": live})["y"]

    assert torch.equal(torch.autograd.grad(result.sum(), live)[0], torch.ones(3))


def test_scan_goes_along_axes_in_both_directions() -> None:
    shapes = {"h": (2,), "x": (3, 2), "v": (2, 3)}
    feeds = {name: random_array(*shape, seed=at) for at, (name, shape) in enumerate(shapes.items())}
    wide = {name: each.astype(np.float64) for name, each in feeds.items()}

    agrees_with_runtime(_SCAN.format(kind="float"), feeds, tolerance=1e-6)
    gradients_agree(_SCAN.format(kind="double"), wide)


def test_scan_over_nothing_returns_what_is_declared() -> None:
    text = """
      g (float[2] h, float[0, 2] x) => (float[2] last, float[0, 2] all) {
        last, all = Scan<num_scan_inputs = 1, body = step (float[2] s, float[2] u)
          => (float[2] n, float[2] o) { n = Add(s, u) o = Neg(n) }>(h, x)
      }
    """

    found = run_program(text, {"h": np.ones(2, np.float32), "x": np.ones((0, 2), np.float32)})

    assert found["last"].tolist() == [1, 1]
    assert found["all"].shape == (0, 2)


_OLD_SCAN = """
  g ({kind}[2, 1] h, {kind}[2, 3, 1] x) => ({kind}[2, 1] last, {kind}[2, 3, 1] all) {{
    last, all = Scan<num_scan_inputs = 1{further},
      body = step ({kind}[1] s, {kind}[1] u) => ({kind}[1] n, {kind}[1] o) {{
        n = Add(s, u)
        o = Mul(n, n)
      }}>({lengths}, h, x)
  }}
"""


def test_scan_of_version_8_starts_anew_for_every_batch_element() -> None:
    feeds = {
        "h": random_array(2, 1, dtype=np.float64),
        "x": random_array(2, 3, 1, dtype=np.float64, seed=1),
    }
    whole = _OLD_SCAN.format(kind="double", further="", lengths="")
    parts = _OLD_SCAN.format(kind="double", further="", lengths="n")
    lengths = {"n": np.array([3, 2])}

    found = run_program(whole, feeds, opset=8)
    sums = feeds["h"][:, None] + np.cumsum(feeds["x"], 1)
    np.testing.assert_allclose(found["last"], sums[:, -1])
    np.testing.assert_allclose(found["all"], sums**2)

    found = run_program(parts, feeds, lengths, opset=8)
    np.testing.assert_allclose(found["last"], [sums[0, 2], sums[1, 1]])
    np.testing.assert_allclose(found["all"][1, :2], sums[1, :2] ** 2)
    gradients_agree(parts, feeds, lengths, opset=8)


def test_scan_of_version_8_refuses_lengths_backwards() -> None:
    text = _OLD_SCAN.format(kind="float", further=", directions = [1]", lengths="n")
    program = Program.from_subgraph(build(text, {"n": np.array([3, 2])}, opset=8))

    with pytest.raises(ModelError, match="different lengths"):
        program({"h": random_array(2, 1), "x": random_array(2, 3, 1)})
