"""Comparing values inside a graph."""

import numpy as np
import pytest

from qcompiler.execution.differences import Comparisons, Meaning, meaning_of
from qcompiler.execution.sessions import open_session
from qcompiler.execution.taps import Measure, Tap, tap_model
from tests.support.graphs import Array, build, random_array

P = random_array(5, 7, seed=1)
Q = P + random_array(5, 7, seed=2) / 10


def softmax(values: Array) -> Array:
    powers = np.exp(values.astype(np.float64))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def compare(text: str, meaning: Meaning | None, **feeds: Array) -> tuple[Array, Array]:
    model = build(text)
    values = {value.name: value for node in model.graph for value in node.outputs}
    found = Comparisons(model).add(values["p"], values["q"], meaning)
    taps = [Tap(found.error, Measure.VALUES)]
    if found.divergence is not None:
        taps.append(Tap(found.divergence, Measure.VALUES))
    tapped = tap_model(model, taps)
    with open_session(tapped.model, optimize=False, threads=1) as session:
        results = session.run(feeds)
    return results[tapped.outputs[taps[0]]], results[tapped.outputs[taps[-1]]]


@pytest.mark.parametrize(
    ("op", "meaning"), [("Softmax", Meaning.PROBABILITIES), ("Identity", Meaning.LOGITS)]
)
def test_error_and_divergence_are_numpys(op: str, meaning: Meaning) -> None:
    text = f"""g (float[5, 7] a, float[5, 7] b) => (float[5, 7] p, float[5, 7] q) {{
        p = {op}(a) q = {op}(b) }}"""
    error, divergence = compare(text, meaning, a=P, b=Q)
    right, found = softmax(P), softmax(Q)
    if meaning is Meaning.PROBABILITIES:
        np.testing.assert_allclose(error, found - right, atol=1e-6)
    else:
        np.testing.assert_array_equal(error, Q - P)
    expected = (right * np.log(right / found)).sum()
    assert divergence == pytest.approx(expected, rel=1e-3)


def test_probabilities_of_zero_have_a_finite_divergence() -> None:
    text = (
        "g (float[2] a, float[2] b) => (float[2] p, float[2] q) { p = Identity(a) q = Identity(b) }"
    )
    one, other = np.array([1, 0], np.float32), np.array([0, 1], np.float32)
    _, divergence = compare(text, Meaning.PROBABILITIES, a=one, b=other)
    assert divergence == pytest.approx(np.log(1e12), rel=1e-4)


def test_other_float_types_are_compared_in_float32() -> None:
    text = """g (float16[3] a, float16[3] b) => (float16[3] p, float16[3] q) {
        p = Identity(a) q = Identity(b) }"""
    a, b = (np.array(v, np.float16) for v in ([1, 2, 3], [1, 2, 3.5]))
    error, _ = compare(text, None, a=a, b=b)
    assert error.dtype == np.float32
    assert error.tolist() == [0, 0, 0.5]


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("g (float[2, 3] x) => (float[2, 3] y) { y = Softmax(x) }", Meaning.PROBABILITIES),
        ("g (float[2, 3] x) => (float[2, 3] y) { y = Softmax<axis=1>(x) }", Meaning.PROBABILITIES),
        ("g (float[2, 3] x) => (float[2, 3] y) { y = Softmax<axis=0>(x) }", None),
        ("g (float[2, 3] x) => (float[2, 3] y) { y = LogSoftmax(x) }", Meaning.LOGITS),
        ("g (float[2, 3] x) => (float[2, 3] the_Logits) { the_Logits = Relu(x) }", Meaning.LOGITS),
        ("g (float[2, 3] x) => (float[2, 3] y) { y = Relu(x) }", None),
    ],
)
def test_what_an_output_means(text: str, meaning: Meaning | None) -> None:
    assert meaning_of(build(text).graph.outputs[0]) == meaning
