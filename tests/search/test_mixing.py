"""Schemes of whole weights: the least damage within a size and a time."""

from pathlib import Path

import pytest

from qcompiler.ir.weights import WeightStore
from qcompiler.options import CompileOptions
from qcompiler.plan import make_plan
from qcompiler.quant.scheme import QScheme
from qcompiler.rewriting.base import PassContext
from qcompiler.search.assigned import Assigned, assign
from qcompiler.search.mixing import Choice, Mix, choices_of
from tests.support.graphs import build
from tests.support.islands import TEXT, weights

SCHEMES = ("w8a16", "w4a16:b32", "w2a16:b32")


@pytest.fixture
def uniform(tmp_path: Path) -> list[Assigned]:
    """Return the classifier with each of the schemes."""
    context = PassContext(WeightStore(tmp_path))
    model = build(TEXT, weights(0), opset=21)
    found = []
    for scheme in SCHEMES:
        options = CompileOptions(scheme=scheme)
        found.append(assign(scheme, options, make_plan(options), model, context))
    return found


def _mix(uniform: list[Assigned], more_ms: dict[int, float] | None = None) -> Mix:
    """Return a mix whose damage halves with each bit, the first weight's a thousandfold.

    Args:
        uniform: The model with each scheme.
        more_ms: Milliseconds beyond float's time, by bits.
    """
    choices = {
        name: [
            Choice(
                scheme,
                bits,
                0.0
                if scheme is None
                else (1000.0 if name == "w0" else 1.0) / 2**scheme.weight_bits,
                0.0 if scheme is None else (more_ms or {}).get(scheme.weight_bits, 0.0),
            )
            for scheme, bits, _ in entries
        ]
        for name, entries in choices_of(uniform, stored=False).items()
    }
    return Mix(uniform[-1], choices, stored=False)


def _bits(scheme: QScheme | None) -> int:
    return 32 if scheme is None else scheme.weight_bits


def test_what_hurts_most_gets_most_bits(uniform: list[Assigned]) -> None:
    mix = _mix(uniform)
    room = int(1.2 * uniform[1].bits(stored=False))
    chosen = mix.choose(room, None)
    assert chosen is not None
    assert _bits(chosen["w0"]) > _bits(chosen["w1"])
    spent = sum(
        next(c.bits for c in mix.choices[name] if c.scheme == scheme)
        for name, scheme in chosen.items()
    )
    assert spent + mix.fixed_bits <= room


def test_the_smallest_is_the_smallest_of_each(uniform: list[Assigned]) -> None:
    mix = _mix(uniform)
    assert mix.least_bits == uniform[-1].bits(stored=False)
    chosen = mix.choose(mix.least_bits, None)
    assert chosen == uniform[-1].schemes()
    assert mix.choose(mix.least_bits - 1, None) is None


def test_time_is_kept_at_the_least_damage(uniform: list[Assigned]) -> None:
    mix = _mix(uniform, {8: 5.0, 4: 1.0, 2: -1.0})
    room = uniform[0].bits(stored=False)
    free = mix.choose(room, None)
    assert free is not None
    assert sum(mix.more_ms(free).values()) > 1.0
    bound = mix.choose(room, 1.0)
    assert bound is not None
    assert sum(mix.more_ms(bound).values()) <= 1.0
    # 4 bits on the weight that hurts a thousand times as much.
    assert _bits(bound["w0"]) >= 4
    assert mix.choose(room, -2.0) == uniform[-1].schemes()
    assert mix.choose(room, -2.1) is None


def test_a_choice_is_a_recipe(uniform: list[Assigned]) -> None:
    mix = _mix(uniform)
    chosen = {**uniform[-1].schemes(), "w0": uniform[1].schemes()["w0"], "w1": None}
    recipe = mix.recipe(chosen)
    assert str(recipe.default) == "w2a16:b32"
    found = {rule.selector.name: rule.scheme for rule in recipe.rules}
    assert found == {"/up/": uniform[1].schemes()["w0"], "/middle/": None}
    assert all("search" in (rule.reason or "") for rule in recipe.rules)


def test_what_stays_in_float_counts(tmp_path: Path) -> None:
    options = CompileOptions(scheme="w4a16:b32", exclude=("down",))
    context = PassContext(WeightStore(tmp_path))
    found = assign(
        "w4a16:b32", options, make_plan(options), build(TEXT, weights(0), opset=21), context
    )
    assert found.planned_elements < found.elements
    assert found.bits(stored=False, planned=False) == 32 * 640
    (entry,) = choices_of([found], stored=False)["w2"]
    assert entry == (None, 32 * 640, 0.0)
