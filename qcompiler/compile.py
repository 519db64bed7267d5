"""The compilation, top to bottom: load, rewrite, write, look at what the runtime makes of it."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

import onnx_ir as ir

from qcompiler.artefacts import (
    CompileResult,
    engine_workspace_for,
    publish,
    workspace_for,
)
from qcompiler.calibration.largest_call import largest_call
from qcompiler.calibration.quality import OutputQuality, output_quality
from qcompiler.engine import (
    build_and_check,
    engine_warnings,
    publish_engine,
    requested_engine,
    with_named_engine,
    with_profiles,
)
from qcompiler.errors import ModelError, TargetError, UsageError
from qcompiler.execution.kernels import Inspection, inspect_kernels
from qcompiler.execution.latency import Budget, Timing, compare_latency
from qcompiler.execution.narrow_floats import has_bfloat16
from qcompiler.following import HandOver, leading, require_shareable
from qcompiler.gate.check import require_judgeable, run_gate
from qcompiler.gate.setting import Candidate, GateOptions
from qcompiler.ir.dataflow import all_nodes, standard_opset
from qcompiler.ir.fingerprint import BackgroundFingerprint, fingerprint
from qcompiler.ir.load import load_model
from qcompiler.ir.provenance import SCHEME, forget, without_times
from qcompiler.ir.quantizable import INTEGER_OPS, find_sites
from qcompiler.ir.save import SavedModel, save_model
from qcompiler.ir.stored_size import stored_bytes
from qcompiler.ir.weights import WeightStore
from qcompiler.options import CompileOptions
from qcompiler.passes.lower.cast_types import CastTypes
from qcompiler.pipeline import pipeline
from qcompiler.plan import Plan, make_plan, with_data
from qcompiler.progress import Progress, SilentProgress
from qcompiler.quant.scheme import FLOAT
from qcompiler.report.build import (
    calibration_report,
    calibration_warnings,
    kernel_warnings,
    latency_warnings,
    metric_report,
    node_reports,
    output_checks,
    pass_reports,
    summarize,
    window_reports,
)
from qcompiler.report.compute_types import type_counts, type_warnings
from qcompiler.report.files import manifest_json
from qcompiler.report.islands import islands_report
from qcompiler.report.network import Network
from qcompiler.report.records import EngineReport, FileFacts, NodeReport, Report
from qcompiler.report.verdict import GateFailedError, Verdict, lasting_figures
from qcompiler.rewriting.base import PassContext, PassRecord
from qcompiler.rewriting.manager import PassManager
from qcompiler.rewriting.work_folder import WorkFolder
from qcompiler.settings import identity_of, settings_of
from qcompiler.team import Alone, Team
from qcompiler.watching import Watching, watch

_LATENCY_BUDGET: Final = Budget(seconds=1.0, fewest=3)


def default_output(source: Path, plan: Plan) -> Path:
    """Return where a compiled model goes when nobody says: beside the source, scheme in the name.

    A recipe with rules beside a default gives "mixed"; a type that it is cast to comes last.
    """
    selected = [rule for rule in plan.recipe.rules if rule.scheme is not None]
    label = "mixed" if selected else str(plan.recipe.default or FLOAT)
    compute = plan.recipe.compute_type
    if compute is not None:
        label = str(compute) if label == FLOAT else f"{label}-{compute}"
    return source.with_name(f"{source.stem}.{label.replace(':', '-')}.onnx")


def compile_model(
    source: Path | str | ir.Model,
    options: CompileOptions | None = None,
    *,
    output: Path | str | None = None,
    progress: Progress | None = None,
    team: Team | None = None,
) -> CompileResult:
    """Compile a model and write it with its report and manifest.

    Args:
        source: Path of an ONNX model, or a model in memory (it is not changed).
        options: What to do; None is weight-only int8 for ONNX Runtime.
        output: Where the model goes; None is beside the source, with the scheme in the name.
            A model in memory needs it. Report, page and manifest go beside it. Where it names an
            engine, m.engine, the model is called m.lowered.onnx.
        progress: Where long work shows how far it is; None is silent.
        team: Processes that share the work, which this one leads; the others `follow` it. None is
            this process alone.

    Returns:
        The paths written, and the report.

    Raises:
        UsageError: Options, recipe or paths that cannot be used.
        ModelError: The model is malformed, or there is nothing in it to compile.
        TargetError: The runtime cannot load the result, or no engine can be built from it.
        ParityError: `verify="numerics"` found a pass that changes what it must not.
        GateFailedError: A bound of the gate does not hold.
        InternalError: A pass is defective; a reproducer is kept beside the output.

    Either all files are written or none; a killed run leaves nothing.
    """
    started = time.perf_counter()
    options = options or CompileOptions()
    progress = progress or SilentProgress()
    options, output = with_named_engine(options, output)
    team = team or Alone()
    plan = make_plan(options)
    require_shareable(plan, team)
    engine = requested_engine(options, plan.target)
    target_path = _output_path(source, output, plan)
    with workspace_for(target_path) as workspace, ExitStack() as held:
        engine_workspace = held.enter_context(engine_workspace_for(engine))
        path, name = _source_file(source, workspace, progress)
        model = load_model(path)
        forget(model)
        size, opset = stored_bytes(path, model), standard_opset(model)
        if plan.gate is not None:
            require_judgeable(plan.gate, model, _gate_options(plan, options))
        digest = held.enter_context(BackgroundFingerprint(path))
        plan = with_data(plan, model, digest.result)
        if engine is not None:
            engine = with_profiles(engine, model, plan.data.samples if plan.data else None)
        work = held.enter_context(_work_folder(digest.result, plan, options))
        watching = watch(model, plan, options, target_path.parent)
        with WeightStore(workspace) as store:
            context = PassContext(store, progress, options.workers or os.cpu_count() or 1, team)
            model, records = _rewritten(model, plan, context, watching, work)
            with without_times(model):
                saved = save_model(
                    model,
                    workspace / "out" / target_path.name,
                    progress=progress,
                    external_data=options.external_data,
                )
            network = watching.network(plan, model, context) if options.compare else Network()
        source_facts = FileFacts(name, size, digest.result(), opset)
        inspection = _inspect(model, saved, options, progress) if plan.target.runs_here else None
        quality = _quality(plan, path, saved, progress) if options.compare else ()
        latency = _latency(plan, path, saved, progress)
        built = None
        if engine is not None and not engine.elsewhere:
            made = engine_workspace / "out" / engine.path.name
            built = build_and_check(engine, saved.path, model, made, progress)
        kernels = inspection.kernels if inspection else None
        nodes = node_reports(model, kernels, network.errors)
        report = _report(
            plan,
            source_facts,
            saved,
            model,
            nodes,
            records,
            watching,
            inspection,
            quality,
            latency,
            built,
            started,
        )
        report = replace(report, channels=network.profiles, settings=settings_of(plan, options))
        verdict = _judged(plan, options, path, saved, progress)
        manifest = _manifest(plan, report, verdict)
        result = publish(saved, target_path, report, manifest, html=options.html)
        result = replace(result, verdict=verdict)
        if engine is None:
            return result
        result = replace(result, engine_options=engine.options)
        if built is None:
            return result
        made = engine_workspace / "out" / engine.path.name
        return replace(result, engine_path=publish_engine(engine, made, built, report.output))


def _rewritten(
    model: ir.Model,
    plan: Plan,
    context: PassContext,
    watching: Watching,
    work: WorkFolder | None,
) -> tuple[ir.Model, list[PassRecord]]:
    """Run the passes, those that a stopped compilation finished excepted."""
    team, folder = context.team, context.store.directory
    if team.size > 1 and plan.windows is None:
        plan = replace(plan, windows=folder / "windows")
    hooks = [*watching.hooks()]
    if plan.windows is not None:
        hooks.append(HandOver(team, folder, plan.windows))
    reached = work.newest() if work else None
    done: tuple[PassRecord, ...] = ()
    if reached is not None:
        model, done = reached.model, reached.records
    passes = pipeline(plan)
    watching.missed(passes[: len(done)])
    with leading(team):
        records = PassManager(context, hooks, work).run(model, passes, done)
    _require_something_done(model, plan, records)
    return model, records


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
    if path.suffix == ".qbundle":
        message = "a bundle is a folder, and no model"
        raise UsageError(message, where=str(path), hint="call qcompiler.bundle.compile_bundle")
    if path.exists() and not path.is_file():
        message = "is a folder" if path.is_dir() else "is no regular file"
        raise UsageError(message, where=str(path), hint="name a file ending in .onnx")
    return path


def _source_file(
    source: Path | str | ir.Model, workspace: Path, progress: Progress
) -> tuple[Path, str]:
    """Return the source's path and name; a model in memory is written, so that it stays as is."""
    if isinstance(source, ir.Model):
        path = save_model(source, workspace / "source.onnx", progress=progress).path
        return path, source.graph.name or "model"
    return Path(source), Path(source).name


