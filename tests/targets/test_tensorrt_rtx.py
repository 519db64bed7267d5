"""Every row for TensorRT-RTX, by really building it; and what is refused, by what the library does.

The rows of TensorRT proper are among them: its library needs a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import UsageError
from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock, PerTensor
from qcompiler.quant.scheme import Activations, parse_scheme
from qcompiler.targets.capability import SchemeRequest, Target, resolve
from qcompiler.targets.processors import PROCESSORS, Processor
from qcompiler.targets.registry import find_target
from qcompiler.targets.rows import Row, WeightForm, WeightUse
from qcompiler.targets.tensorrt import TENSORRT_10, TENSORRT_11, TENSORRT_RTX
from tests.support.coded import CodedWeight, coded_weight
from tests.support.graphs import build, initializer
from tests.support.rtx import RtxBuilder, requires_rtx, rtx

__all__ = ["rtx"]

SIZE = 1024
KERNELS = 700_000
"""What an engine of one op holds beside its weights at most."""
RESCALED = "scales to fp32"
"""The only warning: convolutions want float32 scales, and the library converts the others."""
FLOAT8 = ir.DataType.FLOAT8E4M3FN
FLOAT4 = ir.DataType.FLOAT4E2M1
TEXT_TYPES = {"FLOAT": "float", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}


@dataclass(frozen=True)
class Case:
    """One corner of a row."""

    row: Row
    op: str
    use: WeightUse
    bits: int
    form: str
    float_type: str

    def __str__(self) -> str:
        use = self.use.replace(" ", "-")
        return f"{self.row.rule}-{self.op}-{use}-{self.bits}-{self.form}-{self.float_type}"


def cases() -> Iterator[Case]:
    for row in TENSORRT_RTX.rows:
        forms = ["channel"] * row.per_channel + ["tensor"] * row.per_tensor
        forms += [f"b{size}" for size in (*row.block_sizes[:1], *row.block_sizes[-1:])]
        for _, op in row.ops:
            for use in row.uses:
                # A table is shared by both of its readers in one graph.
                if (op, use) == ("Gather", WeightUse.SHARED_TABLE):
                    continue
                for index, form in enumerate(forms):
                    float_type = row.float_types[index % len(row.float_types)]
                    bits = 8 if row.weight_bits == (8,) else 4
                    yield Case(row, op, use, bits, form, float_type)


def granularity(form: str, reduction: int, output: int) -> Granularity:
    if form == "tensor":
        return PerTensor()
    return PerAxis(output) if form == "channel" else PerBlock(reduction, int(form[1:]))


def weight_of(case: Case, shape: tuple[int, ...], reduction: int, output: int) -> CodedWeight:
    return coded_weight(
        shape,
        granularity(case.form, reduction, output),
        bits=case.bits,
        signed=True,
        scale_type=ir.DataType[case.float_type],
        code_type=FLOAT8 if case.row.floating else None,
    )


def graph_of(case: Case) -> ir.Model:
    t = TEXT_TYPES[case.float_type]
    if case.op in ("Conv", "ConvTranspose"):
        reduction, output = (1, 0) if case.op == "Conv" else (0, 1)
        weight = weight_of(case, (256, 256, 3, 3), reduction, output)
        signature, body = f"({t}[1, 256, 8, 8] x) => ({t}[1, 256, h, v] y)", f"y = {case.op}(d, wd)"
    elif case.op in ("LSTM", "GRU", "RNN"):
        gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[case.op]
        weight = weight_of(case, (1, gates * SIZE, SIZE), 2, 1)
        signature = f"({t}[3, 1, {SIZE}] x) => ({t}[3, 1, 1, {SIZE}] y)"
        body = f"y = {case.op}<hidden_size={SIZE}>(d, wd, wd)"
    elif case.op == "Gather":
        weight = weight_of(case, (SIZE, SIZE), 1, 0)
        return finish(
            case, weight, f"(int32[4] x) => ({t}[4, {SIZE}] y)", "d = Identity(x) y = Gather(wd, d)"
        )
    else:
        return product_of(case, t)
    return finish(case, weight, signature, body)


def product_of(case: Case, t: str) -> ir.Model:
    turned = case.use in (WeightUse.TRANSPOSED, WeightUse.SHARED_TABLE)
    weight = weight_of(case, (SIZE, SIZE), int(turned), 1 - int(turned))
    inputs, outputs = f"{t}[4, {SIZE}] x", f"{t}[4, {SIZE}] y"
    body = "y = MatMul(d, wd)"
    if case.use is WeightUse.LEFT:
        weight = weight_of(case, (SIZE, SIZE), 1, 0)
        inputs, outputs = f"{t}[{SIZE}, 4] x", f"{t}[{SIZE}, 4] y"
        body = f"y = {case.op}(wd, d)"
    elif case.op == "Gemm":
        body = f"y = Gemm<transB={int(turned)}>(d, wd)"
    elif turned:
        body = "wt = Transpose<perm=[1, 0]>(wd) y = MatMul(d, wt)"
    if case.use is WeightUse.SHARED_TABLE:
        inputs, outputs = f"{inputs}, int32[4] ids", f"{outputs}, {t}[4, {SIZE}] e"
        body += " e = Gather(wd, ids)"
    return finish(case, weight, f"({inputs}) => ({outputs})", body)


def finish(case: Case, weight: CodedWeight, signature: str, body: str) -> ir.Model:
    weights: dict[str, Any] = dict(weight.weights)
    data = "d = Identity(x)"
    if case.row.activations is Activations.STATIC:
        data = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
        float_type = ir.DataType[case.float_type]
        weights["s"] = ir.tensor(np.array(0.05, float_type.numpy()), dtype=float_type)
        kind = FLOAT8.numpy() if case.row.floating else np.int8
        weights["z"] = ir.tensor(np.zeros((), kind))
    data = "" if "d = " in body else data
    text = f"g {signature} {{ {weight.dequantize('wd')} {data} {body} }}"
    return build(text, weights, opset=21)


@requires_rtx
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_a_row_builds_with_its_weights_as_codes(case: Case, rtx: RtxBuilder) -> None:
    model = graph_of(case)
    made = rtx.build(model)
    assert made.stage == "done", made.log
    assert not [text for text in made.log if RESCALED not in text and "ids" not in text]
    codes = prod(initializer(model, "w").shape) * case.bits // 8
    # A recurrent op reads it twice, for its input and for its state.
    recurrent = case.op in ("LSTM", "RNN", "GRU")
    copies = 2 if case.use is WeightUse.SHARED_TABLE or recurrent else 1
    assert len(made.engine) - codes * copies < KERNELS + codes // 2
    if case.row.activations is Activations.STATIC:
        kind = "fp8_e4m3" if case.row.floating else "int8"
        assert [set(product.operands) - {""} for product in made.products] == [{kind}]


def code_model(code: str, float_type: str) -> ir.Model:
    """A product with a weight of a quantized type."""
    t, dtype = TEXT_TYPES[float_type], ir.DataType[code]
    values = np.random.default_rng(0).integers(-2, 3, (128, 128)).astype(dtype.numpy())
    scale = ir.DataType[float_type]
    weights = {
        "w": ir.tensor(values, dtype=dtype),
        "w_s": ir.tensor(np.full((8, 128), 0.5).astype(scale.numpy()), dtype=scale),
    }
    text = f"""g ({t}[4, 128] x) => ({t}[4, 128] y) {{
        d = DequantizeLinear<axis=0, block_size=16>(w, w_s) y = MatMul(x, d) }}"""
    return build(text, weights, opset=23)


CODES = ("INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1")


@requires_rtx
@pytest.mark.parametrize("processor", TENSORRT_RTX.known_processors, ids=lambda one: one.name)
def test_a_processor_has_the_types_of_the_table(processor: Processor, rtx: RtxBuilder) -> None:
    for code in CODES:
        made = rtx.build(code_model(code, "FLOAT16"), (processor.name,))
        assert (made.stage == "done") == (code in processor.code_types), (code, made.log)
    for float_type in TEXT_TYPES:
        made = rtx.build(code_model("INT8", float_type), (processor.name,))
        assert (made.stage == "done") == (float_type in processor.compute_types), made.log


def w(dtype: str, *shape: int) -> ir.TensorProtocol:
    element = ir.DataType[dtype]
    return ir.tensor(np.ones(shape).astype(element.numpy()), dtype=element)


PRODUCT = "g (float[4, 64] x) => (float[4, 64] y) {{ {0} }}"
SCALES = {"s": np.full(64, 0.1, np.float32), "t": np.array(0.1, np.float32)}
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "e4m3-scales-alone": (
        PRODUCT.format("d=DequantizeLinear<axis=0,block_size=16>(w,k) y=MatMul(x,d)"),
        {"w": w("FLOAT8E4M3FN", 64, 64), "k": w("FLOAT8E4M3FN", 4, 64)},
        "parse",
    ),
    "uint8-activations": (
        PRODUCT.format("q=QuantizeLinear(x,t,z) y=DequantizeLinear(q,t,z)"),
        {"z": np.array(128, np.uint8)},
        "parse",
    ),
    "int8-zero-point": (
        PRODUCT.format("q=QuantizeLinear(x,t,z) y=DequantizeLinear(q,t,z)"),
        {"z": np.array(3, np.int8)},
        "parse",
    ),
    "uint8-weights": (
        PRODUCT.format("d=DequantizeLinear<axis=1>(w,s) y=MatMul(x,d)"),
        {"w": w("UINT8", 64, 64)},
        "parse",
    ),
    "2-bit-weights": (
        PRODUCT.format("d=DequantizeLinear<axis=1>(w,s) y=MatMul(x,d)"),
        {"w": w("INT2", 64, 64)},
        "parse",
    ),
    "int32-bias": (
        PRODUCT.format(
            "d=DequantizeLinear<axis=1>(w,s) b=DequantizeLinear<axis=0>(c,s) y=Gemm(x,d,b)"
        ),
        {"w": w("INT8", 64, 64), "c": np.ones(64, np.int32)},
        "parse",
    ),
    "dynamic": (
        PRODUCT.format("q,a,z=DynamicQuantizeLinear(x) y=DequantizeLinear(q,a,z)"),
        {},
        "parse",
    ),
    "conv-in-blocks": (
        "g (float[1, 64, 8, 8] x) => (float[1, 64, 6, 6] y) "
        "{ d=DequantizeLinear<axis=1,block_size=32>(w,k) y=Conv(x,d) }",
        {"w": w("INT8", 64, 64, 3, 3), "k": np.full((64, 2, 3, 3), 0.1, np.float32)},
        "parse",
    ),
    "gru-per-channel": (
        "g (float[3, 1, 64] x) => (float[3, 1, 1, 64] y) "
        "{ d=DequantizeLinear<axis=1>(w,k) y=GRU<hidden_size=64>(x,d,d) }",
        {"w": w("INT8", 1, 192, 64), "k": np.full(192, 0.1, np.float32)},
        "build",
    ),
    "int4-on-the-left": (
        "g (float[512, 4] x) => (float[512, 4] y) "
        "{ d=DequantizeLinear<axis=1,block_size=64>(w,k) y=MatMul(d,x) }",
        {"w": w("INT4", 512, 512), "k": np.full((512, 8), 0.1, np.float32)},
        "crash",
    ),
}


@requires_rtx
@pytest.mark.parametrize("name", WRONG)
def test_what_the_table_leaves_out_does_not_build(name: str, rtx: RtxBuilder) -> None:
    """When one of these builds, the table can be widened."""
    text, weights, stage = WRONG[name]
    made = rtx.build(build(text, {**SCALES, **weights}, opset=25 if "2-bit" in name else 21))
    # An internal error may come back as an error or end the process.
    assert made.stage in (stage, "crash"), made.log


SILENT: dict[str, tuple[str, dict[str, Any]]] = {
    "short-last-block": (
        "g (float[4, 200] x) => (float[4, 64] y) "
        "{ d=DequantizeLinear<axis=0,block_size=64>(w,k) y=MatMul(x,d) }",
        {"w": w("INT4", 200, 64), "k": np.full((4, 64), 0.1, np.float32)},
    ),
    "codes-without-a-zero-point": (
        PRODUCT.format("q=QuantizeLinear(x,t) y=DequantizeLinear(q,t)"),
        {},
    ),
}


@requires_rtx
@pytest.mark.parametrize("name", SILENT)
def test_what_builds_and_computes_something_else(name: str, rtx: RtxBuilder) -> None:
    """Blocks of 50 rather than 64; int8 rather than uint8. `verify-target` refuses both."""
    text, weights = SILENT[name]
    assert rtx.build(build(text, {**SCALES, **weights})).stage == "done"


def nvfp4(block: int, float_type: str, op: str) -> ir.Model:
    """A weight of E2M1 codes, its scales E4M3 codes with a float scale of their own."""
    t, scale = TEXT_TYPES[float_type], ir.DataType[float_type]
    generator = np.random.default_rng(0)
    codes = generator.uniform(-6, 6, (SIZE, SIZE)).astype(FLOAT4.numpy())
    scales = generator.uniform(0.5, 2, (SIZE // block, SIZE)).astype(FLOAT8.numpy())
    weights = {
        "w": ir.tensor(codes, dtype=FLOAT4),
        "k": ir.tensor(scales, dtype=FLOAT8),
        "g": ir.tensor(np.array(0.01, scale.numpy()), dtype=scale),
    }
    data = "int32[4] x" if op == "Gather" else f"{t}[4, {SIZE}] x"
    read = "Gather(e, x)" if op == "Gather" else f"{op}(x, e)"
    text = f"""g ({data}) => ({t}[4, {SIZE}] y) {{
        s = DequantizeLinear(k, g) e = DequantizeLinear<axis=0, block_size={block}>(w, s)
        y = {read} }}"""
    return build(text, weights, opset=23)


@requires_rtx
@pytest.mark.parametrize("form", TENSORRT_RTX.weight_forms, ids=lambda form: form.rule)
def test_a_form_of_other_tools_builds_where_its_type_exists(
    form: WeightForm, rtx: RtxBuilder
) -> None:
    assert (form.code_type, form.scale_type) == (FLOAT4.name, FLOAT8.name)
    corners = [(form.block_sizes[0], float_type, "MatMul") for float_type in form.float_types]
    corners += [(block, "FLOAT16", "MatMul") for block in form.block_sizes[1:]]
    corners += [(form.block_sizes[0], "FLOAT16", op) for _, op in form.ops]
    for block, float_type, op in corners:
        made = rtx.build(nvfp4(block, float_type, op), ("SM120", "SM121"))
        assert (made.stage, made.log) == ("done", ()), (block, float_type, op)
        stored = SIZE * SIZE // 2 + SIZE * SIZE // block
        assert len(made.engine) - stored < KERNELS
    for processor in TENSORRT_RTX.known_processors:
        made = rtx.build(nvfp4(16, "FLOAT16", "MatMul"), (processor.name,))
        assert (made.stage == "done") == (form.code_type in processor.code_types), made.log


BASE = {"float_type": "FLOAT", "reduction": 1024, "outputs": 512, "weight_rank": 2}
RTX, PROPER = (TENSORRT_RTX,), (TENSORRT_10, TENSORRT_11)
EVERY = (*RTX, *PROPER)
FLOATS = tuple(find_target(f"{target.name}:sm89,sm120") for target in EVERY)
"""For processors that have floats of 8 bits."""


def found(target: Target, op: str, text: str, **changes: Any) -> tuple[str, str]:
    scheme = parse_scheme(text)
    assert scheme is not None
    rank = {"Conv": 4, "ConvTranspose": 4, "LSTM": 3, "GRU": 3, "RNN": 3}.get(op, 2)
    asked = SchemeRequest(op, "", scheme, **{**BASE, "weight_rank": rank, **changes})
    got = resolve(target, asked)
    return ("float" if got.scheme is None else str(got.scheme)), got.reason


@pytest.mark.parametrize(
    ("targets", "op", "text", "changes", "scheme", "reason"),
    [
        (EVERY, "MatMul", "w8a8", {}, "w8a8:sym", "int8 by int8"),
        (EVERY, "Conv", "w8a8:tensor", {}, "w8a8:tensor:sym", "int8 by int8"),
        (FLOATS, "MatMul", "fp8", {}, "fp8", "fp8 by fp8"),
        (FLOATS, "Conv", "fp8:tensor", {}, "fp8:tensor", "fp8 by fp8"),
        (FLOATS, "MatMul", "fp8", {"float_type": "FLOAT16"}, "fp8", "fp8 by fp8"),
        (FLOATS, "MatMul", "fp8", {"in_body": True}, "w8a16:sym", "cannot be calibrated"),
        (FLOATS[:1], "MatMul", "fp8", {"left": True}, "w8a16:sym", "left weight"),
        (FLOATS, "ConvTranspose", "fp8", {}, "w8a16:sym", "no fp8 kernel for ConvTranspose"),
        (EVERY, "MatMul", "w8a8:asym", {}, "w8a8:sym", "without a zero point"),
        (EVERY, "MatMul", "w8a8", {"in_body": True}, "w8a16:sym", "cannot be calibrated"),
        (EVERY, "MatMul", "w8a8", {"float_type": "FLOAT16"}, "w8a8:sym", ""),
        (EVERY, "ConvTranspose", "w8a8", {}, "w8a16:sym", "no w8a8 kernel for ConvTranspose"),
        (EVERY, "MatMul", "w8a8-dynamic", {}, "w8a16:sym", "give --calibration DATA and w8a8"),
        (EVERY, "MatMul", "w2a16:b64", {}, "float", "use w4a16:b128"),
        (EVERY, "MatMul", "w4a16:b128", {}, "w4a16:b128:sym", ""),
        (EVERY, "MatMul", "w3a16:b128:asym", {}, "w3a16:b128:sym", "without a zero point"),
        (RTX, "MatMul", "w4a16:b128", {"reduction": 576}, "w4a16:b64:sym", "do not divide"),
        (RTX, "MatMul", "w4a16:b128", {"reduction": 100}, "w4a16:sym", "one scale per output"),
        (RTX, "MatMul", "w4a16:b128", {"left": True}, "float", "left weight"),
        (RTX, "Conv", "w4a16:b128", {}, "w4a16:sym", "one scale per output channel"),
        (RTX, "GRU", "w8a16", {}, "w8a16:b512:sym", "one scale per output channel has no kernel"),
        (RTX, "GRU", "w4a16:b128", {}, "w4a16:b128:sym", ""),
        (RTX, "GRU", "w8a16", {"float_type": "BFLOAT16"}, "float", "BFLOAT16 GRU"),
        (RTX, "Gather", "w4a16:b32", {}, "w4a16:b32:sym", "lookup"),
        (PROPER, "Conv", "w4a16:b128", {}, "float", "use w8a16 or w8a8"),
        (PROPER, "LSTM", "w8a16", {}, "float", "exclude it, or use tensorrt-rtx"),
        (PROPER, "Gather", "w8a8", {}, "float", "exclude it, or use tensorrt-rtx"),
        (PROPER, "MatMul", "w4a16:b32", {}, "w4a16:b64:sym", "blocks of 64"),
        (PROPER, "MatMul", "w4a16:b128", {"reduction": 100}, "float", "no legal granularity"),
        (EVERY, "MatMul", "w8a16", {"outputs": 1, "reduction": 9}, "float", "under 3 KB"),
    ],
)
def test_requests(
    targets: tuple[Target, ...],
    op: str,
    text: str,
    changes: dict[str, Any],
    scheme: str,
    reason: str,
) -> None:
    for target in targets:
        got, why = found(target, op, text, **changes)
        assert got == scheme, why
        assert reason in why


def test_a_processor_without_a_type_says_so() -> None:
    turing = find_target("tensorrt-rtx:sm75,sm89")
    got, why = found(turing, "MatMul", "w4a16:b128", float_type="FLOAT16")
    assert (got, "SM75 has no INT4: use w8a16" in why) == ("float", True)
    got, why = found(turing, "MatMul", "w8a8")
    assert (got, "SM75 has no products in FLOAT: compute in FLOAT16" in why) == ("float", True)


def test_int4_is_left_out_where_reading_weights_is_not_what_takes_the_time() -> None:
    target = find_target("tensorrt-rtx:sm89,sm86")
    ridge = max(one.ridge for one in target.processors)
    assert found(target, "MatMul", "w4a16:b128", rows=ridge)[0] == "w4a16:b128:sym"
    got, why = found(target, "MatMul", "w4a16:b128", rows=ridge + 1)
    assert got == "float"
    assert f"beyond {ridge} rows on SM89" in why
    assert "name no processor to have the smaller file" in why
    assert found(target, "MatMul", "w8a16", rows=ridge + 1)[0] == "w8a16:sym"
    assert found(TENSORRT_RTX, "MatMul", "w4a16:b128", rows=ridge + 1)[0] == "w4a16:b128:sym"


def test_the_compute_type_is_a_parameter() -> None:
    target = find_target("tensorrt-rtx:sm75")
    for float_type in TEXT_TYPES:
        got = found(target, "MatMul", "w8a8", float_type=float_type)[0]
        assert got == ("w8a8:sym" if float_type == "FLOAT16" else "float")


def test_processors_are_part_of_the_name() -> None:
    target = find_target("tensorrt-rtx:8.9,86,sm_89")
    assert target.name == "tensorrt-rtx:sm86,sm89"
    assert find_target(target.name) == target
    assert find_target("tensorrt").name == "tensorrt-11"
    with pytest.raises(UsageError, match=r"'sm90' is no processor .*known: sm75 \(Turing"):
        find_target("tensorrt-rtx:sm90")
    with pytest.raises(UsageError, match="ONNX Runtime runs on any processor"):
        find_target("onnxruntime:sm90")
    with pytest.raises(UsageError, match=r"no target 'tensort' .*tensorrt"):
        find_target("tensort")


def test_rows_of_tensorrt_are_rows_of_rtx() -> None:
    ours = {row.rule: row for row in TENSORRT_RTX.rows}
    for row in TENSORRT_11.rows:
        wider = ours[row.rule]
        assert set(row.ops) <= set(wider.ops)
        assert set(row.uses) <= set(wider.uses)
        assert set(row.block_sizes) <= set(wider.block_sizes)
        assert set(row.ranks) <= set(wider.ranks)
        assert "not run here" in row.source
    for target in EVERY:
        assert all(row.symmetric == (True,) and not row.ragged for row in target.rows)


def test_ridges_grow_out_of_two_published_numbers() -> None:
    assert all(100 < one.ridge < 1000 for one in PROCESSORS)
    assert len({one.name for one in PROCESSORS}) == len(PROCESSORS)
