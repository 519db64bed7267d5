"""What an op with a weight multiplies, as rows that meet `WeightRows`."""

from collections.abc import Iterator
from math import prod
from typing import Final

from torch import Tensor

from qcompiler.execution.torch.call import Call
from qcompiler.execution.torch.element_types import ElementTypes
from qcompiler.execution.torch.ops.windows import BATCH_AND_CHANNELS, windows_of
from qcompiler.ir.channels.weights import MATRIX_OPS, data_axis
from qcompiler.ir.dataflow import int_attribute, ints_attribute
from qcompiler.ir.quantizable import Site

_PATCH_BYTES: Final = 64 << 20
"""Of the patches of images that are held at once; one image's are never divided."""


def why_no_rows(site: Site) -> str | None:
    """Return why what a site multiplies cannot be written as rows, as a clause; None if it can."""
    op = site.row.op_type
    if op in ("LSTM", "GRU", "RNN"):
        return f"a {op} multiplies what it computed itself the step before"
    if op == "Gather":
        return "its rows are looked up one by one, and for these the nearest codes are the best"
    if op == "ConvTranspose":
        return "the products of a ConvTranspose overlap"
    if op == "Conv":
        return "its weight is transposed in the graph" if site.transposes else None
    assert op in MATRIX_OPS
    if len(site.shape) > 2:
        return f"its weight holds {prod(site.shape[:-2])} matrices"
    batch = "transBatchB" if site.left else "transBatchA"
    return f"its data has the layout of {batch}" if int_attribute(site.node, batch, 0) else None


def data_rows(site: Site, data: Tensor, keep: Tensor | None = None) -> Iterator[Tensor]:
    """Yield what a site multiplies, in pieces that fit memory.

    Args:
        site: A site for which `why_no_rows` has no reason.
        data: What its data input holds.
        keep: Bool `[batch, tokens]`: which tokens count, where data is `[batch, tokens, ..., K]`;
            otherwise it is not consulted.

    Yields:
        `[groups, rows, K]` in the type of `data`.
    """
    if site.row.op_type == "Conv":
        yield from _patches(site, data)
        return
    axis = data_axis(site)
    assert axis is not None
    turned = data.movedim(axis if data.dim() > 1 else -1, -1)
    if keep is not None and axis == -1 and data.dim() > 2 and data.shape[:2] == keep.shape:
        turned = turned[keep]
    yield turned.reshape(1, -1, turned.shape[-1])


def same_rows(site: Site) -> tuple[object, ...]:
    """Return what two sites have in common that read the same value as the same rows."""
    if site.row.op_type != "Conv":
        return (data_axis(site),)
    names = ("strides", "dilations", "pads")
    numbers = tuple(ints_attribute(site.node, name) for name in names)
    auto = site.node.attributes.get("auto_pad")
    group = int_attribute(site.node, "group", 1)
    return site.shape[2:], group, numbers, None if auto is None else auto.as_string()


def _patches(site: Site, images: Tensor) -> Iterator[Tensor]:
    """Yield what a Conv multiplies at all output positions, channels last as kernels sum."""
    kernel = site.shape[2:]
    group = int_attribute(site.node, "group", 1)
    # Elements come as tensors already, whatever type the node declares.
    call = Call(site.node, 1, ElementTypes(), images.device)
    windows = windows_of(call, images, kernel)
    counts = windows.counts(images.shape[BATCH_AND_CHANNELS:])
    channels = images.shape[1]
    one = channels * prod(counts) * prod(kernel) * images.element_size()
    step = max(1, _PATCH_BYTES // max(1, one))
    rank = len(kernel)
    for start in range(0, len(images), step):
        padded = windows.padded(images[start : start + step], counts)
        view = windows.view(padded, counts)
        grouped = view.reshape(len(view), group, channels // group, *view.shape[2:])
        # Groups first, channels of a group last.
        order = (1, 0, *range(3, 3 + 2 * rank), 2)
        yield grouped.permute(order).reshape(group, -1, prod(kernel) * (channels // group))
