"""Error along a graph is that of values, at the op where it comes in and after it."""

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.calls import Feeds, Samples
from qcompiler.calibration.error_growth import GrowthOptions, NodeError, error_growth
from qcompiler.ir.provenance import COMPUTE_TYPE
from qcompiler.progress import SilentProgress
from tests.support.graphs import Array, build, random_array

EYE = np.eye(4, dtype=np.float32)


def chain(second: Array, type_name: str = "float") -> ir.Model:
    """Three products in a row; the weight of the second is given."""
    one = EYE.astype(second.dtype)
    return build(
        f"g ({type_name}[N, 4] x) => ({type_name}[N, 4] y)"
        " { [a] p = MatMul(x, u) [b] q = MatMul(p, v) [c] y = MatMul(q, w) }",
        {"u": one, "v": second, "w": one},
        opset=21,
    )


def samples(calls: int = 6, dtype: object = np.float32) -> Samples:
    def read() -> Iterator[Feeds]:
        for index in range(calls):
            yield {"x": random_array(3 + index, 4, seed=index).astype(dtype)}  # type: ignore[call-overload]

    return Samples("test", False, calls, read)


def test_error_appears_where_it_comes_in_and_stays() -> None:
    found = error_growth(chain(EYE), chain(EYE * 1.1), GrowthOptions(samples()))
    assert list(found) == ["a", "b", "c"]
    assert found["a"] == NodeError(None, np.inf)
    assert found["b"].data_db == np.inf
    for name in ("b", "c"):
        assert found[name].output_db == pytest.approx(20.0, abs=0.01)
    assert found["c"].data_db == pytest.approx(20.0, abs=0.01)


def test_rounds_that_fit_little_memory_give_the_same() -> None:
    class Counting(SilentProgress):
        total = 0.0

        def task(self, description: str, total: float):  # type: ignore[no-untyped-def]
            self.total = total
            return super().task(description, total)

    wide, narrow = Counting(), Counting()
    whole = error_growth(chain(EYE), chain(EYE * 1.1), GrowthOptions(samples(2)), wide)
    # One value of the largest call takes 4 x 4 elements of 4 bytes in both models.
    small = GrowthOptions(samples(2), memory_budget=2 * 4 * 4 * 8)
    assert error_growth(chain(EYE), chain(EYE * 1.1), small, narrow) == whole
    assert (wide.total, narrow.total) == (2, 6)
    assert error_growth(chain(EYE), chain(EYE), GrowthOptions(samples(), memory_budget=64)) == {}
    many = Counting()
    error_growth(chain(EYE), chain(EYE), GrowthOptions(samples(9)), many)
    assert many.total == 4


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.float16, "float16"), (ml_dtypes.bfloat16, "bfloat16")]
)
def test_models_of_16_bit_floats(dtype: type, name: str) -> None:
    reference, other = chain(EYE.astype(dtype), name), chain((EYE * 2).astype(dtype), name)
    found = error_growth(reference, other, GrowthOptions(samples(dtype=dtype)))
    assert found["b"].output_db == pytest.approx(0.0, abs=0.01)


def test_what_a_cast_model_stores_is_rounded() -> None:
    model = chain(EYE)
    cast = chain(EYE.astype(np.float16), "float16")
    cast.metadata_props[COMPUTE_TYPE] = "float16"
    for node in cast.graph:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    found = error_growth(model, cast, GrowthOptions(samples()))
    assert found["a"].output_db is not None
    assert 60 < found["a"].output_db < 90


def test_values_that_are_gone_are_left_out() -> None:
    other = build(
        "g (float[N, 4] x) => (float[N, 4] y) { [a] p = MatMul(x, u) [c] y = MatMul(p, w) }",
        {"u": EYE, "w": EYE},
    )
    found = error_growth(chain(EYE), other, GrowthOptions(samples()))
    assert found == {
        "a": NodeError(None, np.inf),
        "b": NodeError(np.inf, None),
        "c": NodeError(None, np.inf),
    }


def test_infinities_that_both_hold_are_no_error() -> None:
    text = (
        "g (float[N, 4] x) => (float[N, 4] y)"
        " { [a] p = MatMul(x, u) m = Add(p, mask) [b] y = MatMul(m, w) }"
    )
    mask = np.array([0, 0, 0, -np.inf], np.float32)
    first, second = (
        build(text, {"u": EYE * factor, "mask": mask, "w": np.abs(EYE) + 1}) for factor in (1, 1.1)
    )
    found = error_growth(first, second, GrowthOptions(samples()))
    assert found["b"].data_db == pytest.approx(19.0, abs=2.0)
