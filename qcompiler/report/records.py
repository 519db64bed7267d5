"""What a report holds. The JSON form has the same names; docs/report-schema.md explains it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qcompiler.calibration.channel_profiles import ChannelProfile
from qcompiler.report.search_points import SearchReport

SCHEMA = "qcompiler-report"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A model file.

    Attributes:
        name: File name without folders.
        bytes: Size of the .onnx file and its external data together.
        sha256: Hash over both.
        opset: Version of the ai.onnx operator set.
    """

    name: str
    bytes: int
    sha256: str
    opset: int


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one op got, and why: of those with weights, and those between quantized values.

    Attributes:
        name: The node, as the source model calls it.
        origins: All nodes of the source model that it stands for: itself, merged duplicates,
            batch norms folded into it.
        op_type: The op, as the source model calls it.
        scheme: Text form, or "float"; "a8" is an op without weights on 8-bit activations.
        rule: The recipe rule or target row that decided.
        reason: Why, as a sentence.
        weight: Name of the source weight; two joined by a space for recurrent ops.
        elements: Elements of the weight.
        bytes_before: Bytes of the weight in the source model.
        bytes_after: Bytes of codes, scales and zero points; of the float weight if it stayed.
        sqnr_db: Signal to quantization noise ratio of the weight, dB; None for float and for a
            weight that is represented exactly.
        kernel: What the runtime really runs there; None if that was not looked at.
        integer_kernel: Whether that kernel reads integer weights; None if not looked at.
        placement: The target's placement rule by which it works on quantized activations, None
            where they are float.
        region: Number of the stretch of ops that hand each other quantized activations.
        float_ms: Milliseconds that this stretch, with all that shares its quantized inputs, takes
            in float; None if it was not measured.
        quantized_ms: What it takes as it was left; what it would take quantized, where it was left
            in float.
        equalized: By which scales the channels of its data were equalized, and what that did to
            the error of its product on samples; None where they were not looked at.
        compute_type: The float type it computes in; None where the model was not cast.
        type_reason: Why that is float32, None where it is not, or was not chosen.
        data_sqnr_db: SQNR of the data it reads against the float model's, on samples and with the
            runtime's optimizations off, dB; None where that was not measured, or nothing differs.
        output_sqnr_db: The same of its result: the error of all ops up to it.
        sensitivity_db: SQNR that quantizing it alone leaves, of those ops that were ranked; for
            the worst at the outputs, for others a few blocks behind them.
    """

    name: str
    origins: tuple[str, ...]
    op_type: str
    scheme: str
    rule: str
    reason: str
    weight: str | None
    elements: int
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None
    kernel: str | None
    integer_kernel: bool | None
    placement: str | None = None
    region: int | None = None
    float_ms: float | None = None
    quantized_ms: float | None = None
    equalized: str | None = None
    compute_type: str | None = None
    type_reason: str | None = None
    data_sqnr_db: float | None = None
    output_sqnr_db: float | None = None
    sensitivity_db: float | None = None

    @property
    def quantized(self) -> bool:
        """Whether the op got a scheme."""
        return self.scheme != "float"

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element, scales and zero points counted; 0 without a weight."""
        return 8 * self.bytes_after / self.elements if self.elements else 0.0


