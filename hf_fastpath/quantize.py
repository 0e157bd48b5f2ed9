"""Choosing int4 codes, scales and zero points for a weight, without calibration data. Pure torch, any device.

The scale search shrinks the range of each group by a grid of factors and keeps the one with the least squared error
(clipping search as in Lin et al., 2023, "AWQ", section 3.2), then alternates closed-form least-squares fits of zero
point and scale with rounding. Errors can be weighted by the energy of the input channel they meet (activations.py).
"""

from __future__ import annotations

import dataclasses

import torch

from hf_fastpath.config import ScaleSearch
from hf_fastpath.packing import GROUP_SIZES, SYMMETRIC_ZERO

# Elements searched at once; the search holds about five float32 copies of them. On the CPU they are to stay in a
# core's cache (2.5 times faster than 4 million), on a GPU they are to take longer than launching what works on them.
_CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 23}
_SHRINK_GRID = tuple(1.0 - 0.04 * step for step in range(11))
_REFINE_STEPS = 3
_IMPORTANCE_FLOOR = 1e-3  # of the mean


@dataclasses.dataclass(frozen=True)
class GroupQuantized:
    """A quantized weight before packing: ``w[n, k] = (q - zero[n, k // group]) * scale[n, k // group]``.

    q: uint8 ``(N, K)``; scale: 16-bit float ``(N, K/group)``; zero: uint8 ``(N, K/group)``, or None when symmetric (8).
    """

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    group_size: int

    def rows(self, part: slice) -> GroupQuantized:
        """Some of its rows, as views."""
        zero = None if self.zero is None else self.zero[part]
        return GroupQuantized(self.q[part], self.scale[part], zero, self.group_size)

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
    """The scale that just covers each group, and its middle. w: ``(..., group_size)``; both ``(..., 1)``."""
    if zero_points:
        low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
        return (high - low) / 15, (high + low) / 2
    return w.abs().amax(-1, keepdim=True) / 7.5, torch.zeros_like(w[..., :1])


def _safe(scale: torch.Tensor) -> torch.Tensor:
    """The scale as a divisor: a group of zeros has scale 0."""
    return torch.where(scale > 0, scale, 1)


