"""Every real model by name: how to get it, and what getting it takes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from benchmarks.assets import model_path
from benchmarks.models import cifar_cnn, minilm, silero_vad, smollm2


@dataclass(frozen=True, slots=True)
class RealModel:
    """A model that can be built.

    Attributes:
        name: Its name, and its file's without `.onnx`.
        build: Returns its path; takes the cache folder (None: the user's own).
        needs: Modules that must be importable to build it, though not to use it once built.
        revision: Revision of what is built, or None for a file taken as it ships.
    """

    name: str
    build: Callable[[Path | None], Path]
    needs: tuple[str, ...] = ()
    revision: int | None = None

    def is_built(self, cache_dir: Path | None = None) -> bool:
        """Whether a built model is in the cache (False for one that ships ready)."""
        if self.revision is None:
            return False
        return model_path(self.name, self.revision, cache_dir).is_file()

    def missing_modules(self) -> list[str]:
        """Return the modules without which the model cannot be built."""
        return [module for module in self.needs if find_spec(module) is None]


def _silero(variant: silero_vad.Variant) -> RealModel:
    name = "silero_vad" if variant == "vad" else f"silero_vad_{variant}"
    return RealModel(name, partial(silero_vad.build, variant))


def _smollm2(variant: smollm2.Variant) -> RealModel:
    return RealModel(
        f"smollm2_{variant}",
        partial(smollm2.build, variant),
        ("gguf", "torch", "transformers"),
        smollm2.REVISION,
    )


_MODELS = (
    *(_silero(variant) for variant in silero_vad.VARIANTS),
    RealModel(cifar_cnn.NAME, cifar_cnn.build, ("h5py",), cifar_cnn.REVISION),
    RealModel(minilm.NAME, minilm.build, ("safetensors", "torch", "transformers"), minilm.REVISION),
    _smollm2("raw"),
    _smollm2("folded"),
)

CATALOG: dict[str, RealModel] = {model.name: model for model in _MODELS}