@dataclass(frozen=True, slots=True)
class SkipReport:
    """A place a pass left alone."""

    rule: str
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class ChangeReport:
    """What a pass did in one way at some nodes.

    Attributes:
        rule: Short name of what was done.
        detail: What the change was; may be empty.
        nodes: The nodes, in graph order.
    """

    rule: str
    detail: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did.

    Attributes:
        name: The pass.
        stage: Stage of the model afterwards.
        numerics: exact, reordered or lossy.
        seconds: Wall time of the pass itself.
        rewrites: Number of changes.
        skips: What it refused, with reasons.
        changes: What it did, with details.
        nodes: Nodes of the model afterwards; None, as the two below are empty, of a pass that ran
            before a stopped compilation went on, and in reports of older versions.
        ops: By op type, how many more nodes there are than before it.
        removed: Names of nodes that are gone and that no pass had made.
    """

    name: str
    stage: str
    numerics: str
    seconds: float
    rewrites: int
    skips: tuple[SkipReport, ...]
    changes: tuple[ChangeReport, ...] = ()
    nodes: int | None = None
    ops: Mapping[str, int] = field(default_factory=dict)
    removed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WindowReport:
    """What became of a window of blocks that was reconstructed.

    Attributes:
        blocks: What its blocks are called.
        loss_before: Loss on held-out calls with the codes it began with.
        loss_after: The same with what was learned.
        kept: Whether that was better, and kept.
        codes: Codes of all its weights.
        flipped: How many are others than at the start.
        seconds: Wall time.
        peak_bytes: Peak memory of the device, of the process on a CPU.
    """

    blocks: str
    loss_before: float | None
    loss_after: float | None
    kept: bool
    codes: int
    flipped: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class OutputCheck:
    """How a pass changed one output (`--verify numerics`).

    Attributes:
        name: The pass.
        output: The model output.
        max_abs: Largest absolute difference from before the pass; None where it is not finite.
        max_rel: The same over the largest absolute value before the pass.
        sqnr_db: Signal to difference ratio, dB; None where nothing changed.
    """

    name: str
    output: str
    max_abs: float | None
    max_rel: float | None
    sqnr_db: float | None


@dataclass(frozen=True, slots=True)
class QualityReport:
    """How near one output stayed to the source model's, on samples.

    Attributes:
        name: The output.
        native_db: SQNR as the runtime runs the model, dB; None where nothing changed.
        emulated_db: The same with the runtime's optimizations off, Q/DQ computed in float, and
            16-bit floats rounded wherever they are stored.
        ran: Whether the runtime on this machine can run the model; otherwise `native_db` says
            nothing.
    """

    name: str
    native_db: float | None
    emulated_db: float | None
    ran: bool = True


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What the ranges of activations come from.

    Attributes:
        source: Where the samples were, and how many of what there is.
        calls: How many calls of the model they made.
        sha256: Hash over all inputs of all calls.
        made_up: Whether they were random.
        observer: How ranges were chosen.
        outputs: How near the outputs stayed, on 8 calls at most, evenly spread.
    """

    source: str
    calls: int
    sha256: str
    made_up: bool
    observer: str
    outputs: tuple[QualityReport, ...]


@dataclass(frozen=True, slots=True)
class IslandSite:
    """What islands hold of one weight that can have some.

    Attributes:
        name: The node, as the source model calls it.
        layer: Number of its layer; -1 outside all of them.
        projection: What it is in its layer.
        scheme: What the rest of the weight has, or the whole of it.
        elements: Elements of the weight.
        saliency: Its part of the saliency of all weights, from 0 to 1.
        island_elements: Elements in islands.
        island_saliency: The part of its saliency that lies in them.
        island_bytes: Bytes of their values and indices.
    """

    name: str
    layer: int
    projection: str
    scheme: str
    elements: int
    saliency: float
    island_elements: int
    island_saliency: float
    island_bytes: int


@dataclass(frozen=True, slots=True)
class IslandsReport:
    """Which parts of weights keep more bits, and why.

    Attributes:
        kind: What islands are made of: weight, column, block or node.
        saliency: By what they were chosen.
        budget: What they were allowed to cost, as an option.
        task: What the model is to be good at.
        loss: Mean loss of the task where the gradient was taken; None without one.
        weights: Elements of all planned weights.
        elements: Elements in islands.
        average_bits: Bits per element over all planned weights: codes at the bits of their scheme,
            scales, zero points, values of islands and indices.
        average_bits_without: The same without islands.
        share: Part of all saliency that lies in islands.
        concentration: Part of it that the best weights and input channels hold, by how many.
        sites: Every weight that can have islands, in graph order.
    """

    kind: str
    saliency: str
    budget: str
    task: str
    loss: float | None
    weights: int
    elements: int
    average_bits: float
    average_bits_without: float
    share: float
    concentration: dict[str, float]
    sites: tuple[IslandSite, ...]