class _Search:
    """Scales and zero points of the groups of some rows, and how large the error is that they leave.

    w: float32 ``(rows, groups, group_size)``; importance: ``(1, groups, group_size)`` or None, the weights of squared
    errors. Scales, zero points and errors are float32 ``(rows, groups, 1)``; scales are rounded to ``dtype`` before an
    error is measured, so that what is compared is what is stored.
    """

    def __init__(self, w: torch.Tensor, importance: torch.Tensor | None, dtype: torch.dtype) -> None:
        self.w, self.importance, self.dtype = w, importance, dtype
        self.root = None if importance is None else importance.sqrt()
        self.total = w.shape[-1] if importance is None else importance.sum(-1, keepdim=True)

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        return scale.to(self.dtype).to(self.w.dtype)

    def codes(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return torch.addcdiv(zero, self.w, _safe(scale)).round_().clamp_(0, 15)

    def error(self, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The root of each group's weighted squared error."""
        residual = torch.addcmul(self.w, q - zero, scale, value=-1)
        if self.root is not None:
            residual.mul_(self.root)
        return torch.linalg.vector_norm(residual, dim=-1, keepdim=True)

    def weighted(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.importance is None else values * self.importance

    def start(self, scales: torch.Tensor, zeros: torch.Tensor) -> None:
        """Takes the best of some scales and zero points, ``(candidates, rows, groups, 1)``."""
        scales = self.stored(scales)
        pairs = list(zip(scales.unbind(), zeros.unbind(), strict=True))
        errors = torch.stack([self.error(self.codes(scale, zero), scale, zero) for scale, zero in pairs])
        self.least, best = errors.min(0, keepdim=True)
        self.scale, self.zero = (values.gather(0, best).squeeze(0) for values in (scales, zeros))
        self.least, self.q = self.least.squeeze(0), self.codes(self.scale, self.zero)

    def consider(self, scale: torch.Tensor, zero: torch.Tensor) -> None:
        """Takes another scale and zero point in the groups where the error becomes less."""
        scale = self.stored(scale)
        q = self.codes(scale, zero)
        error = self.error(q, scale, zero)
        better = error < self.least
        self.least = torch.where(better, error, self.least)
        self.scale, self.zero = torch.where(better, scale, self.scale), torch.where(better, zero, self.zero)
        self.q = torch.where(better, q, self.q)

    def fitted_scale(self) -> torch.Tensor:
        """The least-squares scale for the present codes."""
        centered = self.q - self.zero
        weighted = self.weighted(centered)
        norm = (weighted * centered).sum(-1, keepdim=True)
        fitted = (weighted * self.w).sum(-1, keepdim=True) / _safe(norm)
        return torch.where(norm > 0, fitted.clamp(min=0), self.scale)

    def fitted_zero(self) -> torch.Tensor:
        """The least-squares zero point for the present codes and scale, rounded to the integer it must be."""
        offset = self.weighted(self.q - self.w / _safe(self.scale)).sum(-1, keepdim=True) / self.total
        return offset.round_().clamp_(0, 15)


def _search_chunk(
    w: torch.Tensor, importance: torch.Tensor | None, zero_points: bool, shrinks: torch.Tensor, dtype: torch.dtype
) -> _Search:
    """The best of the ranges that ``shrinks`` makes of each group's own; refined, if these are more than one."""
    full_scale, center = _absmax_start(w, zero_points)
    scales = shrinks.view(-1, 1, 1, 1) * full_scale
    if zero_points:  # a shrunk range keeps its middle: both ends are clipped alike
        zeros = (7.5 - center / _safe(scales)).round_().clamp_(0, 15)
    else:
        zeros = torch.full_like(scales, SYMMETRIC_ZERO)
    best = _Search(w, importance, dtype)
    best.start(scales, zeros)
    for _ in range(_REFINE_STEPS if len(shrinks) > 1 else 0):
        if zero_points:
            best.consider(best.scale, best.fitted_zero())
        best.consider(best.fitted_scale(), best.zero)
    return best


@torch.no_grad()
def quantize_int4(
    weight: torch.Tensor,
    group_size: int,
    *,
    zero_points: bool = True,
    search: ScaleSearch = ScaleSearch.MSE,
    importance: torch.Tensor | None = None,
) -> GroupQuantized:
    """Quantizes a 2-D weight ``(N, K)`` to int4 groups along K, in row chunks, so that the extra memory is bounded.

    Args:
        weight: float16, bfloat16 or float32, finite.
        group_size: 128, 64 or 32, a divisor of K.
        importance: for the searches, what a squared error in each column costs, ``(K,)``, >= 0; None: all alike.

    Raises:
        ValueError: K is not a multiple of the group size, or the weight holds NaN or infinity.
    """
    n, k = weight.shape
    if group_size not in GROUP_SIZES or k % group_size:
        raise ValueError(
            f"int4 group size {group_size} does not fit in_features {k}: allowed are divisors of in_features among "
            + ", ".join(map(str, GROUP_SIZES))
        )
    if not bool(torch.stack(torch.aminmax(weight)).isfinite().all()):  # takes no memory, unlike isfinite(weight)
        raise ValueError("the weight holds NaN or infinity, which int4 cannot store")
    dtype, groups = scale_dtype(weight.dtype), k // group_size
    if importance is not None:
        # A channel that was never seen to be driven still counts a little.
        relative = importance.float() / importance.float().mean().clamp(min=torch.finfo(torch.float32).tiny)
        importance = (relative + _IMPORTANCE_FLOOR).view(1, groups, group_size)
    grid = (1.0,) if search is ScaleSearch.ABSMAX else _SHRINK_GRID
    shrinks = torch.tensor(grid, dtype=torch.float32, device=weight.device)
    q = torch.empty((n, k), dtype=torch.uint8, device=weight.device)
    scale = torch.empty((n, groups), dtype=dtype, device=weight.device)
    zero = torch.empty((n, groups), dtype=torch.uint8, device=weight.device)
    rows = max(1, _CHUNK_ELEMENTS[weight.device.type] // k)
    for start in range(0, n, rows):
        chunk = weight[start : start + rows].float()
        best = _search_chunk(chunk.view(-1, groups, group_size), importance, zero_points, shrinks, dtype)
        stop = start + chunk.shape[0]
        q[start:stop] = best.q.view(-1, k).to(torch.uint8)
        scale[start:stop] = best.scale.squeeze(-1).to(dtype)
        zero[start:stop] = best.zero.squeeze(-1).to(torch.uint8)
        del chunk, best  # before the next ones are made
    return GroupQuantized(q, scale, zero if zero_points else None, group_size)


@torch.no_grad()
def quantize_int8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes -127..127 of a float ``(N, K)`` weight, int8, and one 16-bit scale for each of its rows, ``(N,)``.

    The scale puts the row's largest value at 127. Rows of zeros have scale 0.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=scale_dtype(weight.dtype), device=weight.device)
    rows = max(1, _CHUNK_ELEMENTS["cuda"] // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        chunk = weight[start : start + rows].float()
        if not bool(chunk.isfinite().all()):
            raise ValueError("the weight holds NaN or infinity, which int8 cannot store")
        scale = (chunk.abs().amax(-1) / 127).to(scales.dtype)
        scales[start : start + rows] = scale
        codes = (chunk / _safe(scale.float()).unsqueeze(-1)).round_().clamp_(-127, 127)
        q[start : start + rows] = codes.to(torch.int8)
    return q, scales
