"""Parts of samples: some to choose by, others to judge the choice on."""

import itertools
from collections.abc import Iterator

from qcompiler.calibration.calls import Feeds, Samples, counted


def hold_out(samples: Samples) -> tuple[Samples, Samples]:
    """Split samples into those to calibrate on and the last quarter, at least one call.

    A single call is both.
    """
    count = len(samples)
    if count < 2:
        return samples, samples
    cut = count - max(1, count // 4)
    return _part(samples, 0, cut), _part(samples, cut, count)


def _part(samples: Samples, start: int, stop: int) -> Samples:
    def read() -> Iterator[Feeds]:
        return itertools.islice(iter(samples), start, stop)

    where = "the last" if start else "the first"
    origin = f"{where} {counted(stop - start, 'call')} of {samples.origin}"
    return Samples(origin, samples.made_up, stop - start, read)


def spread(samples: Samples, most: int) -> Samples:
    """Return at most so many calls, evenly spread over all."""
    count = len(samples)
    if count <= most:
        return samples
    wanted = {index * count // most for index in range(most)}

    def read() -> Iterator[Feeds]:
        return (feeds for index, feeds in enumerate(samples) if index in wanted)

    return Samples(f"{counted(most, 'call')} of {samples.origin}", samples.made_up, most, read)
