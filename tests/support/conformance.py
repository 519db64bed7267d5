"""The ONNX standard's own node tests, run by PyTorch programs.

python -m tests.support.conformance            all of them, counted
python -m tests.support.conformance Softmax    those whose last node is a Softmax, one by one
"""

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase as NodeTest

from qcompiler.execution.torch import Program
from qcompiler.execution.torch.element_types import STORAGE, to_numpy, to_torch


class Verdict(StrEnum):
    """What came of a test."""

    PASSED = "passed"
    REFERENCE = "by the reference evaluator"
    WRONG = "wrong"
    FAILED = "failed"
    OUT_OF_SCOPE = "out of scope"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One test's verdict, with the reason for anything but a pass."""

    name: str
    op: str
    verdict: Verdict
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.verdict}{': ' + self.reason if self.reason else ''}"


_HALF_BITS = {"float16": 10, "bfloat16": 7}
"""Bits of the fraction of a half type."""
_TRAINING = "trains"
_RANDOM = "draws random numbers that another implementation cannot repeat"
_TEXT = "works on strings"
_OUT_OF_SCOPE = {
    "Adagrad": _TRAINING,
    "Adam": _TRAINING,
    "Momentum": _TRAINING,
    "Bernoulli": _RANDOM,
    "ImageDecoder": "decodes image files",
    "ArrayFeatureExtractor": "classical machine learning (ai.onnx.ml)",
    "Binarizer": "classical machine learning (ai.onnx.ml)",
    "LabelEncoder": "classical machine learning (ai.onnx.ml)",
    "TreeEnsemble": "classical machine learning (ai.onnx.ml)",
    "TfIdfVectorizer": _TEXT,
}


