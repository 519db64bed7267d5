"""The call that latency is measured on."""

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.errors import UsageError


def largest_call(samples: Samples) -> Feeds:
    """Return the first of the calls with the most elements; two are in memory at a time.

    Raises:
        UsageError: There is no call.
    """
    best: Feeds | None = None
    most = -1
    for feeds in samples:
        elements = sum(values.size for values in feeds.values())
        if elements > most:
            best, most = feeds, elements
    if best is None:
        message = "there is no sample to run the model on"
        raise UsageError(message, hint="give at least one call's inputs")
    return best
