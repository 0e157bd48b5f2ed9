"""Packed layers that read one input, as one weight: one product in the place of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hf_fastpath.modules.w4a16_linear import W4A16Linear
from hf_fastpath.packing import TILE_ROWS

PER_ROW = ("qweight", "scales", "zeros", "bias")  # the tensors of a layer whose first dimension goes with its rows


class MergedWeight(NamedTuple):
    """A packed weight as the ops take it (:mod:`hf_fastpath.packing`), of one layer or of several, row behind row."""

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None
    out_features: int
    group_size: int


def why_not_merged(layers: Sequence[object]) -> str:
    """Why layers cannot be one product; "" when they can."""
    int4 = [layer for layer in layers if isinstance(layer, W4A16Linear)]
    if len(int4) < len(layers):
        return "not all of its linear layers are int4"
    kinds = {(x.in_features, x.group_size, x.zeros is None, x.bias is None, x.scales.dtype) for x in int4}
    if len(kinds) > 1:
        return "layers of one input differ in group size, zero points, bias or dtype"
    if any(layer.input_order is not None for layer in int4):
        return "columns of a weight are in an order of their own"
    if any(layer.out_features % TILE_ROWS for layer in int4):
        return f"an output size is not a multiple of {TILE_ROWS}"
    return ""


@torch.inference_mode(False)
@torch.no_grad()
def merge(layers: Sequence[W4A16Linear]) -> MergedWeight:
    """The layers as one weight. Their own tensors become views of it, so that it takes no memory of its own; while it
    is made, that of the layers once more.

    Args:
        layers: such that :func:`why_not_merged` has nothing against them.
    """
    for layer in layers:
        layer.to_canonical_layout()
    whole: dict[str, torch.Tensor | None] = {}
    for name in PER_ROW:
        parts = [getattr(layer, name) for layer in layers]
        if len(parts) == 1 or parts[0] is None:
            whole[name] = parts[0]
            continue
        together, start = torch.cat(parts), 0
        for layer, part in zip(layers, parts, strict=True):
            setattr(layer, name, together[start : start + part.shape[0]])
            start += part.shape[0]
        whole[name] = together
    rows = sum(layer.out_features for layer in layers)
    return MergedWeight(**whole, out_features=rows, group_size=layers[0].group_size)  # type: ignore[arg-type]
