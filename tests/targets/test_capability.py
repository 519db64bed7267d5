"""What a request resolves to, and why."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.quant.scheme import SCHEME_FORMS, Activations, QScheme, parse_scheme
from qcompiler.targets.capability import Resolution, SchemeRequest, Target, resolve
from qcompiler.targets.emulation import EMULATION
from qcompiler.targets.onnxruntime import ONNXRUNTIME
from qcompiler.targets.processors import without_type
from qcompiler.targets.registry import TARGETS
from qcompiler.targets.rows import WeightUse

BASE = SchemeRequest("MatMul", "", QScheme(8), "FLOAT", 1024, 512, 2)


def resolved(text: str, **changes: object) -> Resolution:
    scheme = parse_scheme(text)
    assert scheme is not None
    return resolve(ONNXRUNTIME, replace(BASE, scheme=scheme, **changes))  # type: ignore[arg-type]


def scheme_text(resolution: Resolution) -> str:
    return "float" if resolution.scheme is None else str(resolution.scheme)


@pytest.mark.parametrize(
    ("text", "changes", "scheme", "rule", "reason"),
    [
        ("w8a16", {}, "w8a16:sym", "matmul-nbits-8", "MatMulNBits (8-bit)"),
        ("w8a16:asym", {}, "w8a16:asym", "matmul-nbits-8", "MatMulNBits (8-bit)"),
        ("w4a16:b128", {}, "w4a16:b128:asym", "matmul-nbits-4", "MatMulNBits (4-bit)"),
        ("w4a16:b128", {}, "w4a16:b128:asym", "matmul-nbits-4", "rounds activations to 8 bits"),
        ("w3a16:b128", {}, "w3a16:b128:asym", "matmul-nbits-4", "MatMulNBits (4-bit)"),
        ("w4a16:b128", {"reduction": 576}, "w4a16:b128:asym", "matmul-nbits-4", ""),
        ("w4a16:b128", {"reduction": 64}, "w4a16:asym", "matmul-nbits-4", "covers all 64"),
        ("w4a16:b512", {}, "w4a16:b256:asym", "", "no fast kernel"),
        ("w2a16:b16", {}, "w2a16:b32:asym", "matmul-nbits-2", "no fast kernel"),
        ("w2a16:b256", {}, "w2a16:b128:asym", "matmul-nbits-2", "no fast kernel"),
        (
            "w4a16:b128",
            {"reduction": 576, "transposed": True},
            "w4a16:b64:asym",
            "matmul-nbits-transposed",
            "do not divide into blocks of 128",
        ),
        (
            "w4a16",
            {"transposed": True},
            "w4a16:b256:asym",
            "matmul-nbits-transposed",
            "one scale per output channel has no kernel",
        ),
        (
            "w4a16:b32",
            {"reduction": 100, "transposed": True},
            "float",
            "no-kernel",
            "no legal granularity for 100 input channels",
        ),
        ("w4a16:b32", {"weight_rank": 3}, "float", "no-kernel", "weight of rank 3"),
        ("w8a16", {"weight_rank": 3}, "w8a16:sym", "decoded-at-load-matmul", "decoded once"),
        ("w4a16:b32", {"left": True}, "float", "no-kernel", "left weight"),
        ("w8a16", {"left": True}, "w8a16:sym", "decoded-at-load-matmul", "decoded once"),
        ("w8a16", {"float_type": "DOUBLE"}, "float", "no-kernel", "DOUBLE"),
        ("w4a16:b32", {"float_type": "BFLOAT16"}, "", "bfloat16-no-cpu-kernel", "no bfloat16"),
        ("w8a16", {"outputs": 1, "reduction": 100}, "float", "small-weight", "100 elements"),
        ("w8a8-dynamic", {}, "w8a8-dynamic:sym", "dynamic-quantize-matmul", "at most 128"),
        ("w8a8-dynamic", {"left": True}, "w8a16:sym", "", "instead of w8a8-dynamic"),
        ("w8a8", {}, "w8a8:sym", "qlinear-matmul", "at most 128"),
        ("w8a8", {"transposed": True}, "w8a8:sym", "qlinear-matmul", "at most 128"),
        ("w8a8", {"left": True}, "w8a16:sym", "", "left weight; instead of w8a8"),
        ("w8a8", {"in_body": True}, "w8a8-dynamic:sym", "", "cannot be calibrated"),
        ("w8a8", {"float_type": "FLOAT16"}, "w8a16:sym", "", "no 8-bit kernel for a FLOAT16"),
        ("w8a8", {"outputs": 1, "reduction": 100}, "w8a8:sym", "qlinear-matmul", ""),
        ("w8a8:asym", {}, "w8a8:sym", "", "without a zero point"),
        ("w8a8:tensor", {}, "w8a8:tensor:sym", "qlinear-matmul", ""),
        ("w8a16:tensor", {}, "w8a16:sym", "matmul-nbits-8", "gains nothing from a single one"),
        ("w8a8-dynamic:tensor", {}, "w8a8-dynamic:sym", "", "gains nothing from a single one"),
        ("w8a8-dynamic", {"float_type": "FLOAT16"}, "w8a16:sym", "", "instead of w8a8-dynamic"),
        ("w8a8-dynamic:asym", {}, "w8a8-dynamic:sym", "", "without a zero point"),
        ("w8a16", {"op_type": "Einsum"}, "float", "no-kernel", "no w8a16 kernel for Einsum"),
        ("w8a16", {"domain": "ai.onnx"}, "w8a16:sym", "matmul-nbits-8", ""),
        (
            "w8a16",
            {"op_type": "FusedMatMul", "domain": "com.microsoft"},
            "w8a16:sym",
            "decoded-at-load-matmul",
            "",
        ),
    ],
)
def test_matrix_products(
    text: str, changes: dict[str, object], scheme: str, rule: str, reason: str
) -> None:
    found = resolved(text, **changes)
    assert scheme in ("", scheme_text(found))
    assert rule in ("", found.rule)
    assert reason in found.reason


@pytest.mark.parametrize(
    ("op_type", "rank", "text", "scheme", "reason"),
    [
        ("Conv", 4, "w8a16", "w8a16:sym", "decoded once when the session starts"),
        ("Conv", 4, "w4a16:b32", "float", "no convolution kernel"),
        ("ConvTranspose", 4, "w2a16:b64", "float", "no convolution kernel"),
        ("Conv", 4, "w8a8-dynamic", "w8a16:sym", "no w8a8-dynamic kernel for Conv"),
        ("Conv", 4, "w8a8", "w8a8:sym", "runs as QLinearConv"),
        ("Conv", 3, "w8a8", "w8a8:sym", "runs as QLinearConv"),
        ("Conv", 5, "w8a8", "w8a16:sym", "weight of rank 5; instead of w8a8"),
        ("ConvTranspose", 4, "w8a8", "w8a16:sym", "no w8a8 kernel for ConvTranspose"),
        ("LSTM", 3, "w8a8", "w8a16:sym", "no w8a8 kernel for LSTM"),
        ("Gather", 2, "w8a8", "w8a16:asym", "no w8a8 kernel for Gather"),
        ("LSTM", 3, "w8a16", "w8a16:sym", "decoded once"),
        ("GRU", 3, "w4a16:b32", "float", "no recurrent kernel"),
        ("Gather", 2, "w4a16:b32", "w4a16:b32:asym", "GatherBlockQuantized (4-bit)"),
        ("Gather", 2, "w8a16", "w8a16:asym", "GatherBlockQuantized (8-bit)"),
        ("Gather", 3, "w8a16", "float", "weight of rank 3"),
    ],
)
def test_other_ops(op_type: str, rank: int, text: str, scheme: str, reason: str) -> None:
    found = resolved(text, op_type=op_type, weight_rank=rank)
    assert scheme_text(found) == scheme
    assert reason in found.reason


def test_gather_needs_rows_of_whole_bytes() -> None:
    found = resolved("w4a16:b32", op_type="Gather", reduction=95)
    assert (found.scheme, "multiple of 2" in found.reason) == (None, True)


@pytest.mark.parametrize("text", ["w8a16", "w4a16:b128", "w3a16:b32", "w2a16:b64"])
@pytest.mark.parametrize("reduction", [100, 576, 1024])
def test_both_readers_of_a_tied_table_get_the_same(text: str, reduction: int) -> None:
    lookup = resolved(text, op_type="Gather", tied=True, reduction=reduction)
    product = resolved(text, tied=True, transposed=True, reduction=reduction)
    assert (lookup.scheme, lookup.rule) == (product.scheme, product.rule)
    assert (lookup.scheme is None) == (reduction == 100)


def test_a_weight_tied_to_another_product_is_no_table() -> None:
    assert replace(BASE, tied=True).use is WeightUse.PLAIN
    assert replace(BASE, tied=True, transposed=True).use is WeightUse.SHARED_TABLE


@pytest.mark.parametrize(("text", "limit"), [("w8a8", 128), ("w8a8-dynamic", 128), ("w8a16", None)])
def test_codes_for_8_bit_activations_have_limited_pairs(text: str, limit: int | None) -> None:
    assert resolved(text).pair_limit == limit


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
@pytest.mark.parametrize("text", [form for form in SCHEME_FORMS if form != "float"])
def test_every_documented_scheme_quantizes_a_plain_product(target: Target, text: str) -> None:
    scheme = parse_scheme(text)
    assert scheme is not None
    if scheme.activations is Activations.STATIC and not target.has_integers(scheme):
        assert target is not EMULATION, "plan.py refuses it for the others"
        return
    found = resolve(target, replace(BASE, scheme=scheme, reduction=256, outputs=256))
    refused = [
        refusal
        for refusal in target.refusals
        if BASE.op in refusal.ops
        and scheme.floating == refusal.floating
        and scheme.weight_bits in refusal.weight_bits
        and refusal.activations in (None, scheme.activations)
    ]
    if scheme.floating and without_type(target.processors, scheme.weight_type.onnx_name):
        assert "has no FLOAT8E4M3FN: use w8a8, or name other processors" in found.reason
        return
    if refused:
        assert ": " in found.reason, "a refusal names a way out"
        return
    assert found.scheme is not None
    assert found.scheme.weight_bits == scheme.weight_bits
    assert found.scheme.activations is scheme.activations


def test_the_default_scheme_is_one() -> None:
    assert parse_scheme(ONNXRUNTIME.default_scheme) is not None


REQUESTS = st.builds(
    SchemeRequest,
    op_type=st.sampled_from(
        ["MatMul", "Gemm", "Conv", "ConvTranspose", "Gather", "LSTM", "GRU", "Foo"]
    ),
    domain=st.just(""),
    scheme=st.sampled_from(
        [
            "w8a16",
            "w8a8-dynamic",
            "w8a8",
            "w8a8:tensor",
            "w8a16:tensor",
            "w4a16:b32",
            "w4a16",
            "w3a16:b128:sym",
            "w2a16:b16:asym",
        ]
    ).map(lambda text: parse_scheme(text) or QScheme(8)),
    float_type=st.sampled_from(["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"]),
    reduction=st.integers(1, 5000),
    outputs=st.integers(1, 5000),
    weight_rank=st.integers(1, 5),
    transposed=st.booleans(),
    tied=st.booleans(),
    left=st.booleans(),
)


@given(st.sampled_from(list(TARGETS.values())), REQUESTS)
def test_a_resolution_is_complete_and_legal(target: Target, request: SchemeRequest) -> None:
    found = resolve(target, request)
    assert found.reason
    assert found.rule
    if found.scheme is None:
        return
    assert found.scheme.symmetric is not None
    size = found.scheme.block_size
    assert size is None or (16 <= size <= request.reduction and size & (size - 1) == 0)
    assert found.scheme.weight_bits >= request.scheme.weight_bits


@given(st.sampled_from(list(TARGETS.values())), REQUESTS)
def test_a_decided_scheme_resolves_to_itself(target: Target, request: SchemeRequest) -> None:
    found = resolve(target, request)
    if found.scheme is not None:
        again = resolve(target, replace(request, scheme=found.scheme))
        assert (again.scheme, again.rule) == (found.scheme, found.rule)
