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

from hf_fastpath.column_steps import BAND, ColumnSteps
from hf_fastpath.config import ScaleSearch
from hf_fastpath.packing import SYMMETRIC_ZERO
from hf_fastpath.precision import tensor_float32
from hf_fastpath.quantize import GroupQuantized, quantize_int4

# Elements worked on at once, of which one float32 copy is held; on a GPU a column of more rows takes hardly longer.
_CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}
_SWEEPS = 2  # a third takes another 2 to 4% off a layer's error, in half as much time again
# Of some thousand tokens the correlations between channels are known less well than their energies: this share of
# them is taken for chance. Without it a 1,536-wide layer's error on other text was above that of codes rounded singly.
_SHRINKAGE = 0.5
_FLOOR = 1e-3  # of the mean energy: a channel that was never seen to be driven still counts a little


class Hessian:
    """``H``: a moment ``(K, K)`` in units of its mean diagonal, correlations shrunk; float32 and positive definite.

    Its rows are made when they are needed, because a second ``(K, K)`` matrix is the most memory of all.
    """

    def __init__(self, moment: torch.Tensor) -> None:
        energy = moment.diagonal().float()
        unit = energy.mean().clamp(min=torch.finfo(torch.float32).tiny)
        self.moment = moment
        self.factor = (1 - _SHRINKAGE) / unit
        self.diagonal = energy / unit + _FLOOR

    def rows(self, channels: slice) -> torch.Tensor:
        """``(number of channels, K)``."""
        band = self.moment[channels].float() * self.factor
        band[:, channels].diagonal().copy_(self.diagonal[channels])
        return band


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
    hessian = Hessian(moment)
    rows = max(1, _CHUNK_ELEMENTS[weight.device.type] // k)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        CoordinateDescent(weight[part], found.rows(part), hessian).sweep(sweeps)
    return found


class CoordinateDescent:
    """Some rows of a weight on their way down: codes and scales of ``quantized`` are changed in place.

    ``error`` is ``W - Q``, float32 ``(rows, K)``, kept up to date. The gradient, ``H (W - Q)^T``, minus half the
    derivative of the output's error by Q, is computed for each group when its turn comes. What concerns one group is
    float32 and column-major, ``(group_size, rows)`` or ``(rows,)``.
    """

    def __init__(self, weight: torch.Tensor, quantized: GroupQuantized, hessian: Hessian) -> None:
        self.quantized, self.hessian = quantized, hessian
        rows, groups = quantized.scale.shape
        values = quantized.q.float().view(rows, groups, -1)
        values -= SYMMETRIC_ZERO if quantized.zero is None else quantized.zero.unsqueeze(-1)
        values *= quantized.scale.unsqueeze(-1)
        self.error = values.view(rows, -1)
        torch.sub(weight, self.error, out=self.error)
        self.steps = ColumnSteps(rows, weight.device)

    def sweep(self, times: int = 1) -> None:
        """Every code, then the scale, of each group in turn."""
        for _ in range(times):
            for group in range(self.quantized.scale.shape[1]):
                self._move_group(group)

    def _move_group(self, group: int) -> None:
        size, quantized = self.quantized.group_size, self.quantized
        columns = slice(group * size, (group + 1) * size)
        hessian = self.hessian.rows(columns)
        # Some parts in 10^4 of the step that a code wants come from rounding to TF32, too little to matter where it
        # decides between two codes; and they do not add up, since every gradient is computed anew.
        with tensor_float32():
            gradient = hessian @ self.error.t()
        inner = hessian[:, columns]
        codes = quantized.q[:, columns].t().to(torch.float32, memory_format=torch.contiguous_format)
        scale = quantized.scale[:, group].float()

        steps = self._code_steps(codes, scale, inner, gradient)
        change = steps * scale
        gradient.addmm_(inner, change, alpha=-1)
        quantized.q[:, columns] = codes.add_(steps).t()
        codes -= SYMMETRIC_ZERO if quantized.zero is None else quantized.zero[:, group]
        step = self._scale_step(codes, scale, inner, gradient)
        quantized.scale[:, group] += step
        self.error[:, columns] -= change.addcmul_(codes, step).t()

    def _code_steps(
        self, codes: torch.Tensor, scale: torch.Tensor, inner: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        """What to add to the codes of a group to put each at its minimum, one column after the other."""
        inverse = torch.where(scale > 0, 1 / scale, 0)  # a group of zeros stays one
        # In units of a code what one column's step does to the others does not depend on the row.
        diagonal = inner.diagonal()
        weights = inner / diagonal
        wanted = gradient * inverse / diagonal.unsqueeze(1)
        steps = torch.empty_like(codes)
        for start in range(0, codes.shape[0], BAND):
            band = slice(start, start + BAND)
            torch.addmm(wanted[band], weights[:start, band].t(), steps[:start], alpha=-1, out=self.steps.wanted)
            steps[band] = self.steps.take(codes[band], weights[band, band])
        return steps

    def _scale_step(
        self, centered: torch.Tensor, scale: torch.Tensor, inner: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        """What to add to a group's scale to put it at its minimum, as far as 16 bits can say it."""
        slope = (centered * gradient).sum(0)
        curvature = (centered * (inner @ centered)).sum(0)
        wanted = scale + slope / torch.where(curvature > 0, curvature, 1)
        stored = wanted.clamp(min=0).to(self.quantized.scale.dtype).float()
        step = stored - scale
        # The clamp and the rounding may have moved it past the point where the error is what it was.
        return torch.where(step * (2 * slope - step * curvature) > 0, step, 0)