def _require_something_done(model: ir.Model, plan: Plan, records: Sequence[PassRecord]) -> None:
    """Stop when a model has no weight that could be quantized, rather than copy it.

    Of a model that was quantized already another runtime's form is something to do.
    """
    if any(record.name == CastTypes.name and record.rewrites for record in records):
        return
    planned = any(node.metadata_props.get(SCHEME, FLOAT) != FLOAT for node in all_nodes(model))
    if planned or find_sites(model)[0]:
        return
    already = sum(1 for node in all_nodes(model) if (node.domain, node.op_type) in INTEGER_OPS)
    if already and plan.target.intake:
        return
    if already:
        message = f"the model is quantized already: {already} ops work on integers"
        hint = "give the float model it was made from"
        raise ModelError(message, hint=hint, reason="already-quantized")
    if any(value.is_initializer() for value in model.graph.inputs):
        message = "its weights are also inputs of the graph, which a caller may override"
        hint = "export again with keep_initializers_as_inputs=False"
        raise ModelError(message, hint=hint, reason="weights-are-inputs")
    message = "there is no constant float weight to quantize in this model"
    hint = "`qcompile inspect` lists its ops"
    raise ModelError(message, hint=hint, reason="nothing-to-quantize")


def _inspect(
    model: ir.Model, saved: SavedModel, options: CompileOptions, progress: Progress
) -> Inspection | None:
    """Load the written model in the runtime and see which kernels it chooses.

    There are none for bfloat16 on a CPU.
    """
    if not options.inspect_kernels:
        return None
    if has_bfloat16(model):
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
            reason="runtime-refuses",
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
        native=plan.target.runs_here,
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
    watching: Watching,
    inspection: Inspection | None,
    quality: Sequence[OutputQuality],
    latency: Sequence[Timing],
    engine: EngineReport | None,
    started: float,
) -> Report:
    warnings = (
        latency_warnings(latency)
        + kernel_warnings(nodes)
        + type_warnings(model, runs_here=plan.target.runs_here)
    )
    warnings += engine_warnings(engine)
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
        summary=summarize(
            nodes, latency, type_counts(model), seconds=time.perf_counter() - started
        ),
        nodes=nodes,
        passes=pass_reports(records, watching.graph_changes()),
        output_checks=output_checks(watching.comparisons()),
        warnings=warnings,
        runtime=inspection.runtime if inspection else None,
        calibration=calibration,
        engine=engine,
        windows=window_reports(records),
        metric=metric_report(model),
        islands=islands_report(model),
    )