@dataclass(frozen=True, slots=True)
class UnplannedWeight:
    """A weight that does not lie in an engine as the graph holds it.

    Attributes:
        name: The initializer.
        planned: The type in the graph.
        found: The wider type in the engine; None where it was not found in any form that is known.
        planned_bytes: What it takes in the graph, without scales.
        found_bytes: What it takes in the engine; None where it was not found.
    """

    name: str
    planned: str
    found: str | None
    planned_bytes: int
    found_bytes: int | None


@dataclass(frozen=True, slots=True)
class EngineReport:
    """The engine that was built from the compiled model.

    Attributes:
        name: File name without folders.
        bytes: Its size.
        sha256: Its hash.
        library: What built it.
        version: Of the library.
        capabilities: Processors that it is for; empty is that of the machine.
        seconds: What the library took.
        layers: Layers of the network before the library fused any.
        planned_bytes: Bytes of all constants of the graph, each once.
        weights: Weights that were looked for in it; None, as below, where none are in it.
        as_planned: How many were found in the type that the graph holds them in, and no wider one.
        other: The others.
        warnings: What the library warned of.
    """

    name: str
    bytes: int
    sha256: str
    library: str
    version: str
    capabilities: tuple[str, ...]
    seconds: float
    layers: int
    planned_bytes: int
    weights: int | None
    as_planned: int | None
    other: tuple[UnplannedWeight, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """Totals over all weights; a weight that several ops share counts once.

    Attributes:
        sites: Quantizable ops that have a weight.
        quantized: How many of them got a scheme.
        weight_bytes_before: Bytes of all their weights in the source model.
        weight_bytes_after: Bytes in the result, scales and zero points counted.
        average_bits: Stored bits per element over the quantized weights.
        average_bits_all: Stored bits per element over all weights, float ones included.
        worst_sqnr_db: Lowest weight SQNR, dB; None if nothing was quantized.
        integer_kernels: Quantized ops that the runtime runs on integer weights; None if not
            looked at.
        peak_memory_bytes: Peak resident memory of the process.
        seconds: Wall time of the whole compilation.
        float_ms: Median milliseconds of a run of the source model on the largest sample; None if
            latency was not measured.
        compiled_ms: The same of the result.
        latency_ratio: Median of compiled / float over pairs of runs.
        compute_type: The 16-bit type the model was cast to; None, as the three below, where it was
            not.
        narrow_ops: Ops that compute in it.
        float32_ops: Ops that stay in float32.
        casts: Casts that were added between them.
    """

    sites: int
    quantized: int
    weight_bytes_before: int
    weight_bytes_after: int
    average_bits: float
    average_bits_all: float
    worst_sqnr_db: float | None
    integer_kernels: int | None
    peak_memory_bytes: int
    seconds: float
    float_ms: float | None = None
    compiled_ms: float | None = None
    latency_ratio: float | None = None
    compute_type: str | None = None
    narrow_ops: int | None = None
    float32_ops: int | None = None
    casts: int | None = None


@dataclass(frozen=True, slots=True)
class MetricReport:
    """A measure of the user's own, higher is better.

    Attributes:
        name: The function, `module:function`.
        source: Of the float model.
        compiled: Of the result.
    """

    name: str
    source: float
    compiled: float


@dataclass(frozen=True, slots=True)
class Report:
    """Everything a compilation has to say.

    `settings` is what decides the result beside the recipe, as the manifest has it; `islands` holds
    what docs/report-schema.md says, as plain JSON values.
    """

    qcompiler: str
    target: str
    recipe: str
    source: FileFacts
    output: FileFacts
    summary: Summary
    nodes: tuple[NodeReport, ...]
    passes: tuple[PassReport, ...]
    output_checks: tuple[OutputCheck, ...]
    warnings: tuple[str, ...]
    runtime: str | None
    calibration: CalibrationReport | None = None
    engine: EngineReport | None = None
    windows: tuple[WindowReport, ...] = ()
    metric: MetricReport | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    channels: tuple[ChannelProfile, ...] = ()
    islands: IslandsReport | None = None
    search: SearchReport | None = None
    schema: str = SCHEMA
    schema_version: int = SCHEMA_VERSION
