"""Which ops a quantization should spare: ranks them by the damage each does alone."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import isfinite
from pathlib import Path

import onnx_ir as ir

from qcompiler.calibration.candidates import (
    Candidate,
    find_candidates,
    float_outputs,
    nearby_places,
)
from qcompiler.calibration.damage import Damage, MeasureOptions, decibels, measure_damage
from qcompiler.errors import ModelError, UsageError
from qcompiler.first_passes import compiled_until
from qcompiler.options import CompileOptions
from qcompiler.passes.assign.place_quantizers import PlaceQuantizers
from qcompiler.passes.quantize.calibrate import Calibrate
from qcompiler.pipeline import pass_named, quantizing_passes
from qcompiler.plan import Plan, make_plan
from qcompiler.progress import Progress, SilentProgress
from qcompiler.quant.recipe import Recipe, Rule, Selector
from qcompiler.quant.scheme import Activations, QScheme, parse_scheme
from qcompiler.rewriting.base import PassContext


class Mode(StrEnum):
    """Where damage is measured."""

    LOCAL = "local"
    """A few blocks behind the op: an estimate, whose cost does not grow with the model's depth."""
    EXACT = "exact"
    """At the model's outputs."""


@dataclass(frozen=True, slots=True)
class SensitivityRow:
    """What quantizing one op alone does.

    Attributes:
        nodes: Its names in the source model; several where ops share a weight.
        op_type: ONNX op type.
        scheme: What it was quantized to.
        damage: How far values are from the float model's, where the mode looks.
        share: Its part of the damage of all ops, from 0 to 1.
    """

    nodes: tuple[str, ...]
    op_type: str
    scheme: str
    damage: Damage
    share: float


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """A ranking, the most sensitive op first.

    Attributes:
        mode: Where damage was measured.
        samples: Which calls.
        recipe: What was asked for.
        rows: Every op that was quantized.
    """

    mode: Mode
    samples: str
    recipe: Recipe
    rows: tuple[SensitivityRow, ...]

    @property
    def sum_db(self) -> float:
        """SQNR in dB if the errors of all ops add up, as independent ones do."""
        return decibels(sum(row.damage.noise for row in self.rows))

    def needed_for(self, min_sqnr_db: float) -> int:
        """Return how many of the worst to spare, by adding up the damage of the others."""
        for count in range(len(self.rows) + 1):
            rest = sum(row.damage.noise for row in self.rows[count:])
            if decibels(rest) >= min_sqnr_db:
                return count
        raise AssertionError  # nothing left has no noise

    def sparing(self, count: int) -> Recipe:
        """Return the recipe with rules before all others that spare the worst ops.

        An op on quantized activations gets weights of the same bits and activations in float;
        one with quantized weights alone stays in float.
        """
        rules = [
            Rule(
                Selector(name=_pattern(name)), _spared(row), _reason(row, self.mode), "sensitivity"
            )
            for row in self.rows[:count]
            for name in row.nodes
        ]
        return replace(self.recipe, rules=(*rules, *self.recipe.rules))

    def to_json(self, top: int | None = None) -> str:
        """Return the ranking as JSON; infinite decibels are null."""
        rows = [
            {
                "rank": rank,
                "nodes": list(row.nodes),
                "op_type": row.op_type,
                "scheme": row.scheme,
                "sqnr_db": row.damage.sqnr_db if isfinite(row.damage.sqnr_db) else None,
                "divergence": row.damage.divergence,
                "share": row.share,
            }
            for rank, row in enumerate(self.rows[:top], start=1)
        ]
        sum_db = self.sum_db if isfinite(self.sum_db) else None
        table = {"mode": self.mode, "samples": self.samples, "sum_db": sum_db, "ops": rows}
        return json.dumps(table, indent=2, ensure_ascii=False) + "\n"


def rank_sensitivity(
    source: Path | str,
    options: CompileOptions,
    mode: Mode = Mode.LOCAL,
    *,
    progress: Progress | None = None,
) -> Sensitivity:
    """Rank the ops that a compilation would quantize by the damage each does alone.

    Args:
        source: Path of an ONNX model; nothing is written.
        options: What the compilation would be asked to do; it needs samples.
        mode: Where the damage is measured.
        progress: Where long work shows how far it is; None is silent.

    Raises:
        UsageError: Options or samples that cannot be used.
        ModelError: The model is malformed, or holds nothing to quantize.
        TargetError: ONNX Runtime cannot run the model.
    """
    plan = make_plan(replace(options, min_output_sqnr=None, metric=None, max_metric_drop=None))
    if not plan.static:
        message = "no op would get calibrated activations"
        raise UsageError(message, hint="give --calibration DATA and a scheme such as w8a8")
    shown = progress or SilentProgress()
    with compiled_until(source, plan, Calibrate.name, options, shown) as (model, plan, context):
        candidates = find_candidates(model)
        if not candidates:
            message = "there is no op that would be quantized"
            hint = "`qcompile inspect` lists its ops"
            raise ModelError(message, hint=hint, reason="nothing-to-quantize")
        damages = _measure(model, candidates, mode, plan, context)
    return _ranking(candidates, damages, mode, plan)


def _measure(
    model: ir.Model,
    candidates: Sequence[Candidate],
    mode: Mode,
    plan: Plan,
    context: PassContext,
) -> list[Damage]:
    assert plan.data is not None
    assert plan.calibration is not None
    ends = [value.name or "" for value in float_outputs(model)]
    if not ends:
        message = "no output of the model holds floats, so there is no error to measure"
        raise ModelError(message)
    near = nearby_places(model) if mode is Mode.LOCAL else {}
    options = MeasureOptions(
        plan.data.samples,
        (pass_named(PlaceQuantizers.name, plan), *quantizing_passes(plan)),
        context,
        plan.calibration.memory_budget,
        plan.custom_op_libraries,
    )
    return measure_damage(
        model, candidates, lambda c: near.get(c.nodes[0], ends), options, "ranking ops"
    )


def _ranking(
    candidates: Sequence[Candidate], damages: Sequence[Damage], mode: Mode, plan: Plan
) -> Sensitivity:
    assert plan.data is not None
    total = sum(damage.noise for damage in damages)
    pairs = sorted(zip(candidates, damages, strict=True), key=lambda pair: -pair[1].noise)
    rows = tuple(
        SensitivityRow(c.origins, c.op_type, c.scheme, damage, _share(damage.noise, total))
        for c, damage in pairs
    )
    return Sensitivity(mode, plan.data.samples.origin, plan.recipe, rows)


def _share(noise: float, total: float) -> float:
    if not isfinite(noise):
        return 1.0
    return noise / total if total else 0.0


def _pattern(name: str) -> str:
    # A name matches itself, but as a glob it may match others as well.
    return f"/{re.escape(name)}/" if any(c in name for c in "*?[") else name


def _spared(row: SensitivityRow) -> QScheme | None:
    scheme = parse_scheme(row.scheme)
    if scheme is None or scheme.activations is Activations.FLOAT:
        return None
    return QScheme(scheme.weight_bits)


def _reason(row: SensitivityRow, mode: Mode) -> str:
    where = "at the outputs" if mode is Mode.EXACT else "a few blocks behind it"
    return f"sensitive: {row.scheme} on it alone leaves {row.damage.sqnr_db:.1f} dB {where}"
