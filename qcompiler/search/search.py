"""The search, top to bottom: tables, candidates, each made and measured, the best one kept."""

from dataclasses import replace
from pathlib import Path

from qcompiler.artefacts import CompileResult, publish, workspace_for
from qcompiler.calibration.metric import output_bound
from qcompiler.errors import ParityError, UsageError
from qcompiler.ir.save import SavedModel
from qcompiler.options import CompileOptions, Reconstruction, with_samples
from qcompiler.progress import Progress, SilentProgress
from qcompiler.report.records import Report
from qcompiler.report.search_points import SearchReport, point_text
from qcompiler.search.choice import accuracy_of, better, marked
from qcompiler.search.preparation import Folders, Preparation
from qcompiler.search.request import SearchRequest, check_request


def compile_searching(
    source: Path | str,
    options: CompileOptions,
    request: SearchRequest,
    *,
    output: Path | str | None = None,
    progress: Progress | None = None,
) -> CompileResult:
    """Compile a model in the smallest of several ways that holds all bounds.

    What is tried: every scheme on all weights; with a saliency also islands of input channels, and
    schemes for whole weights, up to sizes between those of the schemes and up to the budget. The
    last quarter of the calls chooses nothing and judges. Each candidate is made by `compile_model`
    alone, so that its manifest leads to the same bytes without a search.

    Args:
        source: Path of an ONNX model.
        options: What all candidates share, without a scheme; `min_output_sqnr`, `metric` and
            `max_metric_drop` are what must hold. Without these the most accurate one is taken.
        request: What is tried, and what it may cost.
        output: Where the result goes; None is `<source>.search.onnx` beside the source.
        progress: Where long work shows how far it is; None is silent.

    Returns:
        The paths written, and the report, in which `search` is what was found.

    Raises:
        UsageError: Options that cannot be used.
        ParityError: No candidate holds all bounds; the message has the nearest one.
        QCompilerError: As `compile_model` does.

    Either all files of one candidate are written or none; nothing else stays on the disk. With a
    file of measurements that knows all latencies, the same is chosen again.
    """
    source, progress = Path(source), progress or SilentProgress()
    target = _output_of(source, output)
    bound = output_bound(options.min_output_sqnr, options.metric, options.max_metric_drop)
    check_request(request, options)
    common = _common(options, request)
    with workspace_for(target) as work:
        folders = Folders(work, options.measurements or work / "measurements.json")
        folders.gradients.mkdir()
        common = replace(common, gradients=folders.gradients)
        preparation = Preparation(source, common, request, bound, folders, progress)
        # What a metric has to complain of comes before hours of work.
        trials = preparation.trials()
        candidates = preparation.candidates()
        with progress.task("searching", len(candidates)) as advance:
            best, points = None, []
            for at, candidate in enumerate(candidates):
                made = trials.make(candidate, work / str(at), target.name)
                points.append(made.point)
                best = better(best, made, trials.accuracy, smallest=bound is not None)
                advance(1)
        report = SearchReport(
            request.bounds(options),
            "most accurate" if bound is None else "smallest",
            preparation.judged_on,
            trials.accuracy,
            trials.source_metric,
            tuple(marked(points, best, trials.accuracy)),
        )
        if best is None or best.result is None:
            raise _nothing_holds(report)
        found = replace(
            best.result.report,
            search=report,
            warnings=(*preparation.warnings, *best.result.report.warnings),
        )
        return _published(best.result, target, found, html=options.html)


def _common(options: CompileOptions, request: SearchRequest) -> CompileOptions:
    """Return what all candidates share."""
    if options.calibration is None:
        options = with_samples(options)
    reconstruct = options.reconstruct
    if request.saliency is not None and reconstruct is Reconstruction.NONE:
        # Islands take it, and what is compared shall differ in nothing else.
        reconstruct = Reconstruction.GPTQ
    return replace(
        options,
        scheme=None,
        islands=None,
        min_output_sqnr=None,
        metric=None,
        max_metric_drop=None,
        hold_out=True,
        reconstruct=reconstruct,
        html=False,
    )


def _output_of(source: Path, output: Path | str | None) -> Path:
    path = source.with_name(f"{source.stem}.search.onnx") if output is None else Path(output)
    if path.suffix != ".onnx":
        message = "a search writes a model"
        hint = "name a file ending in .onnx; a bundle or engine is made from what it chose"
        raise UsageError(message, where=str(path), hint=hint)
    if path.exists() and path.samefile(source):
        message = "the output would overwrite the model it is made from"
        raise UsageError(message, where=str(path), hint="choose another -o")
    return path


def _nothing_holds(report: SearchReport) -> ParityError:
    made = [point for point in report.points if point.bytes is not None]
    if made:
        nearest = min(made, key=lambda p: (p.reason.count(";"), -accuracy_of(p, report.accuracy)))
        seen = f"nearest: {nearest.name} with {point_text(nearest)}, but {nearest.reason}"
    else:
        seen = "; ".join(f"{point.name}: {point.reason}" for point in report.points[:3])
    message = f"no candidate holds {', '.join(report.bounds)}; {seen}"
    hint = "loosen a bound, or try other schemes: --scheme w8a16,w4a16:b32"
    return ParityError(message, where="--search", hint=hint, reason="nothing-holds")


def _published(result: CompileResult, target: Path, report: Report, *, html: bool) -> CompileResult:
    """Move the files of a result to where they belong, with another report."""
    saved = SavedModel(result.path, result.data_path, report.output.bytes)
    manifest = result.manifest_path.read_text(encoding="utf-8")
    published = publish(saved, target, report, manifest, html=html)
    return replace(published, verdict=result.verdict)
