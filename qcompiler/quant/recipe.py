"""Which scheme each op gets: ordered rules, first match wins, written in TOML.

```toml
version = 1
default = "w8a16"             # for ops that no rule matches; "float" when absent
weight_range = "weighted-mse" # or "mse", "min-max"; the run decides when absent
correct_bias = false          # whether mean errors are taken out of biases; true when absent
equalize = "auto"             # or another EqualizationMethod, or "none"; needs samples
compute_type = "float16"      # or "bfloat16": what floats are cast to; the model's own when absent

[islands]                     # parts of weights that keep more bits; absent keeps none
saliency = "tacq"             # by what they are chosen
kind = "node"                 # weight, column, block or node
average_bits = 3.1            # or budget_bytes, or fraction

[[rule]]
name = "*/lm_head*"           # glob on node names, or "/regex/"; the whole name, case matters
op_type = "MatMul"            # all selectors that are given must hold
block = "0-3,7"               # block indices, from 0
between = ["x", "y"]          # nodes on a path from value x to value y
scheme = "w4a16:b128"         # or "float"
reason = "lm_head is sensitive"   # optional, reaches the report
origin = "sensitivity"        # optional: who made the rule; "rule 1" when absent

[[float32]]                   # with a compute_type: ops that keep float32; selectors as above
op_type = "Softmax"
[gate]                        # what the result must keep: see `qcompiler.bounds`
min_sqnr = 20
```

A rule has a scheme and at least one selector. Names, op types, blocks and values are looked up in
the model by whoever applies the recipe; this module knows no graph.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from qcompiler.bounds import Gate, gate_from_table
from qcompiler.errors import UsageError
from qcompiler.quant.compute_type import ComputeType
from qcompiler.quant.equalization import EqualizationMethod
from qcompiler.quant.islands import IslandBudget, IslandKind, IslandRequest, Saliency
from qcompiler.quant.ranges import RangeMethod
from qcompiler.quant.scheme import FLOAT, QScheme, parse_scheme
from qcompiler.quant.selector import (
    Selector,
    check_pattern,
    format_blocks,
    nearest,
    parse_blocks,
)

__all__ = ["Recipe", "Rule", "Selector", "nearest"]

_VERSION = 1
_NONE = "none"
_Choice = TypeVar("_Choice", bound=StrEnum)
_RECIPE_KEYS = (
    *("version", "default", "weight_range", "equalize", "correct_bias", "compute_type"),
    *("islands", "rule", "float32", "gate"),
)
_ISLAND_KEYS = ("saliency", "kind", "average_bits", "budget_bytes", "fraction", "unit")
_SELECTOR_KEYS = ("name", "op_type", "block", "between")
_RULE_KEYS = (*_SELECTOR_KEYS, "scheme", "reason", "origin")


@dataclass(frozen=True, slots=True)
class Rule:
    """What the nodes of a selector get.

    Attributes:
        selector: Which nodes.
        scheme: Their scheme; None keeps them in float.
        reason: Why, in the author's words, or None.
        origin: Where the rule stands, such as "rule 2" or "--exclude".
    """

    selector: Selector
    scheme: QScheme | None
    reason: str | None = None
    origin: str = "rule"

    @property
    def label(self) -> str:
        """How reports and messages name the rule, such as "rule 2: name=*/lm_head*"."""
        return f"{self.origin}: {self.selector}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Ordered rules; the first that matches a node decides.

    Attributes:
        rules: In order of precedence.
        default: Scheme of nodes no rule matches; None keeps them in float. Tables that are looked
            up get 8 bits where it has 2 or 3.
        weight_range: How weight ranges are chosen, or None to leave it to the run.
        equalize: How channels are equalized where there are samples; None leaves them.
        correct_bias: Whether mean errors are taken out of biases where there are samples.
        compute_type: The 16-bit type that floats are cast to; None leaves those of the model.
        float32: Ops that stay in float32 all the same.
        gate: What the result must keep, or None.
        islands: Which parts of weights keep more bits, None for none.
    """

    rules: tuple[Rule, ...] = ()
    default: QScheme | None = None
    weight_range: RangeMethod | None = None
    equalize: EqualizationMethod | None = EqualizationMethod.AUTO
    correct_bias: bool = True
    compute_type: ComputeType | None = None
    float32: tuple[Selector, ...] = ()
    gate: Gate | None = None
    islands: IslandRequest | None = None

    @classmethod
    def uniform(cls, scheme: QScheme | None, excludes: Sequence[str] = ()) -> "Recipe":
        """Return a recipe that gives `scheme` to all nodes but those named by `excludes`.

        Raises:
            UsageError: A pattern is empty or not a regular expression.
        """
        return cls(default=scheme).excluding(excludes)

    def excluding(self, patterns: Sequence[str]) -> "Recipe":
        """Return this recipe with rules before all others that keep `patterns` in float.

        Raises:
            UsageError: A pattern is empty or not a regular expression.
        """
        for pattern in patterns:
            check_pattern(pattern, f"--exclude {pattern}")
        leading = (
            Rule(Selector(name=pattern), None, "excluded by option", "--exclude")
            for pattern in patterns
        )
        return replace(self, rules=(*leading, *self.rules))

    def computing_in(
        self, compute_type: ComputeType | None, float32: Sequence[str] = ()
    ) -> "Recipe":
        """Return this recipe with a type to compute in, and patterns that stay in float32.

        Args:
            compute_type: The type; None leaves the recipe's own.
            float32: Patterns of node names, beside the recipe's selectors.

        Raises:
            UsageError: A pattern is empty or not a regular expression, or there is no type that
                it could be an exception from.
        """
        for pattern in float32:
            check_pattern(pattern, f"--float32 {pattern}")
        selectors = (*(Selector(name=pattern) for pattern in float32), *self.float32)
        found = replace(self, compute_type=compute_type or self.compute_type, float32=selectors)
        return _with_type(found, "--float32")

    @classmethod
    def from_toml(cls, path: Path) -> "Recipe":
        """Read a recipe file.

        Raises:
            UsageError: The file cannot be read, or holds anything but a recipe.
        """
        try:
            text = path.read_bytes().decode("utf-8")
        except OSError as error:
            reason = error.strerror or str(error)
            message = f"cannot read the recipe: {reason}"
            raise UsageError(message, where=str(path), hint="check --recipe") from error
        except UnicodeDecodeError as error:
            message = f"the recipe is not UTF-8 text: byte {error.start} cannot be decoded"
            raise UsageError(
                message,
                where=str(path),
                hint="save the file as UTF-8",
            ) from error
        return cls.from_text(text, str(path))

    @classmethod
    def from_text(cls, text: str, where: str) -> "Recipe":
        """Read a recipe from TOML text.

        Args:
            text: The TOML.
            where: What messages call the text, such as a file name.

        Raises:
            UsageError: The text is not a recipe; says which rule and key, and what is expected.
        """
        try:
            # With a last line feed, faults at the end are reported with their line too.
            table = tomllib.loads(f"{text}\n")
        except tomllib.TOMLDecodeError as error:
            message = f"the recipe is not TOML: {error}"
            raise UsageError(message, where=where) from error
        _check_keys(table, _RECIPE_KEYS, where)
        _check_version(table, where)
        rules, islands = _tables(table, "rule", where), _tables(table, "float32", where)
        default = _string(table, "default", where)
        found = cls(
            tuple(_rule(rule, number, where) for number, rule in enumerate(rules, start=1)),
            None if default is None else _scheme(default, f"{where}: default"),
            _choice(table, "weight_range", RangeMethod, where),
            _equalize(table, where),
            _flag(table, "correct_bias", where),
            _choice(table, "compute_type", ComputeType, where),
            tuple(
                _island(island, f"{where}: float32 {number}")
                for number, island in enumerate(islands, start=1)
            ),
            _gate(table, where),
            _island_request(table, where),
        )
        return _with_type(found, where)

    def to_toml(self) -> str:
        """Return the recipe as TOML text that reads back as the same rules, in a fixed form."""
        lines = [f"version = {_VERSION}", f"default = {_quote(_scheme_text(self.default))}"]
        if self.weight_range is not None:
            lines.append(f"weight_range = {_quote(self.weight_range.value)}")
        if self.equalize is not EqualizationMethod.AUTO:
            lines.append(f"equalize = {_quote(self.equalize.value if self.equalize else _NONE)}")
        if not self.correct_bias:
            lines.append("correct_bias = false")
        if self.compute_type is not None:
            lines.append(f"compute_type = {_quote(self.compute_type.value)}")
        if self.islands is not None:
            lines += ["", "[islands]", *_island_lines(self.islands)]
        for number, rule in enumerate(self.rules, start=1):
            lines += ["", "[[rule]]", *_rule_lines(rule)]
            if rule.origin != _numbered(number):
                lines.append(f"origin = {_quote(rule.origin)}")
        for selector in self.float32:
            lines += ["", "[[float32]]", *_selector_lines(selector)]
        if self.gate is not None:
            lines += _table_lines("gate", self.gate.to_table())
        return "\n".join(lines) + "\n"


