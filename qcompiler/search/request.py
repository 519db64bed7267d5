"""What a search is asked for, beside the options of a compilation."""

from dataclasses import dataclass
from math import isfinite
from typing import Final

from qcompiler.errors import UsageError
from qcompiler.options import CompileOptions
from qcompiler.quant.compute_type import ComputeType
from qcompiler.quant.islands import Saliency
from qcompiler.targets.registry import find_target

DEFAULT_SCHEMES: Final = ("w8a8", "w8a16", "w4a16:b64", "w3a16:b64", "w2a16:b64")


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """What is tried, and what it may cost; accuracy is asked for in `CompileOptions`.

    Attributes:
        schemes: Schemes that are tried on all weights, and mixed.
        saliency: By what islands are chosen; None tries none.
        average_bits: Bits per weight at most, over all weights, or None.
        nbytes: The same in bytes of all weights, or None.
        max_latency_ratio: Times the float model's latency at most, or None.
        unit: Input channels of islands are taken so many at a time.
    """

    schemes: tuple[str, ...] = DEFAULT_SCHEMES
    saliency: Saliency | None = Saliency.TACQ
    average_bits: float | None = None
    nbytes: int | None = None
    max_latency_ratio: float | None = None
    unit: int = 1

    def __post_init__(self) -> None:
        for option, number in (
            ("--average-bits", self.average_bits),
            ("--budget-bytes", self.nbytes),
            ("--max-latency-ratio", self.max_latency_ratio),
        ):
            if number is not None and not (isfinite(number) and number > 0):
                message = f"is {number:g}, and must be above 0"
                raise UsageError(message, where=option)
        if self.average_bits is not None and self.nbytes is not None:
            message = "two budgets were given"
            raise UsageError(message, hint="give --average-bits or --budget-bytes")
        if not self.schemes:
            message = "there is no scheme to try"
            raise UsageError(message, where="--scheme", hint="for example w8a16,w4a16:b64")

    @property
    def cap(self) -> float | None:
        """What weights may take at most, in the measure of the budget; None for no limit."""
        return self.average_bits if self.nbytes is None else float(self.nbytes)

    @property
    def in_bytes(self) -> bool:
        """Whether sizes are compared in bytes as stored, rather than in bits per weight."""
        return self.nbytes is not None

    def bounds(self, options: CompileOptions) -> tuple[str, ...]:
        """Return everything that must hold, as options."""
        given = {
            "--min-output-sqnr": options.min_output_sqnr,
            "--max-metric-drop": options.max_metric_drop,
            "--max-latency-ratio": self.max_latency_ratio,
            "--average-bits": self.average_bits,
            "--budget-bytes": self.nbytes,
        }
        return tuple(f"{name} {value:g}" for name, value in given.items() if value is not None)


def check_request(request: SearchRequest, options: CompileOptions) -> None:
    """Refuse what a search cannot do.

    Raises:
        UsageError: Options contradict a search, or nothing bounds it.
    """
    if not request.bounds(options):
        message = "nothing says what the result must keep"
        hint = "give --min-output-sqnr, --metric with --max-metric-drop, --average-bits, or more"
        raise UsageError(message, where="--search", hint=hint)
    others = {
        "--recipe": options.recipe,
        "--engine": options.engine,
        "--work-dir": options.work_dir,
        "--dump-ir": options.dump_ir,
    }
    for option, value in others.items():
        if value is not None:
            message = f"{option} belongs to one compilation, and a search makes several"
            hint = "search first; the result's report has its recipe"
            raise UsageError(message, where="--search", hint=hint)
    if options.calibration is None and options.task is None:
        message = "candidates are compared on samples, and there are none"
        raise UsageError(message, where="--search", hint="give --calibration DATA, or --task FILE")
    target = find_target(options.target)
    bfloat16 = ComputeType.BFLOAT16 in (options.compute_type, *request.schemes)
    if request.max_latency_ratio is not None and bfloat16:
        message = "ONNX Runtime has no kernels for bfloat16 on a CPU to measure latency with"
        raise UsageError(message, where="--max-latency-ratio", hint="leave it out")
    if request.max_latency_ratio is not None and not target.runs_here:
        message = f"latency of {target.title} cannot be measured by ONNX Runtime"
        raise UsageError(message, where="--max-latency-ratio", hint="leave it out")
