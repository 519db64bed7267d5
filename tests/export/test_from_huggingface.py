"""Small random models of transformers, saved, exported and compared with PyTorch."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qcompiler.calibration.signature import read_signature
from qcompiler.calibration.token_inputs import fill_inputs, read_layout
from qcompiler.errors import ModelError, UsageError
from qcompiler.export.exported import Exported
from qcompiler.export.from_huggingface import from_huggingface

torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

TOLERANCE = 1e-4
"""Largest difference from PyTorch, relative to the largest absolute output."""
TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SPEECH: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
WHISPER: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 20,
    "max_source_positions": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
RESNET: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
    "num_labels": 5,
}


def _save(folder: Path, kind: str, config: str, options: dict[str, Any]) -> Path:
    """Write a random model; vectors are not left at the zeros and ones they start as."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def _llama(folder: Path) -> Path:
    options = {**TEXT, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return _save(folder, "LlamaForCausalLM", "LlamaConfig", options)


def _run(exported: Exported, folder: Path) -> Callable[[Sequence[Any]], list[Any]]:
    """Return the graph as a function of inputs in order, without optimizations."""
    path = folder / "model.onnx"
    ir.save(exported.model, path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return lambda call: session.run(
        None, {name: np.asarray(value) for name, value in zip(names, call, strict=True)}
    )


def _near(got: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    wanted = np.asarray(expected, np.float32)
    assert got.shape == wanted.shape
    assert np.abs(got.astype(np.float32) - wanted).max() <= tolerance * np.abs(wanted).max()


def _agree(exported: Exported, folder: Path, tolerance: float = TOLERANCE) -> None:
    run = _run(exported, folder)
    for call in exported.examples:
        with torch.no_grad():
            expected = exported.module(*call)
        for got, wanted in zip(run(call), expected, strict=True):
            _near(got, wanted, tolerance)


@pytest.fixture(scope="module", autouse=True)
def _untraced() -> Iterator[None]:
    """Keep pytest from collecting what PyTorch logs of every symbolic size: it takes minutes."""
    logger = logging.getLogger("torch.__trace")
    propagated = logger.propagate
    logger.propagate = False
    yield
    logger.propagate = propagated


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exported]:
    folder = _llama(tmp_path_factory.mktemp("llama"))
    return folder, from_huggingface(folder)


def test_cached_decoder_agrees_on_every_shape(
    cached: tuple[Path, Exported], tmp_path: Path
) -> None:
    _, exported = cached
    assert [value.name for value in exported.model.graph.inputs] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.key",
        "past_key_values.1.value",
    ]
    outputs = [str(value.name) for value in exported.model.graph.outputs]
    assert outputs[:3] == ["logits", "present.0.key", "present.0.value"]
    shapes = {tuple(call[3].shape) for call in exported.examples}
    assert {shape[0] for shape in shapes} == {1, 2, 3}
    assert 0 in {shape[2] for shape in shapes}
    _agree(exported, tmp_path)


def test_steps_of_decoding_equal_one_forward(cached: tuple[Path, Exported], tmp_path: Path) -> None:
    folder, exported = cached
    _check_steps(folder, exported, tmp_path)


def _check_steps(folder: Path, exported: Exported, tmp_path: Path) -> None:
    """Compare four tokens at once, then one at a time, with one call of a loaded model.

    Rows begin with 0, 1 and 2 tokens of padding.
    """
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9)[None] >= torch.arange(3)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = whole(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
    run = _run(exported, tmp_path)
    past = [
        np.zeros((3, *t.shape[1:2], 0, t.shape[3]), np.float32) for t in exported.examples[0][3:]
    ]
    parts, start = [], 0
    for stop in (4, 5, 6, 7, 8, 9):
        call = (ids[:, start:stop], mask[:, :stop], positions[:, start:stop], *past)
        logits, *past = run(call)
        parts.append(logits)
        start = stop
    real = mask.bool().numpy()
    _near(np.concatenate(parts, 1)[real], expected.numpy()[real])


def test_calibration_can_fill_the_inputs(cached: tuple[Path, Exported], tmp_path: Path) -> None:
    _, exported = cached
    signature = read_signature(exported.model)
    read_layout(signature)
    feeds = fill_inputs([[1, 2, 3], [4, 5]], signature, pad_id=0)
    logits = _run(exported, tmp_path)([feeds[name.name] for name in signature.inputs])[0]
    assert logits.shape == (2, 3, 97)


def test_names_are_those_of_the_checkpoint(cached: tuple[Path, Exported]) -> None:
    _, exported = cached
    weights = {parameter for parameter, _ in exported.module.named_parameters()}
    assert "model.layers.1.mlp.down_proj.weight" in weights
    scopes = " ".join(
        node.metadata_props.get("pkg.torch.onnx.name_scopes", "") for node in exported.model.graph
    )
    assert "'model.layers.1.mlp.down_proj'" in scopes
    assert "model.model" not in scopes


def test_files_are_written_beside(cached: tuple[Path, Exported], tmp_path: Path) -> None:
    folder, exported = cached
    paths = exported.write_files(tmp_path)
    assert tmp_path / "config.json" in paths
    assert (tmp_path / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_image_classification(tmp_path: Path) -> None:
    folder = _save(tmp_path, "ResNetForImageClassification", "ResNetConfig", RESNET)
    preprocessing = {"size": {"height": 64, "width": 64}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    exported = from_huggingface(folder)
    (image,) = exported.model.graph.inputs
    assert [str(d) for d in image.shape or ()] == ["batch", "3", "64", "64"]
    assert "preprocessor_config.json" in [file.name for file in exported.files]
    _agree(exported, tmp_path)


MODELS = {
    "llama-no-cache": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_key_value_heads": 2}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64},
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**TEXT, "num_key_value_heads": 2}),
    "gemma": (
        "GemmaForCausalLM",
        "GemmaConfig",
        {**TEXT, "num_key_value_heads": 1, "head_dim": 8},
    ),
    "bert-masked-lm": ("BertForMaskedLM", "BertConfig", TEXT),
    "bert": ("BertModel", "BertConfig", TEXT),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 97, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4},
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**TEXT, "image_size": 32, "patch_size": 8, "num_labels": 5},
    ),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", SPEECH),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_other_models_agree(name: str, tmp_path: Path) -> None:
    folder = _save(tmp_path, *MODELS[name])
    exported = from_huggingface(folder, with_cache=name != "llama-no-cache")
    _agree(exported, tmp_path)


