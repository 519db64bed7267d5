"""The size a site reports, against the tensors of the lowered model."""

from pathlib import Path

import onnx_ir as ir
import pytest

from qcompiler.passes.lower.lower_embeddings import LowerEmbeddings
from qcompiler.passes.lower.lower_matmul_nbits import LowerMatMulNBits
from qcompiler.quant.granularity import PerAxis, PerBlock
from tests.support.coded import CodedWeight, coded_weight
from tests.support.graphs import build, node_named
from tests.support.rewrites import run_pass

SHAPES = (".shape",)


def lowered(text: str, weight: CodedWeight, sites: tuple[str, ...], folder: Path) -> ir.Model:
    model = build(text, weight.weights)
    for name in sites:
        facts = {"qcompiler.weight": "w", "qcompiler.weight_bytes_after": "1"}
        node_named(model, name).metadata_props.update(facts)
    run_pass(LowerMatMulNBits(), model, folder)
    run_pass(LowerEmbeddings(), model, folder)
    return model


def claimed(model: ir.Model, name: str) -> int:
    return int(node_named(model, name).metadata_props["qcompiler.weight_bytes_after"])


def stored(model: ir.Model) -> int:
    values = model.graph.initializers.values()
    tensors = [value.const_value for value in values if not str(value.name).endswith(SHAPES)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("scale_type", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
@pytest.mark.parametrize("signed", [True, False])
def test_padded_weight_of_two_products(
    scale_type: ir.DataType, signed: bool, tmp_path: Path
) -> None:
    dtype = "float16" if scale_type == ir.DataType.FLOAT16 else "float"
    weight = coded_weight((257, 257), PerAxis(1), bits=8, signed=signed, scale_type=scale_type)
    text = f"""g ({dtype}[b, 257] x) => ({dtype}[b, 257] y) {{
        {weight.dequantize("wd")} [one] t = MatMul(x, wd) [two] y = MatMul(t, wd) }}"""
    model = lowered(text, weight, ("one", "two"), tmp_path)
    assert node_named(model, "one").attributes["block_size"].as_int() == 32
    assert claimed(model, "one") == claimed(model, "two") == stored(model)
    assert 8 * stored(model) / 257**2 < 10.7


@pytest.mark.parametrize("granularity", [PerAxis(0), PerBlock(1, 32)])
def test_table_of_a_lookup_and_a_product(granularity: PerAxis | PerBlock, tmp_path: Path) -> None:
    weight = coded_weight((40, 96), granularity, bits=8, signed=False)
    text = f"""g (int64[b] ids, float[b, 96] x) => (float[b, 96] e, float[b, 40] y) {{
        {weight.dequantize("wd")} wt = Transpose<perm=[1, 0]>(wd)
        [lookup] e = Gather(wd, ids) [head] y = MatMul(x, wt) }}"""
    model = lowered(text, weight, ("lookup", "head"), tmp_path)
    assert claimed(model, "lookup") == claimed(model, "head") == stored(model)


def test_sites_that_stay_keep_their_number(tmp_path: Path) -> None:
    weight = coded_weight((64, 32), PerBlock(0, 32), bits=4, signed=True)
    text = f"""g (float[b, 64] x) => (float[b, 32] y) {{
        {weight.dequantize("wd")} [one] y = MatMul(x, wd) }}"""
    assert claimed(lowered(text, weight, ("one",), tmp_path), "one") == 1
