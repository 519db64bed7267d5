"""The plan: what is asked for, what the target can do, and what is written on the node."""

from pathlib import Path

import onnx_ir as ir
import pytest

from qcompiler.errors import ModelError, UsageError
from qcompiler.ir.provenance import facts_of
from qcompiler.passes.assign.assign_schemes import AssignOptions, AssignSchemes
from qcompiler.quant.recipe import Recipe
from qcompiler.quant.scheme import parse_scheme
from qcompiler.rewriting.base import PassResult
from qcompiler.targets.onnxruntime import ONNXRUNTIME
from tests.support.graphs import build, node_named, random_array
from tests.support.rewrites import assert_idempotent, run_pass

_TEXT = """g (float[N, 64] x, float[64, 64] other) => (float[N, 64] y) {
    [first] a = MatMul(x, w0)
    [relu] b = Relu(a)
    [attention] c = MatMul(b, other)
    [second] y = MatMul(c, w1)
}"""


def _model() -> ir.Model:
    return build(_TEXT, {"w0": random_array(64, 64), "w1": random_array(64, 64, seed=1)})


def _assign(model: ir.Model, recipe: Recipe, folder: Path) -> PassResult:
    return run_pass(AssignSchemes(AssignOptions(recipe, ONNXRUNTIME)), model, folder)


def _uniform(scheme: str, *excludes: str) -> Recipe:
    return Recipe.uniform(parse_scheme(scheme), excludes)


def _scheme(model: ir.Model, name: str) -> str:
    return facts_of(node_named(model, name))["scheme"]


def test_every_weight_op_gets_the_scheme_with_symmetry_decided(tmp_path: Path) -> None:
    model = _model()
    result = _assign(model, _uniform("w4a16:b32:sym"), tmp_path)
    assert _scheme(model, "first") == _scheme(model, "second") == "w4a16:b32:sym"
    assert len(result.rewrites) == 2
    facts = facts_of(node_named(model, "first"))
    assert facts["weight"] == "w0"
    assert facts["weight_elements"] == "4096"
    assert facts["weight_bytes_before"] == "16384"
    assert "recipe default asks for it" in facts["reason"]


def test_an_op_without_a_weight_says_so(tmp_path: Path) -> None:
    model = _model()
    result = _assign(model, _uniform("w8a16"), tmp_path)
    assert _scheme(model, "attention") == "float"
    (skip,) = result.skips
    assert skip.node == "attention"
    assert "both inputs are computed at run time" in skip.reason


def test_an_excluded_op_stays_float_and_says_why(tmp_path: Path) -> None:
    model = _model()
    _assign(model, _uniform("w8a16", "sec*"), tmp_path)
    assert _scheme(model, "second") == "float"
    assert "sec*" in facts_of(node_named(model, "second"))["rule"]
    assert "excluded" in facts_of(node_named(model, "second"))["reason"]
    assert _scheme(model, "first") != "float"


@pytest.mark.parametrize("pattern", ["frist", "/frist.*/"])
def test_a_pattern_that_matches_nothing_names_the_nearest(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="matches no quantizable op") as caught:
        _assign(_model(), _uniform("w8a16", pattern), tmp_path)
    if pattern == "frist":
        assert "first" in str(caught.value.hint)


def test_the_first_rule_that_matches_wins(tmp_path: Path) -> None:
    recipe = Recipe.from_text(
        """version = 1
        default = "w8a16"
        [[rule]]
        name = "first"
        scheme = "w4a16:b32:sym"
        reason = "measured"
        [[rule]]
        op_type = "MatMul"
        scheme = "w8a16:sym"
        """,
        "recipe.toml",
    )
    model = _model()
    _assign(model, recipe, tmp_path)
    assert _scheme(model, "first") == "w4a16:b32:sym"
    assert "measured" in facts_of(node_named(model, "first"))["reason"]
    assert _scheme(model, "second") == "w8a16:sym"


def test_blocks_and_stretches_select(tmp_path: Path) -> None:
    recipe = Recipe.from_text(
        """version = 1
        [[rule]]
        between = ["b", "y"]
        scheme = "w8a16:sym"
        """,
        "recipe.toml",
    )
    model = _model()
    _assign(model, recipe, tmp_path)
    assert (_scheme(model, "first"), _scheme(model, "second")) == ("float", "w8a16:sym")
    by_block = Recipe.from_text(
        'version = 1\n[[rule]]\nblock = "0"\nscheme = "w8a16:sym"\n', "recipe.toml"
    )
    model = _model()
    _assign(model, by_block, tmp_path)
    assert (_scheme(model, "first"), _scheme(model, "second")) == ("w8a16:sym", "float")


def test_between_a_value_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    recipe = Recipe.from_text(
        'version = 1\n[[rule]]\nbetween = ["a", "yy"]\nscheme = "w8a16"\n', "recipe.toml"
    )
    with pytest.raises(UsageError, match="the model has no value 'yy'"):
        _assign(_model(), recipe, tmp_path)


