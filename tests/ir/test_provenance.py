"""What is written on a node reads back."""

import pytest

from qcompiler.errors import UsageError
from qcompiler.ir.provenance import annotate, facts_of, origins_of, scheme_of
from qcompiler.quant.scheme import QScheme
from tests.support.graphs import build


def test_the_scheme_of_a_node() -> None:
    node = build("g (float[2] x) => (float[2] y) { [n] y = Relu(x) }").graph[0]
    assert scheme_of(node) is None
    annotate(node, scheme="float")
    assert scheme_of(node) is None
    annotate(node, scheme="w4a16:b32:sym")
    assert scheme_of(node) == QScheme(4, block_size=32, symmetric=True)
    annotate(node, scheme="w5")
    with pytest.raises(UsageError, match="'w5' is not a scheme"):
        scheme_of(node)


def test_facts_are_text_and_floats_keep_three_decimals() -> None:
    node = build("g (float[2] x) => (float[2] y) { [n] y = Relu(x) }").graph[0]
    node.metadata_props["other"] = "kept out"
    annotate(node, weight_sqnr_db=43.12345, weight_bytes_after=7)
    assert facts_of(node) == {"weight_sqnr_db": "43.123", "weight_bytes_after": "7"}
    assert origins_of(node) == ("n",)
