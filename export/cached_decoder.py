"""A causal language model whose keys and values of earlier tokens are inputs and outputs.

The cache keeps every token in every layer. Layers with a sliding window mask what lies outside of
it, and give the same outputs as with a cache that forgets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import DynamicCache, PreTrainedModel

from qcompiler.errors import ModelError
from qcompiler.export.facade import Facade

_RANK: Final = 4


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Sizes of the keys and values that one layer keeps: [batch, heads, tokens, channels].

    Attributes:
        heads: Heads of keys and values; fewer than those of queries where heads share them.
        key_channels: Channels of a key.
        value_channels: Channels of a value.
    """

    heads: int
    key_channels: int
    value_channels: int


class CachedDecoder(Facade):
    """A causal language model with the inputs and outputs of a step of decoding.

    Inputs: the named ones, then `past_key_values.{i}.key` and `.value` of every layer,
    [batch, heads, past tokens, channels]. Outputs: `logits` [batch, tokens, vocabulary], then
    `present.{i}.key` and `.value`, which are the past of the next step.

    Args:
        model: A causal language model of transformers.
        inputs: `input_ids` [batch, tokens], `attention_mask` [batch, past + new tokens], and
            `position_ids` [batch, tokens] if the model takes it.

    Raises:
        ModelError: The model keeps something else than keys and values from token to token.
    """

    def __init__(self, model: PreTrainedModel, inputs: Sequence[str]) -> None:
        super().__init__(model, inputs, ("logits",), {"use_cache": True})
        self.layers_cached = self._probe()

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return logits and the grown cache."""
        count = len(self._inputs)
        past = values[count:]
        pairs = list(zip(past[::2], past[1::2], strict=True))
        keywords = dict(zip(self._inputs, values[:count], strict=True))
        # Its length is free for the tracer, which would otherwise conclude that it is at least
        # the smallest past and the fewest new tokens that it takes for variable.
        tokens = past[0].shape[2] + keywords["input_ids"].shape[1]
        keywords["attention_mask"] = keywords["attention_mask"][:, torch.arange(tokens)]
        logits, layers = self._step(keywords, pairs)
        return logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))

    @property
    def cache_names(self) -> tuple[str, ...]:
        """Names of the cache's tensors without what says past or present: `0.key`, `0.value`."""
        layers = range(len(self.layers_cached))
        return tuple(f"{i}.{kind}" for i in layers for kind in ("key", "value"))

    def empty_cache(self, batch: int, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return uninitialized tensors of a cache that holds `length` tokens."""
        return [
            torch.empty(batch, layer.heads, length, channels, dtype=dtype)
            for layer in self.layers_cached
            for channels in (layer.key_channels, layer.value_channels)
        ]

    def _step(
        self, keywords: dict[str, Any], past: list[tuple[torch.Tensor, torch.Tensor]] | None
    ) -> tuple[torch.Tensor, list[Any]]:
        # Made without the model's configuration, so that all layers keep all tokens.
        cache = DynamicCache(past)
        result = self.call({**keywords, "past_key_values": cache})
        return result["logits"], list(cache.layers)

    def _probe(self) -> tuple[LayerCache, ...]:
        """Run two tokens, to see what the model keeps of them."""
        ids = torch.zeros((1, 2), dtype=torch.int64)
        keywords = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            try:
                _, layers = self._step(keywords, None)
                caches = [_sizes(layer.keys, layer.values) for layer in layers]
            except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
                message = "keeps more than keys and values from token to token"
                hint = "export it without a cache"
                raise ModelError(message, where=type(self._model[0]).__name__, hint=hint) from error
        if not caches:
            message = "keeps no keys and values in a cache that is given to it"
            hint = "export it without a cache"
            raise ModelError(message, where=type(self._model[0]).__name__, hint=hint)
        return tuple(caches)


def _sizes(keys: torch.Tensor, values: torch.Tensor) -> LayerCache:
    if keys.ndim != _RANK or values.ndim != _RANK or keys.shape[2] != 2:
        message = f"a cache of shape {list(keys.shape)}"
        raise ValueError(message)
    return LayerCache(keys.shape[1], keys.shape[3], values.shape[3])
