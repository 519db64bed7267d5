"""Models of transformers as graphs: a folder on disk or the name of a repository on the hub.

Weights come from safetensors files only, since unpickling `.bin` files runs code of whoever made
them, and code that lies beside a checkpoint runs only if it is asked for.
"""

import contextlib
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qcompiler.errors import ModelError, UsageError
from qcompiler.export.exported import Exported, SideFile

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from qcompiler.export.huggingface_tasks import Interface, Task

DTYPES: Final = ("float32", "float16", "bfloat16")
"""Element types that weights and activations can have."""
_HUB_NAME: Final = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_SIDE_FILES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
_NEVER_USED: Final = ("pooler.",)
"""Weights that may be missing: what they make is no output of any task."""


def from_huggingface(
    source: str | Path,
    task: str | None = None,
    *,
    with_cache: bool = True,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    opset: int = 21,
) -> Exported:
    """Export a model of transformers.

    Attention is exported as products and softmax, with masks computed in the graph. Inputs and
    outputs by task; sizes in quotes are dynamic:

    - causal-lm: `input_ids`, `attention_mask`, `position_ids` and the past, see `CachedDecoder`;
      without a cache `input_ids` and `attention_mask`, both ["batch", "sequence"]. `logits`.
    - masked-lm, sequence-classification: `input_ids`, `attention_mask` and, where the model has
      several types of them, `token_type_ids`, all ["batch", "sequence"]. `logits`.
    - image-classification: `pixel_values` ["batch", channels, height, width]. `logits`.
    - feature-extraction: the inputs above that the model takes. `last_hidden_state`.
    - speech-encoder: `input_values` ["batch", "samples"], or `input_features` ["batch", bins,
      frames] for Whisper's encoder. `last_hidden_state`.

    Args:
        source: A folder with `config.json` and safetensors files, or a repository on the hub.
        task: One of the above; None for what the checkpoint's architecture is made for.
        with_cache: Whether a causal language model takes and returns keys and values.
        dtype: float32, float16 or bfloat16: type of weights, activations and float inputs.
        trust_remote_code: Whether Python code that lies beside the checkpoint may run.
        opset: Version of the standard operators.

    Raises:
        UsageError: The source, task or type cannot be used, or transformers is not installed.
        ModelError: The checkpoint lacks weights, or its model cannot be exported for the task.
    """
    _require_packages()
    if dtype not in DTYPES:
        message = f"there is no type {dtype!r} for weights"
        raise UsageError(message, hint=f"name one of: {', '.join(DTYPES)}")
    name = _check_source(source)
    from qcompiler.export.huggingface_tasks import describe, find_task

    config = _load_config(name, trust_remote_code)
    row = find_task(task, config)
    model = _load_model(name, row, config, dtype, trust_remote_code)
    files = _side_files(name)
    interface = describe(row, model, with_cache=with_cache, image_size=_image_size(files))
    return export_interface(interface, files, opset)


def export_interface(
    interface: "Interface", files: tuple[SideFile, ...], opset: int, notes: tuple[str, ...] = ()
) -> Exported:
    """Export a module whose inputs and outputs are described."""
    from qcompiler.export.from_torch import from_torch

    model = from_torch(
        interface.module,
        interface.examples[0],
        # One element, for the one variadic parameter of forward.
        dynamic_shapes=(interface.axes,),
        input_names=interface.inputs,
        output_names=interface.outputs,
        opset=opset,
    )
    return Exported(model, interface.module, interface.examples, files, notes)


def _require_packages() -> None:
    for package in ("torch", "transformers", "safetensors"):
        if importlib.util.find_spec(package) is None:
            message = f"reading a checkpoint of transformers needs {package}"
            raise UsageError(message, hint="pip install 'qcompiler[transformers]'")


def _check_source(source: str | Path) -> str:
    """Return what transformers is to load, after what can be said without it."""
    path = Path(source).expanduser()
    if path.is_dir():
        _check_folder(path)
        return str(path)
    where = str(source)
    if path.exists():
        message = "is a file, and a checkpoint of transformers is a folder"
        raise UsageError(message, where=where, hint="name the folder; .gguf files have from_gguf")
    if isinstance(source, Path) or not _HUB_NAME.fullmatch(source):
        message = "there is no such folder, and it is no name of a repository"
        raise UsageError(message, where=where, hint="name a folder that holds config.json")
    return source


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        message = "holds no config.json, so it is no checkpoint of transformers"
        raise UsageError(message, where=str(folder), hint="name a folder of save_pretrained")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = f"weights as {pickles[0]}, a pickle that may run code" if pickles else "no weights"
        message = f"holds {found}, and only safetensors are read"
        hint = "model.save_pretrained(folder) writes safetensors"
        raise UsageError(message, where=str(folder), hint=hint)


def _load_config(name: str, trust_remote_code: bool) -> "PreTrainedConfig":
    from transformers import AutoConfig

    with _faults(name):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            name, trust_remote_code=trust_remote_code
        )
    if getattr(config, "quantization_config", None):
        message = "the checkpoint is quantized already"
        raise ModelError(message, where=name, hint="export the float checkpoint it was made from")
    return config


def _load_model(
    name: str, task: "Task", config: "PreTrainedConfig", dtype: str, trust_remote_code: bool
) -> "PreTrainedModel":
    import torch
    import transformers

    with _faults(name), _quiet():
        model, loading = getattr(transformers, task.auto_class).from_pretrained(
            name,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    missing = sorted(key for key in loading["missing_keys"] if not _is_unused(key))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        message = f"lacks weights that a {task.name} model has: {missing[0]}{more}"
        raise ModelError(message, where=name, hint="choose the task it was trained for")
    result: PreTrainedModel = model
    return result


def _is_unused(key: str) -> bool:
    return any(key.startswith(prefix) or f".{prefix}" in key for prefix in _NEVER_USED)


@contextlib.contextmanager
def _faults(name: str) -> Iterator[None]:
    """Turn what transformers raises on a checkpoint that it cannot read into a UsageError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        message = f"transformers cannot read it: {reason}"
        hint = "check the folder or the name; code beside a checkpoint runs only if it is trusted"
        raise UsageError(message, where=name, hint=hint) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _side_files(name: str) -> tuple[SideFile, ...]:
    """Return configuration and tokenizer of a checkpoint: what it has of them."""
    from transformers.utils.hub import cached_file

    files = []
    for file in _SIDE_FILES:
        path = cached_file(
            name,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if path is not None:
            files.append(SideFile(file, Path(path).read_bytes()))
    return tuple(files)


def _image_size(files: tuple[SideFile, ...]) -> int:
    """Return the height of images after preprocessing; 0 if nothing says it."""
    for file in files:
        if file.name == "preprocessor_config.json":
            with contextlib.suppress(ValueError):
                return _square_size(json.loads(file.data))
    return 0


def _square_size(preprocessing: Any) -> int:
    if isinstance(preprocessing, dict):
        for key in ("crop_size", "size"):
            size = preprocessing.get(key)
            if isinstance(size, dict):
                size = size.get("height") or size.get("shortest_edge")
            if isinstance(size, int):
                return size
    return 0
