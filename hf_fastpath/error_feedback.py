"""int4 codes and scales that answer for each other's errors: coordinate descent on the error of a layer's output.

Rounding each weight to the nearest code minimizes the error of every weight, not that of their sum. With the second
moment ``H = E[x x^T]`` of a layer's input, the mean square error of its output is, row by row of ``W``::

    E|x W^T - x Q^T|^2  =  tr((W - Q) H (W - Q)^T)

a quadratic in each code with the others held fixed, whose minimum over 0..15 is found by rounding. Sweeping over the
input channels, each in turn at its minimum, never raises the error, and one column of all rows is one vector
operation. The scale of a group is one more coordinate. (This is the objective of OBQ and GPTQ, Frantar et al., 2022;
coordinate descent on it is CDQuant's, Nair and Suggala, 2024. It needs no Cholesky factor, and left as little error in
SmolLM2-135M's layers as GPTQ's single pass.)
"""

from __future__ import annotations

import torch

from hf_fastpath.config import ScaleSearch
from hf_fastpath.packing import SYMMETRIC_ZERO
from hf_fastpath.quantize import GroupQuantized, quantize_int4

# Elements worked on at once; about five float32 copies of them are held.
_CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
_SWEEPS = 2  # a third takes another 2 to 4% off a layer's error, in half as much time again
# Of some thousand tokens the correlations between channels are known less well than their energies: this share of
# them is taken for chance. Without it a 1,536-wide layer's error on other text was above that of codes rounded singly.
_SHRINKAGE = 0.5
_FLOOR = 1e-3  # of the mean energy: a channel that was never seen to be driven still counts a little


def regularized(moment: torch.Tensor) -> torch.Tensor:
    """``moment`` ``(K, K)`` in units of its mean diagonal, correlations shrunk, float32 and positive definite."""
    energy = moment.diagonal().float()
    unit = energy.mean().clamp(min=torch.finfo(torch.float32).tiny)
    shrunk = moment.float() * ((1 - _SHRINKAGE) / unit)
    shrunk.diagonal().copy_(energy / unit + _FLOOR)
    return shrunk


@torch.no_grad()
def quantize_with_feedback(
    weight: torch.Tensor, moment: torch.Tensor, group_size: int, *, zero_points: bool = True, sweeps: int = _SWEEPS
) -> GroupQuantized:
    """Quantizes a 2-D weight ``(N, K)`` to int4 groups along K so that its output has little error.

    Scales and zero points start from :func:`quantize_int4`, where columns count by the root of their energy: less
    than their own error deserves, since others will make up for a part of it.

    Args:
        weight: float16, bfloat16 or float32, finite.
        moment: ``E[x x^T]`` of the layer's input, ``(K, K)``, on the weight's device.
        group_size: 128, 64 or 32, a divisor of K.
        sweeps: passes of coordinate descent over all columns; 0 leaves what the search found.

    Raises:
        ValueError: K is not a multiple of the group size, the shapes differ, or the weight holds NaN or infinity.
    """
    n, k = weight.shape
    if moment.shape != (k, k):
        raise ValueError(f"the moment of a weight of {k} columns must be {(k, k)}, got {tuple(moment.shape)}")
    root_energy = moment.diagonal().float().clamp(min=0).sqrt()
    found = quantize_int4(
        weight, group_size, zero_points=zero_points, search=ScaleSearch.ACTIVATION, importance=root_energy
    )
    hessian = regularized(moment)
    rows = max(1, _CHUNK_ELEMENTS[weight.device.type] // k)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        descent = CoordinateDescent(weight[part], found, part, hessian)
        for _ in range(sweeps):
            descent.sweep()
        found.q[part] = descent.codes.t().to(torch.uint8)
        found.scale[part] = descent.scale.t().to(found.scale.dtype)
    return found


class CoordinateDescent:
    """Some rows of a weight on their way down. Tensors are float32 and column-major: ``(K, rows)``, ``(groups, rows)``.

    ``gradient`` is ``H (W - Q)^T``, minus half the derivative of the error by Q, and kept up to date.
    """

    def __init__(self, weight: torch.Tensor, start: GroupQuantized, part: slice, hessian: torch.Tensor) -> None:
        self.hessian, self.group_size, self.dtype = hessian, start.group_size, start.scale.dtype
        self.codes = start.q[part].t().float().contiguous()
        self.scale = start.scale[part].t().float().contiguous()
        zero = torch.full_like(self.scale, SYMMETRIC_ZERO) if start.zero is None else start.zero[part].t().float()
        self.zero = zero.contiguous()
        k, rows = self.codes.shape
        values = (self.codes.view(-1, self.group_size, rows) - self.zero.unsqueeze(1)) * self.scale.unsqueeze(1)
        self.gradient = hessian @ (weight.t().float() - values.view(k, rows))

    def sweep(self) -> None:
        """Every code, then the scale, of each group in turn."""
        for group in range(self.scale.shape[0]):
            columns = slice(group * self.group_size, (group + 1) * self.group_size)
            inner = self.hessian[columns, columns]
            change = self._move_codes(group, columns, inner)
            gradient = torch.addmm(self.gradient[columns], inner, change, alpha=-1)
            change += self._move_scale(group, columns, inner, gradient)
            self.gradient.addmm_(self.hessian[:, columns], change, alpha=-1)

    def _move_codes(self, group: int, columns: slice, inner: torch.Tensor) -> torch.Tensor:
        """Puts each code of a group at its minimum; the change of the values, ``(group_size, rows)``."""
        scale, codes = self.scale[group], self.codes[columns]
        inverse = torch.where(scale > 0, 1 / scale, 0)  # a group of zeros stays one
        # In units of a code a column's step does not depend on the row. That leaves four small operations a column,
        # and on a GPU it is their number that takes the time.
        diagonal = inner.diagonal()
        weights = inner / diagonal
        optima = codes + self.gradient[columns] * inverse / diagonal.unsqueeze(1)
        moved, steps = torch.empty_like(codes), torch.empty_like(codes)
        rows = zip(optima.unbind(), codes.unbind(), moved.unbind(), steps.unbind(), weights.unbind(), strict=True)
        for i, (optimum, code, new, step, weight) in enumerate(rows, start=1):
            torch.round(optimum, out=new).clamp_(0, 15)
            torch.sub(new, code, out=step)
            optima[i:].addr_(weight[i:], step, alpha=-1)
        codes.copy_(moved)
        return steps.mul_(scale)

    def _move_scale(self, group: int, columns: slice, inner: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Puts a group's scale at its minimum, as far as 16 bits can say it; the change of the values."""
        centered = self.codes[columns] - self.zero[group]
        slope = (centered * gradient).sum(0)
        curvature = (centered * (inner @ centered)).sum(0)
        wanted = self.scale[group] + slope / torch.where(curvature > 0, curvature, 1)
        stored = wanted.clamp(min=0).to(self.dtype).float()
        step = stored - self.scale[group]
        # The clamp and the rounding may have moved it past the point where the error is what it was.
        step = torch.where(step * (2 * slope - step * curvature) > 0, step, 0)
        self.scale[group] += step
        return centered * step
