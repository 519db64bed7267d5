"""The compilation, top to bottom: load, rewrite, write, look at what the runtime makes of it."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import onnx_ir as ir

from qcompiler.calibration.largest_call import largest_call
from qcompiler.calibration.numerics import VerifyNumerics
from qcompiler.calibration.quality import OutputQuality, output_quality
from qcompiler.calibration.samples import load_feeds, synthetic_feeds
from qcompiler.errors import ModelError, TargetError, UsageError
from qcompiler.execution.kernels import Inspection, inspect_kernels
from qcompiler.execution.latency import Budget, Timing, compare_latency
from qcompiler.ir.dataflow import all_nodes, standard_opset
from qcompiler.ir.fingerprint import BackgroundFingerprint, fingerprint
from qcompiler.ir.load import load_model
from qcompiler.ir.provenance import SCHEME, forget, without_times
from qcompiler.ir.quantizable import INTEGER_OPS, find_sites
from qcompiler.ir.save import SavedModel, save_model
from qcompiler.ir.tensor_sites import tensor_sites
from qcompiler.ir.weights import WeightStore
from qcompiler.options import CompileOptions, Verification
from qcompiler.pipeline import Plan, make_plan, pipeline, with_data
from qcompiler.progress import Progress, SilentProgress
from qcompiler.quant.scheme import FLOAT
from qcompiler.report.build import (
    calibration_report,
    calibration_warnings,
    kernel_warnings,
    latency_warnings,
    node_reports,
    output_checks,
    pass_reports,
    summarize,
)
from qcompiler.report.files import manifest_json, report_json
from qcompiler.report.islands import islands_report
from qcompiler.report.records import FileFacts, NodeReport, Report
from qcompiler.rewriting.base import PassContext
from qcompiler.rewriting.manager import PassHook, PassManager, PassRecord
from qcompiler.rewriting.snapshots import DumpModels, KeepReproducer

_LATENCY_BUDGET: Final = Budget(seconds=1.0, fewest=3)


@dataclass(frozen=True, slots=True)
class CompileResult:
    """What a compilation made.

    Attributes:
        path: The compiled model.
        data_path: Its external data file, None when weights are inside the model.
        report_path: The report, JSON (docs/report-schema.md).
        manifest_path: Hashes, versions and options; identical for identical compilations.
        report: The report, as an object.
    """

    path: Path
    data_path: Path | None
    report_path: Path
    manifest_path: Path
    report: Report

    def model(self) -> ir.Model:
        """Load the compiled model, lazily."""
        return load_model(self.path)


def default_output(source: Path, plan: Plan) -> Path:
    """Return where a compiled model goes when nobody says: beside the source, scheme in the name.

    A recipe with rules beside a default gives "mixed".
    """
    selected = [rule for rule in plan.recipe.rules if rule.scheme is not None]
    label = "mixed" if selected else str(plan.recipe.default or FLOAT)
    return source.with_name(f"{source.stem}.{label.replace(':', '-')}.onnx")


def compile_model(
    source: Path | str | ir.Model,
    options: CompileOptions | None = None,
    *,
    output: Path | str | None = None,
    progress: Progress | None = None,
) -> CompileResult:
    """Compile a model and write it with its report and manifest.

    Args:
        source: Path of an ONNX model, or a model in memory (it is not changed).
        options: What to do; None is weight-only int8 for ONNX Runtime.
        output: Where the model goes; None is beside the source, with the scheme in the name.
            A model in memory needs it. Report and manifest go beside it.
        progress: Where long work shows how far it is; None is silent.

    Returns:
        The paths written, and the report.

    Raises:
        UsageError: Options, recipe or paths that cannot be used.
        ModelError: The model is malformed, or there is nothing in it to compile.
        TargetError: The runtime cannot load the result.
        ParityError: `verify="numerics"` found a pass that changes what it must not.
        InternalError: A pass is defective; a reproducer is kept beside the output.

    Either all files are written or none; a killed run leaves nothing.
    """
    started = time.perf_counter()
    options = options or CompileOptions()
    progress = progress or SilentProgress()
    plan = make_plan(options)
    target_path = _output_path(source, output, plan)
    with _workspace(target_path) as workspace:
        path, name = _source_file(source, workspace, progress)
        model = load_model(path)
        forget(model)
        size, opset = _size_and_opset(path, model)
        with BackgroundFingerprint(path) as digest, WeightStore(workspace) as store:
            plan = with_data(plan, model, digest.result)
            numerics = _numerics_hook(model, options)
            hooks = _hooks(plan, options, target_path.parent, numerics)
            context = PassContext(store, progress, options.workers or os.cpu_count() or 1)
            records = PassManager(context, hooks).run(model, pipeline(plan))
            _require_something_done(model)
            with without_times(model):
                saved = save_model(
                    model,
                    workspace / "out" / target_path.name,
                    progress=progress,
                    external_data=options.external_data,
                )
            source_facts = FileFacts(name, size, digest.result(), opset)
        inspection = _inspect(model, saved, options, progress)
        quality = _quality(plan, path, saved, progress)
        latency = _latency(plan, path, saved, progress)
        nodes = node_reports(model, inspection.kernels if inspection else None)
        report = _report(
            plan,
            source_facts,
            saved,
            model,
            nodes,
            records,
            numerics,
            inspection,
            quality,
            latency,
            started,
        )
        return _publish(saved, target_path, report, _settings(plan, options))


def _output_path(source: Path | str | ir.Model, output: Path | str | None, plan: Plan) -> Path:
    if output is not None:
        path = Path(output)
    elif isinstance(source, ir.Model):
        message = "a model in memory has no folder to write beside"
        raise UsageError(message, hint="pass output=")
    else:
        path = default_output(Path(source), plan)
    if not isinstance(source, ir.Model) and path.exists() and path.samefile(Path(source)):
        message = "the output would overwrite the model it is made from"
        raise UsageError(message, where=str(path), hint="choose another -o")
    if path.exists() and not path.is_file():
        message = "is a folder" if path.is_dir() else "is no regular file"
        raise UsageError(message, where=str(path), hint="name a file ending in .onnx")
    return path


@contextmanager
def _workspace(output: Path) -> Iterator[Path]:
    """Make a hidden folder beside the output, so that finished files can be renamed into place."""
    if not output.parent.is_dir():
        message = "the folder does not exist"
        raise UsageError(message, where=str(output.parent), hint="create it first")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.stem}.", dir=output.parent))
    except OSError as error:
        message = f"cannot write there: {error.strerror}"
        raise UsageError(message, where=str(output.parent)) from error
    try:
        (folder / "out").mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _source_file(
    source: Path | str | ir.Model, workspace: Path, progress: Progress
) -> tuple[Path, str]:
    """Return the source's path and name; a model in memory is written, so that it stays as is."""
    if isinstance(source, ir.Model):
        path = save_model(source, workspace / "source.onnx", progress=progress).path
        return path, source.graph.name or "model"
    return Path(source), Path(source).name


