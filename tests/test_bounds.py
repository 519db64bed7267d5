import pytest

from qcompiler.bounds import Gate, OutputBounds, Tolerances, gate_from_table, gate_from_texts
from qcompiler.errors import UsageError
from qcompiler.quant.recipe import Recipe

TABLE = {
    "data": "test.npz",
    "min_sqnr": 20,
    "metric": "top1",
    "max_metric_drop": 0.01,
    "max_size": "2MiB",
    "max_memory": 0.5,
    "output": {"logits.0": {"min_sqnr": 30.0, "max_kl": 0.1}},
    "tolerance": {"latency": 0.2},
}


def test_table_and_options_say_the_same() -> None:
    texts = [
        *("data=test.npz", "min-sqnr=20", "metric=top1", "max_metric_drop=0.01"),
        *("max-size=2MiB", "max-memory=0.5", "output.logits.0.min-sqnr=30"),
        *("output.logits.0.max-kl=0.1", "tolerance.latency=0.2"),
    ]
    gate = gate_from_texts(texts)
    assert gate == gate_from_table(TABLE, "x")
    assert gate is not None
    assert gate.max_size == "2MiB"
    assert gate.of_output("logits.0") == OutputBounds(min_sqnr=30.0, max_kl=0.1)
    assert gate.of_output("other") == OutputBounds(min_sqnr=20.0)
    assert gate.tolerances == Tolerances(latency=0.2)
    assert gate_from_table(gate.to_table(), "x") == gate


def test_a_recipe_keeps_its_gate() -> None:
    text = Recipe(gate=gate_from_table(TABLE, "x")).to_toml()
    assert Recipe.from_text(text, "r").gate == gate_from_table(TABLE, "x")
    assert Recipe.from_text("version = 1\n", "r").gate is None
    with pytest.raises(UsageError, match="unknown key 'min_snr'"):
        Recipe.from_text("version = 1\n[gate]\nmin_snr = 3\n", "r")


def test_what_comes_later_counts(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "gate.toml"
    path.write_text("[gate]\nmin_sqnr = 20\nmax_bits = 8\n[gate.output.y]\nmin_sqnr = 25\n")
    gate = gate_from_texts([str(path), "min-sqnr=30", "output.y.max-kl=1"])
    assert gate is not None
    assert (gate.outputs.min_sqnr, gate.max_bits) == (30.0, 8.0)
    assert gate.of_output("y") == OutputBounds(min_sqnr=25.0, max_kl=1.0)
    assert gate.merged(Gate(max_bits=4.0)).max_bits == 4.0
    assert gate.merged(None) is gate


def test_nothing_asked_for() -> None:
    assert gate_from_texts([]) is None
    assert not Gate(data="x").asks_for_something
    assert Gate(named=(("y", OutputBounds(max_kl=0.1)),)).asks_for_something
    assert Gate(baseline="m.json").asks_for_something


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("min-snr=3", "unknown key 'min_snr'"),
        ("min-sqnr=much", "a number is expected"),
        ("min-sqnr=nan", "a number is expected"),
        ("min-agreement=98", "from 0 to 1"),
        ("max-latency=0", "above 0"),
        ("max-kl=-1", "0 or more"),
        ("max-size=big", "is no size"),
        ("output=3", "a table for each output"),
        ("output.y.speed=3", "unknown key 'speed'"),
        ("tolerance.sqnr=-1", "0 or more"),
        ("metric=top1", "a metric without a bound"),
        ("max-metric-drop=0.1", "no metric"),
        ("missing.toml", "cannot be read"),
    ],
)
def test_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        gate_from_texts([text])
    assert reason in str(caught.value)
