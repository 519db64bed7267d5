"""Recipes: reading, writing, matching, and every fault with its message."""

from pathlib import Path

import pytest

from qcompiler.errors import UsageError
from qcompiler.quant.compute_type import ComputeType
from qcompiler.quant.equalization import EqualizationMethod
from qcompiler.quant.ranges import RangeMethod
from qcompiler.quant.recipe import Recipe, Rule, Selector, nearest
from qcompiler.quant.scheme import parse_scheme

FULL = """\
version = 1
default = "w8a16"
weight_range = "mse"

[[rule]]
name = "*/lm_head*"
op_type = "MatMul"
scheme = "float"
reason = "lm_head is sensitive"

[[rule]]
block = "0-3,7"
between = ["x \\u0022quoted\\u0022", "y\\u005cz"]
scheme = "w4a16:b128:sym"
"""


def test_a_full_recipe_is_read() -> None:
    recipe = Recipe.from_text(FULL, "r.toml")
    assert recipe == Recipe(
        (
            Rule(Selector("*/lm_head*", "MatMul"), None, "lm_head is sensitive", "rule 1"),
            Rule(
                Selector(blocks=(0, 1, 2, 3, 7), between=('x "quoted"', "y\\z")),
                parse_scheme("w4a16:b128:sym"),
                None,
                "rule 2",
            ),
        ),
        parse_scheme("w8a16"),
        RangeMethod.MSE,
    )
    assert recipe.rules[0].label == "rule 1: name=*/lm_head* op_type=MatMul"
    assert recipe.rules[1].label == 'rule 2: block=0-3,7 between=x "quoted"..y\\z'


@pytest.mark.parametrize(
    ("value", "method"),
    [("none", None), ("aweq", EqualizationMethod.AWEQ), ("auto", EqualizationMethod.AUTO)],
)
def test_equalization_is_read_and_written(value: str, method: EqualizationMethod | None) -> None:
    text = f'version = 1\ndefault = "w8a8"\nequalize = "{value}"\n'
    recipe = Recipe.from_text(text, "r.toml")
    assert recipe.equalize is method
    assert Recipe.from_text(recipe.to_toml(), "r.toml") == recipe
    assert Recipe.from_text("version = 1", "r.toml").equalize is EqualizationMethod.AUTO


def test_bias_correction_is_read_and_written() -> None:
    text = 'version = 1\ndefault = "w8a8"\ncorrect_bias = false\n'
    recipe = Recipe.from_text(text, "r.toml")
    assert not recipe.correct_bias
    assert Recipe.from_text("version = 1", "r.toml").correct_bias
    assert recipe.to_toml() == text


def test_a_type_to_compute_in_is_read_and_written() -> None:
    text = """version = 1
default = "w4a16:b128"
compute_type = "float16"

[[float32]]
op_type = "Softmax"
block = "0-1"
"""
    recipe = Recipe.from_text(text, "r.toml")
    assert recipe.compute_type is ComputeType.FLOAT16
    assert recipe.float32 == (Selector(op_type="Softmax", blocks=(0, 1)),)
    assert recipe.to_toml() == text
    more = recipe.computing_in(ComputeType.BFLOAT16, ["head*"])
    assert more.compute_type is ComputeType.BFLOAT16
    assert more.float32 == (Selector(name="head*"), *recipe.float32)
    assert Recipe().computing_in(None) == Recipe()


def test_toml_text_round_trips_byte_for_byte() -> None:
    assert Recipe.from_text(FULL, "r.toml").to_toml() == FULL


@pytest.mark.parametrize("text", ["version = 1", 'version = 1\ndefault = "float"\nrule = []'])
def test_an_empty_recipe_keeps_everything_in_float(text: str) -> None:
    assert Recipe.from_text(text, "r.toml") == Recipe()