def _rule(table: Mapping[str, Any], number: int, where: str) -> Rule:
    place = f"{where}: rule {number}"
    _check_keys(table, _RULE_KEYS, place)
    scheme = _string(table, "scheme", place)
    if scheme is None:
        message = "the rule has no scheme"
        raise UsageError(message, where=place, hint='add scheme = "float" or a scheme')
    selector = _selector(table, place)
    if selector == Selector():
        message = "the rule selects nothing"
        raise UsageError(
            message,
            where=place,
            hint="give it name, op_type, block or between; for all other nodes set default",
        )
    reason = _string(table, "reason", place)
    origin = _string(table, "origin", place) or _numbered(number)
    return Rule(selector, _scheme(scheme, place), reason, origin)


def _numbered(number: int) -> str:
    return f"rule {number}"


def _island(table: Mapping[str, Any], place: str) -> Selector:
    _check_keys(table, _SELECTOR_KEYS, place)
    selector = _selector(table, place)
    if selector == Selector():
        message = "it selects nothing"
        hint = "give it name, op_type, block or between; without compute_type all is float32"
        raise UsageError(message, where=place, hint=hint)
    return selector


def _selector(table: Mapping[str, Any], place: str) -> Selector:
    name, block = _string(table, "name", place), _string(table, "block", place)
    if name is not None:
        check_pattern(name, place)
    return Selector(
        name,
        _string(table, "op_type", place),
        None if block is None else parse_blocks(block, place),
        _between(table, place),
    )