def _size_and_opset(path: Path, model: ir.Model) -> tuple[int, int]:
    tensors = (site.tensor for site in tensor_sites(model))
    files = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    size = path.stat().st_size + sum(file.stat().st_size for file in files)
    return size, standard_opset(model)


def _numerics_hook(model: ir.Model, options: CompileOptions) -> VerifyNumerics | None:
    if options.verify is not Verification.NUMERICS:
        return None
    feeds = (
        synthetic_feeds(model, seed=options.seed)
        if options.samples is None
        else load_feeds(options.samples, model)
    )
    return VerifyNumerics(feeds, options.custom_op_libraries)


def _hooks(
    plan: Plan, options: CompileOptions, folder: Path, numerics: VerifyNumerics | None
) -> Sequence[PassHook]:
    arguments = ("--target", plan.target.name, "--weight-range", plan.weight_range.value)
    hooks: list[PassHook] = [KeepReproducer(folder, arguments, plan.recipe.to_toml())]
    if options.dump_ir is not None:
        hooks.append(DumpModels(options.dump_ir))
    if numerics is not None:
        hooks.append(numerics)
    return hooks


def _require_something_done(model: ir.Model) -> None:
    """Stop when a model has no weight that could be quantized, rather than copy it."""
    planned = any(node.metadata_props.get(SCHEME, FLOAT) != FLOAT for node in all_nodes(model))
    if planned or find_sites(model)[0]:
        return
    already = sum(1 for node in all_nodes(model) if (node.domain, node.op_type) in INTEGER_OPS)
    if already:
        message = f"the model is quantized already: {already} ops work on integers"
        raise ModelError(message, hint="give the float model it was made from")
    if any(value.is_initializer() for value in model.graph.inputs):
        message = "its weights are also inputs of the graph, which a caller may override"
        raise ModelError(message, hint="export again with keep_initializers_as_inputs=False")
    message = "there is no constant float weight to quantize in this model"
    raise ModelError(message, hint="`qcompile inspect` lists its ops")


