"""Print the top-1 accuracy on `test_data.npz`, and the file size, of one or more digits models.

Usage: `python examples/digits/evaluate.py MODEL.onnx [MODEL2.onnx ...]`. Needs NumPy and ONNX
Runtime only.
"""
# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

TEST_DATA = Path(__file__).parent / "test_data.npz"


def count_correct(model: Path, image: npt.NDArray[np.float32], label: npt.NDArray[np.int64]) -> int:
    """Return how many images the model classifies correctly, on the CPU execution provider.

    A model with a symbolic batch gets all images at once; one with a fixed batch gets that many at
    a time, which has to divide their number.

    Args:
        model: ONNX file with one input [batch, 1, 8, 8] and, as first output, logits [batch, 10].
        image: [n, 1, 8, 8], values in [0, 1].
        label: [n], the class of each image.
    """
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    model_input = session.get_inputs()[0]
    batch = model_input.shape[0]
    step = batch if isinstance(batch, int) else len(image)
    correct = 0
    for start in range(0, len(image), step):
        part = slice(start, start + step)
        logits = session.run(None, {model_input.name: image[part]})[0]
        correct += int((logits.argmax(axis=1) == label[part]).sum())
    return correct


def main() -> None:
    """Print one line for each model named on the command line."""
    parser = argparse.ArgumentParser(description="Measure digits models on the test split.")
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.onnx")
    models: list[Path] = parser.parse_args().models

    with np.load(TEST_DATA, allow_pickle=False) as data:
        image, label = data["image"], data["label"]
    width = max(len("model"), *(len(str(model)) for model in models))
    print(f"{'model':<{width}}  {'bytes':>8}  {'correct':>9}  {'top-1':>7}")
    for model in models:
        correct = count_correct(model, image, label)
        score = f"{correct}/{len(label)}"
        size = model.stat().st_size
        print(f"{model!s:<{width}}  {size:>8}  {score:>9}  {correct / len(label):>7.2%}")


if __name__ == "__main__":
    main()
