"""What is measured inside a finished graph for its report: where error comes in, and which ranges.

Both need the float models the graph was made from, which live as long as the compilation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import onnx_ir as ir

from qcompiler.calibration.channel_profiles import ChannelProfile, channel_profiles
from qcompiler.calibration.error_growth import GrowthOptions, NodeError, error_growth
from qcompiler.progress import Progress
from qcompiler.rewriting.float_models import KeepFloatModels

_PROFILES: Final = 6
"""Ops whose channels are shown: the worst."""


@dataclass(frozen=True, slots=True)
class Network:
    """What was measured inside a graph.

    Attributes:
        errors: By node name of the float model, in graph order.
        profiles: Channels of the ops that add most error.
    """

    errors: Mapping[str, NodeError] = field(default_factory=dict)
    profiles: tuple[ChannelProfile, ...] = ()


def measure_network(
    floats: KeepFloatModels, compiled: ir.Model, options: GrowthOptions, progress: Progress
) -> Network:
    """Measure error along the graph, and the channels of the ops that add most of it.

    What the float models that were not kept are needed for is left out.

    Raises:
        TargetError: ONNX Runtime cannot run one of the models.
    """
    if floats.last is None:
        return Network()
    errors = error_growth(floats.last, compiled, options, progress)
    if floats.first is None:
        return Network(errors)
    worst = sorted(errors, key=lambda name: -added_noise(errors[name]))[:_PROFILES]
    return Network(errors, channel_profiles(floats.first, floats.last, worst, options, progress))


def added_noise(error: NodeError) -> float:
    """Return by how much the noise of an op's result, relative to it, exceeds that of its data."""
    if error.output_db is None:
        return 0.0
    return _noise(error.output_db) - _noise(error.data_db)


def _noise(db: float | None) -> float:
    return 0.0 if db is None else float(10 ** (-db / 10))
