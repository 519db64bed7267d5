"""The casts to 16 bits that are compared, ours and AutoCast's, and a program that makes one model.

    python -m benchmarks.float16_arms SOURCE CALLS OUTPUT ARM

runs in the interpreter that the tool is installed for, and prints as JSON what the model was made
with, or why it was not made.
"""

import math
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar, Final, Literal

from benchmarks.int8_arms import THREADS, main
from benchmarks.int8_peers import ModelOpt, Peer, Task, save

AUTOCAST_DATA_MAX: Final = 512.0
"""Its default: nodes that read or make larger values stay float32."""
_FLOAT16_MAX: Final = 65504.0


@dataclass(frozen=True, slots=True)
class Ours:
    """The pass `cast-types`, as `--target tensorrt-rtx --scheme float16 --calibration DATA`.

    Attributes:
        scheme: The type, as a scheme.
    """

    scheme: Literal["float16", "bfloat16"]

    family: ClassVar[str] = "qcompiler"
    module: ClassVar[str] = "qcompiler"
    distribution: ClassVar[str] = "qcompiler"
    requirement: ClassVar[str] = "-e ."

    def __str__(self) -> str:
        return self.scheme

    def quantize(self, task: Task) -> None:
        """Make the model."""
        from qcompiler import CompileOptions, compile_model

        options = CompileOptions(
            scheme=self.scheme,
            target="tensorrt-rtx",
            calibration=str(task.calls),
            workers=THREADS,
        )
        compile_model(task.source, options, output=task.output)


@dataclass(frozen=True, slots=True)
class AutoCast:
    """NVIDIA ModelOpt's AutoCast, with the same calls, inputs and outputs kept as they are.

    Attributes:
        low_precision: The type.
        data_max: Largest value that nodes in 16 bits may read and make.
    """

    low_precision: Literal["fp16", "bf16"]
    data_max: float = AUTOCAST_DATA_MAX

    family: ClassVar[str] = ModelOpt.family
    module: ClassVar[str] = "modelopt.onnx.autocast"
    distribution: ClassVar[str] = ModelOpt.distribution
    requirement: ClassVar[str] = ModelOpt.requirement

    def __str__(self) -> str:
        limit = "" if self.data_max == AUTOCAST_DATA_MAX else f":max-{self.data_max:.0f}"
        return f"autocast:{self.low_precision}{limit}"

    def quantize(self, task: Task) -> None:
        """Make the model."""
        library = import_module(self.module)
        model = library.convert_to_mixed_precision(
            str(task.source),
            low_precision_type=self.low_precision,
            keep_io_types=True,
            data_max=self.data_max,
            calibration_data=str(task.calls),
        )
        save(model, task.output)


# AutoCast holds indices to its limit as well: by default every lookup in a large table, and so the
# table, stays float32. Its other settings here are those in which none does.
_ALL: tuple[Peer, ...] = (
    Ours("float16"),
    AutoCast("fp16"),
    AutoCast("fp16", _FLOAT16_MAX),
    Ours("bfloat16"),
    AutoCast("bf16"),
    AutoCast("bf16", math.inf),
)
ARMS: dict[str, Peer] = {str(arm): arm for arm in _ALL}
FAMILIES = (AutoCast.family,)


if __name__ == "__main__":
    main(ARMS)
