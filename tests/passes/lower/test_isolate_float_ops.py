"""What was left in float between quantized values stays there."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.passes.lower.isolate_float_ops import IsolateFloatOps
from tests.support.calibrated import compile_calibrated
from tests.support.calibrated import conv_weight as cw
from tests.support.graphs import build, node_named, op_types
from tests.support.parity import assert_parity, random_feeds
from tests.support.rewrites import assert_idempotent, run_pass

PARTS: dict[str, Any] = {"s": np.float32(0.05), "z": np.uint8(128), "w": cw(8, 8, 3, 3)}
CONV = "[op] m = Conv(d, w)"


def model(
    node: str = CONV, *, scheme: str | None = "float", after: str = "r = Relu(m)"
) -> ir.Model:
    text = f"""g (float[N, 8, 6, 6] x) => (float[N, 8, h, v] y) {{
        p = QuantizeLinear(x, s, z) d = DequantizeLinear(p, s, z)
        {node} {after}
        q = QuantizeLinear(r, s, z) y = DequantizeLinear(q, s, z) }}"""
    made = build(text, PARTS)
    if scheme:
        node_named(made, "op").metadata_props["qcompiler.scheme"] = scheme
    return made


@pytest.mark.parametrize("after", ["r = Relu(m)", "r = Identity(m)", "r = Add(m, m)"])
@pytest.mark.parametrize("scheme", ["float", "w8a16:sym"])
def test_rewrites(scheme: str, after: str, tmp_path: Path) -> None:
    made = model(scheme=scheme, after=after)
    result = run_pass(IsolateFloatOps(), made, tmp_path)
    expected = [] if "Identity" in after else ["op"]
    assert [rewrite.node for rewrite in result.rewrites] == expected
    if expected:
        assert op_types(made)[2:4] == ["Concat", "Conv"]
        assert node_named(made, "op").inputs[0].name == "d.copy"  # type: ignore[union-attr]
        assert_parity(model(scheme=scheme, after=after), made, tolerance=0)


@pytest.mark.parametrize("node", ["AveragePool<kernel_shape=[2,2]>(d)", "Softmax<axis=1>(d)"])
def test_ops_without_weights_need_no_scheme(node: str, tmp_path: Path) -> None:
    made = model(f"[op] m = {node}", scheme=None)
    assert len(run_pass(IsolateFloatOps(), made, tmp_path).rewrites) == 1


def test_leaves_ops_on_integers_alone(tmp_path: Path) -> None:
    made = model(scheme="w8a8:sym")
    node_named(made, "op").metadata_props["qcompiler.placement"] = "conv"
    assert run_pass(IsolateFloatOps(), made, tmp_path).rewrites == ()


@pytest.mark.parametrize("node", ["[op] m = Conv(x, w)", "[op] m = Tanh(d)"])
def test_leaves_other_ops_alone(node: str, tmp_path: Path) -> None:
    assert run_pass(IsolateFloatOps(), model(node), tmp_path).rewrites == ()


def test_is_idempotent(tmp_path: Path) -> None:
    assert_idempotent(IsolateFloatOps(), model(), tmp_path)


POOLS = ["ceil_mode=1,count_include_pad=1", "dilations=[2,2]"]


@pytest.mark.parametrize("attributes", POOLS)
def test_pools_with_a_wrong_kernel_stay_in_float(attributes: str, tmp_path: Path) -> None:
    pads = "pads=[1,1,1,1]"
    text = f"""g (float[N,8,9,9] x) => (float[N,8,h,v] y) {{ a=Conv<{pads}>(x,w)
        m=AveragePool<kernel_shape=[2,2],strides=[2,2],{attributes}>(a) y=Conv<{pads}>(m,w) }}"""
    made_from = build(text, {"w": PARTS["w"]})
    made = compile_calibrated(made_from, random_feeds(made_from, 0), tmp_path)
    assert "AveragePool" in made.ops
    assert made.kernel_loss_db() > 100
