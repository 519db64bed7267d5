"""The engine at the end of a compilation: what is asked for, building it, and looking into it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir

from qcompiler.calibration.calls import Samples
from qcompiler.errors import TargetError, UsageError
from qcompiler.export.engine_weights import WeightFinding, find_weights
from qcompiler.export.tensorrt_profiles import Profiles, ShapeRange, profiles_of
from qcompiler.export.to_tensorrt import (
    LIBRARIES,
    EngineFile,
    EngineOptions,
    build_engine,
    require_library,
)
from qcompiler.ir.dataflow import all_nodes
from qcompiler.ir.provenance import SCHEME, origins_of
from qcompiler.ir.tensor_output import content_key
from qcompiler.ir.tensor_sites import tensor_sites
from qcompiler.options import CompileOptions
from qcompiler.progress import Progress
from qcompiler.quant.scheme import FLOAT
from qcompiler.report.records import EngineReport, FileFacts, UnplannedWeight
from qcompiler.targets.capability import Target
from qcompiler.targets.registry import TARGETS

SUFFIXES: Final = (".engine", ".plan")
"""By these an output is known for an engine."""
_WITHOUT_WEIGHTS: Final = "STRIP_PLAN"
_OVERHEAD: Final = 1.1
"""An engine this much larger than its weights and `_KERNELS` is worth a warning."""
_KERNELS: Final = 8 << 20
"""What kernels and plans of an engine may take: MiniLM's has 4.6 MB of them, a CNN's 1.3 MB."""
_NAMES_SHOWN: Final = 3


class EngineBuildError(TargetError):
    """The library refused a model, failed or crashed.

    Attributes:
        sites: The quantized ops with weights, as the source model calls them.
    """

    def __init__(self, cause: TargetError, sites: tuple[str, ...]) -> None:
        super().__init__(cause.message, where=cause.where, hint=cause.hint)
        self.sites = sites


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """An engine that is to be built.

    Attributes:
        path: Where it goes.
        options: How it is built.
        title: What messages call the library.
        elsewhere: Whether it is built later, on another machine: nothing is built here.
    """

    path: Path
    options: EngineOptions
    title: str
    elsewhere: bool = False

    @property
    def manifest_path(self) -> Path:
        """Where its manifest goes."""
        return self.path.with_name(f"{self.path.name}.manifest.json")


def with_named_engine(
    options: CompileOptions, output: Path | str | None
) -> tuple[CompileOptions, Path | None]:
    """Return options that name the engine, and where the model goes, if that was said.

    An output that is an engine by its suffix has the model beside it, under a name that the source
    of the compilation is unlikely to have: m.engine and m.lowered.onnx.

    Raises:
        UsageError: Two engines were named.
    """
    path = None if output is None else Path(output)
    if path is None or path.suffix not in SUFFIXES:
        return options, path
    if options.engine not in (None, path):
        message = "two engines were named"
        raise UsageError(message, where=f"{path} and {options.engine}", hint="give -o model.onnx")
    return replace(options, engine=path), path.with_suffix(".lowered.onnx")


def requested_engine(options: CompileOptions, target: Target) -> EngineRequest | None:
    """Return the engine that options ask for, None where they ask for none.

    Raises:
        UsageError: The target builds none, the library is missing, or options speak of an engine
            that nobody wants.
    """
    path = options.engine
    if path is None and not options.engine_elsewhere:
        if options.engine_options != EngineOptions():
            message = "options say how an engine is built, and none is asked for"
            raise UsageError(message, hint="give --engine model.engine")
        return None
    if target.engine is None:
        able = ", ".join(name for name, each in TARGETS.items() if each.engine)
        message = f"{target.title} takes ONNX models; it has no engines"
        where = None if path is None else str(path)
        raise UsageError(message, where=where, hint=f"targets with engines: {able or 'none'}")
    chosen = _for_processors(replace(options.engine_options, library=target.engine), target)
    title = LIBRARIES[chosen.library].title
    if path is None:
        return EngineRequest(Path(), chosen, title, elsewhere=True)
    require_library(chosen)
    return EngineRequest(path, chosen, title)


def _for_processors(chosen: EngineOptions, target: Target) -> EngineOptions:
    """Return options for the processors that a target names, where none are asked for.

    Raises:
        UsageError: Others are asked for than the graph is made for.
    """
    named = tuple(one.name for one in target.processors)
    if not target.tuned or not LIBRARIES[chosen.library].names_processors:
        return chosen
    others = [name for name in chosen.capabilities if name not in named]
    if others:
        message = f"the engine is for {', '.join(others)}, and the graph for {', '.join(named)}"
        raise UsageError(message, hint=f"leave --sm out, or the processors of {target.name}")
    return replace(chosen, capabilities=chosen.capabilities or named)


def with_profiles(
    request: EngineRequest, model: ir.Model, samples: Samples | None
) -> EngineRequest:
    """Return a request that says which shapes the engine takes.

    Args:
        request: The request; its own profiles come first. Their names may be patterns, with * and ?
            in them.
        model: The source model.
        samples: The calls that other inputs' shapes are taken from, if there are any.

    Raises:
        UsageError: A profile is for an input that the model does not have, or of another rank, or
            the samples leave an input empty whose shape varies, such as a decoder's cache.
    """
    own = _own_profiles(request.options.profile, model)
    seen: Mapping[str, ShapeRange] = {} if samples is None else profiles_of(samples)
    profile = {**seen, **own}
    _refuse_empty([name for name in varying_inputs(model) if name not in own], seen)
    missing = [name for name in varying_inputs(model) if name not in profile]
    if request.elsewhere and missing:
        message = f"nothing says which shapes the input {missing[0]} takes"
        raise UsageError(message, hint="give --calibration, or --profile input:1x16..8x128..64x512")
    return replace(request, options=replace(request.options, profile=profile))


def _own_profiles(asked: Profiles, model: ir.Model) -> dict[str, ShapeRange]:
    """Return profiles by input; of two that fit an input the one with its very name counts."""
    ranks = {
        value.name or "": None if value.shape is None else len(value.shape)
        for value in model.graph.inputs
    }
    found: dict[str, ShapeRange] = {}
    for pattern, shapes in sorted(asked.items(), key=lambda each: each[0] in ranks):
        names = [pattern] if pattern in ranks else [n for n in ranks if fnmatchcase(n, pattern)]
        if not names:
            message = f"the model has no input {pattern!r}"
            raise UsageError(message, where="--profile", hint=f"inputs: {', '.join(ranks)}")
        for name in names:
            if ranks[name] not in (None, len(shapes.common)):
                count = len(shapes.common)
                message = f"input {name} has {ranks[name]} axes, and its profile {count}"
                raise UsageError(message, where="--profile")
            found[name] = shapes
    return found


def _refuse_empty(names: Sequence[str], seen: Profiles) -> None:
    """Stop where an engine could only ever take an input that holds nothing."""
    for name in names:
        shapes = seen.get(name)
        if shapes is None or 0 not in shapes.largest:
            continue
        example = "..".join(
            "x".join(str(extent or most) for extent in shapes.largest) for most in (0, 128, 512)
        )
        message = f"input {name} is empty in all samples: so it would have to be in the engine"
        hint = f"give --profile '{name}:{example}', and shapes of other inputs that go with it"
        raise UsageError(message, where="--profile", hint=f"{hint}; names may have * in them")


def varying_inputs(model: ir.Model) -> tuple[str, ...]:
    """Return the inputs whose shapes vary, in order."""
    return tuple(
        value.name or ""
        for value in model.graph.inputs
        if value.shape is None or not value.shape.is_static()
    )


def build_and_check(
    request: EngineRequest, graph: Path, model: ir.Model, made: Path, progress: Progress
) -> EngineReport:
    """Build an engine and say what lies in it.

    Args:
        request: How it is built.
        graph: The lowered model's file.
        model: The same model.
        made: Where the engine is written.
        progress: Shows the library's phases.

    Raises:
        UsageError: An option does not exist, or a shape is missing.
        EngineBuildError: The library refuses the model, fails or crashes.
    """
    try:
        built = build_engine(graph, made, request.options, progress=progress)
    except TargetError as error:
        raise EngineBuildError(error, _quantized_sites(model)) from error
    if _WITHOUT_WEIGHTS in request.options.flags:
        return _report(request, built, model, None)
    with progress.task("looking for weights", 1) as advance:
        findings = find_weights(made, ir.load(graph, format="protobuf"))
        advance(1)
    return _report(request, built, model, findings)


def _quantized_sites(model: ir.Model) -> tuple[str, ...]:
    named = (
        next(iter(origins_of(node)), node.name or "")
        for node in all_nodes(model)
        if node.metadata_props.get(SCHEME, FLOAT) != FLOAT
    )
    return tuple(dict.fromkeys(named))


def _report(
    request: EngineRequest,
    built: EngineFile,
    model: ir.Model,
    findings: tuple[WeightFinding, ...] | None,
) -> EngineReport:
    tensors = {content_key(site.tensor): site.tensor.nbytes for site in tensor_sites(model)}
    others = [entry for entry in findings or () if entry.wider or not entry.found]
    return EngineReport(
        name=request.path.name,
        bytes=built.size,
        sha256=_sha256(built.path),
        library=request.title,
        version=built.version,
        capabilities=request.options.capabilities,
        seconds=round(built.seconds, 3),
        layers=built.layers,
        planned_bytes=sum(tensors.values()),
        weights=None if findings is None else len(findings),
        as_planned=None if findings is None else len(findings) - len(others),
        other=tuple(_unplanned(entry) for entry in others),
        warnings=built.warnings,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _unplanned(finding: WeightFinding) -> UnplannedWeight:
    found = finding.wider
    return UnplannedWeight(
        finding.name,
        finding.planned.name,
        None if found is None else found.name,
        finding.planned_bytes,
        None if found is None else -(-finding.elements * found.bitwidth // 8),
    )


def engine_warnings(engine: EngineReport | None) -> tuple[str, ...]:
    """Say where an engine is not what was planned."""
    if engine is None:
        return ()
    found: list[str] = []
    wider = [entry for entry in engine.other if entry.found is not None]
    if wider:
        extra = sum((entry.found_bytes or 0) - entry.planned_bytes for entry in wider)
        shown = ", ".join(f"{entry.name} as {entry.found}" for entry in wider[:_NAMES_SHOWN])
        more = ", ..." if len(wider) > _NAMES_SHOWN else ""
        found.append(
            f"{len(wider)} weights lie in the engine in a wider type than planned, "
            f"{extra >> 10} KiB more: {shown}{more}"
        )
    if engine.weights and engine.bytes > _OVERHEAD * engine.planned_bytes + _KERNELS:
        lost = sum(1 for entry in engine.other if entry.found is None)
        found.append(
            f"the engine has {engine.bytes >> 10} KiB, and constants of the graph take "
            f"{engine.planned_bytes >> 10} KiB; {lost} weights were not found in it"
        )
    return tuple(found)


def publish_engine(
    request: EngineRequest, made: Path, engine: EngineReport, graph: FileFacts
) -> Path:
    """Write the manifest of an engine, and rename both into place.

    Args:
        request: Where it goes.
        made: The engine, in a folder of the same file system.
        engine: What lies in it.
        graph: What it was built from.

    Raises:
        UsageError: It cannot be written.
    """
    manifest = made.with_name(request.manifest_path.name)
    try:
        manifest.write_text(engine_manifest(request, engine, graph), encoding="utf-8")
        manifest.replace(request.manifest_path)
        made.replace(request.path)
    except OSError as error:
        message = f"cannot write the engine: {error.strerror}"
        raise UsageError(message, where=str(request.path)) from error
    return request.path


def engine_manifest(request: EngineRequest, engine: EngineReport, graph: FileFacts) -> str:
    """Return the manifest of an engine as JSON text: what it is made of, and for what."""
    options = request.options
    content: dict[str, Any] = {
        "schema": "qcompiler-engine-manifest",
        "schema_version": 1,
        "graph": asdict(graph),
        "engine": {"name": engine.name, "bytes": engine.bytes, "sha256": engine.sha256},
        "library": {"name": options.library, "version": engine.version},
        "capabilities": list(options.capabilities),
        "profile": {name: shapes.as_lists() for name, shapes in sorted(options.profile.items())},
        "flags": sorted(options.flags),
        "pools": dict(sorted(options.pools.items())),
        "optimization_level": options.optimization_level,
        "hardware_compatibility": options.hardware_compatibility,
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
