"""Rules of the project that no linter checks."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import qcompiler.passes
from qcompiler.pipeline import PASSES
from qcompiler.quant.scheme import SCHEME_FORMS, parse_scheme
from qcompiler.rewriting.base import Numerics, Pass
from qcompiler.targets.registry import TARGETS

ROOT = Path(__file__).parent.parent
LONGEST_FILE = 500


def _pass_classes() -> list[type[Pass]]:
    found: list[type[Pass]] = []
    for module in pkgutil.walk_packages(qcompiler.passes.__path__, "qcompiler.passes."):
        for _, member in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(member, Pass) and member.__module__ == module.name:
                found.append(member)
    return found


@pytest.mark.parametrize("rewrite", _pass_classes(), ids=lambda cls: cls.__name__)
def test_every_pass_is_documented_tested_and_named(rewrite: type[Pass]) -> None:
    text = rewrite.__doc__ or ""
    for part in ("Before:", "After:", "Refuses:"):
        assert part in text, f"{rewrite.__name__} does not say {part}"
    assert rewrite.name in PASSES
    assert (rewrite.tolerance is not None) == (rewrite.numerics is Numerics.REORDERED)
    module = rewrite.__module__.split(".")
    test = ROOT / "tests" / "passes" / module[-2] / f"test_{module[-1]}.py"
    assert test.exists(), f"no {test.relative_to(ROOT)}"
    expected = "".join(part.title() for part in rewrite.name.split("-"))
    assert rewrite.__name__.lower() == expected.lower()


def test_no_file_is_too_long() -> None:
    files = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert files
    long = {f: n for f in files if (n := len((ROOT / f).read_text().splitlines())) > LONGEST_FILE}
    assert not long


@pytest.mark.parametrize("name", ["passes", "export"])
def test_bare_names_cannot_be_imported(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"import qcompiler.{name}" in done.stderr


@pytest.mark.slow
def test_wheel_and_sdist_hold_exactly_the_tracked_package(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "qcompiler", "passes", "export"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    tracked = {
        re.sub(r"^(passes|export)/", r"qcompiler/\1/", name)
        for name in listed
        if name not in ("qcompiler/passes", "qcompiler/export")
    }
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
    subprocess.run(
        [sys.executable, "-m", "build", "-o", tmp_path / "dist", source],
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == tracked
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_documented_schemes_can_be_read() -> None:
    for text in SCHEME_FORMS:
        assert str(parse_scheme(text) or "float") == text


def test_help_offers_what_exists() -> None:
    from qcompiler.cli.compile import command
    from qcompiler.options import Verification
    from qcompiler.quant.ranges import RangeMethod

    choices = {p.name: getattr(p.type, "choices", None) for p in command.params}
    assert list(choices["weight_range"] or ()) == [m.value for m in reversed(RangeMethod)]
    assert list(choices["verify"] or ()) == [v.value for v in Verification]


def test_every_target_row_says_where_it_comes_from() -> None:
    for target in TARGETS.values():
        assert parse_scheme(target.default_scheme) is not None
        sources = {row.rule: row.source for row in target.rows}
        sources |= {refusal.rule: refusal.source for refusal in target.refusals}
        for rule, source in sources.items():
            assert source.startswith(("measured", "read")), rule


def test_readme_runs_what_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    assert "pip install -c constraints.txt -e '.[dev]'" in readme
    assert "\npytest -n auto\n" in script
    assert re.search(r"&& pytest -n auto\n", readme)
