"""Which weights a task depends on, and what islands would hold of them, without compiling."""

from pathlib import Path

from qcompiler.errors import UsageError
from qcompiler.first_passes import compiled_until
from qcompiler.options import CompileOptions
from qcompiler.passes.assign.assign_islands import AssignIslands
from qcompiler.plan import make_plan
from qcompiler.progress import Progress, SilentProgress
from qcompiler.report.islands import islands_report
from qcompiler.report.records import IslandsReport


def map_islands(
    source: Path | str, options: CompileOptions, *, progress: Progress | None = None
) -> IslandsReport:
    """Choose the islands that a compilation would, and say where they lie.

    Args:
        source: Path of an ONNX model; nothing is written.
        options: What the compilation would be asked to do; it needs islands.
        progress: Where long work shows how far it is; None is silent.

    Raises:
        UsageError: Options or samples that cannot be used.
        ModelError: The model is malformed, or no weight of it can have islands.
    """
    plan = make_plan(options)
    if plan.recipe.islands is None:
        message = "nothing says which islands are wanted"
        raise UsageError(message, hint="give --islands tacq and --average-bits 3.1")
    shown = progress or SilentProgress()
    with compiled_until(source, plan, AssignIslands.name, options, shown) as (model, _, _):
        found = islands_report(model)
    assert found is not None
    return found
