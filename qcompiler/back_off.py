"""Compiling again with a few ops in float, where the library cannot build an engine otherwise."""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import onnx_ir as ir

from qcompiler.artefacts import CompileResult
from qcompiler.compile import compile_model
from qcompiler.engine import EngineBuildError
from qcompiler.errors import TargetError
from qcompiler.export.bisection import leave_out_least
from qcompiler.ir.weights import disk_errors
from qcompiler.options import CompileOptions, Reconstruction, Verification, requested_recipe
from qcompiler.progress import Progress, SilentProgress
from qcompiler.quant.recipe import Rule
from qcompiler.quant.selector import Selector
from qcompiler.targets.registry import find_target

MOST_BUILDS: Final = 24
"""How often is built while ops are looked for: enough for two culprits among some fifty ops."""
_LONGEST: Final = 300
"""Characters of what the library said that go into a reason."""


def compile_backing_off(
    source: Path | str | ir.Model,
    options: CompileOptions,
    *,
    output: Path | str | None = None,
    most_builds: int = MOST_BUILDS,
    progress: Progress | None = None,
) -> CompileResult:
    """Compile a model; where its engine cannot be built, leave the fewest ops in float.

    The ops are found by halving (`export.bisection`), with a compilation and a build a try: what
    is built in the end is what a recipe with these exceptions gives, float weights unrounded.
    Tries do without `reconstruct`, which changes codes and no graph.

    Args:
        source: As for `compile_model`.
        options: What to do. Without an engine this is `compile_model`.
        output: As for `compile_model`.
        most_builds: How many builds are tried at most before the last one; at least 2.
        progress: Where long work shows how far it is.

    Returns:
        What was made. Ops left in float have the library's words as their reason in the report,
        under the rule "back-off".

    Raises:
        EngineBuildError: No engine can be built, in float neither.
        QCompilerError: All else that `compile_model` raises.
    """
    progress = progress or SilentProgress()
    try:
        return compile_model(source, options, output=output, progress=progress)
    except EngineBuildError as failure:
        if not failure.sites:
            raise
        search = _Search(source, options, output, progress)
        found = leave_out_least(
            failure.sites, search.works_without, most_tries=most_builds, progress=progress
        )
        if found is None:
            cause = TargetError(
                f"{failure.message}; it fails with all ops in float, too",
                where=failure.where,
                hint=failure.hint,
            )
            raise EngineBuildError(cause, failure.sites) from failure
        reason = f"no engine could be built with it: {failure.message[:_LONGEST]}"
        if not found.minimal:
            reason += f" (one of {len(found.parts)} ops; fewer may do, {found.tries} builds tried)"
        chosen = _leaving(options, found.parts, reason)
    return compile_model(source, chosen, output=output, progress=progress)


@dataclass(frozen=True, slots=True)
class _Search:
    """Tries compilations that are thrown away.

    Attributes:
        source: The source model.
        options: What the compilation is asked for.
        output: Where its results go, so that tries lie on the same disk.
        progress: Shows the tries' own work.
    """

    source: Path | str | ir.Model
    options: CompileOptions
    output: Path | str | None
    progress: Progress

    def works_without(self, sites: Sequence[str]) -> bool:
        """Say whether an engine can be built with these ops in float."""
        if not sites:
            # With all of them it has just failed.
            return False
        folder = self._folder()
        with (
            disk_errors(folder),
            tempfile.TemporaryDirectory(prefix=".qcompile-try-", dir=folder) as name,
        ):
            options = replace(
                _leaving(self.options, sites, "tried", gate=False),
                engine=Path(name) / "try.engine",
                reconstruct=Reconstruction.NONE,
                verify=Verification.STRUCTURE,
                inspect_kernels=False,
                compare=False,
                gate=None,
                html=False,
                dump_ir=None,
                work_dir=None,
            )
            try:
                compile_model(
                    self.source, options, output=Path(name) / "try.onnx", progress=self.progress
                )
            except EngineBuildError:
                return False
        return True

    def _folder(self) -> Path:
        named = self.options.engine or self.output
        if named is None:
            assert not isinstance(self.source, ir.Model), "it needs an output, and had none"
            named = self.source
        return Path(named).absolute().parent


def _leaving(
    options: CompileOptions, sites: Sequence[str], reason: str, *, gate: bool = True
) -> CompileOptions:
    """Return options whose recipe leaves ops in float, before all its other rules."""
    recipe = requested_recipe(options, find_target(options.target))
    if not gate:
        recipe = replace(recipe, gate=None)
    # A name alone could be taken for a pattern, and select others as well.
    rules = (
        Rule(Selector(name=f"/{re.escape(site)}/"), None, reason, "back-off") for site in sites
    )
    return replace(
        options,
        recipe=replace(recipe, rules=(*rules, *recipe.rules)),
        scheme=None,
        exclude=(),
        compute_type=None,
        float32=(),
    )
