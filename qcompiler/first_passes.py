"""Running the first passes of a compilation, for questions that its result does not answer."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from qcompiler.ir.fingerprint import fingerprint
from qcompiler.ir.load import load_model
from qcompiler.ir.provenance import forget
from qcompiler.ir.weights import WeightStore
from qcompiler.options import CompileOptions
from qcompiler.pipeline import pipeline
from qcompiler.plan import Plan, with_data
from qcompiler.progress import Progress
from qcompiler.rewriting.base import PassContext
from qcompiler.rewriting.manager import PassManager


@contextmanager
def compiled_until(
    source: Path | str, plan: Plan, last: str, options: CompileOptions, progress: Progress
) -> Iterator[tuple[ir.Model, Plan, PassContext]]:
    """Run the passes of a compilation up to one of them; nothing is written.

    Args:
        source: Path of an ONNX model.
        plan: What the compilation would do.
        last: Name of the last pass that runs.
        options: How many workers there are.
        progress: Shows passes.

    Yields:
        The model, whose new weights live as long as the context; the plan with its samples; what
        further passes may use.

    Raises:
        UsageError: Samples that cannot be used.
        QCompilerError: Whatever a pass refuses the model with.
    """
    model = load_model(Path(source))
    forget(model)
    plan = with_data(plan, model, lambda: fingerprint(Path(source)))
    with (
        tempfile.TemporaryDirectory(prefix="qcompiler-") as scratch,
        WeightStore(Path(scratch)) as store,
    ):
        context = PassContext(store, progress, options.workers or os.cpu_count() or 1)
        passes = pipeline(plan)
        names = [entry.name for entry in passes]
        PassManager(context).run(model, passes[: names.index(last) + 1])
        yield model, plan, context
