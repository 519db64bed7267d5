"""What a pass is, what it reports, and what it may use."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

import onnx_ir as ir

from qcompiler.ir.weights import WeightStore
from qcompiler.progress import Progress, SilentProgress
from qcompiler.rewriting.stages import Stage
from qcompiler.team import Alone, Team


class Numerics(StrEnum):
    """What a pass does to the numbers a model returns."""

    EXACT = "exact"
    """Bit-equal outputs."""
    REORDERED = "reordered"
    """Equal in real arithmetic; floats are reassociated. The pass states a tolerance."""
    LOSSY = "lossy"
    """Outputs change; the loss is measured and reported."""


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One change a pass made.

    Attributes:
        rule: Short kebab-case name of what was done, such as "fold-batch-norm".
        node: Name of the node that was changed, as the source model calls it.
        detail: What the change was, one clause; may be empty.
    """

    rule: str
    node: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Skip:
    """One place where a pass could have acted and did not.

    Attributes:
        rule: Short kebab-case name of what was refused.
        node: Name of the node left alone, as the source model calls it.
        reason: Why, as a sentence a user can act on.
    """

    rule: str
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class PassResult:
    """What one run of a pass did; both lists are in graph order."""

    rewrites: tuple[Rewrite, ...] = ()
    skips: tuple[Skip, ...] = ()

    @property
    def modified(self) -> bool:
        """Whether the pass changed the model."""
        return bool(self.rewrites)


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What one pass did, as the report shows it.

    Attributes:
        name: The pass.
        stage: The stage the model was at afterwards.
        numerics: What the pass declares about outputs.
        seconds: Time in the pass itself, verification excluded.
        rewrites: What it changed.
        skips: What it refused, with reasons.
    """

    name: str
    stage: Stage
    numerics: Numerics
    seconds: float
    rewrites: tuple[Rewrite, ...]
    skips: tuple[Skip, ...]


@dataclass(frozen=True, slots=True)
class PassContext:
    """What a pass may use beside the model.

    Attributes:
        store: Where large tensors that a pass makes go; the model holds references.
        progress: Where long work shows how far it is.
        workers: Threads a pass may use.
        team: Processes that run the same pass on the same model at the same time.
    """

    store: WeightStore
    progress: Progress = field(default_factory=SilentProgress)
    workers: int = 1
    team: Team = field(default_factory=Alone)


class Pass(ABC):
    """A rewrite of a whole model, in place.

    A concrete pass has a docstring with the parts Before, After and Refuses, takes its options
    (a frozen dataclass) in `__init__`, keeps them as `options`, and has no state between runs.

    Attributes:
        name: Name on the command line and in reports: verb and noun, kebab-case.
        consumes: The stage a model must have reached.
        produces: The stage a model is at afterwards.
        numerics: What happens to the model's outputs.
        tolerance: For REORDERED passes, the largest allowed `|after - before| / max|before|`
            over a model output in float32; None for the other kinds. A model with float16 or
            bfloat16 inputs, outputs or weights is allowed four times the epsilon of the
            narrowest of them where that is more: reassociation costs a few roundings in the type
            that is computed in, and no pass can do better.
        written_by_user: Whether the code is not ours. ONNX's checker judges what it made at once,
            so that no later pass is blamed, and its faults are usage errors, not defects.
        retypes_signature: Whether float inputs and outputs of the model may get another float type.
        options: What the pass was made with, for reproducers; None where it takes nothing.
    """

    name: ClassVar[str]
    consumes: ClassVar[Stage]
    produces: ClassVar[Stage]
    numerics: ClassVar[Numerics]
    tolerance: ClassVar[float | None] = None
    written_by_user: ClassVar[bool] = False
    retypes_signature: bool = False
    options: object | None = None

    @property
    def label(self) -> str:
        """What messages call the pass."""
        return f"pass {self.name}"

    @abstractmethod
    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        """Rewrite `model` in place and say what was done and what was not."""
