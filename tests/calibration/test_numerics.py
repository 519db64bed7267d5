"""The hook that names the first pass whose outputs are wrong."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.numerics import VerifyNumerics
from qcompiler.errors import ParityError, TargetError
from qcompiler.ir.shapes import infer_shapes
from qcompiler.ir.weights import WeightStore
from qcompiler.rewriting.base import Numerics, Pass, PassContext, PassResult, Rewrite
from qcompiler.rewriting.manager import PassHook, PassManager
from qcompiler.rewriting.snapshots import KeepReproducer
from qcompiler.rewriting.stages import Stage
from tests.support.graphs import build


class Scale(Pass):
    """Multiplies the weight of a model by a factor."""

    name = "scale"
    consumes = Stage.IMPORTED
    produces = Stage.IMPORTED
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def run(self, model: ir.Model, context: PassContext) -> PassResult:
        weight = model.graph.initializers["w"]
        assert weight.const_value is not None
        values = weight.const_value.numpy()
        with np.errstate(over="ignore"):
            weight.const_value = ir.tensor((values * self._factor).astype(values.dtype), name="w")
        return PassResult((Rewrite("scale", "m"),))


class Reassociate(Scale):
    name = "reassociate"
    numerics = Numerics.REORDERED
    tolerance = 1e-4


class Round(Scale):
    name = "round"
    numerics = Numerics.LOSSY


def _model(dtype: str = "float", weight: float = 1.0) -> ir.Model:
    kind = {"float": np.float32, "float16": np.float16}[dtype]
    text = f"g ({dtype}[4] x) => ({dtype}[4] y) {{ [m] y = Mul(x, w) }}"
    return build(text, {"w": np.full(4, weight, kind)})


def _feeds(dtype: Any = np.float32) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    return {"x": np.array([1, 2, -4, 1], dtype)}


def _run(model: ir.Model, rewrite: Pass, hook: VerifyNumerics, folder: Path) -> None:
    PassManager(PassContext(WeightStore(folder)), [hook]).run(model, [rewrite])


def test_the_loss_of_a_lossy_pass_is_recorded(tmp_path: Path) -> None:
    hook = VerifyNumerics(_feeds())
    _run(_model(), Round(0.5), hook, tmp_path)
    (record,) = hook.records
    assert (record.name, record.output, record.max_abs, record.max_rel) == ("round", "y", 2.0, 0.5)


def test_an_exact_pass_must_not_change_a_bit(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="pass scale: changes output y by"):
        _run(_model(), Scale(1 + 2.0**-22), VerifyNumerics(_feeds()), tmp_path)


@pytest.mark.parametrize(("change", "allowed"), [(5e-5, True), (5e-4, False)])
def test_a_reordered_pass_has_its_tolerance(change: float, allowed: bool, tmp_path: Path) -> None:
    hook = VerifyNumerics(_feeds())
    if allowed:
        _run(_model(), Reassociate(1 + change), hook, tmp_path)
        assert hook.records[0].max_rel == pytest.approx(change, rel=1e-2)
        return
    with pytest.raises(ParityError, match=r"declares itself reordered \(at most 1\.0e-04\)"):
        _run(_model(), Reassociate(1 + change), hook, tmp_path)


@pytest.mark.parametrize(("epsilons", "allowed"), [(2, True), (8, False)])
def test_half_precision_is_allowed_a_few_roundings(
    epsilons: int, allowed: bool, tmp_path: Path
) -> None:
    rewrite, hook = Reassociate(1 + epsilons * 2.0**-10), VerifyNumerics(_feeds(np.float16))
    if allowed:
        _run(_model("float16"), rewrite, hook, tmp_path)
        assert hook.records[0].max_rel > 1e-4
        return
    with pytest.raises(ParityError, match=r"at most 3\.9e-03"):
        _run(_model("float16"), rewrite, hook, tmp_path)


def test_half_precision_weights_alone_count(tmp_path: Path) -> None:
    text = "g (float[4] x) => (float[4] y) { c = Cast<to=1>(w) y = Mul(x, c) }"
    model = build(text, {"w": np.ones(4, np.float16)})
    _run(model, Reassociate(1 + 2.0**-9), VerifyNumerics(_feeds()), tmp_path)


def test_an_exact_pass_stays_exact_in_half_precision(tmp_path: Path) -> None:
    hook = VerifyNumerics(_feeds(np.float16))
    with pytest.raises(ParityError):
        _run(_model("float16"), Scale(1 + 2.0**-10), hook, tmp_path)


@pytest.mark.parametrize("rewrite", [Scale(1e6), Reassociate(1e6), Round(1e6)])
def test_outputs_stay_finite_whatever_a_pass_declares(rewrite: Pass, tmp_path: Path) -> None:
    hook = VerifyNumerics(_feeds(np.float16))
    with pytest.raises(ParityError, match="makes 4 values of output y NaN or infinite") as caught:
        _run(_model("float16"), rewrite, hook, tmp_path)
    assert caught.value.where == f"pass {rewrite.name}"


def test_a_model_with_nan_outputs_can_be_verified(tmp_path: Path) -> None:
    hook = VerifyNumerics({"x": np.array([1, np.nan, np.inf, 1], np.float32)})
    _run(_model(), Scale(1.0), hook, tmp_path)
    assert hook.records[0].max_abs == 0.0


def test_a_wrong_pass_leaves_a_reproducer(tmp_path: Path) -> None:
    # The reproducer comes first in a compilation: it must outlive its own `after_pass`.
    hooks: list[PassHook] = [KeepReproducer(tmp_path), VerifyNumerics(_feeds())]
    manager = PassManager(PassContext(WeightStore(tmp_path)), hooks)
    with pytest.raises(ParityError, match="has the model before the pass"):
        manager.run(_model(), [Reassociate(1 + 2.0**-30), Scale(3.0)])
    before = ir.load(tmp_path / "qcompiler-reproducer-scale" / "model.onnx")
    tensor = before.graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy().tolist() == [1.0] * 4


def test_custom_op_libraries_reach_the_session(tmp_path: Path) -> None:
    hook = VerifyNumerics(_feeds(), [tmp_path / "none.so"])
    with pytest.raises(TargetError, match=r"none\.so"):
        _run(_model(), Round(1.0), hook, tmp_path)


def test_16_bit_floats_are_rounded_as_they_are_stored() -> None:
    """ONNX Runtime itself has no bfloat16, and would not overflow in float16 here."""
    for kind, large in (("bfloat16", 1e38), ("float16", 60000.0)):
        text = f"g (float[2] x) => (float[2] y) {{ a = Cast<to = {_code(kind)}>(x) b = Add(a, a)"
        model = build(f"{text} y = Cast<to = 1>(b) }}")
        infer_shapes(model)
        hook = VerifyNumerics({"x": np.array([large, 1.001], np.float32)})
        hook.before_pass(model, Scale(1.0))
        found = hook._run(model)["y"]
        assert np.isinf(found[0]) == (kind == "float16")
        assert found[1] == pytest.approx(2.0, abs=0.01)
        assert found[1] != np.float32(2.002)


def _code(kind: str) -> int:
    return int(ir.DataType[kind.upper()])