def _inspect(
    model: ir.Model, saved: SavedModel, options: CompileOptions, progress: Progress
) -> Inspection | None:
    """Load the written model in the runtime and see which kernels it chooses."""
    if not options.inspect_kernels:
        return None
    names = [
        node.name or ""
        for node in all_nodes(model)
        if node.metadata_props.get(SCHEME, FLOAT) != FLOAT
    ]
    inspection = inspect_kernels(
        saved.path,
        names,
        memory_limit=options.memory_limit,
        custom_op_libraries=options.custom_op_libraries,
        progress=progress,
    )
    if inspection.failure is not None:
        message = f"ONNX Runtime does not load the compiled model: {inspection.failure}"
        raise TargetError(
            message,
            hint="check that it loads the source model; --no-inspect writes the result anyway",
        )
    return inspection


def _quality(
    plan: Plan, source: Path, saved: SavedModel, progress: Progress
) -> tuple[OutputQuality, ...]:
    """Compare the outputs of source and result on the samples, if there are any."""
    if plan.data is None:
        return ()
    return output_quality(
        source,
        saved.path,
        plan.data.samples,
        custom_op_libraries=plan.custom_op_libraries,
        progress=progress,
    )


def _latency(plan: Plan, source: Path, saved: SavedModel, progress: Progress) -> tuple[Timing, ...]:
    """Time source and result on the largest sample, if regions were measured."""
    if plan.data is None or not plan.never_slower:
        return ()
    with progress.task("measuring latency", 1) as advance:
        timings = compare_latency(
            (source, saved.path),
            largest_call(plan.data.samples),
            _LATENCY_BUDGET,
            threads=plan.threads,
            custom_op_libraries=plan.custom_op_libraries,
        )
        advance(1)
    return timings


def _report(
    plan: Plan,
    source: FileFacts,
    saved: SavedModel,
    model: ir.Model,
    nodes: tuple[NodeReport, ...],
    records: Sequence[PassRecord],
    numerics: VerifyNumerics | None,
    inspection: Inspection | None,
    quality: Sequence[OutputQuality],
    latency: Sequence[Timing],
    started: float,
) -> Report:
    warnings = latency_warnings(latency) + kernel_warnings(nodes)
    calibration = None
    if plan.calibration is not None and plan.data is not None:
        samples = plan.data.samples
        calibration = calibration_report(model, samples, quality)
        warnings += calibration_warnings(samples, quality)
    return Report(
        qcompiler=version("qcompiler"),
        target=plan.target.name,
        recipe=plan.recipe.to_toml(),
        source=source,
        output=FileFacts(
            saved.path.name,
            saved.bytes,
            fingerprint(saved.path),
            standard_opset(model),
        ),
        summary=summarize(nodes, latency, seconds=time.perf_counter() - started),
        nodes=nodes,
        passes=pass_reports(records),
        output_checks=output_checks(numerics.records if numerics else ()),
        warnings=warnings,
        runtime=inspection.runtime if inspection else None,
        calibration=calibration,
        islands=islands_report(model),
    )


def _settings(plan: Plan, options: CompileOptions) -> dict[str, object]:
    """Return what decides the bytes of the result beside model and recipe."""
    return {
        "weight_range": plan.weight_range.value,
        "never_slower": plan.never_slower,
        "min_output_sqnr": options.min_output_sqnr,
        "metric": options.metric,
        "max_metric_drop": options.max_metric_drop,
        "islands": None if plan.islands is None else plan.islands.to_text(),
        "task": None if plan.task is None else plan.task.source,
        "user_passes": list(options.user_passes),
        "external_data": options.external_data,
    }


def _publish(
    saved: SavedModel, path: Path, report: Report, settings: dict[str, object]
) -> CompileResult:
    """Write report and manifest beside the finished model, and rename all of it into place."""
    folder = saved.path.parent
    report_path = path.with_suffix(".report.json")
    manifest_path = path.with_suffix(".manifest.json")
    data_path = None if saved.data_path is None else path.with_name(saved.data_path.name)
    texts = {report_path: report_json(report), manifest_path: manifest_json(report, settings)}
    try:
        for final, text in texts.items():
            (folder / final.name).write_text(text, encoding="utf-8")
        # The model goes last: whoever sees it finds everything it needs.
        finished = [report_path, manifest_path, path]
        for final in finished if data_path is None else [data_path, *finished]:
            (folder / final.name).replace(final)
    except OSError as error:
        message = f"cannot write the result: {error.strerror}"
        raise UsageError(message, where=str(path)) from error
    return CompileResult(path, data_path, report_path, manifest_path, report)
