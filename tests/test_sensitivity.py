"""Ranking the ops of a model file."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.damage import decibels
from qcompiler.calibration.observers import Observer
from qcompiler.compile import compile_model
from qcompiler.errors import ModelError, UsageError
from qcompiler.options import CalibrationOptions, CompileOptions
from qcompiler.quant.recipe import Recipe
from qcompiler.sensitivity import Mode, Sensitivity, rank_sensitivity
from tests.support.graphs import build, random_array
from tests.support.sensitive import OPS, SENSITIVE, calls, sensitive_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    ir.save(sensitive_model(), path)
    folder = tmp_path / "calls"
    folder.mkdir()
    for index, feeds in enumerate(calls(4)):
        np.savez(folder / f"{index}.npz", allow_pickle=False, **feeds)
    return path


def options(source: Path, **others: object) -> CompileOptions:
    calibration = CalibrationOptions(
        str(source.parent / "calls"),
        observer=Observer.MIN_MAX,
        outlier_channels=0,
        two_terms_below=0,
    )
    settings = {"calibration": calibration, "never_slower": False, **others}
    return CompileOptions(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", list(Mode))
def test_every_op_is_ranked_once_the_worst_first(source: Path, mode: Mode) -> None:
    found = rank_sensitivity(source, options(source), mode)
    assert found.rows[0].nodes == (SENSITIVE,)
    assert sorted(row.nodes[0] for row in found.rows) == sorted(OPS)
    decibels_of = [row.damage.sqnr_db for row in found.rows]
    assert decibels_of == sorted(decibels_of)
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert found == rank_sensitivity(source, options(source), mode)


def test_the_recipe_spares_what_was_asked_for_and_compiles(source: Path, tmp_path: Path) -> None:
    found = rank_sensitivity(source, options(source), Mode.EXACT)
    recipe = Recipe.from_text(found.sparing(1).to_toml(), "recipe")
    assert [rule.selector.name for rule in recipe.rules] == [SENSITIVE]
    result = compile_model(source, options(source, recipe=recipe), output=tmp_path / "out.onnx")
    schemes = {node.name: node.scheme for node in result.report.nodes}
    assert schemes[SENSITIVE].startswith("w8a16")
    assert all(schemes[name].startswith("w8a8") for name in OPS if name != SENSITIVE)


def test_a_bound_is_met_by_adding_up_what_is_left(source: Path) -> None:
    found = rank_sensitivity(source, options(source), Mode.EXACT)
    assert found.needed_for(found.sum_db) == 0
    for count in (1, 2, 4):
        rest = decibels(sum(row.damage.noise for row in found.rows[count:]))
        assert found.needed_for(rest) == count
    assert found.needed_for(1e6) == 4


def test_names_that_are_patterns_match_themselves_alone(source: Path) -> None:
    row = rank_sensitivity(source, options(source)).rows[0]
    odd = Sensitivity(
        Mode.LOCAL, "", Recipe(), (type(row)(("a[0]*/b",), "MatMul", "w8a8", row.damage, 1.0),)
    )
    (rule,) = odd.sparing(1).rules
    assert rule.selector.matches_name("a[0]*/b")
    assert not rule.selector.matches_name("a0/b")
    assert not rule.selector.matches_name("a[0]xx/b")


def test_ops_with_quantized_weights_alone_are_ranked_and_spared_in_float(source: Path) -> None:
    ops = "/second|third|last/"
    recipe = Recipe.from_text(
        f'version = 1\ndefault = "w8a8"\n[[rule]]\nname = "{ops}"\nscheme = "w4a16:b32"', "r"
    )
    found = rank_sensitivity(source, options(source, recipe=recipe))
    schemes = {row.nodes[0]: row.scheme.partition(":")[0] for row in found.rows}
    assert schemes["first"] == "w8a8"
    assert schemes[SENSITIVE] == "w4a16"
    spared = {str(rule.selector): rule.scheme for rule in found.sparing(4).rules[:4]}
    assert spared[f"name={SENSITIVE}"] is None
    assert str(spared["name=first"]) == "w8a16"


def test_json_has_every_number(source: Path) -> None:
    table = json.loads(rank_sensitivity(source, options(source), Mode.EXACT).to_json(2))
    assert table["mode"] == "exact"
    assert [row["rank"] for row in table["ops"]] == [1, 2]
    assert table["ops"][0]["nodes"] == [SENSITIVE]
    assert table["ops"][0]["divergence"] > 0


def test_what_cannot_be_ranked_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no op would get calibrated"):
        rank_sensitivity(source, CompileOptions())
    indices = build(
        "g (float[N, 64] x) => (int64[N] y) { h = MatMul(x, w) y = ArgMax<axis=1, keepdims=0>(h) }",
        {"w": random_array(64, 64)},
    )
    path = tmp_path / "indices.onnx"
    ir.save(indices, path)
    with pytest.raises(ModelError, match="no output of the model holds floats"):
        rank_sensitivity(path, options(source))