@pytest.mark.slow
def test_whisper_encoder(tmp_path: Path) -> None:
    folder = _save(tmp_path, "WhisperModel", "WhisperConfig", WHISPER)
    exported = from_huggingface(folder, "speech-encoder")
    assert [str(value.name) for value in exported.model.graph.inputs] == ["input_features"]
    _agree(exported, tmp_path)


@pytest.mark.slow
def test_a_sliding_window_is_kept_with_a_whole_cache(tmp_path: Path) -> None:
    options = {**TEXT, "num_key_value_heads": 2, "sliding_window": 3}
    folder = _save(tmp_path, "MistralForCausalLM", "MistralConfig", options)
    _check_steps(folder, from_huggingface(folder), tmp_path)


@pytest.mark.slow
def test_half_precision(tmp_path: Path) -> None:
    exported = from_huggingface(_llama(tmp_path), dtype="float16")
    assert exported.model.graph.inputs[3].dtype == ir.DataType.FLOAT16
    assert exported.model.graph.outputs[0].dtype == ir.DataType.FLOAT16
    # Ten bits of mantissa, and sums in another order.
    _agree(exported, tmp_path, tolerance=1e-2)


@pytest.mark.slow
def test_bfloat16(tmp_path: Path) -> None:
    # ONNX Runtime's CPU provider has no such products, so only types are looked at.
    exported = from_huggingface(_llama(tmp_path), with_cache=False, dtype="bfloat16")
    types = {
        value.dtype
        for value in exported.model.graph.initializers.values()
        if value.shape is not None and value.const_value is not None and value.const_value.size > 99
    }
    assert types == {ir.DataType.BFLOAT16}


def test_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        from_huggingface(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        from_huggingface(tmp_path)
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(UsageError, match="is a file"):
        from_huggingface(file)


def test_refuses_pickles(tmp_path: Path) -> None:
    folder = _llama(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="holds no weights, and only safetensors are read"):
        from_huggingface(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UsageError, match=r"pytorch_model\.bin, a pickle that may run code"):
        from_huggingface(folder)


def test_refuses_unknown_names(tmp_path: Path) -> None:
    folder = _llama(tmp_path)
    with pytest.raises(UsageError, match="no task 'translation'"):
        from_huggingface(folder, "translation")
    with pytest.raises(UsageError, match="no type 'int8'"):
        from_huggingface(folder, dtype="int8")
    _change_config(folder, architectures=["LlamaForPainting"])
    with pytest.raises(UsageError, match="cannot be told from the architecture LlamaForPainting"):
        from_huggingface(folder)


def test_refuses_a_quantized_checkpoint(tmp_path: Path) -> None:
    folder = _llama(tmp_path)
    _change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="quantized already"):
        from_huggingface(folder)


def test_refuses_weights_that_would_be_random(tmp_path: Path) -> None:
    folder = _save(tmp_path, "BertModel", "BertConfig", TEXT)
    with pytest.raises(ModelError, match=r"lacks weights .* sequence-classification .*classifier"):
        from_huggingface(folder, "sequence-classification")


def test_code_beside_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    folder = _llama(tmp_path)
    ran = tmp_path / "ran"
    (folder / "model_code.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    _change_config(
        folder,
        model_type="unheard_of",
        auto_map={"AutoConfig": "model_code.Config", "AutoModelForCausalLM": "model_code.Model"},
    )
    with pytest.raises(UsageError, match="transformers cannot read it"):
        from_huggingface(folder, "causal-lm")
    assert not ran.exists()


def test_refuses_a_cache_of_recurrent_state(tmp_path: Path) -> None:
    options = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    folder = _save(tmp_path, "MambaForCausalLM", "MambaConfig", options)
    with pytest.raises(ModelError, match=r"keeps (no|more than) keys and values"):
        from_huggingface(folder)


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
