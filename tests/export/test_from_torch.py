import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from qcompiler.errors import ModelError, UsageError
from qcompiler.export.from_torch import DYNAMIC_AXES, from_torch
from qcompiler.export.parity import check_parity
from qcompiler.ir.load import load_model
from qcompiler.ir.quantizable import find_sites
from qcompiler.ir.save import save_model
from qcompiler.progress import SilentProgress
from tests.support.graphs import node_named, op_types
from tests.support.torch_modules import Case, Mlp, case

ALL = ("mlp", "mlp of sequences", "cnn", "attention", "lm", "gru")


@cache
def exported(name: str) -> tuple[Case, ir.Model]:
    """Each module is exported once: that takes seconds."""
    made = case(name)
    return made, from_torch(made.module, made.example, dynamic_shapes=made.shapes)


@pytest.mark.parametrize("name", ALL)
def test_graph_computes_what_the_module_computes(name: str) -> None:
    made, model = exported(name)
    (difference,) = check_parity(made.module, model, [made.example], tolerance=2e-6)
    assert difference.sqnr_db > 120


@pytest.mark.parametrize("name", ALL)
def test_every_layer_with_a_weight_is_a_site_of_its_name(name: str) -> None:
    made, model = exported(name)
    sites, _ = find_sites(model)
    assert tuple(site.node.name for site in sites) == made.sites


@pytest.mark.parametrize("name", ALL)
def test_graph_is_clean(name: str, tmp_path: Path) -> None:
    _, model = exported(name)
    assert not model.functions
    assert model.opset_imports == {"": 21}
    nodes = list(model.graph.all_nodes())
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names)
    assert not {"Identity", "Constant", "Dropout"} & set(op_types(model))
    for node in nodes:
        used = [bool(o.uses()) or o.is_graph_output() for o in node.outputs if o.name]
        assert all(used), node.name
        assert set(node.metadata_props) <= {
            "pkg.torch.onnx.name_scopes",
            "pkg.torch.onnx.class_hierarchy",
        }
    assert all(value.uses() for value in model.graph.initializers.values())
    save_model(model, tmp_path / "model.onnx", progress=SilentProgress())
    data = (tmp_path / "model.onnx").read_bytes()
    for text in (b"site-packages", str(Path.cwd()).encode(), b".py", b"stack_trace"):
        assert text not in data
    assert [n.name for n in load_model(tmp_path / "model.onnx").graph] == [
        n.name for n in model.graph
    ]


@pytest.mark.parametrize("name", ["mlp", "mlp of sequences", "cnn", "attention", "lm"])
def test_initializers_have_the_names_of_parameters(name: str) -> None:
    made, model = exported(name)
    for parameter, tensor in made.module.named_parameters():
        found = model.graph.initializers[parameter].const_value
        assert found is not None
        values = tensor.detach().numpy()
        same = np.array_equal(found.numpy(), values) or np.array_equal(found.numpy().T, values)
        assert same, parameter


def test_weights_are_the_modules_own_memory() -> None:
    made, model = exported("mlp of sequences")
    assert isinstance(made.module, Mlp)
    weight = model.graph.initializers["up_proj.weight"].const_value
    assert weight is not None
    assert weight.shape == (32, 64)
    assert np.shares_memory(weight.numpy(), made.module.up_proj.weight.detach().numpy())


def test_names_of_further_nodes_and_values() -> None:
    _, model = exported("attention")
    assert node_named(model, "mlp.up_proj").op_type == "MatMul"
    assert node_named(model, "mlp.up_proj/Add").op_type == "Add"
    assert node_named(model, "mlp.act").op_type == "Gelu"
    assert node_named(model, "norm1").op_type == "LayerNormalization"
    assert node_named(model, "self_attn/Softmax").op_type == "Softmax"
    assert node_named(model, "mlp.up_proj").outputs[0].name == "mlp.up_proj"


def test_tied_weight_is_stored_once(tmp_path: Path) -> None:
    made, model = exported("lm")
    assert "embed_tokens.weight" in model.graph.initializers
    assert "lm_head.weight" not in model.graph.initializers
    saved = save_model(
        model, tmp_path / "model.onnx", progress=SilentProgress(), external_data=True
    )
    assert saved.data_path is not None
    parameters = sum(p.nbytes for p in made.module.parameters())
    assert saved.data_path.stat().st_size < parameters + 64 * 32 * 4


def test_equal_weights_of_two_modules_stay_two() -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    module[1].load_state_dict(module[0].state_dict())
    model = from_torch(module, (torch.randn(2, 16),))
    assert set(model.graph.initializers) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_view_of_a_weight_is_the_same_memory() -> None:
    first, second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
    second.weight = nn.Parameter(first.weight.detach())
    model = from_torch(nn.Sequential(first, second), (torch.randn(2, 16),))
    assert set(model.graph.initializers) == {"0.weight"}