@cache
def node_tests() -> tuple[NodeTest, ...]:
    """Return all node tests of the installed onnx, by name; making their data takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases()
    return tuple(sorted(cases, key=lambda case: case.name))


def op_of(case: NodeTest) -> str:
    """Return the op type that a test is about."""
    assert case.model is not None
    return case.model.graph.node[-1].op_type if case.model.graph.node else ""


def run_case(case: NodeTest, device: str = "cpu") -> Outcome:
    """Run a test and compare with the answers it comes with."""
    op = op_of(case)
    if reason := _why_out_of_scope(case, op):
        return Outcome(case.name, op, Verdict.OUT_OF_SCOPE, reason)
    assert case.model is not None
    try:
        program = Program.from_subgraph(ir.from_proto(case.model), device=device)
        for inputs, expected in case.data_sets or ():
            feeds = dict(zip(program.input_names, map(_as_feed, inputs), strict=True))
            results = program(feeds)
            complaint = _first_difference(case, program, results, expected)
            if complaint:
                return Outcome(case.name, op, Verdict.WRONG, complaint)
    # What cannot run may fail in any way; that it does is the result.
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        return Outcome(case.name, op, Verdict.FAILED, f"{type(error).__name__}: {first_line}")
    verdict = Verdict.REFERENCE if program.outside_torch else Verdict.PASSED
    return Outcome(case.name, op, verdict)


def _why_out_of_scope(case: NodeTest, op: str) -> str:
    assert case.model is not None
    if op in _OUT_OF_SCOPE:
        return _OUT_OF_SCOPE[op]
    graph = case.model.graph
    declared = [*graph.input, *graph.output, *graph.value_info]
    if any(_element_type(value) == onnx.TensorProto.STRING for value in declared):
        return _TEXT
    if any(node.op_type in ("Bernoulli", "RandomUniformLike") for node in graph.node):
        return _RANDOM
    if op == "Dropout" and "train" in case.name:
        return _TRAINING
    return ""


def _element_type(value: onnx.ValueInfoProto) -> int:
    kind = value.type
    if kind.HasField("sequence_type"):
        kind = kind.sequence_type.elem_type
    if kind.HasField("optional_type"):
        kind = kind.optional_type.elem_type
    return kind.tensor_type.elem_type


def _as_feed(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return ir.serde.deserialize_tensor(value).numpy()
    if isinstance(value, list | tuple):
        return [_as_tensor(each) for each in value]
    return None if value is None else np.asarray(value)


def _as_tensor(value: Any) -> Any:
    return to_torch(_as_feed(value))


def _first_difference(
    case: NodeTest, program: Program, results: dict[str, Any], expected: Sequence[Any]
) -> str:
    assert case.model is not None
    model = ir.from_proto(case.model)
    for value, wanted in zip(model.graph.outputs, expected, strict=True):
        result = results[str(value.name)]
        assert value.dtype is not None
        if isinstance(result, torch.Tensor) and result.dtype != STORAGE[value.dtype]:
            return f"{value.name}: type {result.dtype}, expected {value.dtype}"
        got = to_numpy(result, value.dtype)
        complaint = _difference(got, wanted, case.rtol, case.atol)
        if complaint:
            return f"{value.name}: {complaint}"
    return ""


def _difference(got: Any, wanted: Any, rtol: float, atol: float) -> str:
    if isinstance(wanted, onnx.TensorProto):
        wanted = ir.serde.deserialize_tensor(wanted).numpy()
    if isinstance(wanted, list | tuple):
        if not isinstance(got, list) or len(got) != len(wanted):
            return f"expected a sequence of {len(wanted)}"
        pairs = zip(got, wanted, strict=True)
        return next(filter(None, (_difference(a, b, rtol, atol) for a, b in pairs)), "")
    if wanted is None or got is None:
        return "" if wanted is got else "one is absent, the other is not"
    wanted = np.asarray(wanted)
    if got.dtype != wanted.dtype:
        return f"type {got.dtype}, expected {wanted.dtype}"
    if got.shape != wanted.shape:
        return f"shape {got.shape}, expected {wanted.shape}"
    left, right = _comparable(got), _comparable(wanted)
    if np.allclose(left, right, rtol=rtol, atol=atol, equal_nan=True):
        return ""
    slack = _slack(left, right, wanted.dtype.name)
    if slack is not None and (abs(left - right) <= slack).all():
        return ""
    with np.errstate(invalid="ignore"):
        worst = np.nanmax(np.abs(left.astype(np.complex128) - right.astype(np.complex128)))
    return f"differs by up to {worst:.3g}"


def _slack(left: Any, right: Any, dtype: str) -> Any:
    """Return a distance that rounding alone may make where a test asks for less, or None.

    Two neighbours of a half type, which only an implementation that rounds at the same places can
    beat; and for sums of many float32 products (DFT, whose expected answers are themselves
    computed), two neighbours of the largest value.
    """
    largest = np.maximum(abs(left), abs(right))
    if dtype in _HALF_BITS:
        return 2 * _spacing(largest, _HALF_BITS[dtype])
    if dtype == "float32" and largest.size:
        return 2 * _spacing(largest.max(), 23)
    return None


def _spacing(magnitudes: Any, bits: int) -> Any:
    """Return how far apart numbers of a type are that has so many bits of fraction."""
    return np.exp2(np.floor(np.log2(magnitudes, where=magnitudes > 0)) - bits)


def _comparable(array: Any) -> Any:
    small = array.dtype.kind == "V" or array.dtype.name in dir(ml_dtypes)
    return array.astype(np.float32) if small or array.dtype == np.float16 else array


def outcomes(op_types: Sequence[str] = (), device: str = "cpu") -> Iterator[Outcome]:
    """Yield the outcome of every test, or of those about some ops."""
    for case in node_tests():
        if not op_types or op_of(case) in op_types:
            yield run_case(case, device)


def as_markdown(found: Sequence[Outcome]) -> str:
    """Return a table of verdicts by op, and every test that did not pass with its reason."""
    verdicts = list(Verdict)
    counts = Counter(outcome.verdict for outcome in found)
    lines = [_row(["", *verdicts]), _row(["---", *["---:"] * len(verdicts)])]
    lines.append(_row(["all", *(str(counts[verdict]) for verdict in verdicts)]))
    for op in sorted({outcome.op for outcome in found}):
        counts = Counter(outcome.verdict for outcome in found if outcome.op == op)
        lines.append(_row([op, *(str(counts[verdict] or "") for verdict in verdicts)]))
    lines += ["", "## Not passed by PyTorch", ""]
    lines += [f"- `{outcome}`" for outcome in found if outcome.verdict is not Verdict.PASSED]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print outcomes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", help="op types")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    # The tests' tolerances are those of float32.
    torch.backends.cudnn.allow_tf32 = False
    counts: Counter[str] = Counter()
    for outcome in outcomes(arguments.ops, arguments.device):
        counts[outcome.verdict] += 1
        if outcome.verdict in (Verdict.WRONG, Verdict.FAILED) or arguments.ops:
            print(outcome)  # noqa: T201
    print({str(verdict): count for verdict, count in counts.items()})  # noqa: T201


if __name__ == "__main__":
    main()
