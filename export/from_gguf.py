"""GGUF files of Llama models as float graphs.

Quantized weights are dequantized: the graph computes what the file's weights stand for, in float.
Facts: the GGUF specification's keys and tensor names.
"""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from qcompiler.errors import ModelError, UsageError
from qcompiler.export.exported import Exported, SideFile
from qcompiler.export.from_huggingface import DTYPES, export_interface
from qcompiler.export.gguf_header import header

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from gguf.gguf_reader import ReaderTensor
    from transformers import LlamaConfig, LlamaForCausalLM

ARCHITECTURES: Final = ("llama",)
"""What `general.architecture` may say."""
_TENSOR: Final = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_EMBEDDING: Final = "model.embed_tokens.weight"
_HEAD: Final = "lm_head.weight"
_GLOBAL_NAMES: Final = {
    "token_embd.weight": _EMBEDDING,
    "output_norm.weight": "model.norm.weight",
    "output.weight": _HEAD,
}
_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BAND_ELEMENTS: Final = 1 << 20


def from_gguf(
    path: str | Path, *, with_cache: bool = True, dtype: str = "float32", opset: int = 21
) -> Exported:
    """Export a Llama model from a GGUF file, its tokenizer beside it.

    Inputs and outputs are those of `from_huggingface` for `causal-lm`.

    Args:
        path: The `.gguf` file, of any quantization that the `gguf` package dequantizes.
        with_cache: Whether the graph takes and returns keys and values.
        dtype: float32, float16 or bfloat16: type of weights, activations and float inputs.
        opset: Version of the standard operators.

    Raises:
        UsageError: There is no such file, the type is unknown, or a package is not installed.
        ModelError: It is no GGUF file, or one of another architecture or with more to it.
    """
    _require_packages()
    if dtype not in DTYPES:
        message = f"there is no type {dtype!r} for weights"
        raise UsageError(message, hint=f"name one of: {', '.join(DTYPES)}")
    import torch

    from qcompiler.export.huggingface_tasks import describe, find_task

    reader = open_gguf(path)
    config = read_config(reader)
    model = _build(config, dict(read_weights(reader, getattr(torch, dtype))), str(path))
    files, notes = _files(reader, config)
    # Unmaps the file, which counts as memory while it is open.
    del reader
    interface = describe(find_task("causal-lm", config), model, with_cache=with_cache, image_size=0)
    return export_interface(interface, files, opset, notes)


def open_gguf(path: str | Path) -> "GGUFReader":
    """Open a file and check that it holds a model of a known architecture.

    Raises:
        UsageError: There is no such file.
        ModelError: It is no GGUF file, or one of another architecture.
    """
    from gguf import GGUFReader

    path = Path(path)
    if not path.is_file():
        message = "there is no such file"
        raise UsageError(message, where=str(path), hint="name a .gguf file")
    try:
        reader = GGUFReader(path)
        architecture = header(reader, "general.architecture")
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        message = f"is no GGUF file that can be read: {' '.join(str(error).split())[:200]}"
        raise ModelError(message, where=str(path), hint="download it again") from error
    if architecture not in ARCHITECTURES:
        message = f"is of architecture {architecture}, and only {', '.join(ARCHITECTURES)} is read"
        hint = "export the checkpoint that it was made from with from_huggingface"
        raise ModelError(message, where=str(path), hint=hint)
    return reader


def read_config(reader: "GGUFReader") -> "LlamaConfig":
    """Return the configuration of the network in a file.

    Raises:
        ModelError: The header lacks a size, or describes what is not supported here.
    """
    from transformers import LlamaConfig

    heads = _size(reader, "attention.head_count")
    head_size = _head_size(reader)
    _refuse_other_rotation(reader, head_size)
    names = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in names:
        message = "holds no token_embd.weight"
        raise ModelError(message, where="GGUF tensors", hint="download it again")
    special = {
        f"{role}_token_id": header(reader, f"tokenizer.ggml.{key}_token_id")
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=int(names["token_embd.weight"].shape[1]),
        hidden_size=_size(reader, "embedding_length"),
        intermediate_size=_size(reader, "feed_forward_length"),
        num_hidden_layers=_size(reader, "block_count"),
        num_attention_heads=heads,
        num_key_value_heads=_size(reader, "attention.head_count_kv", heads),
        head_dim=head_size,
        max_position_embeddings=_size(reader, "context_length"),
        rms_norm_eps=_number(reader, "attention.layer_norm_rms_epsilon"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _number(reader, "rope.freq_base", 10_000.0),
        },
        tie_word_embeddings="output.weight" not in names,
        **special,
    )


