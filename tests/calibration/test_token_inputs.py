"""Filling the inputs of language models from token ids."""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qcompiler.calibration.signature import Signature, read_signature
from qcompiler.calibration.token_inputs import TokenLayout, fill_inputs, read_layout
from qcompiler.errors import UsageError
from tests.support.graphs import build, serialized

ROWS = [[7, 8, 9], [5]]


def _signature(inputs: str, weights: dict[str, Any] | None = None) -> Signature:
    graph = f"g ({inputs}) => (float y) {{ y = Constant<value_float=1.0>() }}"
    return read_signature(build(graph, weights))


def _with_odd_names(*inputs: tuple[str, str, list[Any]]) -> Signature:
    """Build a signature whose names hold dots, which the text form does not allow."""
    text = ", ".join(f"{dtype} i{index}" for index, (_, dtype, _) in enumerate(inputs))
    model = build(f"g ({text}) => (float y) {{ y = Constant<value_float=1.0>() }}")
    for value, (name, _, shape) in zip(model.graph.inputs, inputs, strict=True):
        value.name, value.shape = name, ir.Shape(shape)
    return read_signature(model)


def test_an_encoder_gets_ids_mask_and_types() -> None:
    signature = _signature(
        "int64[b, s] input_ids, int64[b, s] attention_mask, int64[b, s] token_type_ids"
    )
    assert read_layout(signature) == TokenLayout("b", "s")
    feeds = fill_inputs(ROWS, signature, 99)
    assert {name: array.tolist() for name, array in feeds.items()} == {
        "input_ids": [[7, 8, 9], [5, 99, 99]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "token_type_ids": [[0, 0, 0], [0, 0, 0]],
    }


def test_inputs_have_the_types_that_the_model_takes() -> None:
    signature = _signature("int32[b, s] input_ids, float[b, s] attention_mask")
    feeds = fill_inputs([[1, 2]], signature, 0)
    assert feeds["input_ids"].dtype == np.dtype(np.int32)
    assert feeds["attention_mask"].dtype == np.dtype(np.float32)
    assert feeds["attention_mask"].tolist() == [[1.0, 1.0]]


def test_a_decoder_starts_with_empty_caches() -> None:
    cache = ["batch", 3, "past_sequence_length", 64]
    signature = _with_odd_names(
        ("input_ids", "int64", ["batch", "sequence_length"]),
        ("attention_mask", "int64", ["batch", "past_sequence_length + 1"]),
        ("position_ids", "int64", ["batch", "sequence_length"]),
        ("past_key_values.0.key", "float16", cache),
        ("past_key_values.0.value", "float16", cache),
    )
    feeds = fill_inputs([[7, 8], [5, 6]], signature, 0)
    assert feeds["position_ids"].tolist() == [[0, 1], [0, 1]]
    assert feeds["attention_mask"].shape == (2, 2)
    for name in ("past_key_values.0.key", "past_key_values.0.value"):
        assert feeds[name].shape == (2, 3, 0, 64)
        assert feeds[name].dtype == np.dtype(np.float16)
    assert list(feeds) == [i.name for i in signature.inputs]
    assert signature.feeds(feeds, "")


def test_onnx_runtime_takes_an_empty_cache() -> None:
    model = build(
        "g (int64[b, s] input_ids, float[b, 1, p, 2] past_key_0) => (float[b, 1, t, 2] y)"
        "{ e = Gather(table, input_ids) u = Unsqueeze(e, one) y = Concat<axis=2>(past_key_0, u) }",
        {"table": np.arange(20, dtype=np.float32).reshape(10, 2), "one": np.array([1])},
    )
    feeds = fill_inputs([[7, 8]], read_signature(model), 0)
    session = onnxruntime.InferenceSession(serialized(model), providers=["CPUExecutionProvider"])
    assert session.run(None, feeds)[0].tolist() == [[[[14, 15], [16, 17]]]]


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("past.0", [2, "batch", 4, "past", 8], (2, 2, 4, 0, 8)),
        ("past_0", [2, "batch", 4, "past", 8], (2, 2, 4, 0, 8)),
        ("past_key_0", [None, 4, None, 8], (2, 4, 0, 8)),
        ("past_value_0", [None, 4, 0, 8], (2, 4, 0, 8)),
        ("past_key_values.1.decoder.key", ["batch", "past", 8], (2, 0, 8)),
        ("past.0", [2, None, 4, None, 8], (2, 2, 4, 0, 8)),
        ("past_key_values_0_key", ["batch", 4, "past", 8], (2, 4, 0, 8)),
    ],
)
def test_caches_are_found_by_name_and_batch(
    name: str, shape: list[Any], expected: tuple[int, ...]
) -> None:
    signature = _with_odd_names(("input_ids", "int64", ["batch", "s"]), (name, "float", shape))
    assert fill_inputs([[1], [2]], signature, 0)[name].shape == expected


def test_other_names_of_positions_are_filled() -> None:
    signature = _signature(
        "int64[b, s] input_ids, int64[s] position_ids, int64[s] cache_position,"
        "bool[1] use_cache_branch"
    )
    feeds = fill_inputs([[4, 5, 6]], signature, 0)
    assert feeds["position_ids"].tolist() == feeds["cache_position"].tolist() == [0, 1, 2]
    assert feeds["use_cache_branch"].tolist() == [False]


def test_rows_are_padded_to_the_length_that_the_model_fixes() -> None:
    signature = _signature("int64[b, 4] input_ids, int64[b, 4] attention_mask")
    feeds = fill_inputs(ROWS, signature, 0)
    assert feeds["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    with pytest.raises(UsageError, match="a text has 5 tokens, and the model takes 4"):
        fill_inputs([[1, 2, 3, 4, 5]], signature, 0)


def test_padding_without_a_mask_is_refused() -> None:
    signature = _signature("int64[b, s] input_ids")
    assert fill_inputs([[1, 2]], signature, 0)["input_ids"].tolist() == [[1, 2]]
    with pytest.raises(UsageError, match="rows of 1 and 3 tokens need an attention_mask"):
        fill_inputs(ROWS, signature, 0)


def test_unknown_inputs_are_named() -> None:
    signature = _signature("int64[b, s] input_ids, float[b, 3] pixel_values, float[2] scale")
    with pytest.raises(UsageError) as caught:
        read_layout(signature)
    message = caught.value.message
    assert message.endswith("the model also takes pixel_values float32[b, 3], scale float32[2]")


def test_unknown_inputs_with_defaults_are_left_out() -> None:
    signature = _signature(
        "int64[b, s] input_ids, float[2] scale", {"scale": np.ones(2, np.float32)}
    )
    assert list(fill_inputs([[1]], signature, 0)) == ["input_ids"]


def test_a_mask_of_another_rank_is_unknown() -> None:
    signature = _signature("int64[b, s] input_ids, float[b, 1, s, s] attention_mask")
    with pytest.raises(UsageError, match="also takes attention_mask"):
        read_layout(signature)


def test_a_model_without_ids_is_refused() -> None:
    signature = _signature("int64[b, s] attention_mask")
    with pytest.raises(UsageError, match="fill an input called input_ids, and the model takes att"):
        read_layout(signature)


def test_a_cache_that_cannot_be_empty_is_refused() -> None:
    signature = _with_odd_names(
        ("input_ids", "int64", ["b", "s"]), ("past.0", "float", ["b", 4, 16, 8])
    )
    with pytest.raises(UsageError, match=r"past\.0 float32.*: has no symbolic length"):
        read_layout(signature)