def _with_type(recipe: Recipe, where: str) -> Recipe:
    """Return a recipe in which ops are kept in float32 only where the others are not.

    Raises:
        UsageError: There is no type to compute in.
    """
    if recipe.float32 and recipe.compute_type is None:
        message = "ops are to stay in float32, and no type is given that the others get"
        raise UsageError(
            message, where=where, hint='give --compute-type or compute_type = "float16"'
        )
    return recipe


def _tables(table: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    found = table.get(key, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        message = f"'{key}' is not a list of tables"
        raise UsageError(message, where=where, hint=f"write [[{key}]]")
    return found


def _check_version(table: Mapping[str, Any], where: str) -> None:
    version = table.get("version")
    # bool is an int: `version = true` must not pass for 1.
    if type(version) is not int or version != _VERSION:
        found = "missing" if version is None else f"{version!r}"
        message = f"the recipe's version is {found}, this compiler reads {_VERSION}"
        raise UsageError(
            message,
            where=where,
            hint=f"write version = {_VERSION}",
        )


def _check_keys(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            near = nearest(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            message = f"unknown key {key!r}"
            raise UsageError(message, where=where, hint=hint)


def _string(table: Mapping[str, Any], key: str, where: str) -> str | None:
    value = table.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        message = f"{key!r} is {value!r}, not a string with text in it"
        raise UsageError(
            message,
            where=where,
            hint=f'write {key} = "..."',
        )
    return value


def _scheme(text: str, where: str) -> QScheme | None:
    try:
        return parse_scheme(text)
    except UsageError as error:
        raise UsageError(error.message, where=where, hint=error.hint) from error


def _choice(table: Mapping[str, Any], key: str, kind: type[_Choice], where: str) -> _Choice | None:
    """Return a member of an enumeration by its value, None where the key is absent."""
    text = _string(table, key, where)
    if text is None:
        return None
    try:
        return kind(text)
    except ValueError as error:
        known = " or ".join(repr(member.value) for member in kind)
        message = f"'{key}' is {text!r}, not {known}"
        raise UsageError(message, where=where) from error


def _flag(table: Mapping[str, Any], key: str, where: str) -> bool:
    value = table.get(key, True)
    if not isinstance(value, bool):
        message = f"'{key}' is {value!r}, not true or false"
        raise UsageError(message, where=where)
    return value


def _equalize(table: Mapping[str, Any], where: str) -> EqualizationMethod | None:
    if table.get("equalize") == _NONE:
        return None
    found = _choice(table, "equalize", EqualizationMethod, where)
    return EqualizationMethod.AUTO if found is None else found


def _island_request(table: Mapping[str, Any], where: str) -> IslandRequest | None:
    found = table.get("islands")
    if found is None:
        return None
    place = f"{where}: islands"
    if not isinstance(found, Mapping):
        message = f"'islands' is {found!r}, not a table"
        raise UsageError(message, where=where, hint="write [islands] on a line of its own")
    _check_keys(found, _ISLAND_KEYS, place)
    numbers = {key: found[key] for key in _ISLAND_KEYS[2:] if key in found}
    for key, number in numbers.items():
        whole = key in ("budget_bytes", "unit")
        if isinstance(number, bool) or not isinstance(number, int if whole else (int, float)):
            message = f"'{key}' is {number!r}, not a {'whole ' if whole else ''}number"
            raise UsageError(message, where=place)
    try:
        budget = IslandBudget(
            numbers.get("average_bits"), numbers.get("budget_bytes"), numbers.get("fraction")
        )
    except UsageError as error:
        hint = "give average_bits, budget_bytes or fraction"
        raise UsageError(error.message, where=place, hint=hint) from error
    return IslandRequest(
        _choice(found, "saliency", Saliency, place) or Saliency.TACQ,
        budget,
        _choice(found, "kind", IslandKind, place) or budget.usual_kind,
        numbers.get("unit", 1),
    )


def _island_lines(islands: IslandRequest) -> list[str]:
    budget = islands.budget
    numbers = {
        "average_bits": budget.average_bits,
        "budget_bytes": budget.nbytes,
        "fraction": budget.fraction,
        "unit": islands.unit if islands.unit > 1 else None,
    }
    lines = [f"saliency = {_quote(islands.saliency.value)}", f"kind = {_quote(islands.kind.value)}"]
    return lines + [f"{key} = {value}" for key, value in numbers.items() if value is not None]


def _gate(table: Mapping[str, Any], where: str) -> Gate | None:
    found = table.get("gate")
    if found is None:
        return None
    if not isinstance(found, dict):
        message = "'gate' is not a table"
        raise UsageError(message, where=where, hint="write [gate]")
    return gate_from_table(found, f"{where}: gate")


def _table_lines(name: str, table: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table of texts, numbers and tables of these."""
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    lines = ["", f"[{name}]"] if len(inner) < len(table) or not table else []
    for key, value in table.items():
        if key not in inner:
            lines.append(f"{key} = {_quote(value) if isinstance(value, str) else repr(value)}")
    for key, value in inner.items():
        lines += _table_lines(f"{name}.{_quote(key)}", value)
    return lines


def _between(table: Mapping[str, Any], where: str) -> tuple[str, str] | None:
    value = table.get("between")
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(isinstance(item, str) and item for item in value)
    ):
        message = f"'between' is {value!r}, not two value names"
        raise UsageError(
            message,
            where=where,
            hint='write between = ["first value", "last value"]',
        )
    return value[0], value[1]


def _rule_lines(rule: Rule) -> list[str]:
    lines = [*_selector_lines(rule.selector), f"scheme = {_quote(_scheme_text(rule.scheme))}"]
    if rule.reason is not None:
        lines.append(f"reason = {_quote(rule.reason)}")
    return lines


def _selector_lines(selector: Selector) -> list[str]:
    lines = []
    if selector.name is not None:
        lines.append(f"name = {_quote(selector.name)}")
    if selector.op_type is not None:
        lines.append(f"op_type = {_quote(selector.op_type)}")
    if selector.blocks is not None:
        lines.append(f"block = {_quote(format_blocks(selector.blocks))}")
    if selector.between is not None:
        lines.append(f"between = [{', '.join(_quote(value) for value in selector.between)}]")
    return lines


def _scheme_text(scheme: QScheme | None) -> str:
    return FLOAT if scheme is None else str(scheme)


def _quote(text: str) -> str:
    """Write a TOML basic string: quotes, backslashes and control characters escaped."""
    escaped = re.sub(r'["\\\x00-\x1f\x7f]', lambda match: f"\\u{ord(match[0]):04x}", text)
    return f'"{escaped}"'