def test_a_weight_in_a_buffer_is_not_copied_either() -> None:
    class Frozen(nn.Module):
        weight: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randn(48, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight)

    module = Frozen()
    model = from_torch(module, (torch.randn(2, 3, 32),))
    (found,) = (value.const_value for value in model.graph.initializers.values())
    assert found is not None
    assert found.name == "weight"
    assert np.shares_memory(found.numpy(), module.weight.numpy())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.part(self.part(x))
        return y


def test_a_module_called_twice() -> None:
    module = Twice()
    model = from_torch(module, (torch.randn(2, 3, 16),))
    sites, _ = find_sites(model)
    assert [site.node.name for site in sites] == ["part", "part/MatMul"]
    assert list(model.graph.initializers) == ["part.bias", "part.weight"]
    check_parity(module, model, [(torch.randn(2, 3, 16),)], tolerance=2e-6)


def test_multihead_attention_has_the_name_of_the_part_whose_weight_it_is() -> None:
    module = nn.MultiheadAttention(32, 4, batch_first=True)
    example = tuple(torch.randn(2, 5, 32) for _ in range(3))
    model = from_torch(module, example)
    sites, _ = find_sites(model)
    assert sites[-1].node.name == "out_proj"
    check_parity(module, model, [example], tolerance=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    made = case("mlp of sequences")
    module = made.module.to(dtype)
    example = tuple(tensor.to(dtype) for tensor in made.example)
    model = from_torch(module, example, dynamic_shapes=made.shapes)
    assert len(find_sites(model)[0]) == len(made.sites)
    assert str(model.graph.outputs[0].dtype) == str(dtype).removeprefix("torch.").upper()
    (difference,) = check_parity(module, model, [example])
    assert difference.sqnr_db > (60 if dtype == torch.float16 else 40)


def test_names_axes_and_their_ranges() -> None:
    made = case("mlp of sequences")
    batch, length = torch.export.Dim("rows", max=8), torch.export.Dim("tokens", min=2)
    model = from_torch(
        made.module,
        made.example,
        dynamic_shapes=({0: batch, 1: length},),
        input_names=["hidden"],
        output_names=["mixed"],
    )
    (value,), (output,) = model.graph.inputs, model.graph.outputs
    assert (value.name, output.name) == ("hidden", "mixed")
    assert str(value.shape) == str(output.shape) == "[rows,tokens,32]"
    ranges = json.loads(model.graph.metadata_props[DYNAMIC_AXES])
    assert ranges["rows"][1] == 8
    assert ranges["tokens"][1] is None


def test_keyword_arguments_and_training_mode() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, *, gain: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": self.linear(self.drop(x)) * gain}

    module = Scaled()
    module.linear.eval()
    call: dict[str, Any] = {"x": torch.randn(2, 8), "gain": torch.ones(())}
    model = from_torch(module, (call["x"],), {"gain": call["gain"]})
    assert module.training
    assert module.drop.training
    assert not module.linear.training
    assert "Dropout" not in op_types(model)
    check_parity(module, model, [call], tolerance=2e-6)


class Counting(nn.Module):
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x * self.count


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum().item() > 0 else -x


def test_refuses_a_module_with_a_state() -> None:
    with pytest.raises(ModelError, match="writes to count, and a graph has no state"):
        from_torch(Counting(), (torch.randn(2),))


def test_refuses_what_torch_cannot_export() -> None:
    with pytest.raises(ModelError, match="PyTorch cannot export it") as caught:
        from_torch(Branching(), (torch.randn(2),))
    assert caught.value.where == "Branching"
    assert "\n" not in caught.value.message


def test_refuses_weights_without_values() -> None:
    with torch.device("meta"):
        module = nn.Linear(4, 4)
    with pytest.raises(ModelError, match="has no values"):
        from_torch(module, (torch.empty(2, 4, device="meta"),))


@pytest.mark.parametrize("opset", [17, 25])
def test_refuses_an_opset_that_torch_does_not_write(opset: int) -> None:
    with pytest.raises(UsageError, match=f"does not write opset {opset}"):
        from_torch(Mlp(), (torch.randn(2, 32),), opset=opset)


@pytest.mark.parametrize(
    ("names", "reason"), [(["a", "b"], "2 names for 1 inputs"), ([""], "not be empty")]
)
def test_refuses_names_that_do_not_fit(names: list[str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        from_torch(nn.ReLU(), (torch.randn(2),), input_names=names)


@pytest.mark.parametrize("opset", [18, 24])
def test_oldest_and_newest_opset(opset: int) -> None:
    made = case("mlp of sequences")
    model = from_torch(made.module, made.example, dynamic_shapes=made.shapes, opset=opset)
    assert model.opset_imports[""] == opset
    assert len(find_sites(model)[0]) == len(made.sites)
    check_parity(made.module, model, [made.example], tolerance=2e-6)


def test_same_module_same_bytes(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    files = []
    for name in ("a.onnx", "b.onnx"):
        model = from_torch(copy.deepcopy(module), (torch.ones(2, 8),))
        save_model(model, tmp_path / name, progress=SilentProgress())
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]
