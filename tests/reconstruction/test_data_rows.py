"""What ops multiply, as rows: rows times the weight's rows are the op's output."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompiler.ir.quantizable import Site, find_sites
from qcompiler.quant.granularity import PerBlock
from qcompiler.reconstruction import data_rows as module
from qcompiler.reconstruction.data_rows import data_rows, same_rows, why_no_rows
from qcompiler.reconstruction.weight_rows import WeightRows
from tests.support.graphs import build, random_array
from tests.support.parity import run_model


def _site(model: ir.Model) -> Site:
    ((site,), _) = find_sites(model)
    return site


def _rows(site: Site, data: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    return torch.cat(list(data_rows(site, data, keep)), dim=1)


@pytest.mark.parametrize(
    ("nodes", "weight", "data", "moved"),
    [
        ("y = MatMul(x, w)", (6, 4), (2, 5, 6), None),
        ("y = MatMul(x, w)", (6,), (5, 6), None),
        ("y = MatMul(w, x)", (4, 6), (2, 6, 5), -2),
        ("y = MatMul(w, x)", (4, 6), (6,), None),
        ("y = Gemm<transB = 1>(x, w)", (4, 6), (5, 6), None),
        ("y = Gemm<transA = 1>(x, w)", (6, 4), (6, 5), None),
        ("t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t)", (4, 6), (5, 6), None),
    ],
)
def test_products_of_matrices(
    nodes: str, weight: tuple[int, ...], data: tuple[int, ...], moved: int | None
) -> None:
    sides = ", ".join("ABCDE"[: len(data)])
    out = 0 if len(weight) == 1 else len(data)
    result = ", ".join("VWXYZ"[: out if len(weight) > 1 else len(data) - 1])
    text = f"g (float[{sides}] x) => (float[{result}] y) {{ {nodes} }}"
    model = build(text, {"w": random_array(*weight)})
    site = _site(model)
    assert why_no_rows(site) is None
    x = random_array(*data, seed=1)
    expected = run_model(model, {"x": x})["y"]
    rows = WeightRows.of(site, PerBlock(site.axes.reduction, 16))
    found = _rows(site, torch.from_numpy(x))[0].numpy() @ rows.rows(random_array(*weight)).T
    outputs = np.moveaxis(expected, moved, -1) if moved else expected
    np.testing.assert_allclose(found.reshape(-1), outputs.reshape(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("attributes", "weight", "data"),
    [
        ("", (4, 3, 3, 2), (2, 3, 7, 6)),
        ("pads = [1, 0, 2, 1], strides = [2, 1], dilations = [1, 2]", (4, 3, 3, 2), (2, 3, 7, 6)),
        ('auto_pad = "SAME_UPPER", strides = [2, 2]', (4, 3, 3, 2), (2, 3, 7, 6)),
        ("group = 2, pads = [1, 1]", (6, 2, 3), (2, 4, 9)),
        ("group = 4", (8, 1, 3, 3), (2, 4, 6, 6)),
        ("", (2, 3, 2, 2, 2), (2, 3, 4, 4, 4)),
    ],
)
def test_convolutions(
    attributes: str,
    weight: tuple[int, ...],
    data: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sides = ", ".join("ABCDE"[: len(data)])
    nodes = f"y = Conv<{attributes}>(x, w)" if attributes else "y = Conv(x, w)"
    kernel = random_array(*weight)
    model = build(f"g (float[{sides}] x) => (float[{sides}] y) {{ {nodes} }}", {"w": kernel})
    site = _site(model)
    assert why_no_rows(site) is None
    x = random_array(*data, seed=1)
    expected = np.moveaxis(run_model(model, {"x": x})["y"], 1, -1)
    rows = WeightRows.of(site, PerBlock(1, 16))
    monkeypatch.setattr(module, "_PATCH_BYTES", 1)
    pieces = list(data_rows(site, torch.from_numpy(x)))
    assert len(pieces) == len(x)
    patches = torch.cat(pieces, dim=1).numpy()
    by_group = rows.rows(kernel).reshape(rows.groups, -1, rows.width)
    found = np.concatenate([p @ w.T for p, w in zip(patches, by_group, strict=True)], axis=1)
    np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=1e-4, atol=1e-5)


def test_padding_does_not_count() -> None:
    model = build(
        "g (float[A, B, 6] x) => (float[A, B, 4] y) { y = MatMul(x, w) }", {"w": random_array(6, 4)}
    )
    x = torch.from_numpy(random_array(2, 5, 6))
    keep = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()
    np.testing.assert_array_equal(_rows(_site(model), x, keep)[0], x[keep])
    other = torch.ones(2, 4).bool()
    assert _rows(_site(model), x, other).shape[1] == 10


@pytest.mark.parametrize(
    ("text", "weight", "reason"),
    [
        (
            "g (float[A, B, C] x) => (float[A, B, C] y) { y = MatMul(x, w) }",
            (3, 6, 4),
            "3 matrices",
        ),
        ("g (int64[A] x) => (float[A, B] y) { y = Gather(w, x) }", (6, 4), "looked up"),
        (
            "g (float[A, 3, B] x) => (float[A, 4, B] y) { y = ConvTranspose(x, w) }",
            (3, 4, 2),
            "overlap",
        ),
    ],
)
def test_refusals_have_a_reason(text: str, weight: tuple[int, ...], reason: str) -> None:
    found = why_no_rows(_site(build(text, {"w": random_array(*weight)})))
    assert found is not None
    assert reason in found


def test_recurrent_ops_are_refused() -> None:
    text = "g (float[S, B, 4] x) => (float[S, 1, B, 5] y) { y = GRU<hidden_size = 5>(x, w, r) }"
    sites, _ = find_sites(build(text, {"w": random_array(1, 15, 4), "r": random_array(1, 15, 5)}))
    for site in sites:
        assert "the step before" in (why_no_rows(site) or "")


def test_sites_of_one_value_share_rows_where_they_read_it_alike() -> None:
    text = """g (float[A, 3, 8] x) => (float[A, 4, B] a, float[A, 4, C] b, float[A, 4, D] c) {
        a = Conv(x, w)
        b = Conv(x, v)
        c = Conv<strides = [2]>(x, u)
    }"""
    model = build(text, {name: random_array(4, 3, 3) for name in "wvu"})
    one, two, strided = find_sites(model)[0]
    assert same_rows(one) == same_rows(two) != same_rows(strided)
