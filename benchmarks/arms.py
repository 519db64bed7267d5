"""The settings that are compared, and how each makes its model.

Run as a program it makes one model, so that the time and the memory of a process are those of one
compilation:

    python -m benchmarks.arms SOURCE OUTPUT ARM [--exclude PATTERN ...]

prints what is in the model as JSON.
"""

import argparse
import json
import sys
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from benchmarks.peers import PEERS, Peer, quantize
from benchmarks.weight_stats import (
    digest,
    file_bytes,
    float_elements,
    matmul_nbits,
    weight_bytes,
)

THREADS = 2

Range = Literal["weighted-mse", "mse", "min-max"]


@dataclass(frozen=True, slots=True)
class Ours:
    """A setting of qcompiler.

    Attributes:
        scheme: Text form of the scheme.
        weight_range: How clipping ranges are chosen; None is the compiler's default, for 8 bits,
            where next to nothing is clipped.
        same_nodes: Whether only the nodes are quantized that the peer can quantize.
    """

    scheme: str
    weight_range: Range | None = None
    same_nodes: bool = False

    def __str__(self) -> str:
        parts = [self.scheme]
        if self.weight_range is not None:
            parts.append(self.weight_range)
        if self.same_nodes:
            parts.append("same-nodes")
        return "/".join(parts)


Arm = Ours | Peer

_FOUR_BITS = tuple(
    f"w4a16:b{block}:{symmetry}" for block in (32, 128) for symmetry in ("asym", "sym")
)
_RANGES: tuple[Range, ...] = get_args(Range)
_OURS = (
    Ours("w8a16"),
    *(Ours(scheme, rule) for scheme in (*_FOUR_BITS, "w2a16:b64") for rule in _RANGES),
    Ours("w8a8-dynamic"),
    *(
        Ours(scheme, rule, same_nodes=True)
        for scheme in (*_FOUR_BITS, "w2a16:b64")
        for rule in _RANGES
    ),
    Ours("w8a16", same_nodes=True),
)

_ALL: tuple[Arm, ...] = (*_OURS, *PEERS)
ARMS: dict[str, Arm] = {str(arm): arm for arm in _ALL}


def make(source: Path, output: Path, arm: Arm, exclude: tuple[str, ...]) -> dict[str, Any]:
    """Write the model of an arm and say what is in it.

    Returns:
        `file_bytes`, `weight_bytes` (all constants), `quantized_elements`, `float_elements` (left
        in float), `average_bits` (of quantized weights, scales and zero points counted), `kernels`
        (name -> number of ops), `quantized_ops`, `integer_kernels`, `digest` (of the file).
    """
    facts = (
        _peer(source, output, arm) if isinstance(arm, Peer) else _ours(source, output, arm, exclude)
    )
    return facts | {
        "file_bytes": file_bytes(output),
        "weight_bytes": weight_bytes(output),
        "float_elements": float_elements(output),
        "digest": digest(output),
    }


def _ours(source: Path, output: Path, arm: Ours, exclude: tuple[str, ...]) -> dict[str, Any]:
    from qcompiler import CompileOptions, RangeMethod, Recipe, Rule, Selector, compile_model
    from qcompiler.quant.scheme import parse_scheme

    method = None if arm.weight_range is None else RangeMethod(arm.weight_range)
    options = CompileOptions(scheme=arm.scheme, weight_range=method, workers=THREADS)
    if arm.same_nodes:
        rule = Rule(Selector(op_type="MatMul"), parse_scheme(arm.scheme))
        options = CompileOptions(
            recipe=Recipe(rules=(rule,)), exclude=exclude, weight_range=method, workers=THREADS
        )
    report = compile_model(source, options, output=output).report
    done = [node for node in report.nodes if node.quantized]
    weights = {node.weight: node.elements for node in done}
    return {
        "quantized_elements": sum(weights.values()),
        "average_bits": report.summary.average_bits,
        "kernels": dict(sorted(Counter(node.kernel or "not found" for node in done).items())),
        "quantized_ops": len(done),
        "integer_kernels": report.summary.integer_kernels,
    }


def _peer(source: Path, output: Path, arm: Peer) -> dict[str, Any]:
    quantize(source, output, arm)
    found = matmul_nbits(output)
    count = int(found["nodes"])
    return {
        "quantized_elements": int(found["elements"]),
        "average_bits": 8 * found["bytes"] / found["elements"] if count else 0.0,
        "kernels": {f"MatMulNBits ({found['bits']:.0f}-bit)": count} if count else {},
        "quantized_ops": count,
        "integer_kernels": count,
    }


def main() -> None:
    """Make one model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("arm", choices=list(ARMS), metavar="ARM")
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN")
    arguments = parser.parse_args()
    arm = ARMS[arguments.arm]
    # The peer prints its progress.
    with redirect_stdout(sys.stderr):
        facts = make(arguments.source, arguments.output, arm, tuple(arguments.exclude))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
