"""Which passes a plan leads to, in which order."""

from dataclasses import replace

import pytest

from qcompiler.errors import UsageError
from qcompiler.options import CompileOptions
from qcompiler.passes.assign.assign_islands import AssignIslands
from qcompiler.passes.assign.drop_slow_regions import DropSlowRegions
from qcompiler.passes.equalize.equalize_channels import EqualizeChannels
from qcompiler.passes.quantize.calibrate import Calibrate
from qcompiler.passes.reconstruct.round_weights import RoundWeights
from qcompiler.pipeline import PASSES, pass_named, pipeline
from qcompiler.plan import make_plan, with_data
from qcompiler.quant.compute_type import ComputeType
from qcompiler.quant.islands import IslandBudget, IslandKind, IslandRequest, Saliency
from qcompiler.rewriting.stages import Stage
from qcompiler.rewriting.user_pass import RunUserPass
from qcompiler.targets.registry import TARGETS
from tests.support.graphs import build


def names(options: CompileOptions) -> list[str]:
    return [rewrite.name for rewrite in pipeline(make_plan(options))]


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_lowers_by_its_own_list(target: str) -> None:
    found = names(CompileOptions(target=target))
    after = found[found.index("insert-qdq") + 1 :]
    assert after == [*TARGETS[target].intake, *TARGETS[target].lowering, "verify-target"]


def test_the_order_is_the_target_s() -> None:
    plan = make_plan(CompileOptions())
    chosen = ("decode-at-load", "decompose-gemm")
    passes = pipeline(replace(plan, target=replace(plan.target, lowering=chosen)))
    assert tuple(rewrite.name for rewrite in passes[-3:]) == (*chosen, "verify-target")


def test_stages_follow_each_other() -> None:
    reached = Stage.IMPORTED
    for rewrite in pipeline(make_plan(CompileOptions())):
        assert rewrite.consumes.rank <= reached.rank, rewrite.name
        reached = max(reached, rewrite.produces, key=lambda stage: stage.rank)
    assert reached is Stage.LOWERED


def test_a_user_s_model_becomes_canonical_again() -> None:
    found = names(CompileOptions(user_passes=("tests.support.user_passes:keep",)))
    at = found.index(RunUserPass.name)
    assert found[at - 1] == "verify-canonical"
    assert found[at + 1 : found.index("assign-schemes")] == [
        *("lift-constants", "fold-constants", "deduplicate"),
        *("eliminate-dead", "assign-names", "verify-canonical"),
    ]


@pytest.mark.parametrize(
    ("scheme", "opset"),
    [("float", 21), ("w8a16", 21), ("w3a16:b128", 21), ("w8a8-dynamic", 21), ("w2a16:b64", 25)],
)
def test_opset_of_a_scheme(scheme: str, opset: int) -> None:
    assert make_plan(CompileOptions(scheme=scheme)).opset == opset


def test_bfloat16_takes_the_opset_in_which_convolutions_have_it() -> None:
    assert make_plan(CompileOptions(scheme="bfloat16")).opset == 22
    assert make_plan(CompileOptions(scheme="float16")).opset == 21


def passes_with_samples(never_slower: bool | None) -> list[str]:
    options = CompileOptions(calibration="random", never_slower=never_slower)
    model = build("g (float[2, 2] x) => (float[2, 2] y) { y = MatMul(x, x) }")
    plan = with_data(make_plan(options), model, lambda: "")
    return [rewrite.name for rewrite in pipeline(plan)]


def test_regions_are_measured_where_there_are_samples() -> None:
    found = passes_with_samples(None)
    assert found == passes_with_samples(True)
    at = found.index("drop-slow-regions")
    assert found.index("calibrate") < at < found.index("split-outlier-channels")
    assert "drop-slow-regions" not in passes_with_samples(False)
    assert "drop-slow-regions" not in names(CompileOptions())
    with pytest.raises(UsageError, match="no integer regions to measure"):
        make_plan(CompileOptions(never_slower=True))


