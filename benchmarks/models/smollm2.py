"""SmolLM2-135M-Instruct, a small Llama (30 layers, hidden 576, tied embedding).

What the package ships is the 4-bit release, so the float baseline is "the 4-bit release,
dequantized". Two variants compute the same function: `raw` has the weights as released, `folded`
has them rewritten off their 4-bit grid (see `smollm2_checkpoint`). Report both.

Inputs `input_ids`, `attention_mask`: int64 [batch, sequence].
Output `logits`: float32 [batch, sequence, 49152].
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from benchmarks.assets import build_once, package_file
from benchmarks.models import smollm2_checkpoint as checkpoint
from benchmarks.models.boolq import passages
from benchmarks.packages import SMOLLM2
from benchmarks.runtime import Array, Feeds, ModelSource, open_session

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Variant = Literal["raw", "folded"]

REVISION = 1
CONTEXT = 512
QUICK_WINDOWS = 8
FULL_WINDOWS = 40
_CHARACTERS_PER_TOKEN = 8


def build(variant: Variant = "raw", cache_dir: Path | None = None) -> Path:
    """Return a variant, exporting it on the first call (needs `gguf`, `torch`, `transformers`)."""
    name = f"smollm2_{variant}"
    return build_once(name, REVISION, lambda path: _export(path, variant, cache_dir), cache_dir)


def evaluate(
    source: ModelSource, limit: int = QUICK_WINDOWS, cache_dir: Path | None = None
) -> dict[str, float]:
    """Return the perplexity on the first `limit` windows of 512 tokens of BoolQ paragraphs.

    The paragraphs are joined with newlines and cut into windows that do not overlap; in each, every
    token but the first is predicted.

    Returns:
        `perplexity` (float model: 20.53 over 8 windows, 19.64 over 40), and `windows`.
    """
    session = open_session(source)
    losses = []
    for ids in token_windows(limit, CONTEXT, cache_dir=cache_dir):
        logits: Array = session.run(["logits"], _feeds(ids[None]))[0][0, :-1]
        losses.append(_cross_entropy(logits, ids[1:]))
    return {"perplexity": float(np.exp(np.mean(losses))), "windows": float(limit)}


def sample_feeds(
    n: int, batch: int = 1, length: int = 128, cache_dir: Path | None = None
) -> list[Feeds]:
    """Return `n` batches of token windows from paragraphs that `evaluate` does not read."""
    second_half = len(passages(cache_dir)) // 2
    ids = token_windows(n * batch, length, first_passage=second_half, cache_dir=cache_dir)
    return [_feeds(part) for part in ids.reshape(n, batch, length)]


def token_windows(
    count: int, length: int, *, first_passage: int = 0, cache_dir: Path | None = None
) -> Array:
    """Return consecutive token windows of the paragraphs from `first_passage` on.

    Returns:
        int64 [count, length].

    Raises:
        ValueError: There is not that much text.
    """
    tokenizer = checkpoint.load_tokenizer(checkpoint_path(cache_dir))
    needed = count * length
    text = "\n".join(passages(cache_dir)[first_passage:])[: needed * _CHARACTERS_PER_TOKEN]
    ids = tokenizer.encode(text).ids
    if len(ids) < needed:
        message = f"the text has {len(ids) // length} windows of {length} tokens, not {count}"
        raise ValueError(message)
    return np.array(ids[:needed], np.int64).reshape(count, length)


def _feeds(ids: Array) -> Feeds:
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _cross_entropy(logits: Array, targets: Array) -> float:
    """Return the mean of -log softmax(logits)[target] over the rows."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    normalizer = np.log(np.exp(shifted).sum(axis=1, dtype=np.float64))
    picked = shifted[np.arange(len(targets)), targets]
    return float((normalizer - picked).mean())


def checkpoint_path(cache_dir: Path | None) -> Path:
    """Return the file that the package ships, weights and tokenizer."""
    return package_file(SMOLLM2, "SmolLM2-135M-Instruct.Q4_1.gguf", cache_dir)


def module(
    variant: Variant = "raw", attention: str = "sdpa", cache_dir: Path | None = None
) -> "LlamaForCausalLM":
    """Return a variant as transformers runs it (needs `gguf`, `torch`, `transformers`)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    weights = checkpoint.load_weights(checkpoint_path(cache_dir))
    if variant == "folded":
        weights = checkpoint.fold(weights)
    config = LlamaConfig(**checkpoint.load_config(), attn_implementation=attention)
    model = LlamaForCausalLM(config).eval()
    tensors = {name: torch.from_numpy(values) for name, values in weights.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model


def _export(path: Path, variant: Variant, cache_dir: Path | None) -> None:
    from benchmarks.models.torch_export import export

    model = module(variant, cache_dir=cache_dir)
    export(
        model,
        path,
        inputs=("input_ids", "attention_mask"),
        output="logits",
        max_sequence=8192,
        external_data=True,
        use_cache=False,
    )
