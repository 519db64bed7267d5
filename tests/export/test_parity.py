from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from qcompiler.errors import ParityError, TargetError, UsageError
from qcompiler.export.from_torch import DYNAMIC_AXES
from qcompiler.export.parity import TOLERANCES, check_parity
from qcompiler.ir.save import save_model
from qcompiler.ir.widened import widened
from qcompiler.progress import SilentProgress
from tests.support.graphs import build, random_array

WEIGHT = random_array(8, 4)
LINEAR = "m (float[rows, 8] x) => (float[rows, 4] y) { y = MatMul(x, w) }"


class Linear(nn.Module):
    def __init__(self, weight: np.ndarray = WEIGHT) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(weight))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(x.shape))
        return x @ self.weight


def model(weight: np.ndarray = WEIGHT) -> ir.Model:
    made = build(LINEAR, {"w": weight})
    made.graph.metadata_props[DYNAMIC_AXES] = '{"rows": [2, 5]}'
    return made


CALL = (torch.randn(3, 8),)


def test_equal_programs_agree() -> None:
    module = Linear()
    (difference,) = check_parity(module, model(), [CALL], random_calls=4)
    assert difference.name == "y"
    assert difference.max_rel < 1e-6
    assert difference.sqnr_db > 120
    lengths = [shape[0] for shape in module.seen]
    assert lengths[0] == 3
    assert set(lengths[1:]) <= {2, 3, 4, 5}
    assert len(set(lengths)) > 1


def test_lengths_can_stay() -> None:
    module = Linear()
    check_parity(module, model(), [CALL], vary_lengths=False)
    assert {shape[0] for shape in module.seen} == {3}


def test_a_broken_graph_is_found() -> None:
    broken = WEIGHT.copy()
    broken[3, 2] += 0.01
    with pytest.raises(ParityError, match=r"differs from PyTorch by .* allowed: 0.0001") as caught:
        check_parity(Linear(), model(broken), [CALL])
    assert caught.value.where == "y"
    check_parity(Linear(), model(broken), [CALL], tolerance=0.1)


def test_an_error_beside_the_given_call_is_found() -> None:
    """The third input is zero in the example, so only random calls see its weight."""
    call = torch.randn(3, 8)
    broken = WEIGHT.copy()
    call[:, 3] = 0
    broken[3] = 0
    check_parity(Linear(), model(broken), [(call,)], random_calls=0)
    with pytest.raises(ParityError):
        check_parity(Linear(), model(broken), [(call,)])


def test_worst_call_counts() -> None:
    broken = WEIGHT * np.float32(1 + 1e-5)
    (small,) = check_parity(Linear(), model(broken), [CALL], random_calls=0)
    (large,) = check_parity(Linear(), model(broken), [CALL, (CALL[0] * 100,)], random_calls=0)
    assert large.max_abs > 50 * small.max_abs


def test_another_number_of_outputs() -> None:
    class Two(Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            return x, x

    with pytest.raises(ParityError, match="1 inputs and 2 outputs"):
        check_parity(Two(), model(), [CALL])


def test_a_graph_that_cannot_run() -> None:
    unknown = build(
        '<ir_version: 10, opset_import: ["" : 21, "x" : 1]>'
        " m (float[2] x) => (float[2] y) { y = x.None (x) }"
    )
    with pytest.raises(TargetError, match="cannot load the exported model"):
        check_parity(nn.Identity(), unknown, [(torch.ones(2),)])


def test_no_calls() -> None:
    with pytest.raises(UsageError, match="no inputs to compare"):
        check_parity(Linear(), model(), [])


def test_integers_stay_in_the_range_of_the_example() -> None:
    table = random_array(4, 8)
    graph = build(
        "m (int64[rows] ids, bool[rows] keep) => (float[rows, 8] y) {"
        " rows = Gather(table, ids)  k = Cast<to = 1>(keep)  c = Unsqueeze(k, one)"
        " y = Mul(rows, c) }",
        {"table": table, "one": np.array([1])},
    )
    graph.graph.metadata_props[DYNAMIC_AXES] = '{"rows": [1, null]}'

    class Lookup(nn.Module):
        def forward(self, ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            assert int(ids.min()) >= 0
            return torch.from_numpy(table)[ids] * keep[:, None]

    call = {"ids": torch.tensor([0, 3]), "keep": torch.tensor([True, False])}
    check_parity(Lookup(), graph, [call], random_calls=5)


def test_an_axis_in_terms_of_others() -> None:
    graph = build(
        "m (float[a] x, float[b] y, float[a_b] z) => (float[a_b] w) {"
        " c = Concat<axis = 0>(x, y)  w = Add(c, z) }"
    )
    graph.graph.inputs[2].shape = ir.Shape(["a + b"])
    graph.graph.metadata_props[DYNAMIC_AXES] = '{"a": [1, 9], "b": [1, 9]}'
    seen = []

    class Joined(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            seen.append((len(x), len(y)))
            return torch.cat([x, y]) + z

    check_parity(Joined(), graph, [(torch.ones(2), torch.ones(3), torch.ones(5))], random_calls=4)
    assert len(set(seen)) > 1


def test_lengths_that_the_module_does_not_take() -> None:
    class Even(Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) != 3:
                raise ValueError(len(x))
            return super().forward(x)

    check_parity(Even(), model(), [CALL], random_calls=4)


def test_bfloat16_is_compared_in_float32(tmp_path: Path) -> None:
    graph = build(
        "m (float x) => (bfloat16[2, 4] y) { a = Cast<to = 16>(x)  b = Expand(a, shape)"
        " y = MatMul(b, w) }",
        {
            "w": ir.tensor(WEIGHT).numpy().astype(ir.DataType.BFLOAT16.numpy()),
            "shape": np.array([2, 8]),
        },
    )
    weight = torch.from_numpy(WEIGHT).bfloat16()

    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.bfloat16().expand(2, 8) @ weight

    (difference,) = check_parity(Half(), graph, [(torch.tensor(0.3),)])
    assert 1e-4 < difference.max_rel < TOLERANCES[ir.DataType.BFLOAT16]
    wide = widened(graph)
    assert graph.graph.outputs[0].dtype == ir.DataType.BFLOAT16
    assert wide.graph.outputs[0].dtype == ir.DataType.FLOAT
    assert wide.graph.node(0).attributes["to"].as_int() == ir.DataType.FLOAT
    save_model(wide, tmp_path / "wide.onnx", progress=SilentProgress())
    assert widened(wide) is wide
