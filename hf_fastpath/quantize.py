"""Choosing int4 codes, scales and zero points for a weight, without calibration data. Pure torch, any device.

The scale search follows the idea of OMNIQUANT/AWQ-style clipping (Lin et al., 2023, "AWQ", section 3; Badri and Shaji,
2023, "HQQ"): shrink the range of each group by a grid of factors, keep the one with the least error, then refine scale
by the closed-form least-squares fit to the codes it led to.
"""

from __future__ import annotations

import dataclasses

import torch

from hf_fastpath.config import ScaleSearch
from hf_fastpath.packing import GROUP_SIZES, SYMMETRIC_ZERO

# Elements searched at once: the search holds about eight float32 copies of a chunk, so a chunk this size costs 130 MB.
_CHUNK_ELEMENTS = 1 << 22
_SHRINK_GRID = tuple(1.0 - 0.02 * step for step in range(21))
_REFINE_STEPS = 3


@dataclasses.dataclass(frozen=True)
class GroupQuantized:
    """A quantized weight before packing: ``w[n, k] = (q - zero[n, k // group]) * scale[n, k // group]``.

    q: uint8 ``(N, K)``; scale: 16-bit float ``(N, K/group)``; zero: uint8 ``(N, K/group)``, or None when symmetric (8).
    """

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    group_size: int

    def dequantize(self) -> torch.Tensor:
        """``(N, K)`` in ``scale.dtype``."""
        n, k = self.q.shape
        zero = SYMMETRIC_ZERO if self.zero is None else self.zero.to(torch.int8).unsqueeze(-1)
        centered = self.q.to(torch.int8).view(n, -1, self.group_size) - zero
        return (centered.to(self.scale.dtype) * self.scale.unsqueeze(-1)).view(n, k)


def pick_group_size(in_features: int, wanted: int) -> int | None:
    """The largest of 128, 64, 32 that is <= ``wanted`` and divides ``in_features``; None if there is none."""
    for size in GROUP_SIZES:
        if size <= wanted and in_features % size == 0:
            return size
    return None


def scale_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """Scales are stored in the weight's own 16-bit type; for wider weights in bfloat16."""
    return weight_dtype if weight_dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def _absmax_start(w: torch.Tensor, zero_points: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and real-valued zero point that just cover each group. w: ``(groups, group_size)``; both ``(groups, 1)``."""
    if zero_points:
        low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low) / 15
        return scale, -low / scale.clamp(min=torch.finfo(w.dtype).tiny)
    return w.abs().amax(1, keepdim=True) / 7.5, torch.full_like(w[:, :1], SYMMETRIC_ZERO)


def _round_codes(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The nearest codes, as floats. A group of zeros has scale 0; its codes are its zero point."""
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (w / safe + zero).round_().clamp_(0, 15)


def _squared_error(w: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return ((q - zero) * scale - w).square_().sum(1, keepdim=True)


def _search_chunk(
    w: torch.Tensor, zero_points: bool, search: ScaleSearch, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and zero of each group; w is float32 ``(groups, group_size)``. Scales are rounded to ``dtype``
    before any error is measured, so that what is compared is what is stored."""

    def stored(scale: torch.Tensor) -> torch.Tensor:
        return scale.to(dtype).to(w.dtype)

    full_scale, full_zero = _absmax_start(w, zero_points)
    best_scale, best_zero = stored(full_scale), full_zero.round().clamp_(0, 15)
    best_q = _round_codes(w, best_scale, best_zero)
    if search is ScaleSearch.ABSMAX:
        return best_q, best_scale, best_zero
    best_error = _squared_error(w, best_q, best_scale, best_zero)

    def keep_better(scale: torch.Tensor, zero: torch.Tensor) -> None:
        nonlocal best_scale, best_zero, best_q, best_error
        q = _round_codes(w, scale, zero)
        error = _squared_error(w, q, scale, zero)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        best_q = torch.where(better, q, best_q)

    for shrink in _SHRINK_GRID:
        scale = stored(full_scale * shrink)
        keep_better(scale, best_zero if not zero_points else full_zero.round().clamp(0, 15))
    for _ in range(_REFINE_STEPS):
        if zero_points:
            # With the codes fixed the best real zero point is mean(q - w / scale); it must be an integer.
            safe = torch.where(best_scale > 0, best_scale, torch.ones_like(best_scale))
            keep_better(best_scale, (best_q - w / safe).mean(1, keepdim=True).round_().clamp_(0, 15))
        centered = best_q - best_zero
        norm = centered.square().sum(1, keepdim=True)
        fitted = (centered * w).sum(1, keepdim=True) / norm.clamp(min=1e-20)
        keep_better(stored(torch.where(norm > 0, fitted.clamp(min=0), best_scale)), best_zero)
    return best_q, best_scale, best_zero


@torch.no_grad()
def quantize_int4(
    weight: torch.Tensor,
    group_size: int,
    *,
    zero_points: bool = True,
    search: ScaleSearch = ScaleSearch.MSE,
) -> GroupQuantized:
    """Quantizes a 2-D weight ``(N, K)`` to int4 groups along K, in row chunks, so that the extra memory is bounded.

    Args:
        weight: float16, bfloat16 or float32, finite.
        group_size: 128, 64 or 32, a divisor of K.

    Raises:
        ValueError: K is not a multiple of the group size, or the weight holds NaN or infinity.
    """
    n, k = weight.shape
    if group_size not in GROUP_SIZES or k % group_size:
        raise ValueError(f"int4 group size {group_size} does not fit in_features {k}: allowed are divisors of "
                         f"in_features among {', '.join(map(str, GROUP_SIZES))}")
    dtype, groups = scale_dtype(weight.dtype), k // group_size
    q = torch.empty((n, k), dtype=torch.uint8, device=weight.device)
    scale = torch.empty((n, groups), dtype=dtype, device=weight.device)
    zero = torch.empty((n, groups), dtype=torch.uint8, device=weight.device)
    rows = max(1, _CHUNK_ELEMENTS // k)
    for start in range(0, n, rows):
        chunk = weight[start : start + rows].float()
        if not bool(chunk.isfinite().all()):
            raise ValueError("the weight holds NaN or infinity, which int4 cannot store")
        codes, s, z = _search_chunk(chunk.reshape(-1, group_size), zero_points, search, dtype)
        stop = start + chunk.shape[0]
        q[start:stop] = codes.view(-1, k).to(torch.uint8)
        scale[start:stop] = s.view(-1, groups).to(dtype)
        zero[start:stop] = z.view(-1, groups).to(torch.uint8)
    return GroupQuantized(q, scale, zero if zero_points else None, group_size)
