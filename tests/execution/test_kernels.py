"""Seeing what ONNX Runtime runs, on models small enough to know it."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.execution.kernels import Kernel, inspect_kernels
from qcompiler.quant.granularity import PerAxis, PerBlock
from tests.support.coded import coded_weight
from tests.support.graphs import build, random_array

SIZE = 64
WHOLE = 1 << 30


def save(model: ir.Model, folder: Path) -> Path:
    path = folder / "m.onnx"
    ir.save(model, path, external_data="m.data", size_threshold_bytes=0)
    return path


def chain(length: int, *, seed: int = 0, typed: bool = True) -> ir.Model:
    """Return a chain of 4-bit products called p0, p1, ..., each with its own weights."""
    weights = [
        coded_weight(
            (SIZE, SIZE), PerBlock(0, 32), bits=4, signed=False, name=f"w{i}", seed=seed + i
        )
        for i in range(length)
    ]
    body = " ".join(
        f"{weight.dequantize(f'd{i}')} [p{i}] v{i + 1} = MatMul(v{i}, d{i})"
        for i, weight in enumerate(weights)
    )
    text = f"g (float[b, {SIZE}] v0) => (float[b, {SIZE}] v{length}) {{ {body} }}"
    tensors = {name: tensor for weight in weights for name, tensor in weight.weights.items()}
    model = build(text, tensors)
    for node in model.graph if typed else ():
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        if node.op_type == "MatMul":
            node.outputs[0].shape = ir.Shape(["b", SIZE])
    return model


def test_segments_show_what_the_whole_shows(tmp_path: Path) -> None:
    path = save(chain(6), tmp_path)
    wanted = [f"p{i}" for i in range(6)]
    whole = inspect_kernels(path, wanted, memory_limit=WHOLE)
    cut = inspect_kernels(path, wanted, memory_limit=1)
    assert whole.kernels == cut.kernels
    assert set(cut.kernels.values()) == {Kernel("MatMulNBits (4-bit)", integer=True)}
    assert (whole.segments, whole.loaded, whole.reused) == (1, 1, 0)
    assert (cut.segments, cut.loaded, cut.reused) == (6, 1, 5)
    assert cut.runtime.startswith("onnxruntime 1.")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["m.data", "m.onnx"]


@pytest.mark.parametrize("fill", [None, 0, 15])
def test_the_choice_does_not_depend_on_values(fill: int | None, tmp_path: Path) -> None:
    """What lets segments of equal structure share one answer."""
    found = []
    for seed in (0, 1):
        model = chain(2, seed=seed)
        for name, value in model.graph.initializers.items():
            if fill is not None and not name.endswith("_s"):
                assert value.const_value is not None
                dtype = value.const_value.dtype
                shape = value.const_value.shape.numpy()
                values = np.full(shape, fill * seed).astype(dtype.numpy())
                value.const_value = ir.tensor(values, dtype=dtype, name=name)
        path = save(model, tmp_path)
        found.append(inspect_kernels(path, ["p0", "p1"], memory_limit=WHOLE).kernels)
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_unknown_types_make_one_segment(tmp_path: Path) -> None:
    path = save(chain(3, typed=False), tmp_path)
    cut = inspect_kernels(path, ["p0", "p2"], memory_limit=1)
    assert (cut.segments, sorted(cut.kernels)) == (1, ["p0", "p2"])


def test_nodes_not_asked_for_are_not_loaded(tmp_path: Path) -> None:
    found = inspect_kernels(save(chain(4), tmp_path), ["p2", "nobody"], memory_limit=1)
    assert (sorted(found.kernels), found.loaded, found.segments) == (["p2"], 1, 4)


def test_follows_bias_activation_and_casts(tmp_path: Path) -> None:
    weight = coded_weight(
        (SIZE, SIZE), PerBlock(0, 32), bits=4, signed=True, scale_type=ir.DataType.FLOAT16
    )
    text = f"""g (float16[b, {SIZE}] x) => (float16[b, {SIZE}] y) {{
        {weight.dequantize("wd")}
        [p] t = MatMul(x, wd)
        u = Add(t, c)
        y = Relu(u) }}"""
    model = build(text, {**weight.weights, "c": random_array(SIZE, dtype=np.float16)})
    found = inspect_kernels(save(model, tmp_path), ["p"], memory_limit=WHOLE)
    assert found.kernels == {"p": Kernel("MatMulNBits (4-bit)", integer=True)}


def test_float_after_dequantize_linear_is_called_so(tmp_path: Path) -> None:
    weight = coded_weight((8, 8, 3, 3), PerAxis(0), bits=8, signed=True)
    text = f"""g (float[1, 8, 6, 6] x) => (float[1, 8, h, v] y) {{
        {weight.dequantize("wd")}
        [p] t = Conv(x, wd)
        y = Relu(t) }}"""
    found = inspect_kernels(save(build(text, weight.weights), tmp_path), ["p"], memory_limit=WHOLE)
    assert found.kernels == {"p": Kernel("float FusedConv after DequantizeLinear", integer=False)}


def test_static_q_dq_runs_on_integers(tmp_path: Path) -> None:
    weight = coded_weight((SIZE, SIZE), PerAxis(1), bits=8, signed=True)
    text = f"""g (float[b, {SIZE}] x) => (float[b, {SIZE}] y) {{
        {weight.dequantize("wd")}
        q = QuantizeLinear(x, s, z) xd = DequantizeLinear(q, s, z)
        [p] t = MatMul(xd, wd)
        r = QuantizeLinear(t, s, z) y = DequantizeLinear(r, s, z) }}"""
    scales = {"s": np.array(0.05, np.float32), "z": np.array(3, np.int8)}
    model = build(text, {**weight.weights, **scales})
    found = inspect_kernels(save(model, tmp_path), ["p"], memory_limit=WHOLE)
    assert found.kernels == {"p": Kernel("QLinearMatMul", integer=True)}


@pytest.mark.parametrize("memory_limit", [1, WHOLE])
def test_a_model_the_runtime_cannot_load_says_why(memory_limit: int, tmp_path: Path) -> None:
    text = "g (bfloat16[b, 4] x) => (bfloat16[b, 3] y) { [p] y = MatMul(x, w) }"
    weight = ir.tensor(random_array(4, 3).astype(ir.DataType.BFLOAT16.numpy()))
    found = inspect_kernels(
        save(build(text, {"w": weight}), tmp_path), ["p"], memory_limit=memory_limit
    )
    assert found.kernels == {}
    assert found.failure is not None
    assert "MatMul" in found.failure


def test_convolutions_in_the_blocked_layout_are_found(tmp_path: Path) -> None:
    text = """g (float[1, 16, 8, 8] x) => (float[1, 16, 4, 4] y) {
        [first] a = Conv(x, w)
        b = Relu(a)
        [second] c = Conv(b, v)
        y = Relu(c)
    }"""
    weights = {"w": random_array(16, 16, 3, 3), "v": random_array(16, 16, 3, 3, seed=1)}
    ir.save(build(text, weights), tmp_path / "m.onnx")
    found = inspect_kernels(tmp_path / "m.onnx", ["first", "second"], memory_limit=1 << 30)
    assert [found.kernels[name].name.split(",")[0] for name in ("first", "second")] == [
        "float Conv",
        "float Conv",
    ]