@contextmanager
def _work_folder(
    source_sha256: Callable[[], str], plan: Plan, options: CompileOptions
) -> Iterator[WorkFolder | None]:
    """Hold the folder of intermediate models, if one was named; it is emptied on success."""
    if options.work_dir is None:
        yield None
        return
    with WorkFolder(options.work_dir, identity_of(source_sha256(), plan, options)) as work:
        yield work
        work.finish()


def _gate_options(plan: Plan, options: CompileOptions) -> GateOptions:
    native = plan.target.runs_here
    return GateOptions(options.gate_samples, plan.threads, plan.custom_op_libraries, native)


def _judged(
    plan: Plan, options: CompileOptions, source: Path, saved: SavedModel, progress: Progress
) -> Verdict | None:
    """Hold the result against the gate, if there is one.

    Raises:
        GateFailedError: A bound does not hold.
    """
    if plan.gate is None:
        return None
    candidate = Candidate(saved.path, saved.path.name)
    if plan.data is not None:
        samples = plan.data.samples
        candidate = replace(
            candidate,
            calibrated=samples.input_statistics(),
            calibration_sha256=samples.fingerprint(),
        )
    verdict = run_gate(
        source, candidate, plan.gate, _gate_options(plan, options), progress=progress
    )
    if not verdict.passed:
        raise GateFailedError(verdict)
    return verdict


def _manifest(plan: Plan, report: Report, verdict: Verdict | None) -> str:
    inputs = {} if plan.data is None else plan.data.samples.input_statistics()
    return manifest_json(
        report,
        report.settings,
        {name: entry.to_table() for name, entry in inputs.items()},
        None if verdict is None else lasting_figures(verdict),
    )
