"""Which scales a group of channels gets."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.linear_examples import Examples
from qcompiler.calibration.product_error import Noise, QuantizedProduct, channel_extremes
from qcompiler.ir.channels.groups import ChannelGroup, Reader
from qcompiler.ir.provenance import scheme_of
from qcompiler.ir.quantizable import Site
from qcompiler.quant.equalization import (
    ALPHAS,
    EXPONENTS,
    EXPONENTS_OF_DATA,
    EXPONENTS_OF_OUTLIERS,
    EqualizationMethod,
    balanced_scales,
    outlier_scales,
    powers_of_two,
    salience_scales,
)

F64 = npt.NDArray[np.float64]

_LEAST_GAIN: Final = {EqualizationMethod.AUTO: 0.9, EqualizationMethod.CFP: 0.98}
"""What the noise must fall to, on examples that chose nothing, for scales to be taken; any others
are taken whatever they do. Less than half a decibel of a group's is seldom seen in a model's
outputs: other roundings of the weights move those more.
"""


@dataclass(frozen=True, slots=True)
class ScaleOptions:
    """How scales are chosen.

    Attributes:
        method: Which scales are tried.
        alpha: For `smoothquant`.
        percentile: Percent of an activation's examples that its range covers; None takes the
            whole range over all calls.
        outlier_limit: How many channels calibration may leave in float.
        two_terms_below: What calibration gives two terms of codes.
    """

    method: EqualizationMethod = EqualizationMethod.AUTO
    alpha: float = 0.5
    percentile: float | None = None
    outlier_limit: int = 8
    two_terms_below: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """What a group of channels gets.

    Attributes:
        label: How its scales were made, "none" where it stays as it is.
        scales: float64 `[channels]`.
        before: Noise without scales, a ratio of energies, summed over the readers.
        after: Noise with them.
    """

    label: str
    scales: F64
    before: float
    after: float

    @property
    def equalizes(self) -> bool:
        """Whether anything is to be scaled."""
        return bool(np.any(self.scales != 1.0))


@dataclass(frozen=True, slots=True)
class _Ranges:
    """Extremes of the channels of a group, float64 `[channels]` each."""

    low: F64
    high: F64
    mean: F64
    weight_low: F64
    weight_high: F64


def choose_scales(
    group: ChannelGroup, examples: Mapping[Site, Examples], options: ScaleOptions
) -> Choice:
    """Try scales on a group's ops as they are going to be quantized, and return the best.

    Half of the calls say which range the data has; on the others it may be exceeded, and scales
    that leave no room anywhere lose. With `auto` and `cfp` they also decide whether the best scales
    are better than leaving the group as it is.
    """
    products = [
        QuantizedProduct(
            r.site, r.channels, examples[r.site], options.outlier_limit, options.two_terms_below
        )
        for r in group.readers
        if scheme_of(r.site.node) is not None and r.site in examples
    ]
    ranges = _ranges(group, examples, products, options.percentile)
    exact_powers = any(reader.site.tensor.dtype.bitwidth == 16 for reader in group.readers)
    candidates = dict(_candidates(ranges, options, quantized=products[0].quantizes_data))
    if exact_powers:
        candidates = {label: powers_of_two(scales) for label, scales in candidates.items()}
    plain = _noise(products, np.ones(group.count))
    noises = {label: _noise(products, scales) for label, scales in candidates.items()}
    best = min(noises, key=lambda label: noises[label].fit + noises[label].judge)
    limit = _LEAST_GAIN.get(options.method)
    if limit is not None and noises[best].judge > limit * plain.judge:
        return Choice("none", np.ones(group.count), plain.judge, noises[best].judge)
    return Choice(best, candidates[best], plain.judge, noises[best].judge)


def _candidates(
    ranges: _Ranges, options: ScaleOptions, *, quantized: bool
) -> Iterator[tuple[str, F64]]:
    method = options.method
    everything = method is EqualizationMethod.AUTO
    size, weight_size = (
        _magnitude(ranges.low, ranges.high),
        _magnitude(ranges.weight_low, ranges.weight_high),
    )
    if method is EqualizationMethod.AWEQ or everything:
        width, weight_width = ranges.high - ranges.low, ranges.weight_high - ranges.weight_low
        yield "aweq", balanced_scales(width, weight_width)
    if method is EqualizationMethod.SMOOTHQUANT:
        yield f"smoothquant {options.alpha:g}", balanced_scales(size, weight_size, options.alpha)
    if method is EqualizationMethod.SMOOTHQUANT_SEARCHED or everything:
        for alpha in ALPHAS:
            yield f"smoothquant {alpha:g}", balanced_scales(size, weight_size, alpha)
    if method is EqualizationMethod.CFP:
        for exponent in EXPONENTS_OF_OUTLIERS:
            yield f"cfp {exponent:g}", outlier_scales(size, exponent)
    if method is EqualizationMethod.AWQ or everything:
        alone = method is EqualizationMethod.AWQ or not quantized
        for exponent in EXPONENTS if alone else EXPONENTS_OF_DATA:
            yield f"awq {exponent:g}", salience_scales(ranges.mean, exponent)


def _magnitude(low: F64, high: F64) -> F64:
    return np.maximum(-low, high)


def _noise(products: Sequence[QuantizedProduct], scales: F64) -> Noise:
    """Sum the relative noise of the ops that read a group."""
    data = {product.treatment: product for product in products}
    rows = {treatment: product.data(scales) for treatment, product in data.items()}
    found = [product.noise(rows[product.treatment], scales) for product in products]
    return Noise(sum(noise.fit for noise in found), sum(noise.judge for noise in found))


def _ranges(
    group: ChannelGroup,
    examples: Mapping[Site, Examples],
    products: Sequence[QuantizedProduct],
    percentile: float | None,
) -> _Ranges:
    low, high, mean = np.zeros((3, group.count))
    for reader in group.readers:
        if reader.site not in examples:
            continue
        held = examples[reader.site]
        found = _clipped(reader, held, percentile) if percentile is not None else held
        a, b, c = channel_extremes(reader.channels, found.ranges, group.count)
        low, high, mean = np.minimum(low, a), np.maximum(high, b), np.maximum(mean, c)
    weight_low, weight_high = np.zeros((2, group.count))
    for product in products:
        a, b = product.weight_extremes(group.count)
        weight_low, weight_high = np.minimum(weight_low, a), np.maximum(weight_high, b)
    return _Ranges(low, high, mean, weight_low, weight_high)


def _clipped(reader: Reader, examples: Examples, percentile: float) -> Examples:
    """Return examples with ranges that leave out what lies beyond a percentile on either side."""
    channels = len(examples.ranges.minimum)
    groups, count, width = examples.rows.shape
    # Rows of a convolution hold its positions side by side: [groups, count, channels, positions].
    positions = groups * width // channels
    values = examples.rows.reshape(groups, count, width // positions, positions)
    by_channel = np.moveaxis(values, 1, 2).reshape(channels, -1)
    rest = (100.0 - percentile) / 2
    low, high = np.percentile(by_channel, [rest, 100.0 - rest], axis=1)
    ranges = replace(
        examples.ranges,
        minimum=np.minimum(low, 0.0).astype(np.float64),
        maximum=np.maximum(high, 0.0).astype(np.float64),
    )
    return replace(examples, ranges=ranges)