@pytest.mark.parametrize("control", ["\n", "\t", "\x7f", "\x00", "é", "\U0001f600", '"""'])
def test_any_name_survives_the_round_trip(control: str) -> None:
    recipe = Recipe((Rule(Selector(name=f"a{control}b"), None, control, "rule 1"),))
    assert Recipe.from_text(recipe.to_toml(), "r.toml") == recipe


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("*/lm_head*", "/model/lm_head/MatMul", True),
        ("*/LM_head*", "/model/lm_head/MatMul", False),
        ("lm_head", "/model/lm_head/MatMul", False),
        ("layers.[01].*", "layers.1.fc", True),
        ("layers[0]/fc", "layers[0]/fc", True),
        ("layers[0]/fc", "layers0/fc", True),
        (r"/layers\.\d+/", "layers.12", True),
        (r"/layers\.\d+/", "layers.12.fc", False),
        ("/", "/", True),
        ("//", "x", False),
        (None, "anything", True),
    ],
)
def test_names_match_globs_and_regexes_as_a_whole(
    pattern: str | None, name: str, matches: bool
) -> None:
    assert Selector(name=pattern).matches_name(name) is matches


def test_excludes_become_leading_rules() -> None:
    scheme = parse_scheme("w4a16:b128")
    recipe = Recipe.uniform(scheme, ["a*", "/b/"])
    assert recipe.default == scheme
    assert [rule.label for rule in recipe.rules] == ["--exclude: name=a*", "--exclude: name=/b/"]
    assert [rule.scheme for rule in recipe.rules] == [None, None]
    both = Recipe.from_text(FULL, "r.toml").excluding(["a*"])
    assert [rule.origin for rule in both.rules] == ["--exclude", "rule 1", "rule 2"]


def _rule(text: str) -> str:
    return f'version = 1\n[[rule]]\nscheme = "float"\nname = "a"\n[[rule]]\n{text}\n'


FAULTS = {
    "default = 'w8a16'": "r.toml: the recipe's version is missing, this compiler reads 1",
    "version = 2": "r.toml: the recipe's version is 2",
    "version = true": "r.toml: the recipe's version is True",
    "version = '1'": "r.toml: the recipe's version is '1'",
    "version = 1\ndefalt = 'w8a16'": "unknown key 'defalt' (did you mean 'default'?)",
    "version = 1\nzzz = 1": (
        "unknown key 'zzz' (known: version, default, weight_range, equalize, correct_bias, "
        "compute_type, islands, rule, float32, gate)"
    ),
    "version = 1\ndefault = 8": "r.toml: 'default' is 8, not a string",
    "version = 1\ndefault = 'w9'": "r.toml: default: 'w9' is not a scheme (forms: ",
    "version = 1\ncorrect_bias = 'yes'": "'correct_bias' is 'yes', not true or false",
    "version = 1\nequalize = 'more'": "'equalize' is 'more', not 'auto' or 'aweq' or 'smoothquant'",
    "version = 1\nweight_range = 'max'": "'weight_range' is 'max', not 'min-max' or 'mse'",
    "version = 1\nrule = 3": "r.toml: 'rule' is not a list of tables (write [[rule]])",
    "version = 1\nrule = [3]": "'rule' is not a list of tables",
    "version = 1\n[rule]\nname = 'a'": "'rule' is not a list of tables",
    "version = 1\ncompute_type = 'int8'": "'compute_type' is 'int8', not 'float16' or 'bfloat16'",
    "version = 1\ndefault = 'float16'": "float16 is a type for the whole model, not a scheme",
    "version = 1\n[[float32]]\nname = 'a'": "no type is given that the others get",
    "version = 1\ncompute_type = 'float16'\n[[float32]]": "float32 1: it selects nothing",
    "version = 1\ncompute_type = 'float16'\nfloat32 = 'a'": "'float32' is not a list of tables",
    "version = 1\nx =": "r.toml: the recipe is not TOML: Invalid value (at line 2, ",
    "version = 1\nversion = 1": "Cannot overwrite a value (at line 2, ",
    _rule("scheme = 'float'"): "r.toml: rule 2: the rule selects nothing",
    _rule("name = 'b'"): "r.toml: rule 2: the rule has no scheme",
    _rule("name = 'b'\nscheme = 'w5a16'"): "r.toml: rule 2: 'w5a16' is not a scheme",
    _rule("nme = 'b'\nscheme = 'float'"): "rule 2: unknown key 'nme' (did you mean 'name'?)",
    _rule("name = ''\nscheme = 'float'"): "rule 2: 'name' is ''",
    _rule("name = ['b']\nscheme = 'float'"): "rule 2: 'name' is ['b'], not a string",
    _rule("name = '/(/'\nscheme = 'float'"): "rule 2: '/(/' is not a regular expression",
    _rule("op_type = 1\nscheme = 'float'"): "rule 2: 'op_type' is 1, not a string",
    _rule("block = 3\nscheme = 'float'"): "rule 2: 'block' is 3, not a string",
    _rule("block = '3-1'\nscheme = 'float'"): "'3-1' is not an index or a rising range",
    "version = 1\nislands = 1": "'islands' is 1, not a table",
    "version = 1\n[islands]\nkind = 'column'": "islands need one budget above 0",
    "version = 1\n[islands]\naverage_bits = 3\nfraction = 0.1": "islands need one budget above 0",
    "version = 1\n[islands]\nbudget_bytes = 1.5": "'budget_bytes' is 1.5, not a whole number",
    "version = 1\n[islands]\naverage_bits = true": "'average_bits' is True, not a number",
    "version = 1\n[islands]\nbits = 3": "unknown key 'bits'",
    "version = 1\n[islands]\nkind = 'row'\nfraction = 0.1": "'kind' is 'row'",
    _rule("block = '1,,2'\nscheme = 'float'"): "'' is not an index or a rising range",
    _rule("block = '-1'\nscheme = 'float'"): "'-1' is not an index",
    _rule("block = '0-999999999'\nscheme = 'float'"): "'0-999999999' is not an index",
    _rule("between = 'a'\nscheme = 'float'"): "'between' is 'a', not two value names",
    _rule("between = ['a']\nscheme = 'float'"): "not two value names",
    _rule("between = ['a', 1]\nscheme = 'float'"): "not two value names",
    _rule("name = 'b'\nscheme = 'float'\nreason = 1"): "rule 2: 'reason' is 1",
}


