"""Graphs that are easy to get wrong, compiled with calibrated activations as a user would."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.observers import Observer
from qcompiler.compile import compile_model
from qcompiler.errors import UsageError
from qcompiler.execution.sessions import open_session
from qcompiler.options import CalibrationOptions, CompileOptions
from tests.support.calibrated import compile_calibrated, distance_db
from tests.support.calibrated import conv_weight as cw
from tests.support.graphs import build, random_array
from tests.support.parity import random_feeds, run_model

P = "pads=[1,1,1,1]"
X = "float[N,8,8,8] x"
Y, Z = "float[N,16,h,w] y", "float[N,16,h,w] z"
W: dict[str, Any] = {"w1": cw(16, 8, 3, 3), "w2": cw(16, 16, 3, 3, seed=1)}
W |= {"w3": cw(16, 16, 3, 3, seed=2), "wd": cw(16, 1, 3, 3, seed=3), "w4": cw(16, 32, 3, 3, seed=4)}
W |= {"k": random_array(16, 1, 1), "zero": np.float32(0), "six": np.float32(6)}
W |= {"m1": random_array(64, 48) / 8, "m2": random_array(48, 32, seed=1) / 7}
W |= {"c1": random_array(48, seed=4), "p1": cw(16, 16, 1, 1, seed=5), "b16": random_array(16)}
C1, REST = f"a=Conv<{P}>(x,w1)", f"y=Conv<{P}>(m,w2)"
BRANCHES = """z = If (c) < then_branch = yes () => (float[N,16,8,8] t) { t = Neg(%s) },
    else_branch = no () => (float[N,16,8,8] e) { e = %s } >"""
LOW_OPSET = 13

GRAPHS = {
    "residual": f"{C1} b=Relu(a) c=Conv<{P}>(b,w2) d=Add(c,b) m=Relu(d) {REST}",
    "concat with a float branch": f"{C1} t=Tanh(a) m=Concat<axis=1>(a,t) y=Conv<{P}>(m,w4)",
    "relu read by two": f"{C1} m=Relu(a) {REST} z=Tanh(m)",
    "conv read before and after relu": f"{C1} m=Relu(a) {REST} z=Conv<{P}>(a,w3)",
    "shared weights": f"{C1} m=Conv<{P}>(a,w2) {REST}",
    "input read by conv and float": f"{C1} m=Relu(a) {REST} z=Tanh(x)",
    "captured": f"{C1} m=Relu(a) {REST} " + BRANCHES % ("m", "Tanh(m)"),
    "captured by a conv": f"{C1} m=Relu(a) {REST} " + BRANCHES % ("a", f"Conv<{P}>(m,w3)"),
    "max pool after relu": f"{C1} r=Relu(a) m=MaxPool<kernel_shape=[2,2],strides=[2,2]>(r) {REST}",
    "split": f"{C1} s,t=Split<axis=1,num_outputs=2>(a) y=Conv<{P}>(s,w1) z=Conv<{P}>(t,w1)",
    "split with a float half": f"{C1} s,t=Split<axis=1,num_outputs=2>(a) y=Conv<{P}>(t,w1) "
    "z=Tanh(s)",
    "depthwise and clip": f"{C1} r=Relu(a) c=Conv<{P},group=16>(r,wd) m=Clip(c,zero,six) {REST}",
    "leaky relu": f"{C1} m=LeakyRelu<alpha=0.1>(a) {REST}",
    "silu": f"{C1} s=Sigmoid(a) m=Mul(a,s) {REST}",
    "squeeze and excite": f"{C1} r=Relu(a) q=GlobalAveragePool(r) e=Conv(q,p1) s=Sigmoid(e) "
    f"m=Mul(r,s) {REST}",
    "transposed convolution": f"{C1} r=Relu(a) m=ConvTranspose<strides=[2,2]>(r,w3) {REST}",
    "added constant": f"{C1} t=Tanh(a) m=Add(t,k) {REST}",
    "added to itself": f"{C1} m=Add(a,a) {REST}",
    "bias": f"a=Conv<{P}>(x,w1,b16) m=Relu(a) {REST}",
    "pool before relu": f"{C1} p=MaxPool<kernel_shape=[2,2],strides=[2,2]>(a) m=Relu(p) {REST}",
}
INTEGER = {"captured by a conv": 2, "transposed convolution": 2, "squeeze and excite": 3}


def model(text: str, *, opset: int = 21) -> ir.Model:
    outputs = f"{Y}, {Z}" if " z=" in text or " z = " in text else Y
    inputs = X + (", bool c" if "If (c)" in text else "")
    made = build(f"g ({inputs}) => ({outputs}) {{ {text} }}", W, opset=opset)
    used = {value.name for node in made.graph.all_nodes() for value in node.inputs if value}
    for name in [name for name in made.graph.initializers if name not in used]:
        del made.graph.initializers[name]
    return made


@pytest.mark.parametrize("name", GRAPHS)
def test_graph(name: str, tmp_path: Path) -> None:
    source = model(GRAPHS[name])
    made = compile_calibrated(source, random_feeds(source, 0, {"N": 3}), tmp_path)
    assert made.worst_db() > 28
    assert made.kernel_loss_db() > 60, "the kernels compute what the graph says"
    convolutions = GRAPHS[name].count("Conv<") + GRAPHS[name].count("Conv(")
    assert made.ops.count("QLinearConv") == INTEGER.get(name, convolutions)
    assert not [text for text in made.result.report.warnings if "kernels of this CPU" in text]


def test_outputs_inside_the_graph_keep_their_names(tmp_path: Path) -> None:
    text = f"g ({X}) => (float[N,16,8,8] a, {Y}) {{ {C1} m=Relu(a) {REST} }}"
    source = build(text, {"w1": W["w1"], "w2": W["w2"]})
    made = compile_calibrated(source, random_feeds(source, 0), tmp_path)
    assert list(made.native) == ["a", "y"]
    assert made.worst_db() > 28


def test_names_like_ours_are_taken(tmp_path: Path) -> None:
    text = f"g ({X}) => ({Y}, {Z}) {{ {C1} t=Tanh(a) m=Relu(a) {REST} z=Neg(t) }}"
    source = build(text, {"w1": W["w1"], "w2": W["w2"]})
    values = {value.name: value for node in source.graph for value in node.outputs}
    values["t"].name, values["m"].name = "x.scale", "x.quantized"
    made = compile_calibrated(source, random_feeds(source, 0), tmp_path)
    assert made.worst_db() > 28


def test_low_opsets_are_converted(tmp_path: Path) -> None:
    source = model(GRAPHS["residual"], opset=LOW_OPSET)
    source.ir_version = 7
    made = compile_calibrated(source, random_feeds(source, 0), tmp_path)
    assert made.ops.count("QLinearConv") == 3
    assert made.worst_db() > 28


@pytest.mark.parametrize("op", ["Conv", "MatMul"])
def test_float16_falls_to_weights_only_with_a_reason(op: str, tmp_path: Path) -> None:
    text = f"g (float16[N,8,8,8] x) => (float16[N,16,8,8] y) {{ [op] y=Conv<{P}>(x,w) }}"
    weight = W["w1"]
    if op == "MatMul":
        text = "g (float16[N,64] x) => (float16[N,48] y) { [op] y=MatMul(x,w) }"
        weight = W["m1"]
    source = build(text, {"w": weight.astype(np.float16)})
    made = compile_calibrated(source, random_feeds(source, 0), tmp_path)
    (node,) = made.result.report.nodes
    assert node.scheme == "w8a16:sym"
    assert "FLOAT16" in node.reason
    assert made.worst_db() > 28


@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 64)])
def test_product_bias_and_relu(shape: tuple[int, ...], tmp_path: Path) -> None:
    dims = ",".join(map(str, shape[:-1]))
    text = f"""g (float[{dims},64] x) => (float[{dims},32] y) {{
        a=MatMul(x,m1) b=Add(a,c1) r=Relu(b) y=MatMul(r,m2) }}"""
    source = build(text, {name: W[name] for name in ("m1", "m2", "c1")})
    made = compile_calibrated(source, random_feeds(source, 0), tmp_path)
    assert made.result.report.summary.integer_kernels == 2
    assert made.worst_db() > 33
    assert made.kernel_loss_db() > 100


@pytest.mark.parametrize("attributes", ["", "<alpha=0.5>", "<beta=2.0>", "<alpha=0.5, beta=3.0>"])
def test_gemm(attributes: str, tmp_path: Path) -> None:
    text = f"""g (float[N,64] x) => (float[N,32] y) {{
        a=Gemm{attributes}(x,m1,c1) r=Relu(a) y=MatMul(r,m2) }}"""
    source = build(text, {name: W[name] for name in ("m1", "m2", "c1")})
    made = compile_calibrated(source, random_feeds(source, 0), tmp_path)
    assert made.result.report.summary.integer_kernels == 2
    assert made.worst_db() > 33
    assert made.kernel_loss_db() > 100


def options(folder: Path, **more: Any) -> CompileOptions:
    source = model(GRAPHS["residual"])
    np.savez(folder / "calls.npz", **dict[str, Any](random_feeds(source, 0, {"N": 1})))
    calibration = CalibrationOptions(str(folder / "calls.npz"), **more)
    return CompileOptions(calibration=calibration, never_slower=False)


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    source = model(GRAPHS["residual"])
    found = [
        compile_model(source, options(tmp_path), output=tmp_path / f"{run}.onnx") for run in "ab"
    ]
    assert found[0].path.read_bytes() == found[1].path.read_bytes()
    assert found[0].report.calibration == found[1].report.calibration


def test_calibrated_at_batch_1_and_run_at_16(tmp_path: Path) -> None:
    source = model(GRAPHS["residual"])
    made = compile_model(source, options(tmp_path), output=tmp_path / "out.onnx")
    feeds = random_feeds(source, 1, {"N": 16})
    truth = run_model(source, feeds)["y"]
    assert truth.shape[0] == 16
    for optimize in (True, False):
        with open_session(made.path, optimize=optimize, threads=1) as session:
            assert distance_db(truth, session.run(feeds)["y"]) > 25


def test_statistics_are_reused_and_bound_to_their_samples(tmp_path: Path) -> None:
    source = tmp_path / "source.onnx"
    ir.save(model(GRAPHS["residual"]), source)
    file = tmp_path / "seen.npz"
    kept = options(tmp_path, statistics=file, observer=Observer.MSE)
    first = compile_model(source, kept, output=tmp_path / "a.onnx")
    assert file.exists()
    second = compile_model(source, kept, output=tmp_path / "b.onnx")
    assert first.path.read_bytes() == second.path.read_bytes()
    np.savez(tmp_path / "other.npz", x=random_array(1, 8, 8, 8, seed=9))
    assert isinstance(kept.calibration, CalibrationOptions)
    other = replace(kept.calibration, source=str(tmp_path / "other.npz"))
    with pytest.raises(UsageError, match="samples"):
        compile_model(source, replace(kept, calibration=other), output=tmp_path / "c.onnx")
    changed = tmp_path / "changed.onnx"
    ir.save(model(GRAPHS["silu"]), changed)
    with pytest.raises(UsageError, match="model"):
        compile_model(changed, kept, output=tmp_path / "d.onnx")
    assert not (tmp_path / "c.onnx").exists()