def read_weights(
    reader: "GGUFReader", dtype: "torch.dtype"
) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield names in transformers' `LlamaForCausalLM`, and weights, dequantized.

    llama.cpp rotates neighbouring channels, transformers those half a head apart: the rows of q
    and k are put back in the order in which the checkpoint had them.

    Raises:
        ModelError: A tensor has no place in the network, or is of an unknown quantization.
    """
    head_size = _head_size(reader)
    for tensor in reader.tensors:
        values = _dequantized(tensor, dtype)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            rows, columns = values.shape
            pairs = values.reshape(rows // head_size, head_size // 2, 2, columns)
            values = pairs.transpose(1, 2).reshape(rows, columns)
        yield _name(tensor.name), values


def _dequantized(tensor: "ReaderTensor", dtype: "torch.dtype") -> "torch.Tensor":
    import torch
    from gguf.quants import dequantize

    shape = [int(size) for size in reversed(tensor.shape)]
    result = torch.empty(shape, dtype=dtype)
    rows = result.reshape(-1, shape[-1])
    packed = tensor.data.reshape(len(rows), -1)
    step = max(1, _BAND_ELEMENTS // shape[-1])
    try:
        for start in range(0, len(rows), step):
            band = dequantize(packed[start : start + step], tensor.tensor_type)
            rows[start : start + step] = torch.from_numpy(np.array(band, np.float32))
    except NotImplementedError as error:
        message = f"is quantized as {tensor.tensor_type.name}, which cannot be dequantized"
        raise ModelError(message, where=tensor.name, hint="update gguf") from error
    return result


def _build(
    config: "LlamaConfig", weights: dict[str, "torch.Tensor"], where: str
) -> "LlamaForCausalLM":
    """Return the network with the weights themselves, not copies of them."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    if config.tie_word_embeddings and _EMBEDDING in weights:
        weights[_HEAD] = weights[_EMBEDDING]
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        message = f"the weights do not fit the header: {' '.join(str(error).split())[:300]}"
        raise ModelError(message, where=where, hint="download the file again") from error
    model.tie_weights()
    # Computed, and in no checkpoint.
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    result: LlamaForCausalLM = model
    return result


def _files(
    reader: "GGUFReader", config: "LlamaConfig"
) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    from qcompiler.export.gguf_tokenizer import tokenizer_files

    config_file = SideFile("config.json", (config.to_json_string()).encode())
    try:
        return (config_file, *tokenizer_files(reader, config.max_position_embeddings)), ()
    except ModelError as error:
        return (config_file,), (f"no tokenizer was written: {error}",)


def _require_packages() -> None:
    for package in ("torch", "transformers", "gguf", "tokenizers"):
        if importlib.util.find_spec(package) is None:
            message = f"reading a GGUF file needs {package}"
            raise UsageError(message, hint=f"pip install {package}")


def _head_size(reader: "GGUFReader") -> int:
    heads = _size(reader, "attention.head_count")
    return _size(reader, "attention.key_length", _size(reader, "embedding_length") // heads)


def _refuse_other_rotation(reader: "GGUFReader", head_size: int) -> None:
    rotated = _size(reader, "rope.dimension_count", head_size)
    scaling = header(reader, "llama.rope.scaling.type")
    if rotated != head_size or scaling not in (None, "none"):
        message = f"rotates {rotated} of {head_size} channels with scaling {scaling or 'none'}"
        hint = "all channels without scaling can be read; export the original checkpoint"
        raise ModelError(message, where="rotary embedding", hint=hint)


def _name(gguf_name: str) -> str:
    if gguf_name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[gguf_name]
    match = _TENSOR.fullmatch(gguf_name)
    if match is None or match[2] not in _LAYER_NAMES:
        message = "has no place in a plain Llama"
        hint = "experts, biases and scaled rotations cannot be read from GGUF"
        raise ModelError(message, where=gguf_name, hint=hint)
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"


def _size(reader: "GGUFReader", key: str, default: int | None = None) -> int:
    value = header(reader, f"llama.{key}")
    value = default if value is None else value
    if not isinstance(value, int) or value <= 0:
        message = f"the header has no size llama.{key}" if value is None else f"it is {value}"
        raise ModelError(message, where=f"llama.{key}", hint="download the file again")
    return value


def _number(reader: "GGUFReader", key: str, default: float | None = None) -> float:
    value = header(reader, f"llama.{key}")
    value = default if value is None else value
    if not isinstance(value, float) or not value > 0:
        message = f"the header has no number llama.{key}" if value is None else f"it is {value}"
        raise ModelError(message, where=f"llama.{key}", hint="download the file again")
    # The shortest decimal of the same float32, which is what the configuration had.
    return float(str(np.float32(value)))