def test_a_bound_is_judged_on_what_regions_were_left() -> None:
    options = CompileOptions(calibration="random", min_output_sqnr=20.0)
    model = build("g (float[2, 2] x) => (float[2, 2] y) { y = MatMul(x, x) }")
    found = [rewrite.name for rewrite in pipeline(with_data(make_plan(options), model, lambda: ""))]
    at = found.index("assign-fallbacks")
    assert found.index("drop-slow-regions") < at < found.index("split-outlier-channels")


def test_what_is_held_out_chooses_nothing() -> None:
    """Neither ranges, nor codes, nor islands see the calls that are going to judge."""
    model = build("g (float[2, 2] x) => (float[2, 2] y) { y = MatMul(x, x) }")
    islands = IslandRequest(Saliency.TACQ, IslandBudget(average_bits=3.0), IslandKind.COLUMN)
    options = CompileOptions(calibration="random:8", scheme="w8a8", islands=islands)
    found = {}
    for held_out in (False, True):
        plan = make_plan(replace(options, hold_out=held_out))
        plan = with_data(plan, model, lambda: "")
        assert plan.data is not None
        assert plan.data.task is not None
        assert len(plan.data.samples) == 8
        calls = [
            len(rewrite.options.samples)
            for rewrite in pipeline(plan)
            if isinstance(rewrite, Calibrate | EqualizeChannels | AssignIslands | RoundWeights)
        ]
        found[held_out] = {*calls, plan.data.task.count // 2}
    assert found == {False: {8}, True: {6}}


def test_regions_are_measured_as_the_rest_of_the_pipeline_makes_them() -> None:
    options = CompileOptions(calibration="random")
    model = build("g (float[2, 2] x) => (float[2, 2] y) { y = MatMul(x, x) }")
    passes = pipeline(with_data(make_plan(options), model, lambda: ""))
    at = next(i for i, rewrite in enumerate(passes) if isinstance(rewrite, DropSlowRegions))
    bench = passes[at]
    assert isinstance(bench, DropSlowRegions)
    rest = [rewrite.name for rewrite in passes[at + 1 :] if rewrite.name != "correct-bias"]
    assert [rewrite.name for rewrite in bench.options.remaining] == rest[:-1]
    assert rest[-1] == "verify-target"


def test_every_pass_is_in_the_table() -> None:
    assert set(names(CompileOptions())) <= set(PASSES)


def test_types_are_cast_between_quantizing_and_lowering() -> None:
    found = names(CompileOptions(scheme="w8a16", compute_type=ComputeType.FLOAT16))
    at = found.index("cast-types")
    assert found[at - 1] == "insert-qdq"
    assert tuple(found[at + 1 : -1]) == TARGETS["onnxruntime"].lowering
    assert "cast-types" not in names(CompileOptions())


def test_nothing_is_equalized_for_float_weights() -> None:
    options = CompileOptions(scheme="float16", calibration="random")
    model = build("g (float[2, 2] x) => (float[2, 2] y) { y = MatMul(x, x) }")
    plan = with_data(make_plan(options), model, lambda: "")
    assert plan.data is not None
    found = [rewrite.name for rewrite in pipeline(plan)]
    assert not {"equalize-channels", "correct-bias"} & set(found)
    assert "cast-types" in found


def test_islands_come_before_rounding_and_imply_it() -> None:
    request = IslandRequest(Saliency.TACQ, IslandBudget(fraction=0.01), IslandKind.COLUMN)
    options = CompileOptions(scheme="w4a16", calibration="random", islands=request)
    model = build("g (float[2, 2] x) => (float[2, 2] y) { y = MatMul(x, x) }")
    plan = with_data(make_plan(options), model, lambda: "")
    found = [rewrite.name for rewrite in pipeline(plan)]
    assert found.index("assign-islands") < found.index("round-weights")
    assert "insert-qdq" not in found
    assert plan.data is not None
    assert plan.data.task is not None
    assert "outputs of the float model" in plan.data.task.origin
    assert "assign-islands" not in names(CompileOptions())
    with pytest.raises(UsageError, match="islands need samples"):
        make_plan(CompileOptions(islands=request))
    with pytest.raises(UsageError, match="assign-islands needs a budget and samples"):
        pass_named("assign-islands", make_plan(CompileOptions()))
