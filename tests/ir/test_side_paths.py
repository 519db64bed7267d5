"""Parts of a product beside it: the sum is what it was, whatever is stored where."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.islands import Island, island_of, mark_island, side_bytes
from qcompiler.ir.quantizable import Site, find_sites
from qcompiler.ir.side_paths import SidePathBuilder, why_no_side_path
from qcompiler.ir.weights import WeightStore
from qcompiler.quant.islands import IslandKind
from tests.support.graphs import build, initializer, node_named, op_types, random_array
from tests.support.parity import assert_parity

_W = random_array(32, 8)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "matmul": ("float[5, 32]", "[op] y = MatMul(x, w)", {"w": _W}),
    "batch": ("float[B, 3, 32]", "[op] y = MatMul(x, w)", {"w": _W}),
    "gemm": ("float[5, 32]", "[op] y = Gemm(x, w, b)", {"w": _W, "b": random_array(8)}),
    "transB": ("float[5, 32]", "[op] y = Gemm<transB=1>(x, w)", {"w": _W.T.copy()}),
    "transpose": (
        "float[5, 32]",
        "t = Transpose<perm=[1, 0]>(w) [op] y = MatMul(x, t)",
        {"w": _W.T.copy()},
    ),
    "conv": (
        "float[2, 12, 6, 6]",
        "[op] y = Conv<pads=[1, 1, 1, 1], strides=[2, 2]>(x, w, b)",
        {"w": random_array(8, 12, 3, 3), "b": random_array(8)},
    ),
}


def model(name: str) -> ir.Model:
    shape, body, weights = CASES[name]
    out = {"batch": "[B, 3, 8]", "conv": "[2, 8, 3, 3]"}.get(name, "[5, 8]")
    made = build(f"g ({shape} x) => (float{out} y) {{ {body} }}", weights)
    for node in made.graph:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        if node.op_type == "Transpose":
            node.outputs[0].shape = ir.Shape([32, 8])
    return made


def site_of(made: ir.Model) -> Site:
    return find_sites(made)[0][0]


def builder(made: ir.Model, folder: Path) -> SidePathBuilder:
    return SidePathBuilder(made, WeightStore(folder), "test", main="rest", side="island")


@pytest.mark.parametrize("stored", [None, ir.DataType.FLOAT16])
@pytest.mark.parametrize("name", CASES)
def test_channels(name: str, stored: ir.DataType | None, tmp_path: Path) -> None:
    after = model(name)
    side = builder(after, tmp_path).split_channels(
        site_of(after), np.array([1, 7, 8], np.int64), stored
    )
    assert [value.name for value in after.graph.outputs] == ["y"]
    assert side.values.dtype == (stored or ir.DataType.FLOAT)
    assert ("Cast" in op_types(after)) == (stored is not None)
    assert_parity(model(name), after, tolerance=1e-5 if stored is None else 2e-3)


@pytest.mark.parametrize("stored", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
@pytest.mark.parametrize("name", [name for name in CASES if name != "conv"])
def test_single_elements(name: str, stored: ir.DataType, tmp_path: Path) -> None:
    after = model(name)
    site = site_of(after)
    mask = np.random.default_rng(0).random(site.shape) < 0.1
    side = builder(after, tmp_path).split_elements(site, mask, stored)
    assert {value.dtype for value in side.index} == {ir.DataType.UINT16}
    assert side_bytes(side) == mask.sum() * (2 + 2 + stored.itemsize)
    assert [value.name for value in after.graph.outputs] == ["y"]
    assert_parity(model(name), after, tolerance=1e-5 if stored == ir.DataType.FLOAT else 2e-3)
    assert not initializer(after, "w.rest")[mask].any()


@pytest.mark.parametrize("kind", [IslandKind.COLUMN, IslandKind.WEIGHT])
@pytest.mark.parametrize("name", CASES)
def test_islands_are_read_and_written(name: str, kind: IslandKind, tmp_path: Path) -> None:
    if name == "conv" and kind is IslandKind.WEIGHT:
        return
    after = model(name)
    site = site_of(after)
    whole = site.tensor.numpy().copy()
    make = builder(after, tmp_path)
    if kind is IslandKind.COLUMN:
        side = make.split_channels(site, np.array([0, 9], np.int64), ir.DataType.FLOAT16)
    else:
        mask = np.random.default_rng(0).random(site.shape) < 0.1
        side = make.split_elements(site, mask, ir.DataType.FLOAT16)
    mark_island(site.node, kind, side)
    (found,) = (s for s in find_sites(after)[0] if s.node is site.node)
    island = island_of(found, after.graph)
    assert isinstance(island, Island)
    if kind is IslandKind.WEIGHT:
        np.testing.assert_array_equal(island.mask(), mask)
    np.testing.assert_allclose(island.whole(found.tensor), whole, rtol=1e-3)
    doubled = (2 * island.whole(found.tensor)[island.mask()]).astype(np.float32)
    island.write(doubled, WeightStore(tmp_path))
    again = island_of(found, after.graph)
    assert again is not None
    np.testing.assert_allclose(
        again.whole(found.tensor), np.where(again.mask(), 2 * whole, whole), rtol=2e-3
    )


def test_what_is_too_large_for_16_bits_is_the_largest_number(tmp_path: Path) -> None:
    made = build(
        "g (float[5, 4] x) => (float[5, 2] y) { y = MatMul(x, w) }", {"w": 1e6 * _W[:4, :2]}
    )
    side = builder(made, tmp_path).split_channels(
        site_of(made), np.array([0], np.int64), ir.DataType.FLOAT16
    )
    assert np.isfinite(initializer(made, side.values.name or "")).all()


def test_16_bit_models_add_in_32_bits(tmp_path: Path) -> None:
    text = "g (float16[5, 32] x) => (float16[5, 8] y) { [op] y = MatMul(x, w) }"
    before, after = (build(text, {"w": _W.astype(np.float16)}) for _ in range(2))
    mask = np.random.default_rng(0).random(_W.shape) < 0.1
    builder(after, tmp_path).split_elements(site_of(after), mask, ir.DataType.FLOAT16)
    assert_parity(before, after, tolerance=4e-3)


def test_bfloat16_needs_no_cast(tmp_path: Path) -> None:
    made = build(
        "g (bfloat16[5, 32] x) => (bfloat16[5, 8] y) { y = MatMul(x, w) }",
        {"w": _W.astype(ml_dtypes.bfloat16)},
    )
    builder(made, tmp_path).split_channels(site_of(made), np.array([4], np.int64))
    assert "Cast" not in op_types(made)


@pytest.mark.parametrize(
    ("text", "weights", "reason"),
    [
        ("y = MatMul(w, x)", {"w": random_array(4, 32)}, "no matrix on the right"),
        (
            "y = Gemm<alpha=2.0>(x, w)",
            {"w": random_array(32, 4)},
            "multiplies the product by alpha",
        ),
        ("y = Gemm<transA=1>(x, w)", {"w": random_array(32, 4)}, "no matrix on the right"),
    ],
)
def test_refuses(text: str, weights: dict[str, Any], reason: str) -> None:
    made = build(f"g (float[32, 32] x) => (float[M, N] y) {{ {text} }}", weights)
    assert reason in (why_no_side_path(site_of(made)) or "")


def test_refuses_grouped_and_single_weights_of_convolutions() -> None:
    made = build(
        "g (float[1, 4, 5, 5] x) => (float[1, 4, 3, 3] y) { y = Conv<group=2>(x, w) }",
        {"w": random_array(4, 2, 3, 3)},
    )
    assert why_no_side_path(site_of(made)) == "its channels lie in groups"
    assert "no form that runs faster" in (why_no_side_path(site_of(made), single=True) or "")


def test_nodes_of_a_side_path_say_who_made_them(tmp_path: Path) -> None:
    made = model("matmul")
    builder(made, tmp_path).split_channels(site_of(made), np.array([3], np.int64))
    others = [node for node in made.graph if node.name != "op"]
    assert {node.metadata_props["qcompiler.created_by"] for node in others} == {"test"}
    assert node_named(made, "op").op_type == "MatMul"
