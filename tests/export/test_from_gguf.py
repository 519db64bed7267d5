"""GGUF files: small ones written here, and the released SmolLM2."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from qcompiler.errors import ModelError, UsageError
from qcompiler.export.exported import Exported
from qcompiler.export.from_gguf import from_gguf, open_gguf, read_config, read_weights
from qcompiler.ir.save import save_model
from qcompiler.progress import SilentProgress

torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
gguf = pytest.importorskip("gguf", reason="needs gguf")

TOLERANCE = 1e-4
HEADS, KV_HEADS, HEAD_SIZE, LAYERS, HIDDEN, VOCABULARY = 4, 2, 8, 1, 32, 64
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module", autouse=True)
def _untraced() -> Iterator[None]:
    """Keep pytest from collecting what PyTorch logs of every symbolic size: it takes minutes."""
    logger = logging.getLogger("torch.__trace")
    propagated = logger.propagate
    logger.propagate = False
    yield
    logger.propagate = propagated


def _model(tied: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        # Large weights, so that a wrong rotation shows.
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 1.0)
    return model


def _gguf_name(name: str) -> str:
    known = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in known or name.endswith(".bias"):
        return known.get(name, "output_norm.bias")
    _, _, layer, *parts, _ = name.split(".")
    return f"blk.{layer}.{GGUF_NAMES['.'.join(parts)]}.weight"


def _interleaved(values: Any, name: str) -> Any:
    """Put channels that rotate together beside each other, as llama.cpp wants them."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return values
    halves = values.reshape(-1, 2, HEAD_SIZE // 2, values.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _write(path: Path, model: Any, *, quantized: bool = False, **changes: Any) -> Path:
    """Write a model; `changes` replace or add header values, with __ for dots."""
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<s>", "</s>", *"abcdefgh", "ab", "abc"]
    tokens += [f"unused{i}" for i in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model(changes.pop("tokenizer", "gpt2"))
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (VOCABULARY - 2)])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    for key, value in changes.items():
        writer.add_string(key.replace("__", "."), value)
    tied = model.config.tie_word_embeddings
    for name, parameter in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            values = _interleaved(parameter.numpy(), name)
            if quantized and values.ndim > 1:
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(
                    _gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind
                )
            else:
                writer.add_tensor(_gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _logits(exported: Exported, folder: Path, call: Any) -> Any:
    path = save_model(exported.model, folder / "model.onnx", progress=SilentProgress()).path
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    feeds = {name: value.numpy() for name, value in zip(names, call, strict=True)}
    return session.run(["logits"], feeds)[0]


def _near(got: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def test_graph_agrees_with_the_model_that_was_written(tmp_path: Path) -> None:
    model = _model(tied=True)
    exported = from_gguf(_write(tmp_path / "m.gguf", model), with_cache=False)
    call = exported.examples[0]
    with torch.no_grad():
        expected = model(input_ids=call[0], attention_mask=call[1], use_cache=False).logits
    _near(_logits(exported, tmp_path, call), expected.numpy())
    large = [
        value.name
        for value in exported.model.graph.initializers.values()
        if value.const_value is not None and value.const_value.size >= VOCABULARY * HIDDEN
    ]
    assert large.count("model.embed_tokens.weight") + large.count("lm_head.weight") == 1
    assert exported.notes == ()


def test_weights_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    model = _model(tied=False)
    weights = dict(read_weights(open_gguf(_write(tmp_path / "m.gguf", model)), torch.float32))
    assert weights.keys() == model.state_dict().keys()
    for name, values in model.state_dict().items():
        assert torch.equal(weights[name], values), name


def test_quantized_weights_are_dequantized(tmp_path: Path) -> None:
    model = _model(tied=True)
    reader = open_gguf(_write(tmp_path / "m.gguf", model, quantized=True))
    for name, values in read_weights(reader, torch.float32):
        wanted = model.state_dict()[name]
        # Half a step of 1/127 of a block's largest value.
        assert (values - wanted).abs().max() <= wanted.abs().max() / 250, name


def test_config_is_read(tmp_path: Path) -> None:
    config = read_config(open_gguf(_write(tmp_path / "m.gguf", _model(tied=False))))
    assert config.rms_norm_eps == 1e-5
    assert config.to_dict()["rope_parameters"]["rope_theta"] == 5000.0
    assert (config.num_key_value_heads, config.head_dim) == (KV_HEADS, HEAD_SIZE)
    assert not config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id) == (0, 1)


def test_tokenizer_comes_along(tmp_path: Path) -> None:
    from qcompiler.export.gguf_tokenizer import tokenizer_files

    files = tokenizer_files(open_gguf(_write(tmp_path / "m.gguf", _model(tied=True))), 64)
    assert [file.name for file in files] == ["tokenizer.json", "tokenizer_config.json"]
    for file in files:
        (tmp_path / file.name).write_bytes(file.data)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer("abcab</s>")["input_ids"] == [0, 11, 10, 1]
    assert tokenizer.decode([11, 10]) == "abcab"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        from_gguf(tmp_path / "absent.gguf")
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF and nothing that follows from it")
    with pytest.raises(ModelError, match="no GGUF file that can be read"):
        from_gguf(path)
    path.write_bytes(_write(tmp_path / "whole.gguf", _model(tied=True)).read_bytes()[:-20_000])
    with pytest.raises(ModelError, match="no GGUF file that can be read"):
        from_gguf(path)
    _write(path, _model(tied=True), architecture="mamba")
    with pytest.raises(ModelError, match="architecture mamba, and only llama is read"):
        from_gguf(path)


def test_refuses_what_is_no_plain_llama(tmp_path: Path) -> None:
    model = _model(tied=True)
    scaled = _write(tmp_path / "m.gguf", model, llama__rope__scaling__type="yarn")
    with pytest.raises(ModelError, match="with scaling yarn"):
        from_gguf(scaled)
    model.model.norm.bias = torch.nn.Parameter(torch.ones(HIDDEN))
    with pytest.raises(ModelError, match="has no place in a plain Llama"):
        from_gguf(_write(tmp_path / "biased.gguf", model))


def test_an_unknown_tokenizer_is_noted(tmp_path: Path) -> None:
    from qcompiler.export.gguf_tokenizer import read_tokenizer

    path = _write(tmp_path / "m.gguf", _model(tied=True), tokenizer="llama")
    with pytest.raises(ModelError, match="kind llama with pre-tokenizer gpt-2"):
        read_tokenizer(open_gguf(path))


@pytest.mark.slow
@pytest.mark.parametrize("with_cache", [True, False])
def test_smollm2(with_cache: bool, tmp_path: Path) -> None:
    from benchmarks.assets import package_file
    from benchmarks.packages import SMOLLM2

    path = package_file(SMOLLM2, "SmolLM2-135M-Instruct.Q4_1.gguf")
    exported = from_gguf(path, with_cache=with_cache)
    for call in exported.examples:
        with torch.no_grad():
            expected = exported.module(*call)[0]
        _near(_logits(exported, tmp_path, call), expected.numpy())
    tokenizer = next(file for file in exported.files if file.name == "tokenizer.json")
    from tokenizers import Tokenizer

    text = Tokenizer.from_buffer(tokenizer.data)
    ids = text.encode("Capital of France in 2024?").ids
    assert text.decode(ids) == "Capital of France in 2024?"
    # Digits one by one.
    assert len(ids) == 10