def test_tied_sites_get_one_scheme_float_if_one_must_be(tmp_path: Path) -> None:
    text = """g (float[N, 64] x, int64[N] i) => (float[N, 64] y, float[N, 64] e) {
        [lookup] e = Gather(table, i)
        [turn] t = Transpose<perm=[1, 0]>(table)
        [head] y = MatMul(x, t)
    }"""
    model = build(text, {"table": random_array(64, 64)})
    _assign(model, _uniform("w8a16"), tmp_path)
    assert _scheme(model, "lookup") == _scheme(model, "head") != "float"
    model = build(text, {"table": random_array(64, 64)})
    _assign(model, _uniform("w8a16", "head"), tmp_path)
    assert _scheme(model, "lookup") == _scheme(model, "head") == "float"


TABLE = """g (int64[N] i) => (float[N, 64] y) {
    [lookup] e = Gather(table, i)
    [turn] t = Transpose<perm=[1, 0]>(table)
    [inner] h = MatMul(e, w)
    [head] y = MatMul(h, t) }"""


@pytest.mark.parametrize(
    ("default", "rules", "table"),
    [
        ("w2a16:b32", "", "w8a16"),
        ("w3a16:b32", "", "w8a16"),
        ("w4a16:b32", "", "w4a16:b32"),
        ("w2a16:b32", '[[rule]]\nop_type = "Gather"\nscheme = "w4a16:b32"', "w4a16:b32"),
    ],
)
def test_tables_keep_8_bits_below_4(default: str, rules: str, table: str, tmp_path: Path) -> None:
    model = build(TABLE, {"table": random_array(64, 64), "w": random_array(64, 64)})
    recipe = Recipe.from_text(f'version = 1\ndefault = "{default}"\n{rules}', "recipe.toml")
    _assign(model, recipe, tmp_path)
    found = {name: _scheme(model, name).removesuffix(":asym") for name in ("lookup", "inner")}
    assert found["inner"].removesuffix(":sym") == default
    assert found["lookup"].removesuffix(":sym") == table
    assert _scheme(model, "lookup") == _scheme(model, "head"), "the head is tied to the table"


def test_a_weight_that_something_else_reads_stays_float(tmp_path: Path) -> None:
    model = build(
        """g (float[64, 64] x) => (float[64, 64] y) {
            [product] a = MatMul(x, w)
            [sum] y = Add(a, w)
        }""",
        {"w": random_array(64, 64)},
    )
    result = _assign(model, _uniform("w8a16"), tmp_path)
    (skip,) = result.skips
    assert "also read by sum (Add), which is not quantized" in skip.reason


def test_a_weight_summed_over_two_axes_stays_float(tmp_path: Path) -> None:
    model = build(
        """g (float[N, 64] x, int64[N] i) => (float[N, 64] y, float[N, 64] e) {
            [lookup] e = Gather(table, i)
            [product] y = MatMul(x, table)
        }""",
        {"table": random_array(64, 64)},
    )
    result = _assign(model, _uniform("w8a16"), tmp_path)
    assert [skip.node for skip in result.skips] == ["lookup", "product"]
    assert "scales along different axes" in result.skips[0].reason


def test_a_small_weight_stays_float(tmp_path: Path) -> None:
    model = build(
        "g (float[N, 4] x) => (float[N, 4] y) { [tiny] y = MatMul(x, w) }",
        {"w": random_array(4, 4)},
    )
    (skip,) = _assign(model, _uniform("w8a16"), tmp_path).skips
    assert "has 16 elements" in skip.reason


def test_a_weight_without_elements_is_a_broken_model(tmp_path: Path) -> None:
    model = build(
        "g (float[N, 0] x) => (float[N, 4] y) { [empty] y = MatMul(x, w) }",
        {"w": random_array(0, 4)},
    )
    with pytest.raises(ModelError, match=r"w has shape \[0, 4\]: no elements"):
        _assign(model, _uniform("w8a16"), tmp_path)


def test_assigning_twice_gives_the_same_model(tmp_path: Path) -> None:
    options = AssignOptions(_uniform("w8a16"), ONNXRUNTIME)
    model = _model()
    run_pass(AssignSchemes(options), model, tmp_path)
    before = [dict(node.metadata_props) for node in model.graph]
    run_pass(AssignSchemes(options), model, tmp_path)
    assert [dict(node.metadata_props) for node in model.graph] == before


def test_nothing_to_plan_changes_nothing(tmp_path: Path) -> None:
    model = build("g (float[N] x) => (float[N] y) { [r] y = Relu(x) }")
    assert_idempotent(AssignSchemes(AssignOptions(_uniform("w8a16"), ONNXRUNTIME)), model, tmp_path)
