"""The bounds a model must keep before it may be released, as recipes and commands give them.

```toml
[gate]
data = "test.npz"            # what is judged on; the samples of calibration when absent
labels = "label"             # the array in it that holds labels
min_sqnr = 20                # dB, of every float output against the float model
min_cosine = 0.99            # mean cosine of samples of an output
max_kl = 0.05                # nats, mean divergence of rows of a distribution
min_agreement = 0.98         # rows whose largest entry is where it was
metric = "top1"              # or top5, perplexity, f1:module:function, module:function, ...
max_metric_drop = 0.005      # by how much it may be worse than the float model's
metric_bound = 0.98          # the worst value that is good enough
max_latency = 0.9            # times the float model's
max_size = "2MiB"            # or a number: times the float model's
max_memory = 1.0             # to load and to run once; a size, or times the float model's
max_bits = 8.5               # stored per weight, scales and zero points counted
max_input_shift = 0.1        # of means of inputs since calibration, in standard deviations
baseline = "v1.manifest.json"    # no worse than this release

[gate.output.logits]         # for one output, instead of what holds for all
min_sqnr = 30

[gate.tolerance]             # what "no worse than the release" allows
sqnr = 0.5
```
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any, Final

from qcompiler.byte_sizes import parse_size
from qcompiler.errors import UsageError

Limit = float | str
"""A share of the float model's, or a size as text."""


@dataclass(frozen=True, slots=True)
class OutputBounds:
    """How near an output must stay to the float model's; None asks for nothing.

    Attributes:
        min_sqnr: Least signal to noise ratio over all samples, dB.
        min_cosine: Least mean cosine of the angle between samples.
        max_kl: Largest mean Kullback-Leibler divergence of rows, nats; distributions only.
        min_agreement: Least share of rows whose largest entry is the same, 0 to 1.
    """

    min_sqnr: float | None = None
    min_cosine: float | None = None
    max_kl: float | None = None
    min_agreement: float | None = None


@dataclass(frozen=True, slots=True)
class Tolerances:
    """By how much a model may be worse than the last release.

    Attributes:
        sqnr: Of the outputs, dB.
        cosine: Absolute.
        kl: Relative.
        agreement: Absolute, a share of the rows.
        metric: Absolute, in the metric's unit.
        latency: Relative.
        size: Relative.
        memory: Relative.
        bits: Absolute, per weight.
    """

    sqnr: float = 1.0
    cosine: float = 0.001
    kl: float = 0.1
    agreement: float = 0.01
    metric: float = 0.005
    latency: float = 0.05
    size: float = 0.01
    memory: float = 0.1
    bits: float = 0.05


