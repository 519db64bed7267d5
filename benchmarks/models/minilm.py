"""all-MiniLM-L6-v2, a sentence encoder (6 layers, hidden 384, 22.7 M parameters).

Inputs `input_ids`, `attention_mask`, `token_type_ids`: int64 [batch, sequence].
Output `last_hidden_state`: float32 [batch, sequence, 384]; a sentence is the mean over its tokens,
which the evaluator takes.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.assets import build_once, package_file
from benchmarks.models.boolq import questions
from benchmarks.packages import BIGBENCH, MINILM
from benchmarks.runtime import Array, Feeds, ModelSource, open_session

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAME = "minilm"
REVISION = 1
UTTERANCES = 693
_PREFIX = "Utterance: "
_MAX_TOKENS = 256
_BATCH = 32


def build(cache_dir: Path | None = None) -> Path:
    """Return the model, exporting it on the first call (needs `torch` and `transformers`)."""
    return build_once(NAME, REVISION, lambda path: _export(path, cache_dir), cache_dir)


def evaluate(
    source: ModelSource, limit: int = UTTERANCES, cache_dir: Path | None = None
) -> dict[str, float]:
    """Score a model on the intents of the first `limit` of 693 spoken requests, seven intents.

    Returns:
        Percentages and the number of requests:
        `zero_shot`: the nearest intent name is the right one (float model: 74.89);
        `nearest_neighbour`: the nearest other request has the same intent (float model: 87.73);
        `utterances`.
    """
    path = package_file(BIGBENCH, "intent_recognition.json", cache_dir)
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"][:limit]
    intents = list(examples[0]["target_scores"])
    texts = [example["input"].removeprefix(_PREFIX) for example in examples]
    truth = np.array([[example["target_scores"][name] for name in intents] for example in examples])
    labels = truth.argmax(axis=1)
    vectors = embed(source, texts, cache_dir)
    names = embed(source, [name.replace("_", " ") for name in intents], cache_dir)
    zero_shot = (vectors @ names.T).argmax(axis=1) == labels
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = labels[similarity.argmax(axis=1)] == labels
    return {
        "zero_shot": 100.0 * float(zero_shot.mean()),
        "nearest_neighbour": 100.0 * float(nearest.mean()),
        "utterances": float(len(texts)),
    }


def embed(source: ModelSource, texts: Sequence[str], cache_dir: Path | None = None) -> Array:
    """Return unit vectors, float32 [texts, 384]: the mean over each text's tokens, normalized."""
    session = open_session(source)
    parts = []
    for start in range(0, len(texts), _BATCH):
        feeds = encode(texts[start : start + _BATCH], cache_dir)
        hidden: Array = session.run(["last_hidden_state"], feeds)[0]
        mask = feeds["attention_mask"][..., None].astype(np.float32)
        mean = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
        parts.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(parts)


def encode(texts: Sequence[str], cache_dir: Path | None = None) -> Feeds:
    """Return the inputs for a batch of texts, padded to the longest."""
    path = package_file(MINILM, "tokenizer.json", cache_dir)
    encodings = _tokenizer(path).encode_batch(list(texts))
    ids = np.array([encoding.ids for encoding in encodings], np.int64)
    mask = np.array([encoding.attention_mask for encoding in encodings], np.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def sample_feeds(n: int, batch: int = 8, cache_dir: Path | None = None) -> list[Feeds]:
    """Return `n` padded batches of BoolQ questions; none is among the scored requests."""
    texts = questions(n * batch, cache_dir)
    return [
        encode(texts[start : start + batch], cache_dir) for start in range(0, len(texts), batch)
    ]


@cache
def _tokenizer(path: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    # The file asks for a fixed length of 128; a batch is padded to its own longest text instead.
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(_MAX_TOKENS)
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    return tokenizer


def _export(path: Path, cache_dir: Path | None) -> None:
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    from benchmarks.models.torch_export import export

    config = BertConfig.from_json_file(str(package_file(MINILM, "config.json", cache_dir)))
    model = BertModel(config, add_pooling_layer=False)
    weights = load_file(package_file(MINILM, "model.safetensors", cache_dir))
    unused = ("pooler.", "embeddings.position_ids")
    model.load_state_dict({k: v for k, v in weights.items() if not k.startswith(unused)})
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    export(model, path, inputs=inputs, output="last_hidden_state", max_sequence=512)
