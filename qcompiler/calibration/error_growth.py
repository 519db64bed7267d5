"""How far values along a quantized graph are from those of the float graph it was made from."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.calls import Feeds, Samples, widened_feeds
from qcompiler.calibration.held_out import spread
from qcompiler.calibration.largest_call import largest_call
from qcompiler.execution.intermediates import shapes_at
from qcompiler.execution.narrow_floats import emulated
from qcompiler.execution.sessions import Session, open_session
from qcompiler.execution.taps import Measure, Tap, tap_model
from qcompiler.ir.channels.weights import data_input
from qcompiler.ir.dataflow import constant_of
from qcompiler.ir.editing import values_of
from qcompiler.ir.provenance import COMPUTE_TYPE
from qcompiler.ir.quantizable import find_sites
from qcompiler.ir.widened import widened
from qcompiler.progress import Progress, SilentProgress
from qcompiler.quant.ranges import sqnr_db

Array = npt.NDArray[Any]

MOST_CALLS: Final = 4
_FEWEST_CALLS: Final = 2
"""Where values take several rounds, each of which runs both models, fewer calls must do."""
_CHUNK: Final = 1 << 20
_BYTES: Final = 2 * np.dtype(np.float32).itemsize
"""An element leaves both sessions."""
_SHARE: Final = 2
"""One part in so many of the memory budget is for what is compared at once."""


@dataclass(frozen=True, slots=True)
class NodeError:
    """How far the data and the result of one op are from the float graph's.

    Attributes:
        data_db: SQNR of what it reads, dB, infinite where nothing differs; None where it reads
            nothing computed, or where no value of that name is left.
        output_db: The same of what it returns.
    """

    data_db: float | None
    output_db: float | None


@dataclass(frozen=True, slots=True)
class GrowthOptions:
    """How error growth is measured.

    Attributes:
        samples: The calls; of them at most `MOST_CALLS` are used, evenly spread.
        memory_budget: Bytes; half of them are for the values compared at once.
        threads: Threads of one operator; None leaves it to ONNX Runtime.
        custom_op_libraries: Shared libraries with the kernels of custom operators.
    """

    samples: Samples
    memory_budget: int = 2 << 30
    threads: int | None = None
    custom_op_libraries: tuple[Path, ...] = ()


def error_growth(
    reference: ir.Model,
    compiled: ir.Model,
    options: GrowthOptions,
    progress: Progress | None = None,
) -> dict[str, NodeError]:
    """Compare what ops with weights read and return in two models of the same value names.

    Both run without the runtime's optimizations, which compute Q/DQ nodes in float: what is
    measured is the quantization, summed up from the inputs to each op, without what kernels add.
    Where a model was cast to 16 bits, every value that is stored in them is rounded.

    Args:
        reference: The float model.
        compiled: What was made of it. Values that it has not, and those in bodies, are left out.
        options: Samples and limits.
        progress: Where the work is shown.

    Returns:
        By the reference's node name, in graph order.

    Raises:
        TargetError: ONNX Runtime cannot run one of the models.
    """
    reference, compiled = widened(reference), _comparable(compiled)
    ends = _ends(reference)
    names = dict.fromkeys(name for pair in ends.values() for name in pair if name is not None)
    found = _compared(reference, compiled, _common(names, reference, compiled), options, progress)
    errors = {
        node: NodeError(None if data is None else found.get(data), found.get(output))
        for node, (data, output) in ends.items()
    }
    return {n: e for n, e in errors.items() if e.data_db is not None or e.output_db is not None}


def _comparable(compiled: ir.Model) -> ir.Model:
    return emulated(compiled) if COMPUTE_TYPE in compiled.metadata_props else widened(compiled)


def _ends(model: ir.Model) -> dict[str, tuple[str | None, str]]:
    """Return the data and the result of every op with a weight in the main graph."""
    found: dict[str, tuple[str | None, str]] = {}
    for site in find_sites(model)[0]:
        if site.node.graph is not model.graph:
            continue
        position = data_input(site)
        data = None if position is None else site.node.inputs[position]
        computed = data is not None and constant_of(data) is None
        name = data.name if data is not None and computed else None
        found.setdefault(site.node.name or "", (name, site.node.outputs[0].name or ""))
    return found


def _common(names: Iterable[str], *models: ir.Model) -> list[str]:
    """Return those of the names that are computed float values in all models."""
    present = [
        {v.name for v in values_of(m.graph) if v.producer() is not None and _is_float(v)}
        for m in models
    ]
    return [name for name in names if all(name in values for values in present)]


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _compared(
    reference: ir.Model,
    compiled: ir.Model,
    names: Sequence[str],
    options: GrowthOptions,
    progress: Progress | None,
) -> dict[str, float]:
    samples = spread(options.samples, MOST_CALLS)
    rounds = list(_rounds(reference, names, largest_call(samples), options)) if names else []
    samples = spread(samples, max(_FEWEST_CALLS, MOST_CALLS // max(1, len(rounds))))
    found: dict[str, float] = {}
    task = (progress or SilentProgress()).task
    with task("measuring error along the network", len(rounds) * len(samples)) as advance:
        for chosen in rounds:
            sums = {name: np.zeros(2) for name in chosen}
            with (
                _open(reference, chosen, options) as first,
                _open(compiled, chosen, options) as second,
            ):
                for feeds in map(widened_feeds, samples):
                    _add(first.run(feeds), second.run(feeds), sums)
                    advance(1)
            found |= {n: sqnr_db(*s) for n, s in sums.items() if np.isfinite(s).all()}
    return found


def _rounds(
    model: ir.Model, names: Sequence[str], feeds: Feeds, options: GrowthOptions
) -> Iterator[list[str]]:
    """Divide values into rounds that fit memory; one that does not fit alone is left out."""
    shapes = shapes_at(
        model,
        names,
        widened_feeds(feeds),
        threads=options.threads,
        custom_op_libraries=options.custom_op_libraries,
    )
    limit = options.memory_budget // _SHARE
    chosen: list[str] = []
    room = limit
    for name in names:
        cost = _BYTES * prod(shapes[name])
        if cost > limit:
            continue
        if cost > room:
            yield chosen
            chosen, room = [], limit
        chosen.append(name)
        room -= cost
    if chosen:
        yield chosen


def _open(model: ir.Model, names: Sequence[str], options: GrowthOptions) -> "_Tapped":
    tapped = tap_model(model, [Tap(name, Measure.VALUES) for name in names])
    session = open_session(
        tapped.model,
        optimize=False,
        threads=options.threads,
        custom_op_libraries=options.custom_op_libraries,
    )
    return _Tapped(session, {output: tap.value for tap, output in tapped.outputs.items()})


class _Tapped(AbstractContextManager["_Tapped"]):
    """A session whose outputs go by the names of the values they were tapped from."""

    def __init__(self, session: Session, names: dict[str, str]) -> None:
        self._session = session
        self._names = names

    def __exit__(self, *exception: object) -> None:
        self._session.__exit__(*exception)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        results = self._session.run(self._session.fitting(feeds))
        return {value: results[output] for output, value in self._names.items()}


def _add(truths: dict[str, Array], others: dict[str, Array], sums: dict[str, Array]) -> None:
    for name, total in sums.items():
        total += _energies(truths[name], others[name])


def _energies(truth: Array, other: Array) -> npt.NDArray[np.float64]:
    """Return the energies of a value and of its error, float64 `[2]`; NaN where they have none."""
    if truth.shape != other.shape:
        return np.full(2, np.nan)
    energies = np.zeros(2)
    for start in range(0, truth.size, _CHUNK):
        one, two = (
            v.reshape(-1)[start : start + _CHUNK].astype(np.float64) for v in (truth, other)
        )
        with np.errstate(invalid="ignore"):
            # Masks hold infinities, which both graphs keep.
            error = np.where(one == two, 0.0, one - two)
        kept = np.isfinite(one)
        energies += (np.square(one[kept]).sum(), np.square(error).sum())
    return energies
