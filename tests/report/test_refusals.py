"""Every refusal and every reason of an error has an entry, and every entry is one of something."""

import ast
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import pytest

from qcompiler import errors
from qcompiler.cli.main import main
from qcompiler.errors import QCompilerError
from qcompiler.pipeline import PASSES
from qcompiler.report.refusals import catalogue, meaning_of_rule
from qcompiler.report.verdict import GateFailedError
from qcompiler.targets.registry import TARGETS
from tests.support.graphs import build, random_array

ROOT = Path(__file__).parent.parent.parent
DECISIONS = {"recipe", "no-weight", "small-weight", "shared-weight", "no-kernel", "never-slower"}
"""Rules of ops in float that no pass writes as the first argument of a Skip."""


def _trees() -> Iterator[ast.Module]:
    for folder in ("passes", "export", "qcompiler"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield ast.parse(path.read_text())


def _rules_of_skips(tree: ast.Module) -> Iterator[str]:
    """Yield the rules that a file makes skips with: constants, and names and passes behind them."""
    constants: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            constants[getattr(target, "id", "")] = str(node.value.value)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "Skip"
            and node.args
        ):
            rule = node.args[0]
            if isinstance(rule, ast.Constant):
                yield str(rule.value)
            elif isinstance(rule, ast.Name) and rule.id in constants:
                yield constants[rule.id]
            elif isinstance(rule, ast.Attribute) and rule.attr == "name":
                yield constants["name"]


def _reasons_of_errors(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", "")
            for keyword in node.keywords:
                if (
                    name.endswith("Error")
                    and keyword.arg == "reason"
                    and isinstance(keyword.value, ast.Constant)
                ):
                    yield str(keyword.value.value)


def _classes() -> Iterator[type[QCompilerError]]:
    for member in (*vars(errors).values(), GateFailedError):
        if isinstance(member, type) and issubclass(member, QCompilerError):
            yield member


def test_the_catalogue_and_the_code_agree() -> None:
    trees = list(_trees())
    used = {rule for tree in trees for rule in _rules_of_skips(tree)}
    assert {"fold-batch-norm", "stays-in-float", "no-range"} <= used, "the search finds skips"
    used |= {reason for tree in trees for reason in _reasons_of_errors(tree)}
    assert "already-quantized" in used, "the search finds errors"
    used |= {kind.reason for kind in _classes() if kind.reason is not None}
    used |= {refusal.rule for target in TARGETS.values() for refusal in target.refusals}
    used |= DECISIONS
    assert used == set(catalogue())


def test_every_entry_is_read_whole() -> None:
    text = (ROOT / "docs" / "refusals.md").read_text()
    assert text.count("\n### `") == len(catalogue())
    for entry in catalogue().values():
        assert len(entry.meaning) > 20
        assert len(entry.way_out) > 10
        assert entry.anchor == f"docs/refusals.md#{entry.reason}"


def test_rules_of_recipes_share_an_entry() -> None:
    for rule in ("rule 2: name=*head*", "--exclude: name=x", "recipe default"):
        assert meaning_of_rule(rule) is catalogue()["recipe"]
    assert meaning_of_rule("conv-low-bit") is catalogue()["conv-low-bit"]
    assert meaning_of_rule("qlinear-conv") is None
    assert "insert-qdq" in PASSES


def test_the_command_tells_and_errors_name_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "m.onnx"
    text = "g (float[N, 64] x) => (float[N, 64] y) { y = MatMul(x, w) }"
    ir.save(build(text, {"w": random_array(64, 64)}), source)
    with pytest.raises(SystemExit):
        main(["explain", "--reason", "conv-low-bit"])
    out = capsys.readouterr().out
    assert "no convolution kernel" in out
    assert "way out:" in out
    with pytest.raises(SystemExit) as stop:
        main(["explain", "--reason", "conv-low"])
    assert stop.value.code == 2
    assert "conv-low-bit" in capsys.readouterr().err
    compiled = tmp_path / "c.onnx"
    with pytest.raises(SystemExit):
        main([str(source), "-o", str(compiled), "--no-html"])
    assert not (tmp_path / "c.report.html").exists()
    with pytest.raises(SystemExit) as stop:
        main([str(compiled), "-o", str(tmp_path / "d.onnx")])
    assert stop.value.code == 3
    assert "more: docs/refusals.md#already-quantized, qcompile explain" in capsys.readouterr().err
