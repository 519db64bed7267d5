"""What a runtime can run, as data, and the functions that read it.

A target is a frozen table. No code anywhere asks which target it is working for: it hands a
request to `resolve`, which finds the first row that fits and says why, or why none does.
"""

from dataclasses import dataclass, replace

from qcompiler.quant.scheme import Activations, QScheme
from qcompiler.targets.placement import Placement
from qcompiler.targets.processors import Processor, without_type
from qcompiler.targets.rows import (
    LoweredOp,
    MissingOp,
    OpType,
    Refusal,
    Row,
    Substitute,
    WeightForm,
    WeightUse,
)


@dataclass(frozen=True, slots=True)
class SchemeRequest:
    """What a recipe wants for one weight, and what the choice may depend on.

    Attributes:
        op_type: Operator name.
        domain: Operator domain, "" for ONNX's own.
        scheme: What was asked for; symmetry and block size may be undecided.
        float_type: ONNX name of the float type that the op is going to compute in, such as
            "FLOAT16": that of the weight, or what it will be cast to.
        reduction: Number of input channels (K).
        outputs: Number of output channels (N).
        weight_rank: Rank of the weight.
        elements: Number of elements of the weight, None for `reduction * outputs`.
        transposed: Whether the weight reaches the op through a Transpose (or Gemm's transB).
        tied: Whether several ops share the weight.
        left: Whether the weight is the first input of a matrix product.
        in_body: Whether the op lies in an If, Loop or Scan body.
        rows: How often the op multiplies by its whole weight in one run, None where shapes do
            not say.
    """

    op_type: str
    domain: str
    scheme: QScheme
    float_type: str
    reduction: int
    outputs: int
    weight_rank: int
    elements: int | None = None
    transposed: bool = False
    tied: bool = False
    left: bool = False
    in_body: bool = False
    rows: int | None = None

    @property
    def op(self) -> OpType:
        """Domain and name."""
        return ("" if self.domain == "ai.onnx" else self.domain, self.op_type)

    @property
    def size(self) -> int:
        """Number of elements of the weight."""
        return self.reduction * self.outputs if self.elements is None else self.elements

    @property
    def use(self) -> WeightUse:
        """How the weight reaches the op."""
        if self.left:
            return WeightUse.LEFT
        if self.tied and (self.transposed or self.op_type == "Gather"):
            return WeightUse.SHARED_TABLE
        return WeightUse.TRANSPOSED if self.transposed else WeightUse.PLAIN


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a weight gets.

    Attributes:
        scheme: The scheme with block size and symmetry decided, None for float.
        rule: Short name of the table row or refusal that decided.
        reason: Why, one sentence.
        pair_limit: What two neighbouring codes of one sign may add up to; None is no limit.
    """

    scheme: QScheme | None
    rule: str
    reason: str
    pair_limit: int | None = None


@dataclass(frozen=True, slots=True)
class AddedBias:
    """Where the Add of a constant behind a MatMul costs nothing, since the kernel adds it.

    Attributes:
        activations: What happens to the data of the product.
        any_shape: Whether its result may have any shape; else it is a matrix or has a fixed one.
        source: Where the row comes from.
    """

    activations: Activations
    any_shape: bool
    source: str


@dataclass(frozen=True, slots=True)
class Target:
    """What one runtime can run.

    Attributes:
        name: Name on the command line.
        title: What reports call it.
        opset_min: Lowest ONNX opset it loads.
        opset_max: Highest.
        default_scheme: Text form of what ops are asked to get when nothing was said.
        calibrated_scheme: The same where there are samples to calibrate on.
        min_elements: Weights with fewer elements stay in float, but where their op works on
            quantized activations.
        min_elements_reason: Why, a clause.
        rows: What it can run, the best first.
        refusals: What it cannot.
        substitutes: What to try instead.
        placement: Where it wants quantized activations.
        lowering: Names of the passes that give a Q/DQ graph the runtime's own form, in order.
        lowered_ops: What those passes may leave behind, and Q/DQ nodes with it.
        intake: Names of the passes that give what other tools quantized a form that the runtime
            takes, in order; they run before the others, while all floats are float32.
        added_biases: Where the Add of a constant behind a MatMul becomes a part of its kernel.
        weight_forms: What it takes of other tools' weights, and no scheme makes.
        missing_ops: What it does not have, whoever made it.
        processors: What an engine must run on; empty where that does not matter.
        known_processors: What else can be named instead.
        tuned: Whether `processors` were named, so that what does not pay off there is left out.
        engine: What builds engines for it, by its name in `export.to_tensorrt`; None is nobody.
        emulated: Whether it is no runtime, but the arithmetic of the ONNX standard.
    """

    name: str
    title: str
    opset_min: int
    opset_max: int
    default_scheme: str
    calibrated_scheme: str
    min_elements: int
    min_elements_reason: str
    rows: tuple[Row, ...]
    refusals: tuple[Refusal, ...]
    substitutes: tuple[Substitute, ...]
    placement: Placement
    lowering: tuple[str, ...]
    lowered_ops: tuple[LoweredOp, ...]
    added_biases: tuple[AddedBias, ...] = ()
    intake: tuple[str, ...] = ()
    weight_forms: tuple[WeightForm, ...] = ()
    missing_ops: tuple[MissingOp, ...] = ()
    processors: tuple[Processor, ...] = ()
    known_processors: tuple[Processor, ...] = ()
    tuned: bool = False
    engine: str | None = None
    emulated: bool = False

    @property
    def runs_here(self) -> bool:
        """Whether ONNX Runtime is the runtime, so that kernels and latency can be looked at."""
        return self.engine is None and not self.emulated

    def has_integers(self, scheme: QScheme) -> bool:
        """Whether any op can have the weights of a scheme and its calibrated activations."""
        return any(row.multiplies(scheme) for row in self.rows)


def resolve(target: Target, request: SchemeRequest) -> Resolution:
    """Decide what one weight gets on a target.

    Worked example: w4a16:b128 on a MatMul with K = 64 gives one scale per output channel, with a
    reason that says that one block covers the whole axis.
    """
    static = request.scheme.activations is Activations.STATIC
    if request.size < target.min_elements and not static:
        return _float(
            "small-weight",
            f"its weight has {request.size} elements, fewer than {target.min_elements}: "
            f"{target.min_elements_reason}",
        )
    complaints: list[tuple[bool, str]] = []
    for row in _rows_for(target, request):
        found = _unfit_processor(target, row, request) or _fit(row, request)
        if isinstance(found, Resolution):
            return _unless_compute_bound(target, row, request) or found
        complaints.append((request.use not in row.uses, found))
    # What the first row about this use of the weight says, before rows about other uses.
    complaint = min(complaints, key=lambda item: item[0], default=(False, ""))[1]
    return _instead(target, request, complaint)


def _unfit_processor(target: Target, row: Row, request: SchemeRequest) -> str:
    """Return which processor cannot run a row, "" if all can."""
    # Rows are symmetric wherever processors matter: codes are signed.
    stored = replace(request.scheme, symmetric=True).weight_type.onnx_name
    without = without_type(target.processors, stored)
    if without:
        instead = "w8a8" if request.scheme.floating else "w8a16"
        return f"{', '.join(without)} has no {stored}: use {instead}, or name other processors"
    for one in target.processors:
        if request.float_type in row.float_types and request.float_type not in one.compute_types:
            return (
                f"{one.name} has no products in {request.float_type}: "
                f"compute in {' or '.join(one.compute_types)}, or name other processors"
            )
    return ""


def _unless_compute_bound(target: Target, row: Row, request: SchemeRequest) -> Resolution | None:
    """Refuse a row that only saves reading, where reading does not take the time; else None."""
    if not (target.tuned and row.weight_bound) or request.rows is None:
        return None
    slowest = max(target.processors, key=lambda one: one.ridge)
    if request.rows <= slowest.ridge:
        return None
    return _float(
        "compute-bound",
        f"with {request.rows} rows in a run its arithmetic takes longer than reading its weights "
        f"(beyond {slowest.ridge} rows on {slowest.name}), and decoding "
        f"{request.scheme.weight_bits} bits gains no time: name no processor to have the "
        "smaller file",
    )


def _rows_for(target: Target, request: SchemeRequest) -> list[Row]:
    return [row for row in target.rows if request.op in row.ops and row.multiplies(request.scheme)]


def _instead(target: Target, request: SchemeRequest, complaint: str) -> Resolution:
    """Try a substitute, else refuse; `complaint` says why the best row did not fit."""
    refusal = _refusal_for(target, request)
    why = complaint or (refusal.reason if refusal else "")
    for substitute in target.substitutes:
        if _applies(substitute, request):
            scheme = replace(
                request.scheme,
                weight_bits=substitute.instead_bits,
                activations=substitute.instead_activations,
                floating=False,
            )
            found = resolve(target, replace(request, scheme=scheme))
            why = why or f"{target.title} has no {request.scheme} kernel for {request.op_type}"
            return replace(found, reason=f"{why}; instead of {request.scheme}: {found.reason}")
    if refusal is not None and not complaint:
        return _float(refusal.rule, refusal.reason)
    reason = why or f"{target.title} has no {request.scheme} kernel for {request.op_type}"
    return _float("no-kernel", reason)


def _applies(substitute: Substitute, request: SchemeRequest) -> bool:
    return (
        request.op in substitute.ops
        and request.scheme.floating == substitute.floating
        and request.scheme.weight_bits in substitute.weight_bits
        and request.scheme.activations is substitute.activations
    )


def _refusal_for(target: Target, request: SchemeRequest) -> Refusal | None:
    for refusal in target.refusals:
        if (
            request.op in refusal.ops
            and request.scheme.floating == refusal.floating
            and request.scheme.weight_bits in refusal.weight_bits
            and refusal.activations in (None, request.scheme.activations)
        ):
            return refusal
    return None


def _float(rule: str, reason: str) -> Resolution:
    return Resolution(None, rule, reason)


def _fit(row: Row, request: SchemeRequest) -> Resolution | str:
    """Return what the row gives, or why it does not fit."""
    complaint = _misfit(row, request)
    if complaint:
        return complaint
    shared = request.scheme.per_tensor and row.per_tensor
    block = _granularity(row, request)
    if block is None:
        return (
            f"no legal granularity for {request.reduction} input channels: "
            f"block sizes {list(row.block_sizes)} do not divide it"
        )
    block_size, block_note = block
    symmetric, symmetry_note = _symmetry(row, request)
    scheme = replace(
        request.scheme, block_size=block_size or None, symmetric=symmetric, per_tensor=shared
    )
    notes = [note for note in (block_note, symmetry_note, row.note) if note]
    return Resolution(
        scheme,
        row.rule,
        "; ".join([f"runs as {row.kernel}", *notes]),
        row.pair_limit,
    )


def _misfit(row: Row, request: SchemeRequest) -> str:
    """Return why the row cannot be used whatever the granularity, "" if it can."""
    name = request.op_type
    if request.use not in row.uses:
        return f"no integer kernel for a {name} with a {request.use} weight"
    if request.in_body and not row.bodies:
        return "activations in an If, Loop or Scan body cannot be calibrated"
    if request.weight_rank not in row.ranks:
        return f"no integer kernel for a {name} with a weight of rank {request.weight_rank}"
    if request.float_type not in row.float_types:
        return (
            f"no {request.scheme.weight_bits}-bit kernel for a {request.float_type} {name}; "
            f"there is one for {', '.join(row.float_types)}"
        )
    if request.reduction % row.reduction_multiple:
        return (
            f"{row.kernel} needs rows of a multiple of {row.reduction_multiple} elements, "
            f"not {request.reduction}"
        )
    return ""


def _granularity(row: Row, request: SchemeRequest) -> tuple[int, str] | None:
    """Return the block size (0 for none) and why it changed; None where nothing is legal."""
    if request.scheme.per_tensor and row.per_tensor:
        return 0, ""
    if request.scheme.per_tensor and row.per_channel:
        return 0, "one scale per output channel: this kernel gains nothing from a single one"
    return _block_size(row, request)


def _block_size(row: Row, request: SchemeRequest) -> tuple[int, str] | None:
    """Return the block size (0 for one scale per output channel) and why it changed."""
    asked, channels = request.scheme.block_size, request.reduction
    legal = [
        size
        for size in row.block_sizes
        if size <= channels and (row.ragged or channels % size == 0)
    ]
    if asked is None:
        if row.per_channel:
            return 0, ""
        reason = "one scale per output channel has no kernel"
    elif asked in legal:
        return asked, ""
    elif asked >= channels and row.per_channel:
        same = f"one block of {asked} covers all {channels} input channels"
        return 0, f"{same}, so there is one scale per output channel"
    elif asked > channels:
        reason = f"blocks of {asked} are larger than the {channels} input channels"
    elif asked not in row.block_sizes:
        reason = f"blocks of {asked} have no fast kernel"
    else:
        reason = f"{channels} input channels do not divide into blocks of {asked}"
    smaller = [size for size in legal if asked is None or size <= asked]
    if smaller:
        return smaller[-1], f"blocks of {smaller[-1]}, since {reason}"
    if legal:
        return legal[0], f"blocks of {legal[0]}, since {reason}"
    if row.per_channel:
        return 0, f"one scale per output channel, since {reason}"
    return None


def _symmetry(row: Row, request: SchemeRequest) -> tuple[bool, str]:
    asked = request.scheme.symmetric
    if asked is None or asked in row.symmetric:
        return row.symmetric[0] if asked is None else asked, ""
    with_or_without = "without" if row.symmetric[0] else "with"
    return row.symmetric[0], f"{with_or_without} a zero point, the only form of {row.kernel}"
