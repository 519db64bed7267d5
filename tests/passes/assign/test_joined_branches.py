"""Quantizers for TensorRT: on the inputs of ops with weights, and on one branch of a residual."""

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from qcompiler.errors import TargetError
from qcompiler.ir.provenance import annotate
from qcompiler.passes.assign.place_quantizers import PlaceOptions, PlaceQuantizers
from qcompiler.targets.tensorrt import TENSORRT_RTX
from tests.passes.assign.test_place_quantizers import conv, fact, marked, model
from tests.support.graphs import node_named, serialized
from tests.support.rewrites import run_pass


def placed(body: str, folder: Path, **options: Any) -> ir.Model:
    made = model(body, **options)
    run_pass(PlaceQuantizers(PlaceOptions(TENSORRT_RTX.placement)), made, folder)
    return made


def reads(made: ir.Model, name: str) -> list[int]:
    return list(json.loads(fact(made, name, "quantized_inputs") or "[]"))


C1, TAIL = conv("a", "x", "w1"), conv("y", "m", "w2")


def test_inputs_are_quantized_and_what_fuses_is_not(tmp_path: Path) -> None:
    made = placed(f"{C1} [r] r = Relu(a) [p] m = MaxPool<kernel_shape=[1,1]>(r) {TAIL}", tmp_path)
    assert marked(made) == {"x", "m"}
    assert made.graph.inputs[0].metadata_props["qcompiler.quantizer"] == "int8:sym"


@pytest.mark.parametrize(("order", "branch"), [("c, x", 1), ("x, c", 0)])
def test_the_branch_without_a_convolution_is_quantized(
    order: str, branch: int, tmp_path: Path
) -> None:
    body = f"{C1} [r] r = Relu(a) {conv('c', 'r', 'w3')} [add] s = Add({order}) m = Relu(s) {TAIL}"
    made = placed(body, tmp_path)
    assert marked(made) == {"x", "r", "m"}, "neither c nor s: they fuse with what follows"
    assert fact(made, "add", "placement") == "residual"
    assert reads(made, "add") == [branch]


def test_of_two_convolutions_the_earlier_one_is_quantized(tmp_path: Path) -> None:
    body = f"{C1} {conv('c', 'x', 'w3')} [add] m = Add(c, a) {TAIL}"
    made = placed(body, tmp_path)
    assert marked(made) == {"x", "a", "m"}
    assert reads(made, "add") == [1]


REFUSED = {
    "two-readers": (f"{C1} [add] m = Add(a, x) {TAIL} b = Relu(a)", "float[N,8,8,8] y, "
                    "float[N,8,8,8] b"),
    "no-convolution": ("a = Relu(x) [add] m = Add(a, x) " + TAIL, "float[N,8,8,8] y"),
    "behind-a-relu": (f"{C1} r = Relu(a) [add] m = Add(r, x) {TAIL}", "float[N,8,8,8] y"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_adds_no_sums(name: str, tmp_path: Path) -> None:
    body, outputs = REFUSED[name]
    made = placed(body, tmp_path, outputs=outputs)
    assert fact(made, "add", "placement") is None
    assert "adds no sums of a Conv" in (fact(made, "add", "placement_reason") or "")


def test_refuses_a_constant_branch(tmp_path: Path) -> None:
    body = f"{C1} [add] m = Add(a, w2) {TAIL}"
    made = placed(body, tmp_path)
    assert fact(made, "add", "placement_reason") == "one of its inputs is a constant in float"


def test_is_idempotent(tmp_path: Path) -> None:
    body = f"{C1} {conv('c', 'x', 'w3')} [add] m = Add(c, a) {TAIL}"
    made = placed(body, tmp_path)
    before = serialized(made)
    run_pass(PlaceQuantizers(PlaceOptions(TENSORRT_RTX.placement)), made, tmp_path)
    assert serialized(made) == before


def test_codes_are_floats_where_the_convolution_multiplies_floats(tmp_path: Path) -> None:
    body = f"[relu] r = Relu(x) {C1} [add] m = Add(a, r) {TAIL}"
    made = model(body)
    for name in ("a_op", "y_op"):
        annotate(node_named(made, name), scheme="fp8")
    run_pass(PlaceQuantizers(PlaceOptions(TENSORRT_RTX.placement)), made, tmp_path)
    values = [*made.graph.inputs, *(value for node in made.graph for value in node.outputs)]
    found = {v.name: v.metadata_props.get("qcompiler.quantizer") for v in values}
    # Nothing but the Add reads r: it takes the type of the convolution before it.
    assert {found[name] for name in ("x", "r", "m")} == {"fp8:sym"}


def test_a_value_cannot_be_floats_and_integers(tmp_path: Path) -> None:
    made = model(f"{C1} {conv('c', 'x', 'w3')} [add] m = Add(a, c) {TAIL}")
    annotate(node_named(made, "a_op"), scheme="fp8")
    with pytest.raises(TargetError, match=r"a_op .Conv.: x would be fp8 .* integers for c_op"):
        run_pass(PlaceQuantizers(PlaceOptions(TENSORRT_RTX.placement)), made, tmp_path)