@pytest.mark.parametrize("text", FAULTS)
def test_every_fault_says_where_and_why(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_text(text, "r.toml")
    assert FAULTS[text] in str(caught.value)
    assert str(caught.value).startswith("r.toml: ")
    assert caught.value.exit_code == 2


def test_a_missing_file_a_folder_and_binary_data_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no\.toml: cannot read the recipe: No such file"):
        Recipe.from_toml(tmp_path / "no.toml")
    with pytest.raises(UsageError, match="cannot read the recipe: Is a directory"):
        Recipe.from_toml(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"version = 1 # \xff")
    with pytest.raises(UsageError, match="not UTF-8 text: byte 14"):
        Recipe.from_toml(binary)


def test_a_file_is_named_in_its_faults(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(FULL)
    assert Recipe.from_toml(path) == Recipe.from_text(FULL, "r.toml")
    path.write_text("version = 3")
    with pytest.raises(UsageError) as caught:
        Recipe.from_toml(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("pattern", ["", "/[/"])
def test_bad_excludes_are_usage_errors(pattern: str) -> None:
    with pytest.raises(UsageError, match="--exclude"):
        Recipe.uniform(None, [pattern])


def test_nearest_names() -> None:
    names = ["/model/layers.0/q_proj/MatMul", "/model/layers.0/k_proj/MatMul", "/lm_head/MatMul"]
    assert nearest("*lm_haed/MatMul*", names)[0] == "/lm_head/MatMul"
    assert nearest("LM_HEAD", names) == ["/lm_head/MatMul"]
    assert nearest("q_proj", names)[0] == names[0]
    assert nearest("entirely different", ["abc"]) == []
    assert len(nearest("MatMul", names, n=2)) == 2
    assert nearest("", names) == []
