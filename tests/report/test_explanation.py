"""Any node of the source or the result is explained: what it became, why, and what would help."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qcompiler.compile import compile_model
from qcompiler.errors import UsageError
from qcompiler.options import CompileOptions
from qcompiler.report.explanation import Subject, explanations
from qcompiler.report.records import EngineReport, UnplannedWeight
from tests.support.calibrated import compile_calibrated
from tests.support.graphs import build, random_array
from tests.support.reports import node_report

MODEL = """
g (float[8, 64] x) => (float[8, 64] y) {
  [nothing] i = Identity(x) [first] a = MatMul(i, u) [act] r = Relu(a) [second] b = MatMul(r, v)
  [end] t = Tanh(b) [third] y = MatMul(t, u)
}
"""
WEIGHTS = {"u": random_array(64, 64, seed=1), "v": random_array(64, 64, seed=2)}


def told(subject: Subject, pattern: str) -> str:
    return "\n".join(line for lines in explanations(subject, pattern) for line in lines)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("explained")
    feeds = {"x": random_array(8, 64, seed=5)}
    result = compile_calibrated(build(MODEL, WEIGHTS), feeds, folder).result
    return Subject(result.model(), result.report.nodes, result.report.passes)


def test_a_quantized_op(subject: Subject) -> None:
    text = told(subject, "second")
    for part in (
        *("scheme    w8a8:sym", "rule      qlinear-matmul", "recipe default asks for it"),
        *("became    MatMul second; reads DequantizeLinear (insert-activation-qdq)",),
        *(
            "weight    v: 4096 elements",
            "SQNR",
            "error     reads",
            "calibrate (choose-range): r: 0",
        ),
        *("assign-schemes", "insert-qdq: w8a8:sym", "change    --exclude second keeps it in float"),
    ):
        assert part in text, part


def test_a_node_that_a_pass_made_and_one_that_is_gone(subject: Subject) -> None:
    text = told(subject, "r.quantized")
    assert text.startswith("r.quantized (QuantizeLinear)")
    assert "made      by insert-activation-qdq" in text
    assert "read      by r.dequantized" in text
    text = told(subject, "nothing")
    assert "gone      since eliminate-identity" in text
    assert "kept      in float" in told(subject, "end")


def test_every_node_of_source_and_result_is_explained(subject: Subject) -> None:
    for name in subject.names():
        assert told(subject, name.replace("[", "[[]")), name
    assert {"nothing", "first", "act", "second", "end", "third"} <= set(subject.names())
    assert told(subject, "other") == ""


def test_a_folded_node_is_told_with_what_it_became_and_the_way_out_of_float(tmp_path: Path) -> None:
    ones = np.ones(64, np.float32)
    model = build(
        "g (float[N, 64, 8, 8] x) => (float[N, 64, 8, 8] y) {"
        " [conv] c = Conv <kernel_shape = [1, 1]> (x, w)"
        " [norm] y = BatchNormalization(c, s, b, m, v) }",
        {"w": random_array(64, 64, 1, 1), "s": ones, "b": ones, "m": ones, "v": ones},
    )
    result = compile_model(model, CompileOptions("w4a16:b32"), output=tmp_path / "o.onnx")
    text = told(Subject(result.model(), result.report.nodes, result.report.passes), "norm")
    assert text.startswith("conv (Conv)")
    assert "also      norm" in text
    assert "fold-batch-norm: BatchNormalization into conv" in text
    bare = told(Subject(result.model(), result.report.nodes), "norm")
    assert "also      norm" in bare
    assert text.count("has no convolution kernel for weights below 8 bits: it would") == 1
    assert "docs/refusals.md#conv-low-bit" in text


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"scheme": "float", "rule": "rule 2: name=x"}, "docs/refusals.md#recipe"),
        ({"scheme": "float", "rule": "never-slower"}, "--no-never-slower"),
        ({"reason": "chosen by --never-slower: faster"}, "--no-never-slower gives it"),
        ({"reason": "left out of w8a8 by --min-output-sqnr 30"}, "a lower --min-output-sqnr"),
        ({"integer_kernel": False}, "no integer kernel runs it"),
        ({"scheme": "w4a16:b128", "sqnr_db": 12.0}, "--reconstruct gptq"),
        ({"data_sqnr_db": 20.0, "output_sqnr_db": 19.9}, "arrives with its data"),
        (
            {"compute_type": "float32", "type_reason": "it overflows"},
            "in float32, since it overflows",
        ),
        ({"weight": None, "scheme": "a8"}, "it follows the ops around it"),
    ],
)
def test_what_would_change_it(changes: dict[str, object], wanted: str) -> None:
    model = build("g (float[2] x) => (float[2] y) { [it] y = Relu(x) }")
    entry = replace(node_report("it"), **changes)  # type: ignore[arg-type]
    assert wanted in told(Subject(model, [entry]), "it")


def test_weights_that_an_engine_holds_otherwise(subject: Subject) -> None:
    initializers = subject.model.graph.initializers.values()
    (stored,) = [
        v.name or ""
        for v in initializers
        if v.const_value and v.const_value.shape == (64, 64) and (v.name or "").startswith("v")
    ]
    other = (
        UnplannedWeight(stored, "INT8", "FLOAT", 4096, 16384),
        UnplannedWeight("another", "INT8", None, 64, None),
    )
    engine = EngineReport(
        *("m.engine", 3 << 20, "0", "TensorRT-RTX", "1.7", ("SM86",), 2.5, 40, 2 << 20, 9, 7),
        other,
        (),
    )
    text = told(replace(subject, engine=engine), "second")
    assert f"engine    {stored}: planned as INT8, found as FLOAT" in text
    assert "another" not in text
    assert "engine  " not in told(replace(subject, engine=engine), "first")


def test_a_pattern_that_is_no_expression_is_refused(subject: Subject) -> None:
    with pytest.raises(UsageError):
        told(subject, "/(/")
