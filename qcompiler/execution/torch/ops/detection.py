"""NonMaxSuppression (ONNX operators, `Operators.md`)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.op_table import OpTable

TABLE = OpTable()


# Every box kept decides about the next: on a GPU each of these steps would wait for it.
@TABLE.op("NonMaxSuppression", since=10, host=(0, 1, 2, 3, 4))
def non_max_suppression(
    call: Call,
    boxes: Tensor,
    scores: Tensor,
    most: Tensor | None = None,
    overlap: Tensor | None = None,
    least: Tensor | None = None,
) -> Tensor:
    """Return the boxes kept, [count, 3]: batch, class and box index, best score first.

    Args:
        call: The node.
        boxes: [batches, boxes, 4].
        scores: [batches, classes, boxes].
        most: How many boxes to keep for each class of a batch element.
        overlap: Intersection over union above which the worse of two boxes is dropped.
        least: Score that a box has to exceed.
    """
    corners = _corners(boxes, is_centered=bool(call.integer("center_point_box", 0)))
    limit = 0 if most is None else int(most.item())
    threshold = 0.0 if overlap is None else overlap.item()
    kept: list[tuple[int, int, int]] = []
    for batch, classes in enumerate(scores.unbind()):
        for label, values in enumerate(classes.unbind()):
            order = values.argsort(descending=True, stable=True)
            if least is not None:
                order = order[values[order] > least.reshape(())]
            found = _kept(corners[batch], order, limit, threshold)
            kept += [(batch, label, box) for box in found]
    return torch.tensor(kept, dtype=torch.int64).reshape(-1, 3)


def _kept(corners: Tensor, order: Tensor, limit: int, threshold: float) -> Iterator[int]:
    while order.numel() and limit > 0:
        best, order = order[0], order[1:]
        yield int(best.item())
        limit -= 1
        order = order[_intersection_over_union(corners[best], corners[order]) <= threshold]


def _corners(boxes: Tensor, *, is_centered: bool) -> Tensor:
    """Return boxes as their low corner and their high corner."""
    if is_centered:
        center, half = boxes[..., :2], boxes[..., 2:] / 2
        return torch.cat((center - half, center + half), -1)
    first, second = boxes[..., :2], boxes[..., 2:]
    return torch.cat((torch.minimum(first, second), torch.maximum(first, second)), -1)


def _intersection_over_union(box: Tensor, others: Tensor) -> Tensor:
    low = torch.maximum(box[:2], others[:, :2])
    high = torch.minimum(box[2:], others[:, 2:])
    both = (high - low).clamp(min=0).prod(-1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(-1) - both
    # Boxes without an area overlap nothing.
    return torch.where(both > 0, both / union, torch.zeros_like(both))
