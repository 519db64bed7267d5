"""A quantization compiler for exported models.

    from qcompiler import CompileOptions, compile_model

    result = compile_model("model.onnx", CompileOptions(scheme="w4a16:b32"))
    print(result.path, result.report.summary.average_bits)

Names are imported on first use, so that `import qcompiler` and `qcompile --help` stay quick.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompiler.artefacts import CompileResult
    from qcompiler.bounds import Gate, OutputBounds, Tolerances
    from qcompiler.calibration.calls import SampleOptions
    from qcompiler.calibration.observers import Observer
    from qcompiler.compile import compile_model
    from qcompiler.errors import (
        InternalError,
        ModelError,
        ParityError,
        QCompilerError,
        TargetError,
        UsageError,
    )
    from qcompiler.export.to_tensorrt import EngineOptions
    from qcompiler.gate.check import run_gate
    from qcompiler.gate.setting import GateOptions
    from qcompiler.options import CalibrationOptions, CompileOptions, Verification
    from qcompiler.quant.compute_type import ComputeType
    from qcompiler.quant.ranges import RangeMethod
    from qcompiler.quant.recipe import Recipe, Rule
    from qcompiler.quant.selector import Selector
    from qcompiler.report.verdict import GateFailedError, Verdict

__version__ = version("qcompiler")

__all__ = [
    "CalibrationOptions",
    "CompileOptions",
    "CompileResult",
    "ComputeType",
    "EngineOptions",
    "Gate",
    "GateFailedError",
    "GateOptions",
    "InternalError",
    "ModelError",
    "Observer",
    "OutputBounds",
    "ParityError",
    "QCompilerError",
    "RangeMethod",
    "Recipe",
    "Rule",
    "SampleOptions",
    "Selector",
    "TargetError",
    "Tolerances",
    "UsageError",
    "Verdict",
    "Verification",
    "__version__",
    "compile_model",
    "run_gate",
]

_HOME = {
    "CalibrationOptions": "qcompiler.options",
    "CompileOptions": "qcompiler.options",
    "CompileResult": "qcompiler.artefacts",
    "ComputeType": "qcompiler.quant.compute_type",
    "EngineOptions": "qcompiler.export.to_tensorrt",
    "Gate": "qcompiler.bounds",
    "GateFailedError": "qcompiler.report.verdict",
    "GateOptions": "qcompiler.gate.setting",
    "Observer": "qcompiler.calibration.observers",
    "OutputBounds": "qcompiler.bounds",
    "RangeMethod": "qcompiler.quant.ranges",
    "Recipe": "qcompiler.quant.recipe",
    "Rule": "qcompiler.quant.recipe",
    "SampleOptions": "qcompiler.calibration.calls",
    "Selector": "qcompiler.quant.selector",
    "Tolerances": "qcompiler.bounds",
    "Verdict": "qcompiler.report.verdict",
    "Verification": "qcompiler.options",
    "compile_model": "qcompiler.compile",
    "run_gate": "qcompiler.gate.check",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in __all__:
        return getattr(import_module("qcompiler.errors"), name)
    message = f"module 'qcompiler' has no attribute {name!r}"
    raise AttributeError(message)
