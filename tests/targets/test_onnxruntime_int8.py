"""Every line about calibrated 8-bit activations, by compiling a graph and looking at what runs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.quant.recipe import Recipe
from qcompiler.quant.scheme import parse_scheme
from qcompiler.targets.onnxruntime_int8 import INT8_ROWS, PLACEMENT
from tests.support.calibrated import Calibrated, compile_calibrated, run_optimized
from tests.support.calibrated import conv_weight as cw
from tests.support.graphs import build, random_array
from tests.support.parity import random_feeds

PADS = "pads=[1,1,1,1]"
HEAD = f"g (float[N,8,8,8] x) => (float[N,o,h,w] y) {{ [c1] a=Conv<{PADS}>(x,w1)"
TAIL = f"[c2] y=Conv<{PADS}>(m,w2) }}"
WEIGHTS = {"w1": cw(16, 8, 3, 3), "w2": cw(16, 16, 3, 3, seed=1)}
LEAST_DB = 28.0
KERNEL_DB = 100.0
"""Float sums in another order are this near; integer results are equal."""


@dataclass(frozen=True)
class Case:
    """An op between two convolutions, or a graph of its own.

    Attributes:
        rule: The line it is about.
        text: Nodes that compute `m` from `a`; a text that begins with "g" is the graph.
        runs: What must be among the kernels, beside QLinearConv.
        weights: Further initializers.
        ops: The op types of the line that it shows.
    """

    rule: str
    text: str
    runs: tuple[str, ...]
    ops: tuple[str, ...]
    weights: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.rule, *self.ops])


def between(rule: str, op: str, text: str, runs: str, **weights: Any) -> Case:
    return Case(rule, text, (runs,), (op,), weights)


M64, M48 = random_array(64, 48) / 8, random_array(48, 32, seed=1) / 7
INT = np.array
POOL = "kernel_shape=[2,2],strides=[2,2]"
CASES = [
    between("conv", "Conv", f"m=Conv<{PADS}>(a,w3)", "QLinearConv", w3=cw(16, 16, 3, 3, seed=2)),
    Case("matmul", "g (float[N,3,64] x) => (float[N,3,32] y) { a=MatMul(x,m1) y=MatMul(a,m2) }",
         ("QLinearMatMul", "MatMulIntegerToFloat"), ("MatMul",), {"m1": M64, "m2": M48}),
    Case("matmul", "g (float[N,64] x) => (float[N,32] y) { a=Gemm(x,m1,b) y=Gemm(a,m2) }",
         ("QGemm",), ("Gemm",), {"m1": M64, "m2": M48, "b": random_array(48)}),
    between("elementwise", "Add", f"t=Conv<{PADS}>(x,w3) m=Add(a,t)", "QLinearAdd",
            w3=cw(16, 8, 3, 3, seed=2)),
    between("elementwise", "Mul", f"t=Conv<{PADS}>(x,w3) m=Mul(a,t)", "QLinearMul",
            w3=cw(16, 8, 3, 3, seed=2)),
    between("concat", "Concat", f"t=Conv<{PADS}>(x,w3) m=Concat<axis=2>(a,t)", "QLinearConcat",
            w3=cw(16, 8, 3, 3, seed=2)),
    between("select", "Where", f"t=Conv<{PADS}>(x,w3) k=Less(x,n) l=Concat<axis=1>(k,k) "
            "m=Where(l,a,t)", "QLinearWhere", w3=cw(16, 8, 3, 3, seed=2),
            n=np.array(0.0, np.float32)),
    between("average-pool", "AveragePool", f"m=AveragePool<{POOL}>(a)", "QLinearAveragePool"),
    between("average-pool", "GlobalAveragePool", "m=GlobalAveragePool(a)",
            "QLinearGlobalAveragePool"),
    between("table-lookup", "Sigmoid", "m=Sigmoid(a)", "QLinearSigmoid"),
    between("table-lookup", "LeakyRelu", "m=LeakyRelu<alpha=0.1>(a)", "QLinearLeakyRelu"),
    between("data-movement", "Reshape", "m=Reshape(a,s)", "Reshape", s=INT([0, 16, 4, 16])),
    between("data-movement", "Flatten", "f=Flatten(a) m=Reshape(f,s)", "Flatten",
            s=INT([0, 16, 4, 16])),
    between("data-movement", "Squeeze", "u=Unsqueeze(a,k) t=Transpose<perm=[0,1,2,4,3]>(u) "
            "m=Squeeze(t,k2)", "Squeeze", k=INT([3]), k2=INT([4])),
    between("data-movement", "Unsqueeze", "u=Unsqueeze(a,k) t=Transpose<perm=[0,1,2,4,3]>(u) "
            "m=Squeeze(t,k2)", "Unsqueeze", k=INT([3]), k2=INT([4])),
    between("data-movement", "Transpose", "m=Transpose<perm=[0,1,3,2]>(a)", "QLinearConv"),
    between("data-movement", "Slice", "m=Slice(a,s,e,k)", "Slice",
            s=INT([1]), e=INT([7]), k=INT([2])),
    between("data-movement", "Split", "s,t=Split<axis=2,num_outputs=2>(a) m=Add(s,t)",
            "Split"),
    between("data-movement", "Gather", "m=Gather<axis=2>(a,i)", "Gather", i=INT([3, 1, 5])),
    between("data-movement", "Expand", "p=GlobalAveragePool(a) m=Expand(p,s)", "Expand",
            s=INT([1, 16, 4, 4])),
    between("data-movement", "Tile", "m=Tile(a,s)", "Tile", s=INT([1, 1, 2, 1])),
    between("data-movement", "DepthToSpace", "d=DepthToSpace<blocksize=2>(a) "
            f"m=Conv<{PADS}>(d,w3)", "DepthToSpace", w3=cw(16, 4, 3, 3, seed=2)),
    between("data-movement", "MaxPool", f"m=MaxPool<{POOL}>(a)", "NhwcMaxPool"),
    between("data-movement", "ReduceMax", "m=ReduceMax<keepdims=1>(a,k)", "ReduceMax",
            k=INT([2])),
    between("resize-nearest", "Resize", 'm=Resize<mode="nearest">(a,,s)', "Resize",
            s=np.array([1, 1, 2, 2], np.float32)),
    between("clipping", "Relu", "m=Relu(a)", "QLinearConv"),
    between("clipping", "Clip", "m=Clip(a,lo,hi)", "QLinearConv",
            lo=np.float32(0), hi=np.float32(6)),
]  # fmt: skip


def compile_between(case: Case, folder: Path) -> Calibrated:
    whole = case.text.startswith("g ")
    text = case.text if whole else f"{HEAD} {case.text} {TAIL}"
    weights = dict(case.weights) if whole else {**WEIGHTS, **case.weights}
    model = build(text, weights)
    return compile_calibrated(model, random_feeds(model, 0), folder, as_given=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule_runs_on_integers(case: Case, tmp_path: Path) -> None:
    made = compile_between(case, tmp_path)
    assert set(case.runs) <= set(made.ops)
    floats = {"Conv", "FusedConv", "Relu", "Clip", "MatMul", "Gemm"} | set(case.ops)
    assert not floats - set(case.runs) & set(made.ops)
    # One at the input and, unless a product returns float, one at the output: no pair between.
    assert made.ops.count("QuantizeLinear") == 1
    assert made.ops.count("DequantizeLinear") <= 1
    placed = {node.op_type: node.placement for node in made.result.report.nodes}
    assert {placed[op] for op in case.ops} == {case.rule}
    assert made.worst_db() > LEAST_DB
    assert made.kernel_loss_db() > KERNEL_DB


def test_every_op_of_every_rule_is_shown() -> None:
    shown = {(case.rule, op) for case in CASES for op in case.ops}
    assert shown == {(rule.rule, op) for rule in PLACEMENT.rules for _, op in rule.ops}


RESIZE = np.array([1, 1, 2, 2], np.float32)
FLOAT_OPS: dict[str, tuple[str, dict[str, Any]]] = {
    "LayerNormalization": ("m=LayerNormalization(a,n)", {"n": np.ones(8, np.float32)}),
    "InstanceNormalization": (
        "m=InstanceNormalization(a,n,k)",
        {"n": np.ones(16, np.float32), "k": np.zeros(16, np.float32)},
    ),
    "GroupNormalization": (
        "m=GroupNormalization<num_groups=4>(a,n,k)",
        {"n": np.ones(16, np.float32), "k": np.zeros(16, np.float32)},
    ),
    "PRelu": ("m=PRelu(a,n)", {"n": np.full((16, 1, 1), 0.3, np.float32)}),
    "Sub": (f"t=Conv<{PADS}>(x,w3) m=Sub(a,t)", {"w3": cw(16, 8, 3, 3, seed=2)}),
    "Div": ("e=Exp(a) m=Div(a,e)", {}),
    "Max": (f"t=Conv<{PADS}>(x,w3) m=Max(a,t)", {"w3": cw(16, 8, 3, 3, seed=2)}),
    "Min": (f"t=Conv<{PADS}>(x,w3) m=Min(a,t)", {"w3": cw(16, 8, 3, 3, seed=2)}),
    "Sqrt": ("b=Relu(a) m=Sqrt(b)", {}),
    "Pow": ("m=Pow(a,n)", {"n": np.array(2.0, np.float32)}),
    "ReduceMean": ("m=ReduceMean<keepdims=1>(a,n)", {"n": np.array([2])}),
    "Pad": ("m=Pad(a,n)", {"n": np.array([0, 0, 1, 1, 0, 0, 1, 1])}),
    "SpaceToDepth": (
        f"d=SpaceToDepth<blocksize=2>(a) m=Conv<{PADS}>(d,w3)",
        {"w3": cw(16, 64, 3, 3, seed=2)},
    ),
    "RMSNormalization": ("m=RMSNormalization(a,n)", {"n": np.ones(8, np.float32)}),
    "Resize": ('m=Resize<mode="linear">(a,,n)', {"n": RESIZE}),
    "Softmax": ("m=Softmax<axis=1>(a)", {}),
}
DIFFERENT_OPSET = {"RMSNormalization": 23, "Swish": 24}
MATRIX_OPS = ("MatMul",)


@pytest.mark.parametrize(
    "op",
    [op for entry in PLACEMENT.reluctances for _, op in entry.ops if op not in MATRIX_OPS],
)
def test_reluctance_has_no_integer_kernel(op: str, tmp_path: Path) -> None:
    text, weights = FLOAT_OPS.get(op, (f"m={op}(a)", {}))
    opset = DIFFERENT_OPSET.get(op, 21)
    model = build(f"{HEAD} {text} {TAIL}", {**WEIGHTS, **weights}, opset=opset)
    made = compile_calibrated(model, random_feeds(model, 0), tmp_path, as_given=True)
    assert not [kernel for kernel in made.ops if kernel in (f"QLinear{op}", f"Nhwc{op}")]
    assert made.ops.count("DequantizeLinear") >= 2, "the op works on float"
    assert made.ops.count("QLinearConv") >= 2
    reasons = {entry.reason for entry in PLACEMENT.reluctances}
    (node,) = [node for node in made.result.report.nodes if node.op_type == op]
    assert (node.placement, node.reason in reasons) == (None, True)
    assert made.kernel_loss_db() > KERNEL_DB


def test_a_product_of_activations_stays_in_float(tmp_path: Path) -> None:
    text = """g (float[N,5,64] x) => (float[N,5,5] y) {
        q=MatMul(x,w) k=MatMul(x,v) t=Transpose<perm=[0,2,1]>(k) [qk] y=MatMul(q,t) }"""
    model = build(text, {"w": M64[:, :32], "v": M64[:, 16:]})
    made = compile_calibrated(model, random_feeds(model, 0), tmp_path, as_given=True)
    assert made.ops == ["QuantizeLinear", "MatMulIntegerToFloat", "MatMulIntegerToFloat"] + [
        op for op in made.ops if op in ("MatMul", "FusedMatMul")
    ]
    assert made.worst_db() > LEAST_DB


ROW_CASES = {
    "conv-1d": ("g (float[N,8,16] x) => (float[N,16,16] y) { [s] y=Conv<pads=[1,1]>(x,w) }",
                cw(16, 8, 3), "QLinearConv"),
    "conv-2d": (f"g (float[N,8,8,8] x) => (float[N,16,8,8] y) {{ [s] y=Conv<{PADS}>(x,w) }}",
                cw(16, 8, 3, 3), "QLinearConv"),
    "conv-depthwise": (
        f"g (float[N,16,8,8] x) => (float[N,16,8,8] y) {{ [s] y=Conv<{PADS},group=16>(x,w) }}",
        cw(16, 1, 3, 3), "QLinearConv"),
    "conv-grouped": (
        f"g (float[N,8,8,8] x) => (float[N,16,8,8] y) {{ [s] y=Conv<{PADS},group=2>(x,w) }}",
        cw(16, 4, 3, 3), "QLinearConv"),
    "conv-strided-dilated": (
        "g (float[N,8,9,9] x) => (float[N,16,h,v] y) "
        "{ [s] y=Conv<strides=[2,1],dilations=[1,2],pads=[0,1,2,1]>(x,w) }",
        cw(16, 8, 3, 3), "QLinearConv"),
    "matmul": ("g (float[N,3,64] x) => (float[N,3,48] y) { [s] y=MatMul(x,w) }",
               M64, "MatMulIntegerToFloat"),
    "matmul-matrix": ("g (float[N,64] x) => (float[N,48] y) { [s] y=MatMul(x,w) }",
                      M64, "MatMulIntegerToFloat"),
    "matmul-transposed": (
        "g (float[N,48] x) => (float[N,64] y) { t=Transpose<perm=[1,0]>(w) [s] y=MatMul(x,t) }",
        M64, "MatMulIntegerToFloat"),
    "matmul-odd": ("g (float[N,2,63] x) => (float[N,2,48] y) { [s] y=MatMul(x,w) }",
                   M64[:63], "MatMulIntegerToFloat"),
    "gemm": ("g (float[N,64] x) => (float[N,48] y) { [s] y=Gemm(x,w) }", M64, "QGemm"),
    "gemm-transposed": ("g (float[N,48] x) => (float[N,64] y) { [s] y=Gemm<transB=1>(x,w) }",
                        M64, "QGemm"),
    "gemm-both-transposed": (
        "g (float[48,N] x) => (float[N,64] y) { [s] y=Gemm<transA=1,transB=1>(x,w) }",
        M64, "QGemm"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROW_CASES)
def test_row_runs_as_the_table_says(name: str, tmp_path: Path) -> None:
    text, weight, kernel = ROW_CASES[name]
    model = build(text, {"w": weight})
    made = compile_calibrated(model, random_feeds(model, 0, {"N": 3}), tmp_path, as_given=True)
    assert made.kernel("s") == kernel
    (node,) = [node for node in made.result.report.nodes if node.name == "s"]
    (row,) = [row for row in INT8_ROWS if row.rule == node.rule]
    assert kernel in row.kernel
    assert made.worst_db() > 35
    assert made.kernel_loss_db() > KERNEL_DB


@pytest.mark.parametrize("name", ["conv-2d", "conv-grouped", "matmul", "gemm-transposed", "bias"])
def test_one_scale_per_weight_runs_on_the_same_kernels(name: str, tmp_path: Path) -> None:
    text, weight, kernel = ROW_CASES.get(name, ROW_CASES["gemm"])
    weights = {"w": weight}
    if name == "bias":
        text, weights["b"] = text.replace("Gemm(x,w)", "Gemm(x,w,b)"), random_array(48)
    model = build(text, weights)
    made = compile_calibrated(
        model,
        random_feeds(model, 0, {"N": 3}),
        tmp_path,
        recipe=Recipe.uniform(parse_scheme("w8a8:tensor")),
        as_given=True,
    )
    assert made.kernel("s") == kernel
    (node,) = [node for node in made.result.report.nodes if node.name == "s"]
    assert node.scheme == "w8a8:tensor:sym"
    assert made.worst_db() > 32
    assert made.kernel_loss_db() > KERNEL_DB


@pytest.mark.parametrize("scheme", ["float", "w8a16", "w8a8-dynamic", "w4a16:b32"])
@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])
def test_what_has_another_scheme_keeps_it_between_quantized_values(
    op: str, scheme: str, tmp_path: Path
) -> None:
    """ONNX Runtime would round float weights there per tensor, and saturate with all 8 bits."""
    if op == "Conv":
        text = f"{HEAD} b=Relu(a) [mid] m=Conv<{PADS}>(b,w3) {TAIL}"
        weights: dict[str, Any] = {**WEIGHTS, "w3": cw(16, 16, 3, 3, seed=2)}
    else:
        bias = ",b" if op == "Gemm" else ""
        text = f"""g (float[N,64] x) => (float[N,32] y) {{
            [c1] a=MatMul(x,m0) r=Relu(a) [mid] m={op}(r,m1{bias}) [c2] y=MatMul(m,m2) }}"""
        weights = {"m0": random_array(64, 64) / 8, "m1": M64, "m2": M48}
        weights |= {"b": random_array(48)} if op == "Gemm" else {}
    rule = f'version = 1\ndefault = "w8a8"\n[[rule]]\nname = "mid"\nscheme = "{scheme}"\n'
    model = build(text, weights)
    recipe = Recipe.from_text(rule, "test")
    made = compile_calibrated(model, random_feeds(model, 0), tmp_path, recipe=recipe, as_given=True)
    assert made.ops.count("QLinearConv") == (2 if op == "Conv" else 0)
    expected = {"Conv": "Conv", "w8a16": "MatMulNBits", "w4a16:b32": "MatMulNBits"}
    wanted = expected.get(op) or expected.get(scheme)
    if wanted:
        assert wanted in made.ops
    if scheme == "w8a8-dynamic" and op != "Conv":
        assert "DynamicQuantizeMatMul" in made.ops
    # MatMulNBits rounds activations to 8 bits itself; everything else is the same arithmetic.
    assert made.kernel_loss_db() > (30 if wanted == "MatMulNBits" else KERNEL_DB)


def test_without_a_copy_the_runtime_quantizes_a_float_conv_itself(tmp_path: Path) -> None:
    """The defect that isolate-float-ops avoids; when this fails, the pass can go."""
    text = f"{HEAD} b=Relu(a) [mid] m=Conv<{PADS}>(b,w3) {TAIL}"
    model = build(text, {**WEIGHTS, "w3": cw(16, 16, 3, 3, seed=2)})
    made = compile_calibrated(
        model, random_feeds(model, 0), tmp_path, exclude=("mid",), as_given=True
    )
    broken = made.result.model()
    (copy,) = [node for node in broken.graph if node.op_type == "Concat"]
    copy.outputs[0].replace_all_uses_with(copy.inputs[0])  # type: ignore[arg-type]
    ir.save(broken, tmp_path / "broken.onnx")
    _, optimized = run_optimized(tmp_path / "broken.onnx", random_feeds(model, 0))
    assert [node.op_type for node in optimized.graph].count("QLinearConv") == 3
