"""Train the digits example and write its model and data.

Writes `digits.onnx`, `test_data.npz` and `calibration.npz` next to this script, or to
`--output-dir`. Every random choice is seeded and training runs on one thread, so a second run with
the same package versions on the same processor writes the same bytes.

Needs torch, onnx, onnxscript and scikit-learn; using the written files needs none of them.
"""
# mypy: allow-subclassing-any, disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import (
    LiftConstantsToInitializersPass,
    NameFixPass,
    RemoveUnusedNodesPass,
)
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import (
    materialize_reshape_shape_rule,
    remove_optional_bias_from_conv_rule,
)
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

SEED = 20
OPSET_VERSION = 20
EPOCHS = 40
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 4e-3
TEST_FRACTION = 0.25
CALIBRATION_SIZE = 256
KEPT_METADATA = frozenset({"pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy"})


@dataclass(frozen=True)
class Split:
    """The three disjoint uses of the data set; calibration images are also training images.

    Attributes:
        train_image: float32 [1347, 1, 8, 8], values in [0, 1].
        train_label: int64 [1347].
        test_image: float32 [450, 1, 8, 8], values in [0, 1].
        test_label: int64 [450].
        calibration_image: float32 [256, 1, 8, 8], a class-balanced subset of `train_image`.
    """

    train_image: npt.NDArray[np.float32]
    train_label: npt.NDArray[np.int64]
    test_image: npt.NDArray[np.float32]
    test_label: npt.NDArray[np.int64]
    calibration_image: npt.NDArray[np.float32]


class ConvBlock(nn.Module):
    """Convolution without bias, BatchNorm, and Relu unless `relu` is false."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        *,
        groups: int = 1,
        relu: bool = True,
    ) -> None:
        """Build a block of stride 1 that keeps height and width."""
        super().__init__()
        self.conv = nn.Conv2d(
            channels_in, channels_out, kernel, padding=kernel // 2, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU() if relu else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, channels_in, h, w] to [batch, channels_out, h, w]."""
        y: Tensor = self.norm(self.conv(x))
        return y if self.relu is None else self.relu(y)


class ResidualBlock(nn.Module):
    """Two 3x3 blocks whose output is added to their input before the last Relu."""

    def __init__(self, channels: int) -> None:
        """Build a block over `channels` channels."""
        super().__init__()
        self.first = ConvBlock(channels, channels, 3)
        self.second = ConvBlock(channels, channels, 3, relu=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, channels, h, w] to the same shape."""
        y: Tensor = self.relu(x + self.second(self.first(x)))
        return y


class DigitsNet(nn.Module):
    """A small network with the operators a quantizer meets most often."""

    def __init__(self) -> None:
        """Build the network with PyTorch's default initialization."""
        super().__init__()
        self.stem = ConvBlock(1, 32, 3)
        self.residual = ResidualBlock(32)
        self.pool = nn.MaxPool2d(2)
        self.depthwise = ConvBlock(32, 32, 3, groups=32)
        self.pointwise = ConvBlock(32, 96, 1)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.hidden1 = nn.Linear(96, 384)
        self.hidden2 = nn.Linear(384, 128)
        self.classifier = nn.Linear(128, 10)
        self.relu = nn.ReLU()

    def forward(self, image: Tensor) -> Tensor:
        """Map images [batch, 1, 8, 8] in [0, 1] to logits [batch, 10]."""
        x = self.pool(self.residual(self.stem(image)))
        x = self.average(self.pointwise(self.depthwise(x)))
        x = torch.flatten(x, 1)
        x = self.relu(self.hidden1(x))
        x = self.relu(self.hidden2(x))
        logits: Tensor = self.classifier(x)
        return logits


def load_split() -> Split:
    """Load scikit-learn's digits, scale 0..16 to [0, 1], and split by class."""
    digits = load_digits()
    image = (digits.data / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    label = digits.target.astype(np.int64)
    train_image, test_image, train_label, test_label = train_test_split(
        image, label, test_size=TEST_FRACTION, stratify=label, random_state=SEED
    )
    calibration_image, _ = train_test_split(
        train_image, train_size=CALIBRATION_SIZE, stratify=train_label, random_state=SEED
    )
    return Split(train_image, train_label, test_image, test_label, calibration_image)


def shift_images(image: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image of [batch, 1, 8, 8] by -1, 0 or 1 pixel along both axes, padding with 0."""
    padded = functional.pad(image, (1, 1, 1, 1))
    rows, columns = torch.randint(0, 3, (2, len(image)), generator=generator)
    span = torch.arange(8)
    row_index = (rows[:, None] + span)[:, :, None]
    column_index = (columns[:, None] + span)[:, None, :]
    batch_index = torch.arange(len(image))[:, None, None]
    return padded[batch_index, 0, row_index, column_index][:, None]


def train(split: Split) -> DigitsNet:
    """Train on the training part only, for a fixed number of epochs, and return the eval model."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(mode=True)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    image = torch.from_numpy(split.train_image)
    label = torch.from_numpy(split.train_label)
    model = DigitsNet()
    steps_per_epoch = len(image) // BATCH_SIZE
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=EPOCHS * steps_per_epoch
    )
    model.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(image), generator=generator)
        # The incomplete last batch is left out; the next epoch's order covers it.
        for index in order[: steps_per_epoch * BATCH_SIZE].view(-1, BATCH_SIZE):
            logits = model(shift_images(image[index], generator))
            loss = functional.cross_entropy(logits, label[index], label_smoothing=0.05)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    model.eval()
    return model


def clean(model: ir.Model) -> None:
    """Fold the exporter's shape arithmetic in place, and keep BatchNormalization as exported.

    `torch.onnx.export(optimize=True)` would fold BatchNormalization into Conv as well, and that
    fold is what the example leaves to the compiler. Metadata outside `KEPT_METADATA` goes too: the
    exporter's stack traces name files of the machine that exported.
    """
    onnxscript.optimizer.fold_constants(model)
    rewrite(model, [remove_optional_bias_from_conv_rule, materialize_reshape_shape_rule])
    RemoveUnusedNodesPass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    NameFixPass()(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph:
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
        for key in set(node.metadata_props) - KEPT_METADATA:
            del node.metadata_props[key]


def export(model: DigitsNet, path: Path) -> None:
    """Write `model` to one ONNX file with a symbolic batch and its weights inside."""
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 1, 8, 8),),
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=OPSET_VERSION,
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    if program is None:
        msg = "torch.onnx.export(dynamo=True) returned no program"
        raise RuntimeError(msg)
    clean(program.model)
    program.save(path, external_data=False)


def accuracy(model: DigitsNet, split: Split) -> float:
    """Return the top-1 accuracy of `model` on the test part, in [0, 1]."""
    with torch.no_grad():
        predicted = model(torch.from_numpy(split.test_image)).argmax(1)
    return float((predicted == torch.from_numpy(split.test_label)).float().mean())


def main() -> None:
    """Train, export and write the data files."""
    parser = argparse.ArgumentParser(description="Train and export the digits example.")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
    output_dir: Path = parser.parse_args().output_dir
    output_dir.mkdir(parents=True, exist_ok=True)

    split = load_split()
    model = train(split)
    export(model, output_dir / "digits.onnx")
    np.savez_compressed(
        output_dir / "test_data.npz", image=split.test_image, label=split.test_label
    )
    np.savez_compressed(output_dir / "calibration.npz", image=split.calibration_image)
    print(f"PyTorch top-1 accuracy: {accuracy(model, split):.4f} of {len(split.test_label)}")


if __name__ == "__main__":
    main()
