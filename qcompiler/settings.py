"""What decides the bytes of a compilation beside model, target and recipe, as plain JSON values."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from enum import StrEnum
from typing import Any, Final

from qcompiler.calibration.calls import SampleOptions
from qcompiler.calibration.observers import Observer
from qcompiler.options import (
    CalibrationOptions,
    CompileOptions,
    EqualizationOptions,
    Reconstruction,
    TaskOptions,
    with_samples,
)
from qcompiler.pipeline import pipeline
from qcompiler.plan import Plan
from qcompiler.quant.equalization import EqualizationMethod, InsertMul
from qcompiler.quant.ranges import RangeMethod
from qcompiler.quant.recipe import Recipe
from qcompiler.quant.reconstruction import (
    BlockReconstruction,
    Compute,
    Learned,
    Rounding,
    Start,
)
from qcompiler.report.files import package_versions

_PLAIN: Final = (
    *("min_output_sqnr", "metric", "max_metric_drop", "hold_out"),
    *("external_data", "device"),
)
_SAMPLING: Final = (
    *("max_samples", "batch_size", "seed", "symbolic_size"),
    *("sequence_length", "max_tokens", "text_field"),
)
_BLOCK_CHOICES: Final[Mapping[str, type[StrEnum]]] = {
    "start": Start,
    "learned": Learned,
    "rounding": Rounding,
    "compute": Compute,
}
_CALIBRATING: Final = ("percentile", "outlier_channels", "two_terms_below", "memory_budget")


def settings_of(plan: Plan, options: CompileOptions) -> dict[str, Any]:
    """Return what a manifest says of the options in force, defaults included.

    It names no path: where files are is no part of what was compiled.
    """
    equalization = plan.equalization
    return {
        "weight_range": plan.weight_range.value,
        "equalization": {
            "method": equalization.method and equalization.method.value,
            "alpha": equalization.alpha,
            "percentile": equalization.percentile,
            "insert_mul": equalization.insert_mul.value,
            "check": equalization.check,
        },
        "correct_bias": plan.correct_bias,
        "cast_io": plan.cast_io,
        "reconstruct": plan.reconstruct.value,
        "task": _task_of(plan),
        "blocks": asdict(plan.blocks) if plan.reconstruct is Reconstruction.CBQ else None,
        "never_slower": plan.never_slower,
        "measurements": plan.measurements is not None,
        "user_passes": list(options.user_passes),
        **{name: getattr(options, name) for name in _PLAIN},
        "calibration": _calibration_settings(plan),
    }


def _task_of(plan: Plan) -> dict[str, Any] | None:
    """Return the hash of all inputs and labels of the task's samples, and how these are read.

    `alone` says that there are no others, so that what calibration says is of these as well.
    """
    if plan.task is None or plan.data is None or plan.data.task is None:
        return None
    assert plan.calibration is not None
    return {
        "sha256": plan.data.task.fingerprint(),
        "alone": plan.calibration.is_task,
        "memory_budget": plan.task.memory_budget,
        "samples": {name: getattr(plan.task.samples, name) for name in _SAMPLING},
    }


def _calibration_settings(plan: Plan) -> dict[str, Any] | None:
    options = plan.calibration
    if options is None or plan.data is None:
        return None
    return {
        "sha256": plan.data.samples.fingerprint(),
        "observer": options.observer and options.observer.value,
        **{name: getattr(options, name) for name in _CALIBRATING},
        "samples": {name: getattr(options.samples, name) for name in _SAMPLING},
    }


def options_from(
    recipe: Recipe,
    target: str,
    settings: Mapping[str, Any],
    calibration: CalibrationOptions | None,
    task: TaskOptions | None = None,
) -> CompileOptions:
    """Return the options that lead to a manifest's settings.

    Args:
        recipe: The manifest's.
        target: The manifest's.
        settings: As `settings_of` made them.
        calibration: Where the samples are; how they are read and used comes from the settings.
            None where the settings have none, or where they are those of the task.
        task: Where the samples of the task are, the same.

    Raises:
        KeyError, TypeError, ValueError: They are no settings that this version knows.
    """
    equalization = settings["equalization"]
    method = equalization["method"]
    options = CompileOptions(
        recipe=recipe,
        target=target,
        calibration=calibration and _calibrated_as(calibration, settings["calibration"]),
        task=task and _task_as(task, settings["task"]),
        equalization=EqualizationOptions(
            None if method is None else EqualizationMethod(method),
            equalization["alpha"],
            equalization["percentile"],
            InsertMul(equalization["insert_mul"]),
            equalization["check"],
        ),
        correct_bias=settings["correct_bias"],
        cast_io=settings["cast_io"],
        reconstruct=Reconstruction(settings["reconstruct"]),
        blocks=_blocks_from(settings["blocks"]),
        weight_range=RangeMethod(settings["weight_range"]),
        never_slower=settings["never_slower"],
        user_passes=tuple(settings["user_passes"]),
        **{name: settings[name] for name in _PLAIN},
    )
    alone = task is not None and settings["task"]["alone"]
    return with_samples(options) if alone else options


def _task_as(where: TaskOptions, settings: Mapping[str, Any]) -> TaskOptions:
    samples: SampleOptions = replace(
        where.samples, **{name: settings["samples"][name] for name in _SAMPLING}
    )
    return replace(where, samples=samples, memory_budget=settings["memory_budget"])


def _blocks_from(settings: Mapping[str, Any] | None) -> BlockReconstruction:
    if settings is None:
        return BlockReconstruction()
    chosen = {name: kind(settings[name]) for name, kind in _BLOCK_CHOICES.items()}
    return BlockReconstruction(**{**settings, **chosen})


def _calibrated_as(where: CalibrationOptions, settings: Mapping[str, Any]) -> CalibrationOptions:
    samples: SampleOptions = replace(
        where.samples, **{name: settings["samples"][name] for name in _SAMPLING}
    )
    observer = settings["observer"]
    return replace(
        where,
        samples=samples,
        observer=None if observer is None else Observer(observer),
        **{name: settings[name] for name in _CALIBRATING},
    )


def identity_of(source_sha256: str, plan: Plan, options: CompileOptions) -> dict[str, Any]:
    """Return what two compilations must share for one to go on where the other stopped."""
    return {
        "model": source_sha256,
        "target": plan.target.name,
        "recipe": plan.recipe.to_toml(),
        "settings": settings_of(plan, options),
        "passes": [each.name for each in pipeline(plan)],
        "versions": package_versions(),
    }
