"""Other libraries' quantizers, for the tables that compare; none of them is installed with this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_fastpath.quantize import pick_group_size

_HQQ_BITS_A_GROUP = 32  # a scale and a zero point, 16 bits each


@torch.no_grad()
def round_with_hqq(model: Any, group_size: int) -> float:
    """Replaces the weights that ``patch_model`` would pack by what HQQ's 4 bits keep of them, in the model's dtype, by
    the package ``hqq`` (Badri and Shaji, 2023); returns its bits a weight. Its zero points are not integers.

    Args:
        model: of the Llama kind, on the CPU. group_size: or the next smaller that divides a layer's inputs.

    Raises:
        RuntimeError: the package is not installed.
    """
    try:
        from hqq.core.quantize import Quantizer
    except ImportError as error:
        raise RuntimeError(f"comparing with HQQ needs its package: pip install hqq ({error})") from error
    bits = count = 0.0
    for name, layer in model.named_modules():
        group = pick_group_size(layer.in_features, group_size) if isinstance(layer, nn.Linear) else None
        if group is None or name == "lm_head":
            continue
        weight = layer.weight
        codes, meta = Quantizer.quantize(
            weight.float(), nbits=4, group_size=group, optimize=True, round_zero=False, axis=1, device="cpu",
            compute_dtype=torch.float32,
        )  # fmt: skip
        weight.copy_(Quantizer.dequantize(codes, meta))
        bits += weight.numel() * (4 + _HQQ_BITS_A_GROUP / group)
        count += weight.numel()
    return bits / count
