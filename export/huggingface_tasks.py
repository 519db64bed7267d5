"""What a transformers model is exported for: its inputs, outputs and example calls.

A task names the class that reads the checkpoint and the outputs to keep; the inputs follow from
what the model takes first: tokens, an image, or sound.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from qcompiler.errors import ModelError, UsageError
from qcompiler.export.cached_decoder import CachedDecoder
from qcompiler.export.facade import Facade

Call = tuple[torch.Tensor, ...]
Axes = Mapping[int, str]

_SEED: Final = 0
_IMAGE_SIZE: Final = 224
_SECOND: Final = 16_000
"""Samples of a second at the rate that wav2vec2 and its relatives take."""


@dataclass(frozen=True, slots=True)
class Task:
    """One row of the table.

    Attributes:
        name: What users call it.
        auto_class: Class of transformers that reads the checkpoint.
        endings: How the names of architectures end that are exported for it unless told otherwise.
        output: Field of the model's result that the graph returns.
    """

    name: str
    auto_class: str
    endings: tuple[str, ...]
    output: str


TASKS: Final = (
    Task("causal-lm", "AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), "logits"),
    Task("masked-lm", "AutoModelForMaskedLM", ("ForMaskedLM",), "logits"),
    Task(
        "sequence-classification",
        "AutoModelForSequenceClassification",
        ("ForSequenceClassification",),
        "logits",
    ),
    Task(
        "image-classification",
        "AutoModelForImageClassification",
        ("ForImageClassification",),
        "logits",
    ),
    Task("feature-extraction", "AutoModel", ("Model",), "last_hidden_state"),
    Task("speech-encoder", "AutoModel", (), "last_hidden_state"),
)


@dataclass(frozen=True, slots=True)
class Interface:
    """What a graph takes and returns.

    Attributes:
        module: Takes the inputs by position and returns a tuple of the outputs.
        inputs: Names, in order.
        outputs: Names, in order.
        axes: For each input, the names of its dynamic axes.
        examples: Calls of several shapes; the first one fits the tracing of all.
    """

    module: Facade
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: tuple[Axes, ...]
    examples: tuple[Call, ...]


def find_task(name: str | None, config: PreTrainedConfig) -> Task:
    """Return the task of this name, or the one that the checkpoint's architecture is made for.

    Raises:
        UsageError: There is no such task, or the architecture is made for none of them.
    """
    hint = f"name one of: {', '.join(task.name for task in TASKS)}"
    if name is not None:
        for task in TASKS:
            if task.name == name:
                return task
        message = f"there is no task {name!r}"
        raise UsageError(message, hint=hint)
    architectures = getattr(config, "architectures", None) or []
    for architecture in architectures:
        for task in TASKS:
            if architecture.endswith(task.endings) and not config.is_encoder_decoder:
                return task
    message = (
        f"the task cannot be told from the architecture {', '.join(architectures) or '(none)'}"
    )
    raise UsageError(message, where="config.json", hint=hint)


def describe(task: Task, model: PreTrainedModel, *, with_cache: bool, image_size: int) -> Interface:
    """Return how a model is exported for a task.

    Args:
        task: The task.
        model: Its model.
        with_cache: Whether a causal language model takes and returns keys and values.
        image_size: Height and width of images if the model's configuration has none; 0 for 224.

    Raises:
        ModelError: The model takes inputs that are unknown here, or cannot have a cache.
    """
    if model.config.is_encoder_decoder:
        if task.name != "speech-encoder":
            message = f"is an encoder with a decoder, which is no {task.name} model"
            raise ModelError(message, where=type(model).__name__)
        model = model.get_encoder()
    if task.name == "causal-lm" and with_cache:
        return _cached(model)
    kind = model.main_input_name
    if kind not in _INTERFACES:
        message = f"takes {kind}, and only {', '.join(_INTERFACES)} are known"
        raise ModelError(message, where=type(model).__name__)
    return _INTERFACES[kind](task, model, image_size)


def _tokens(task: Task, model: PreTrainedModel, _: int) -> Interface:
    names = ["input_ids", "attention_mask"]
    if getattr(model.config, "type_vocab_size", 0) > 1 and _takes(model, "token_type_ids"):
        names.append("token_type_ids")
    options = {"use_cache": False} if _takes(model, "use_cache") else {}
    random = _Random(model)
    examples = []
    for batch, length in ((2, 7), (1, 12), (3, 3)):
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[1:, -length // 3 :] = 0
        call = {"input_ids": random.tokens(batch, length), "attention_mask": mask}
        call["token_type_ids"] = torch.arange(length).ge(length // 2).long().expand(batch, length)
        examples.append(tuple(call[name].contiguous() for name in names))
    axes = {0: "batch", 1: "sequence"}
    return Interface(
        Facade(model, names, (task.output,), options),
        tuple(names),
        (task.output,),
        (axes,) * len(names),
        tuple(examples),
    )


def _cached(model: PreTrainedModel) -> Interface:
    names = ["input_ids", "attention_mask"]
    if _takes(model, "position_ids"):
        names.append("position_ids")
    module = CachedDecoder(model, names)
    axes: list[Axes] = [{0: "batch", 1: "sequence"}] * len(names)
    axes[1] = {0: "batch", 1: "total_sequence"}
    axes += [{0: "batch", 2: "past_sequence"}] * len(module.cache_names)
    examples = []
    random = _Random(model)
    for rows, length, before in ((2, 3, 5), (1, 4, 0), (3, 1, 6)):
        mask = torch.ones(rows, before + length, dtype=torch.int64)
        mask[1:, : before // 2] = 0
        call = {"input_ids": random.tokens(rows, length), "attention_mask": mask}
        call["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, before:].contiguous()
        cache = [random.like(t) for t in module.empty_cache(rows, before, model.dtype)]
        examples.append((*(call[name] for name in names), *cache))
    return Interface(
        module,
        (*names, *(f"past_key_values.{name}" for name in module.cache_names)),
        ("logits", *(f"present.{name}" for name in module.cache_names)),
        tuple(axes),
        tuple(examples),
    )


def _image(task: Task, model: PreTrainedModel, image_size: int) -> Interface:
    config = model.config
    size = getattr(config, "image_size", None) or image_size or _IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    shape = (config.num_channels, height, width)
    return _batches_of(task, model, shape)


def _spectrogram(task: Task, model: PreTrainedModel, _: int) -> Interface:
    encoder: Any = model
    stride = encoder.conv1.stride[0] * encoder.conv2.stride[0]
    frames = model.config.max_source_positions * stride
    return _batches_of(task, model, (model.config.num_mel_bins, frames))


def _batches_of(task: Task, model: PreTrainedModel, shape: tuple[int, ...]) -> Interface:
    """Return the interface of a model of one input, of which only the number of rows is free."""
    random = _Random(model)
    name = model.main_input_name
    return Interface(
        Facade(model, (name,), (task.output,), {}),
        (name,),
        (task.output,),
        ({0: "batch"},),
        tuple((random.numbers(rows, *shape),) for rows in (2, 1, 3)),
    )


def _samples(task: Task, model: PreTrainedModel, _: int) -> Interface:
    random = _Random(model)
    name = model.main_input_name
    return Interface(
        Facade(model, (name,), (task.output,), {}),
        (name,),
        (task.output,),
        ({0: "batch", 1: "samples"},),
        tuple(
            (random.numbers(rows, length),)
            for rows, length in ((2, _SECOND), (1, _SECOND // 2), (3, _SECOND // 4 + 123))
        ),
    )


_INTERFACES: Final[Mapping[str, Callable[[Task, PreTrainedModel, int], Interface]]] = {
    "input_ids": _tokens,
    "pixel_values": _image,
    "input_values": _samples,
    "input_features": _spectrogram,
}


class _Random:
    """Random inputs of a model, the same in every run."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._generator = torch.Generator().manual_seed(_SEED)
        self._dtype = model.dtype
        self._vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)

    def tokens(self, *shape: int) -> torch.Tensor:
        return torch.randint(0, self._vocabulary, shape, generator=self._generator)

    def numbers(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self._dtype)

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.numbers(*tensor.shape)


def _takes(model: PreTrainedModel, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters
