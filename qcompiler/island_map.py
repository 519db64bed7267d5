"""Which weights a task depends on, and what islands would hold of them, without compiling."""

import os
import tempfile
from pathlib import Path

from qcompiler.errors import UsageError
from qcompiler.ir.fingerprint import fingerprint
from qcompiler.ir.load import load_model
from qcompiler.ir.provenance import forget
from qcompiler.ir.weights import WeightStore
from qcompiler.options import CompileOptions
from qcompiler.passes.assign.assign_islands import AssignIslands
from qcompiler.pipeline import pipeline
from qcompiler.plan import make_plan, with_data
from qcompiler.progress import Progress, SilentProgress
from qcompiler.report.islands import islands_report
from qcompiler.report.records import IslandsReport
from qcompiler.rewriting.base import PassContext
from qcompiler.rewriting.manager import PassManager


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
    model = load_model(Path(source))
    forget(model)
    plan = with_data(plan, model, lambda: fingerprint(Path(source)))
    with (
        tempfile.TemporaryDirectory(prefix="qcompiler-") as scratch,
        WeightStore(Path(scratch)) as store,
    ):
        workers = options.workers or os.cpu_count() or 1
        context = PassContext(store, progress or SilentProgress(), workers)
        passes = pipeline(plan)
        names = [entry.name for entry in passes]
        PassManager(context).run(model, passes[: names.index(AssignIslands.name) + 1])
        found = islands_report(model)
    assert found is not None
    return found
