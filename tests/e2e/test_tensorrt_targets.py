"""Models compiled for TensorRT-RTX: what ONNX Runtime computes, and what the library builds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.observers import Observer
from qcompiler.compile import compile_model
from qcompiler.engine import requested_engine
from qcompiler.errors import TargetError, UsageError
from qcompiler.export.to_tensorrt import EngineOptions
from qcompiler.options import CalibrationOptions, CompileOptions
from qcompiler.quant.compute_type import ComputeType
from qcompiler.targets.registry import find_target
from tests.support.calibrated import conv_weight as cw
from tests.support.calibrated import distance_db
from tests.support.graphs import build, op_types, random_array
from tests.support.parity import random_feeds, run_model
from tests.support.real_models import real_model
from tests.support.rtx import RtxBuilder, requires_rtx, rtx

__all__ = ["rtx"]

PADS = "pads=[1,1,1,1]"
RESIDUAL = f"""g (float[4,8,8,8] x) => (float[4,10] y) {{
    [c1] a=Conv<{PADS}>(x,w1,b1) [r1] r=Relu(a)
    [c2] c=Conv<{PADS}>(r,w2,b2) [add] s=Add(c,r) [r2] t=Relu(s)
    [pool] p=GlobalAveragePool(t) f=Flatten(p) [fc] y=Gemm<transB=1>(f,w3,b3) }}"""


def weights() -> dict[str, Any]:
    return {
        "w1": cw(16, 8, 3, 3),
        "w2": cw(16, 16, 3, 3, seed=1),
        "w3": random_array(10, 16, seed=2) / 4,
        **{f"b{index}": random_array(size) for index, size in ((1, 16), (2, 16), (3, 10))},
    }


def compiled(model: ir.Model, folder: Path, **options: Any) -> ir.Model:
    if options.pop("calibrated", True):
        np.savez(folder / "call.npz", **dict[str, Any](random_feeds(model, 0)))
        source = str(folder / "call.npz")
        options["calibration"] = CalibrationOptions(source, observer=Observer.MIN_MAX)
    asked = CompileOptions(**{"target": "tensorrt-rtx:sm89", **options})
    return compile_model(model, asked, output=folder / "compiled.onnx").model()


@pytest.mark.parametrize(
    ("scheme", "decibels"), [("w8a8", 28), ("w8a8:tensor", 28), ("fp8", 22), ("fp8:tensor", 22)]
)
def test_a_residual_network_keeps_its_outputs(scheme: str, decibels: float, tmp_path: Path) -> None:
    model = build(RESIDUAL, weights())
    made = compiled(model, tmp_path, scheme=scheme)
    feeds = random_feeds(model, 0)
    truth, found = run_model(model, feeds)["y"], run_model(made, feeds)["y"]
    assert distance_db(truth, found) > decibels
    # One pair each before the convolutions, which the Add reads as well, and before the Gemm.
    assert op_types(made).count("QuantizeLinear") == 3
    assert {node.domain for node in made.graph.all_nodes()} == {""}
    for node in made.graph.all_nodes():
        if node.op_type == "QuantizeLinear":
            floats = scheme.startswith("fp8")
            kind = ir.DataType.FLOAT8E4M3FN if floats else ir.DataType.INT8
            assert node.outputs[0].dtype == kind


@requires_rtx
@pytest.mark.parametrize("compute_type", [None, *ComputeType])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8:tensor", "fp8", "fp8:tensor"])
def test_its_engine_multiplies_codes(
    scheme: str, compute_type: ComputeType | None, tmp_path: Path, rtx: RtxBuilder
) -> None:
    """Without a warning: in 16 bits scales per channel are widened for it."""
    model = build(RESIDUAL, weights())
    made = compiled(model, tmp_path, scheme=scheme, compute_type=compute_type)
    built = rtx.build(made)
    assert (built.stage, built.log) == ("done", ())
    assert {name for product in built.products for name in product.nodes} == {"c1", "c2", "fc"}
    kind = "int8" if scheme.startswith("w8a8") else "fp8_e4m3"
    assert all(set(product.operands) - {""} == {kind} for product in built.products)


def test_the_report_has_figures_of_floats(tmp_path: Path) -> None:
    model = build(RESIDUAL, weights())
    np.savez(tmp_path / "call.npz", **dict[str, Any](random_feeds(model, 0)))
    options = CompileOptions(
        target="tensorrt-rtx:sm89",
        scheme="fp8",
        calibration=CalibrationOptions(str(tmp_path / "call.npz")),
    )
    report = compile_model(model, options, output=tmp_path / "compiled.onnx").report
    nodes = {node.name: node for node in report.nodes if node.scheme == "fp8"}
    assert set(nodes) == {"c1", "c2", "fc"}
    for node in nodes.values():
        # 3 bits of mantissa: 31.6 dB for values spread evenly over an octave.
        assert node.sqnr_db is not None
        assert 30 < node.sqnr_db < 36
    outputs = [node.output_sqnr_db for node in nodes.values() if node.output_sqnr_db is not None]
    assert outputs
    # Sums and means are nearer than what they add up.
    assert all(20 < found < 45 for found in outputs)


@requires_rtx
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16:b32"])
def test_weights_alone(scheme: str, tmp_path: Path, rtx: RtxBuilder) -> None:
    text = "g (float[4,512] x) => (float[4,512] y) { a=MatMul(x,m1) b=Relu(a) y=MatMul(b,m2) }"
    matrices = {f"m{seed}": random_array(512, 512, seed=seed) / 20 for seed in (1, 2)}
    made = compiled(build(text, matrices), tmp_path, scheme=scheme, calibrated=False)
    built = rtx.build(made)
    assert (built.stage, built.log) == ("done", ())
    assert len(built.engine) < 4 * 512 * 512


QUANTIZED = f"""<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (float[4,8,8,8] x) => (float[4,10] y) {{
    q = QuantizeLinear(x, xs, xz)
    [c1] c = QLinearConv<{PADS}>(q, xs, xz, w, ws, wz, cs, cz, b)
    [pool] p = MaxPool<kernel_shape=[8,8]>(c) f = Flatten(p)
    d = DequantizeLinear(f, cs, cz)
    [fc] m = com.microsoft.MatMulNBits<K=16, N=10, bits=4, block_size=16>(d, n, ns)
    y = Relu(m) }}"""


def quantized_elsewhere() -> ir.Model:
    generator = np.random.default_rng(0)
    return build(
        QUANTIZED,
        {
            "w": generator.integers(-64, 65, (16, 8, 3, 3)).astype(np.int8),
            "ws": np.full(16, 0.01, np.float32),
            "wz": np.zeros(16, np.int8),
            "b": generator.integers(-100, 101, 16).astype(np.int32),
            "n": generator.integers(0, 256, (10, 1, 8)).astype(np.uint8),
            "ns": np.full(10, 0.1, np.float32),
            **{name: np.float32(0.05) for name in ("xs", "cs")},
            **{name: np.uint8(128) for name in ("xz", "cz")},
        },
    )


def test_what_another_tool_quantized_keeps_its_outputs(tmp_path: Path) -> None:
    model = quantized_elsewhere()
    made = compiled(model, tmp_path, scheme="float", calibrated=False)
    assert {node.domain for node in made.graph.all_nodes()} == {""}
    feeds = random_feeds(model, 0)
    # All zero points are in the middle, so that only sums differ: in integers and in floats.
    assert distance_db(run_model(model, feeds)["y"], run_model(made, feeds)["y"]) > 50


@requires_rtx
def test_what_another_tool_quantized_builds(tmp_path: Path, rtx: RtxBuilder) -> None:
    made = compiled(quantized_elsewhere(), tmp_path, scheme="float", calibrated=False)
    built = rtx.build(made)
    assert (built.stage, built.log) == ("done", ())
    convolution = built.products[0]
    assert convolution.multiplies_integers


@requires_rtx
def test_float8_of_another_tool_goes_through(tmp_path: Path, rtx: RtxBuilder) -> None:
    text = """g (float[4,64] x) => (float[4,64] y) {
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        w = DequantizeLinear<axis=1>(c, t) [fc] y = MatMul(d, w) }"""
    float8 = ir.DataType.FLOAT8E4M3FN
    codes = random_array(64, 64).astype(float8.numpy())
    model = build(
        text,
        {
            "c": ir.tensor(codes, dtype=float8),
            "t": np.full(64, 0.1, np.float32),
            "s": np.float32(0.05),
            "z": ir.tensor(np.zeros((), float8.numpy()), dtype=float8),
        },
    )
    made = compiled(model, tmp_path, scheme="float", calibrated=False)
    built = rtx.build(made)
    assert (built.stage, built.log) == ("done", ())
    assert [product.operands for product in built.products] == [("fp8_e4m3", "fp8_e4m3")]
    with pytest.raises(TargetError, match="SM80, SM86 has no FLOAT8E4M3FN"):
        compiled(model, tmp_path, target="tensorrt-rtx", scheme="float", calibrated=False)


@requires_rtx
def test_an_engine_is_for_the_processors_of_the_target(tmp_path: Path) -> None:
    options = CompileOptions(engine=tmp_path / "m.engine")
    named = requested_engine(options, find_target("tensorrt-rtx:sm89,sm86"))
    assert named is not None
    assert named.options.capabilities == ("SM86", "SM89")
    free = requested_engine(options, find_target("tensorrt-rtx"))
    assert free is not None
    assert free.options.capabilities == ()
    asked = replace(options, engine_options=EngineOptions(capabilities=("SM120",)))
    with pytest.raises(UsageError, match="the engine is for SM120, and the graph for SM86"):
        requested_engine(asked, find_target("tensorrt-rtx:sm86"))


@requires_rtx
def test_integers_and_float16_in_one_engine(tmp_path: Path, rtx: RtxBuilder) -> None:
    """Casting leaves the types of quantizers and their readers in one piece."""
    text = """g (float[4,256] x) => (float[4,64] y) {
        [up] a=MatMul(x,m1) r=Relu(a) [down] y=MatMul(r,m2) }"""
    matrices = {"m1": random_array(256, 256) / 16, "m2": random_array(256, 64, seed=1) / 16}
    made = compiled(build(text, matrices), tmp_path, compute_type=ComputeType.FLOAT16)
    built = rtx.build(made)
    assert (built.stage, built.log) == ("done", ())
    assert [product.operands for product in built.products] == [("int8", "int8")] * 2


def test_latency_is_not_measured_where_engines_do_not_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="latency of TensorRT-RTX cannot be measured"):
        compiled(build(RESIDUAL, weights()), tmp_path, never_slower=True)


def test_a_processor_that_lacks_float32_products_is_refused(tmp_path: Path) -> None:
    model = build(RESIDUAL, weights())
    with pytest.raises(TargetError, match=r"SM75 has no Conv in FLOAT .compute in float16"):
        compiled(model, tmp_path, target="tensorrt-rtx:sm75", scheme="w8a16", calibrated=False)


@requires_rtx
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("cifar_cnn", {"images": [[1, 3, 32, 32], [8, 3, 32, 32], [64, 3, 32, 32]]}),
        (
            "minilm",
            {
                name: [[1, 1], [8, 16], [16, 64]]
                for name in ("input_ids", "attention_mask", "token_type_ids")
            },
        ),
    ],
)
@pytest.mark.parametrize(
    ("scheme", "processors", "kind"),
    [
        ("w8a8", ("SM80", "SM86", "SM89", "SM120"), "int8"),
        ("fp8", ("SM89", "SM120"), "fp8_e4m3"),
    ],
)
def test_real_models_run_all_their_products_on_codes(
    name: str,
    shapes: dict[str, list[list[int]]],
    scheme: str,
    processors: tuple[str, ...],
    kind: str,
    tmp_path: Path,
    rtx: RtxBuilder,
) -> None:
    calibration = CalibrationOptions("random", observer=Observer.MIN_MAX, outlier_channels=0)
    options = CompileOptions(
        target=f"tensorrt-rtx:{','.join(processors).lower()}",
        scheme=scheme,
        calibration=calibration,
        correct_bias=False,
        equalization=None,
    )
    result = compile_model(real_model(name), options, output=tmp_path / "compiled.onnx")
    built = rtx.build(result.path, processors, shapes)
    assert built.stage == "done", built.log
    assert not [text for text in built.log if "Int64 binding" not in text]
    planned = {node.name for node in result.report.nodes if node.scheme in ("w8a8:sym", "fp8")}
    on_codes = [one for one in built.products if set(one.operands) - {""} == {kind}]
    assert planned == {node for product in on_codes for node in product.nodes}


@requires_rtx
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
def test_a_convolutional_net_in_float16_draws_no_warning(
    scheme: str, tmp_path: Path, rtx: RtxBuilder
) -> None:
    options = CompileOptions(
        target="tensorrt-rtx:sm89",
        scheme=scheme,
        compute_type=ComputeType.FLOAT16,
        calibration=CalibrationOptions("random", observer=Observer.MIN_MAX),
        correct_bias=False,
        equalization=None,
    )
    result = compile_model(real_model("cifar_cnn"), options, output=tmp_path / "compiled.onnx")
    shapes = {"images": [[1, 3, 32, 32], [8, 3, 32, 32], [64, 3, 32, 32]]}
    built = rtx.build(result.path, ("SM89",), shapes)
    assert (built.stage, built.log) == ("done", ())