@dataclass(frozen=True, slots=True)
class Gate:
    """What a model must keep; the module's text shows the form in a recipe.

    Attributes:
        data: What it is judged on; None is the samples of calibration.
        labels: Name of the array that holds labels.
        outputs: What holds for every float output.
        named: Bounds of single outputs; what they leave open is as for all.
        metric: A built-in one or `module:function`; None measures none.
        max_metric_drop: By how much it may be worse than the float model's, in its own unit.
        metric_bound: The worst value that is good enough.
        max_latency: Times the float model's.
        max_size: Of the files: times the float model's, or a size.
        max_memory: To load and run once: times the float model's, or a size.
        max_bits: Stored bits per weight.
        max_input_shift: How far means of inputs may be from those of calibration, in standard
            deviations.
        baseline: Manifest, or result of an earlier gate, of the last release.
        tolerances: By how much it may be worse than that.
    """

    data: str | None = None
    labels: str = "label"
    outputs: OutputBounds = field(default_factory=OutputBounds)
    named: tuple[tuple[str, OutputBounds], ...] = ()
    metric: str | None = None
    max_metric_drop: float | None = None
    metric_bound: float | None = None
    max_latency: float | None = None
    max_size: Limit | None = None
    max_memory: Limit | None = None
    max_bits: float | None = None
    max_input_shift: float | None = None
    baseline: str | None = None
    tolerances: Tolerances = field(default_factory=Tolerances)

    def of_output(self, name: str) -> OutputBounds:
        """Return the bounds of an output."""
        own = dict(self.named).get(name, OutputBounds())
        given = {key: value for key, value in _values(own).items() if value is not None}
        return replace(self.outputs, **given)

    @property
    def asks_for_something(self) -> bool:
        """Whether there is a bound at all."""
        outputs = (self.outputs, *dict(self.named).values())
        near = [value for bounds in outputs for value in _values(bounds).values()]
        return any(value is not None for value in (*near, *(getattr(self, n) for n in _BOUNDS)))

    def merged(self, other: "Gate | None") -> "Gate":
        """Return this gate with what another one asks for on top of it."""
        if other is None:
            return self
        return gate_from_table(_merged(self.to_table(), other.to_table()), "gate")

    def to_table(self) -> dict[str, Any]:
        """Return it as the table of a recipe: what differs from the defaults."""
        default = Gate()
        plain = {name: getattr(self, name) for name in _PLAIN}
        table = {k: v for k, v in plain.items() if v != getattr(default, k)} | _given(self.outputs)
        if self.named:
            table["output"] = {name: _given(bounds) for name, bounds in self.named}
        changed = {
            key: value
            for key, value in _values(self.tolerances).items()
            if value != getattr(default.tolerances, key)
        }
        return table | ({"tolerance": changed} if changed else {})


_NUMBERS: Final = ("max_metric_drop", "metric_bound", "max_latency", "max_bits", "max_input_shift")
_LIMITS: Final = ("max_size", "max_memory")
_TEXTS: Final = ("data", "labels", "metric", "baseline")
_PLAIN: Final = (*_TEXTS, *_NUMBERS, *_LIMITS)
_BOUNDS: Final = (*_NUMBERS, *_LIMITS, "baseline")
_OUTPUT_KEYS: Final = tuple(f.name for f in fields(OutputBounds))
_TOLERANCE_KEYS: Final = tuple(f.name for f in fields(Tolerances))
_KEYS: Final = (*_PLAIN, *_OUTPUT_KEYS, "output", "tolerance")
_SHARES: Final = ("min_agreement",)
_NOT_NEGATIVE: Final = ("max_metric_drop", "max_kl", "max_input_shift", *_TOLERANCE_KEYS)
_POSITIVE: Final = ("max_latency", "max_bits", *_LIMITS)


def gate_from_table(table: Mapping[str, Any], where: str) -> Gate:
    """Read the `[gate]` table of a recipe.

    Args:
        table: The table.
        where: What messages call it.

    Raises:
        UsageError: A key is unknown, or a value is of no use; says which.
    """
    _check_keys(table, _KEYS, where)
    given: dict[str, Any] = {k: _text(table[k], f"{where}: {k}") for k in _TEXTS if k in table}
    given |= {k: _number(k, table[k], f"{where}: {k}") for k in _NUMBERS if k in table}
    given |= {k: _limit(k, table[k], f"{where}: {k}") for k in _LIMITS if k in table}
    named = _tables(table.get("output", {}), f"{where}: output")
    tolerance = table.get("tolerance", {})
    gate = Gate(
        **given,
        outputs=_outputs({k: v for k, v in table.items() if k in _OUTPUT_KEYS}, where),
        named=tuple((n, _outputs(t, f"{where}: output.{n}")) for n, t in named.items()),
        tolerances=Tolerances(**_numbers(tolerance, _TOLERANCE_KEYS, f"{where}: tolerance")),
    )
    if gate.metric is None and (gate.max_metric_drop, gate.metric_bound) != (None, None):
        message = "a bound on a metric, and no metric"
        raise UsageError(message, where=where, hint="for example metric=top1")
    if gate.metric is not None and not (
        gate.baseline or gate.max_metric_drop is not None or gate.metric_bound is not None
    ):
        message = "a metric without a bound on it"
        hint = "max-metric-drop, metric-bound or baseline says what it may be"
        raise UsageError(message, where=where, hint=hint)
    return gate


