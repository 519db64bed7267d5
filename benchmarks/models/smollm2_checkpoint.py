"""What is inside SmolLM2's GGUF file (weights, tokenizer), and a rewrite off its 4-bit grid.

The file is a 4-bit release (Q4_1: groups of 32, asymmetric). Dequantized, its weights still lie on
that grid, and quantizing them to int4 in groups of 32 would look lossless. `fold` moves them off it
without changing what the network computes.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.runtime import Array

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer

LAYERS = 30
HEADS = 9
KV_HEADS = 3
HEAD_SIZE = 64
HIDDEN = 576
FFN = 1536
VOCABULARY = 49_152

Weights = dict[str, Array]

_FOLD_SEED = 0
_FOLD_SPREAD = 0.1
_SPECIAL_TOKEN = 3
_LAYER_NAMES = {
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


def load_config() -> dict[str, Any]:
    """Return the arguments of `transformers.LlamaConfig` for this network."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def load_weights(path: Path) -> Weights:
    """Return the weights, dequantized to float32, under the names of `LlamaForCausalLM`.

    The rotary halves of q and k, which llama.cpp interleaves, are put back in order.
    """
    from gguf.quants import dequantize

    weights: Weights = {}
    for tensor in _reader(path).tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            rows, columns = shape
            pairs = values.reshape(rows // HEAD_SIZE, HEAD_SIZE // 2, 2, columns)
            values = pairs.swapaxes(1, 2).reshape(rows, columns)
        weights[_name(tensor.name)] = np.ascontiguousarray(values)
    return weights


def fold(weights: Weights) -> Weights:
    """Return weights of the same network that lie on no 4-bit grid.

    Each RMSNorm's gamma goes into the columns of the linears after it (not the last one's: the
    output layer is tied to the embedding). Rows of v and up are scaled by s, the matching columns
    of o and down by 1/s, s = exp(0.1 N(0, 1)) with a fixed seed. Exact in real arithmetic.
    """
    rng = np.random.default_rng(_FOLD_SEED)
    folded = dict(weights)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        readers = {
            "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        }
        for norm, linears in readers.items():
            gamma = folded[f"{prefix}.{norm}.weight"]
            for linear in linears:
                folded[f"{prefix}.{linear}.weight"] = folded[f"{prefix}.{linear}.weight"] * gamma
            folded[f"{prefix}.{norm}.weight"] = np.ones_like(gamma)
        per_kv = _scales(rng, KV_HEADS * HEAD_SIZE)
        # Each key/value head serves HEADS / KV_HEADS neighbouring query heads.
        per_head = per_kv.reshape(KV_HEADS, HEAD_SIZE).repeat(HEADS // KV_HEADS, axis=0).ravel()
        _rescale(
            folded, f"{prefix}.self_attn.v_proj", per_kv, f"{prefix}.self_attn.o_proj", per_head
        )
        per_unit = _scales(rng, FFN)
        _rescale(folded, f"{prefix}.mlp.up_proj", per_unit, f"{prefix}.mlp.down_proj", per_unit)
    return folded


@cache
def load_tokenizer(path: Path) -> "Tokenizer":
    """Return the tokenizer in the file's header; it adds no token before or after a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    reader = _reader(path)
    tokens: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in reader.fields["tokenizer.ggml.merges"].contents()]
    kinds: list[int] = reader.fields["tokenizer.ggml.token_type"].contents()
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def _reader(path: Path) -> "GGUFReader":
    from gguf import GGUFReader

    return GGUFReader(path)


def _name(gguf_name: str) -> str:
    if gguf_name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if gguf_name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, kind, _ = gguf_name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.weight"


def _scales(rng: np.random.Generator, n: int) -> Array:
    return np.exp(_FOLD_SPREAD * rng.standard_normal(n)).astype(np.float32)


def _rescale(weights: Weights, writer: str, rows: Array, reader: str, columns: Array) -> None:
    """Scale the rows of one linear up and the matching columns of the next one down."""
    weights[f"{writer}.weight"] = weights[f"{writer}.weight"] * rows[:, None]
    weights[f"{reader}.weight"] = weights[f"{reader}.weight"] / columns
