"""Magnitudes by channel: what the channels of data and weights hold, before and after."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.calibration.channel_profiles import MOST_POINTS, channel_profiles
from qcompiler.calibration.error_growth import GrowthOptions
from tests.support.graphs import Array, build, random_array


def samples(*shape: int, count: int = 2) -> Samples:
    def read() -> Iterator[Feeds]:
        for index in range(count):
            yield {"x": np.full(shape, -1.0 - index, np.float32)}

    return Samples("test", False, count, read)


def scaled(scale: Array) -> ir.Model:
    """A product whose data is scaled up and whose weight is scaled down, by channel."""
    weight = np.array([[1, -2, 0], [0, 0.5, 4]], np.float32)
    return build(
        "g (float[N, 2] x) => (float[N, 3] y) { d = Mul(x, s) [mm] y = MatMul(d, w) }",
        {"s": scale, "w": weight / scale[:, None]},
    )


def test_data_and_weight_by_channel_before_and_after() -> None:
    before, after = scaled(np.array([1, 8], np.float32)), scaled(np.array([1, 2], np.float32))
    found = channel_profiles(before, after, ["mm", "other"], GrowthOptions(samples(5, 2)))
    (profile,) = found
    assert (profile.node, profile.channels) == ("mm", 2)
    assert profile.data_before == (16.0, 2.0), "descending, the largest of all calls"
    assert profile.data_after == (4.0, 2.0)
    assert profile.weight_before == (0.5, 2.0)
    assert profile.weight_after == (2.0, 2.0)


def test_grouped_convolutions_keep_the_channels_of_their_data() -> None:
    weight = (
        np.ones((4, 1, 3, 3), np.float32) * np.arange(1, 5, dtype=np.float32)[:, None, None, None]
    )
    model = build(
        "g (float[N, 4, 5, 5] x) => (float[N, 4, 3, 3] y)"
        " { r = Relu(x) n = Neg(x) [c] y = Conv <group = 4> (n, w) }",
        {"w": weight},
    )
    (profile,) = channel_profiles(model, model, ["c"], GrowthOptions(samples(2, 4, 5, 5)))
    assert profile.channels == 4
    assert profile.weight_before == (1.0, 2.0, 3.0, 4.0)
    assert profile.data_before == (2.0,) * 4


def test_many_channels_are_few_points_and_none_is_hidden() -> None:
    weight = random_array(500, 2)
    model = build(
        "g (float[N, 500] x) => (float[N, 2] y) { d = Mul(x, s) [mm] y = MatMul(d, w) }",
        {"s": np.arange(1, 501, dtype=np.float32), "w": weight},
    )
    (profile,) = channel_profiles(model, model, ["mm"], GrowthOptions(samples(1, 500, count=1)))
    assert len(profile.data_before) == MOST_POINTS
    assert profile.data_before[0] == 500.0
    assert max(profile.weight_before) == float(f"{np.abs(weight).max():.3g}")


def test_weights_beyond_the_memory_budget_are_left_out() -> None:
    model = scaled(np.ones(2, np.float32))
    assert channel_profiles(model, model, ["mm"], GrowthOptions(samples(1, 2), 64)) == ()