def gate_from_texts(texts: Iterable[str]) -> Gate | None:
    """Read what `--gate` options say; None where there are none.

    Args:
        texts: `key=value`, hyphens or underscores in keys, `output.NAME.key=value`,
            `tolerance.key=value`; or a TOML file with a `[gate]` table. What comes later counts.

    Raises:
        UsageError: One of them is of no use.
    """
    table: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if equals:
            _put(table, key.strip(), value.strip())
        else:
            table = _merged(table, _read_gate_file(Path(text)).to_table())
    return gate_from_table(table, "--gate") if table else None


def _read_gate_file(path: Path) -> Gate:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        hint = "--gate takes KEY=VALUE, or a TOML file with a [gate] table"
        raise UsageError(message, where=f"--gate {path}", hint=hint) from error
    except ValueError as error:
        message = f"is no TOML: {error}"
        raise UsageError(message, where=f"--gate {path}") from error
    if not isinstance(content.get("gate"), dict):
        message = "holds no [gate] table"
        raise UsageError(message, where=f"--gate {path}")
    return gate_from_table(content["gate"], str(path))


def _put(table: dict[str, Any], key: str, text: str) -> None:
    head, dot, rest = key.partition(".")
    head = head.replace("-", "_")
    if not dot:
        table[head] = _plain(text) if head not in _TEXTS else text
        return
    name, inner, last = rest.rpartition(".")
    last = last.replace("-", "_")
    if head == "output" and inner:
        table.setdefault("output", {}).setdefault(name, {})[last] = _plain(text)
    else:
        table.setdefault(head, {})[rest.replace("-", "_")] = _plain(text)


def _plain(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _merged(below: Any, above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        inner = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if inner else value
    return result


def _values(record: OutputBounds | Tolerances) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in fields(record)}


def _given(bounds: OutputBounds) -> dict[str, float]:
    return {key: value for key, value in _values(bounds).items() if value is not None}


def _outputs(table: Any, where: str) -> OutputBounds:
    return OutputBounds(**_numbers(table, _OUTPUT_KEYS, where))


def _numbers(table: Any, keys: tuple[str, ...], where: str) -> dict[str, float]:
    if not isinstance(table, Mapping):
        message = f"is {table!r}, and a table is expected"
        raise UsageError(message, where=where, hint=f"with any of {', '.join(keys)}")
    _check_keys(table, keys, where)
    return {key: _number(key, value, f"{where}: {key}") for key, value in table.items()}


def _tables(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        message = f"is {value!r}, and a table for each output is expected"
        raise UsageError(message, where=where, hint="[gate.output.NAME], output.NAME.min-sqnr=20")
    return value


def _number(key: str, value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        message = f"is {value!r}, and a number is expected"
        raise UsageError(message, where=where)
    lowest = {**dict.fromkeys(_NOT_NEGATIVE, 0.0), **dict.fromkeys(_SHARES, 0.0)}.get(key)
    too_low = lowest is not None and value < lowest
    if too_low or (key in _POSITIVE and value <= 0) or (key in _SHARES and value > 1):
        bound = "from 0 to 1" if key in _SHARES else "0 or more" if too_low else "above 0"
        message = f"is {value:g}, and a number {bound} is expected"
        raise UsageError(message, where=where)
    return float(value)


def _limit(key: str, value: Any, where: str) -> Limit:
    if isinstance(value, str):
        try:
            parse_size(value)
        except UsageError as error:
            hint = "2MiB, or 0.5 for half of the float model's"
            raise UsageError(error.message, where=where, hint=hint) from error
        return value
    return _number(key, value, where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        message = f"is {value!r}, and a text is expected"
        raise UsageError(message, where=where)
    return value


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            message = f"unknown key {key!r}"
            raise UsageError(message, where=where, hint=f"known: {', '.join(known)}")
