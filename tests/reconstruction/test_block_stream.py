"""Blocks run one after the other, each from what those before it gave."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompiler.errors import UsageError
from qcompiler.ir.blocks import find_blocks
from qcompiler.reconstruction.block_stream import BlockStream, open_device
from qcompiler.reconstruction.value_cache import ValueCache
from tests.support.graphs import build, random_array
from tests.support.parity import run_model
from tests.support.reconstruction import samples_of

_TEXT = """g (float[N, 8] x, float[8] shift) => (float[N, 4] y) {
    a = MatMul(x, w0)
    b = Relu(a)
    n = Shape(b)
    c = MatMul(b, w1)
    s = Mul(shift, two)
    d = Add(c, s)
    e = MatMul(d, w2)
    r = Reshape(e, n)
    y = MatMul(r, w3)
}"""


def _model() -> ir.Model:
    weights: dict[str, Any] = {f"w{at}": random_array(8, 8, seed=at) for at in range(3)}
    weights |= {"w3": random_array(8, 4), "two": np.float32(2)}
    return build(_TEXT, weights)


def _calls() -> list[dict[str, Any]]:
    return [
        {"x": random_array(3 + seed, 8, seed=seed), "shift": random_array(8, seed=9)}
        for seed in range(3)
    ]


def _stream(model: ir.Model, calls: list[dict[str, Any]], cache: ValueCache) -> BlockStream:
    stream = BlockStream(model, find_blocks(model), cache, torch.device("cpu"))
    stream.read(samples_of(calls))
    return stream


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_values_are_those_of_the_whole_model(limit: int, tmp_path: Path) -> None:
    model, calls = _model(), _calls()
    blocks = find_blocks(model)
    assert len(blocks) == 4
    with ValueCache(tmp_path, limit) as cache:
        stream = _stream(model, calls, cache)
        ends = [block.output for block in blocks[:-1]]
        for index, name in enumerate(("x", "c", "e", "y")):
            found = [values[name].numpy() for values in stream.values([name])]
            for feeds, values in zip(calls, found, strict=True):
                expected = feeds["x"] if name == "x" else _tapped(model, name, feeds)
                np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
            if index < 3:
                assert stream.block.output == ends[index]
                stream.advance()


def test_a_value_of_a_later_block_can_be_asked_for(tmp_path: Path) -> None:
    model, calls = _model(), _calls()
    with ValueCache(tmp_path, 0) as cache:
        stream = _stream(model, calls, cache)
        for feeds, values in zip(calls, stream.values(["y", "shift"]), strict=True):
            np.testing.assert_allclose(
                values["y"], run_model(model, feeds)["y"], rtol=1e-4, atol=1e-5
            )
            np.testing.assert_array_equal(values["shift"], feeds["shift"])


def test_blocks_see_what_was_put_in_place_of_a_value(tmp_path: Path) -> None:
    model, calls = _model(), _calls()
    with ValueCache(tmp_path, 0) as cache:
        stream = _stream(model, calls, cache)
        stream.stand_ins["a"] = torch.ones(2, 8)
        stream.advance()
        stream.stand_ins.clear()
        for values in stream.values(["c"]):
            weight = model.graph.initializers["w1"].const_value
            assert weight is not None
            expected = np.ones((2, 8), np.float32) @ weight.numpy()
            np.testing.assert_allclose(values["c"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "kept"), [(np.array([[1, 0, 1]]), [[True, False, True]]), (np.ones((1, 3)), None)]
)
def test_which_tokens_count(mask: Any, kept: list[list[bool]] | None, tmp_path: Path) -> None:
    model = _model()
    calls = [feeds | {"shift": np.zeros(8, np.float32), "mask": mask} for feeds in _calls()]
    with ValueCache(tmp_path, 0) as cache:
        stream = _stream(model, calls, cache)
        stream.advance()
        found = stream.tokens(1, "mask")
        assert kept == (None if found is None else found.tolist())
        assert stream.tokens(1, "shift") is None
        assert stream.tokens(1, "missing") is None
        assert stream.tokens(1, None) is None


@pytest.mark.parametrize("lengths", [(3, 3, 3, 3, 3), (3, 3, 4, 4, 3)])
def test_joined_calls_give_what_each_gives_alone(lengths: tuple[int, ...], tmp_path: Path) -> None:
    model = _model()
    calls = [
        {"x": random_array(length, 8, seed=at), "shift": random_array(1, 8, seed=at + 9)}
        for at, length in enumerate(lengths)
    ]
    found = []
    for joined in (1, 2, 16):
        with ValueCache(tmp_path, 0) as cache:
            blocks, device = find_blocks(model), torch.device("cpu")
            stream = BlockStream(model, blocks, cache, device, joined=joined)
            stream.read(samples_of(calls))
            stream.advance()
            stream.advance()
            found.append([values["e"] for values in stream.values(["e"])])
    for alone, two, many in zip(*found, strict=True):
        torch.testing.assert_close(two, alone)
        torch.testing.assert_close(many, alone)


@pytest.mark.parametrize("name", ["cuda:77", "abacus"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: PyTorch cannot use this device"):
        open_device(name)


def _tapped(model: ir.Model, name: str, feeds: dict[str, Any]) -> Any:
    copy = model.clone()
    value = next(v for node in copy.graph for v in node.outputs if v.name == name)
    copy.graph.outputs[:] = [value]
    return run_model(copy, feeds)[name]
