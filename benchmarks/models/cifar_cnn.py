"""A Keras CNN for CIFAR-10 (0.97 M parameters), written out as ONNX by hand.

Six 3x3 convolutions without padding, each `Conv -> Relu -> BatchNormalization`: the activation is
inside the Keras convolution, so a batch norm can be folded *forward* into the next Conv or Gemm,
never into its own Conv. Then three dense layers; the last has a Relu of its own, and the Softmax
after it is added here.

Input `images`: float32 [batch, 3, 32, 32], RGB, 0..255.
Output `probabilities`: float32 [batch, 10], in the order of `CLASSES`.
"""

import base64
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.assets import build_once, package_file
from benchmarks.packages import BIGBENCH, CIFAR_CNN
from benchmarks.runtime import Array, Feeds, ModelSource, open_session

NAME = "cifar_cnn"
REVISION = 1
TEST_IMAGES = 10_000
CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_PER_CLASS = TEST_IMAGES // len(CLASSES)
_OPSET = 18
_IR_VERSION = 8
_BATCH = 100


def build(cache_dir: Path | None = None) -> Path:
    """Return the model, building it on the first call (which needs `h5py`)."""
    return build_once(NAME, REVISION, lambda path: _write_model(path, cache_dir), cache_dir)


def evaluate(
    source: ModelSource, limit: int = TEST_IMAGES, cache_dir: Path | None = None
) -> dict[str, float]:
    """Score a model on the first `limit` of the 10,000 test images, as `read_images` counts them.

    Returns:
        `top1` in percent, and `images`, their number. The float model scores 80.14.
    """
    session = open_session(source)
    hits = 0
    for start in range(0, limit, _BATCH):
        images, labels = read_images(start, min(start + _BATCH, limit), cache_dir)
        probabilities: Array = session.run(["probabilities"], {"images": images})[0]
        hits += int((probabilities.argmax(axis=1) == labels).sum())
    return {"top1": 100.0 * hits / limit, "images": float(limit)}


def sample_feeds(n: int, batch: int = 8, seed: int = 0) -> list[Feeds]:
    """Return `n` batches of smooth random pictures; needs no data set, so tests can use it.

    Their spectrum falls off as 1/f, as that of photographs does, and the channels are correlated.
    """
    rng = np.random.default_rng(seed)
    return [{"images": _random_pictures(rng, batch)} for _ in range(n)]


def image_feeds(
    n: int, batch: int = 8, start: int = 0, cache_dir: Path | None = None
) -> list[Feeds]:
    """Return `n` batches of test images, from number `start` on; for evaluation only."""
    starts = range(start, start + n * batch, batch)
    return [{"images": read_images(first, first + batch, cache_dir)[0]} for first in starts]


def read_images(start: int, stop: int, cache_dir: Path | None = None) -> tuple[Array, Array]:
    """Return test images `start` to `stop` as float32 [n, 3, 32, 32], and their class numbers.

    The data set is sorted by class. Here the classes take turns, so that any stretch of images is
    balanced: image k is the one numbered k // 10 of class k % 10.

    Raises:
        ValueError: There are no such images.
    """
    if not 0 <= start < stop <= TEST_IMAGES:
        message = f"the test images are numbers 0 to {TEST_IMAGES - 1}, not {start} to {stop - 1}"
        raise ValueError(message)
    from PIL import Image

    images, labels = [], []
    path = package_file(BIGBENCH, "cifar10_test.json", cache_dir)
    examples = _examples(path)
    for number in range(start, stop):
        example = examples[number % len(CLASSES) * _PER_CLASS + number // len(CLASSES)]
        with Image.open(io.BytesIO(base64.b64decode(example["input"]))) as picture:
            images.append(np.asarray(picture.convert("RGB"), np.float32).transpose(2, 0, 1))
        scores: dict[str, int] = example["target_scores"]
        labels.append(CLASSES.index(max(scores, key=scores.__getitem__)))
    return np.stack(images), np.array(labels)


@cache
def _examples(path: Path) -> list[dict[str, Any]]:
    examples: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["examples"]
    return examples


def _random_pictures(rng: np.random.Generator, batch: int) -> Array:
    frequency = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.rfftfreq(32)[None, :])
    frequency[0, 0] = 1 / 32
    spectrum = np.fft.rfft2(rng.standard_normal((batch, 4, 32, 32))) / frequency
    planes = np.fft.irfft2(spectrum, s=(32, 32))
    planes /= planes.std(axis=(2, 3), keepdims=True)
    # Three colours share most of one brightness plane.
    colours = 0.9 * planes[:, :1] + 0.4 * planes[:, 1:]
    level = rng.uniform(90, 160, (batch, 1, 1, 1))
    return np.clip(level + 60 * colours, 0, 255).round().astype(np.float32)


class _GraphWriter:
    """Collects the nodes of a chain: each takes the value that the one before made."""

    def __init__(self, value: str) -> None:
        self.value = value
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, op_type: str, name: str, *weights: tuple[str, Array], **attributes: Any) -> None:
        inputs = [self.value]
        for suffix, values in weights:
            inputs.append(f"{name}.{suffix}")
            tensor = np.ascontiguousarray(values, np.float32)
            self.initializers.append(numpy_helper.from_array(tensor, inputs[-1]))
        self.value = f"{name}_output"
        self.nodes.append(helper.make_node(op_type, inputs, [self.value], name, **attributes))


def _write_model(path: Path, cache_dir: Path | None) -> None:
    import h5py

    writer = _GraphWriter("images")
    with h5py.File(package_file(CIFAR_CNN, "cnn_model.h5", cache_dir)) as file:
        for layer in json.loads(file.attrs["model_config"])["config"]["layers"]:
            name = layer["config"]["name"]
            group = file["model_weights"].get(f"{name}/{name}", {})
            weights = {key.removesuffix(":0"): np.asarray(group[key]) for key in group}
            _add_layer(writer, layer["class_name"], layer["config"], weights)
    writer.add("Softmax", "softmax", axis=1)
    writer.nodes[-1].output[0] = "probabilities"
    graph = helper.make_graph(
        writer.nodes,
        NAME,
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10])],
        writer.initializers,
    )
    opset = helper.make_opsetid("", _OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _add_layer(
    writer: _GraphWriter, kind: str, config: dict[str, Any], weights: dict[str, Array]
) -> None:
    """Write one Keras layer; the layers of this network use no padding and no strides."""
    name = config["name"]
    if kind == "Conv2D":
        kernel = weights["kernel"].transpose(3, 2, 0, 1)
        writer.add("Conv", name, ("weight", kernel), ("bias", weights["bias"]))
    elif kind == "BatchNormalization":
        order = ("gamma", "beta", "moving_mean", "moving_variance")
        statistics = [(key, weights[key]) for key in order]
        writer.add(kind, name, *statistics, epsilon=config["epsilon"])
    elif kind == "MaxPooling2D":
        shape = {"kernel_shape": config["pool_size"], "strides": config["strides"]}
        writer.add("MaxPool", name, **shape)
    elif kind == "Flatten":
        # What arrives is [batch, 64, 1, 1], so the order of channels and pixels does not matter.
        writer.add("Flatten", name, axis=1)
    elif kind == "Dense":
        writer.add("Gemm", name, ("weight", weights["kernel"]), ("bias", weights["bias"]))
    elif kind not in {"InputLayer", "Dropout"}:
        message = f"{CIFAR_CNN.requirement} has a layer of unknown kind {kind!r}"
        raise ValueError(message)
    if config.get("activation") == "relu":
        writer.add("Relu", f"{name}_relu")
