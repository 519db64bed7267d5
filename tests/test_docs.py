"""What the documentation shows works: commands, options, recipes, the example of a pass."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcompiler.cli.main import cli
from qcompiler.compile import compile_model
from qcompiler.options import CompileOptions
from qcompiler.quant.recipe import Recipe
from tests.support.graphs import op_types

ROOT = Path(__file__).parent.parent
OTHERS = {
    *("--save-inputs", "--update-golden", "--no-cache-dir", "--rm"),
    *("--fp16", "--int8", "--stronglyTyped", "--nproc-per-node"),
}
"""Options of other programs."""
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _options() -> Iterator[str]:
    context = cli.make_context("qcompile", ["doctor"])
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        for parameter in command.params:
            yield from (*parameter.opts, *parameter.secondary_opts)
    yield from ("--list", "--help", "--version", "--traceback")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_options_exist(page: Path) -> None:
    known = set(_options()) | OTHERS
    lines = [line for line in page.read_text().splitlines() if "python -m" not in line]
    named = set(re.findall(r"(?<![\w-])--[a-z][A-Za-z0-9-]+", "\n".join(lines)))
    assert named <= known, f"{page.name} names options that do not exist"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert sorted(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)) == [p.name for p in PAGES]


def test_the_recipe_can_be_read() -> None:
    (text,) = blocks("recipes.md", "toml")
    assert len(Recipe.from_text(text, "docs").rules) == 3


def test_the_example_of_a_pass_runs(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = blocks("writing-a-pass.md", "python")[0]
    (tmp_path / "my_passes.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = CompileOptions(user_passes=("my_passes:cap_relus",), inspect_kernels=False)
    result = compile_model(digits, options, output=tmp_path / "capped.onnx")
    ops = op_types(result.model())
    assert "Relu" not in ops
    assert "Clip" in ops


@pytest.mark.slow
def test_the_first_five_minutes(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    commands = [line for block in blocks("index.md", "bash") for line in block.splitlines()]
    assert len(commands) == 5
    for command in commands:
        name, *arguments = shlex.split(command)
        start = [sys.executable, "-m", "qcompiler.cli"] if name == "qcompile" else [sys.executable]
        done = subprocess.run(
            [*start, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (tmp_path / "digits.w8a8.report.html").exists()
