"""int4 checkpoints packed from integer codes straight by the published formulas, code by code, in numpy.

Sources: ``pack`` of AutoGPTQ's ``QuantLinear`` (words along K, zero points along N minus one), ``from_linear`` of
AutoAWQ's ``WQLinear_GEMM`` (words along N in the order 0 2 4 6 1 3 5 7), ``pack_to_int32`` of compressed-tensors (codes
from -8 to 7 plus 8, words along K, zero points along N). The packing has nothing from the package under test.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from hf_fastpath.checkpoints import CheckpointFormat

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantized layer before packing: codes ``(N, K)``, scales and zero points ``(N, G)``, groups ``(K,)``."""

    q: np.ndarray
    scale: torch.Tensor
    zero: np.ndarray
    column_group: np.ndarray

    def weight(self) -> torch.Tensor:
        """``w[n, k] = (q[n, k] - zero[n, g]) * scale[n, g]``, g the group of k, rounded once to the scales' type."""
        centered = torch.from_numpy(self.q.astype(np.int64) - self.zero.astype(np.int64)[:, self.column_group])
        # float64 holds the product of a 4-bit integer and a 16-bit scale exactly, so only the last step rounds.
        exact = centered.double() * self.scale.double()[:, torch.from_numpy(self.column_group)]
        return exact.to(self.scale.dtype)


def random_codes(
    n: int,
    column_group: np.ndarray,
    *,
    seed: int,
    symmetric: bool = False,
    lowest_zero: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Codes:
    """Codes 0 to 15 and zero points ``lowest_zero`` to 15, all of them likely; scales spread over several octaves."""
    random = np.random.default_rng(seed)
    groups = int(column_group.max()) + 1
    q = random.integers(0, 16, (n, len(column_group)))
    zero = np.full((n, groups), 8) if symmetric else random.integers(lowest_zero, 16, (n, groups))
    scale = torch.from_numpy(np.exp2(random.uniform(-12, -2, (n, groups)))).to(dtype)
    return Codes(q, scale, zero, column_group)


def groups_in_order(k: int, group_size: int) -> np.ndarray:
    return np.zeros(k, dtype=np.int64) if group_size == -1 else np.arange(k) // group_size


def pack_rows(values: np.ndarray) -> torch.Tensor:
    """``(8 R, C)`` to int32 ``(R, C)``: value ``[8 r + i, c]`` in bits 4i..4i+3 of word ``[r, c]``."""
    words = np.zeros((values.shape[0] // 8, values.shape[1]), dtype=np.uint32)
    for row in range(values.shape[0]):
        words[row // 8] |= values[row].astype(np.uint32) << np.uint32(4 * (row % 8))
    return torch.from_numpy(words.view(np.int32))


def pack_columns(values: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """``(R, 8 C)`` to int32 ``(R, C)``: value ``[r, 8 c + order[i]]`` in bits 4i..4i+3 of word ``[r, c]``."""
    return pack_rows(np.ascontiguousarray(values[:, _reordered(values.shape[1], order)].T)).T.contiguous()


def _reordered(count: int, order: tuple[int, ...]) -> list[int]:
    return [8 * (i // 8) + order[i % 8] for i in range(count)]


def gptq_tensors(layer: str, codes: Codes, *, version: int = 1) -> dict[str, torch.Tensor]:
    """Version 1 stores zero points minus one; zero points of 0 are for the tests that say how they are stored."""
    stored_zero = codes.zero.T - (1 if version == 1 else 0)
    assert stored_zero.min() >= 0, "version 1 cannot store a zero point of 0"
    return {
        f"{layer}.qweight": pack_rows(codes.q.T),
        f"{layer}.qzeros": pack_columns(stored_zero),
        f"{layer}.scales": codes.scale.T.contiguous(),
        f"{layer}.g_idx": torch.from_numpy(codes.column_group.astype(np.int32)),
    }


def awq_tensors(layer: str, codes: Codes) -> dict[str, torch.Tensor]:
    return {
        f"{layer}.qweight": pack_columns(codes.q.T, AWQ_ORDER),
        f"{layer}.qzeros": pack_columns(codes.zero.T, AWQ_ORDER),
        f"{layer}.scales": codes.scale.T.contiguous(),
    }


def compressed_tensors_tensors(
    layer: str, codes: Codes, *, symmetric: bool = True, reordered: bool = False
) -> dict[str, torch.Tensor]:
    """Codes and zero points of 0 to 15 are the format's -8 to 7 with its offset of 8; zeros pad the last words."""
    n, k = codes.q.shape
    tensors = {
        f"{layer}.weight_packed": pack_columns(np.pad(codes.q, ((0, 0), (0, -k % 8)))),
        f"{layer}.weight_scale": codes.scale,
        f"{layer}.weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        tensors[f"{layer}.weight_zero_point"] = pack_rows(np.pad(codes.zero, ((0, -n % 8), (0, 0))))
    if reordered:
        tensors[f"{layer}.weight_g_idx"] = torch.from_numpy(codes.column_group.astype(np.int32))
    return tensors


def assert_converts(fmt: CheckpointFormat, layer: str, tensors: dict[str, torch.Tensor], codes: Codes) -> None:
    """The converted layer is the formula's weight bit for bit, and its order of columns gives the formula's product."""
    quantized, order = fmt.convert(layer, tensors)
    expected = codes.weight()
    n, k = codes.q.shape
    assert fmt.shape_of(layer, {name: tuple(tensor.shape) for name, tensor in tensors.items()}) == (n, k)
    assert quantized.q.dtype == torch.uint8
    assert quantized.scale.dtype == codes.scale.dtype
    assert quantized.scale.shape == (n, k // quantized.group_size)
    assert (quantized.zero is None) == bool((codes.zero == 8).all())
    in_order = bool((np.diff(codes.column_group) >= 0).all())
    assert (order is None) == in_order
    columns = torch.arange(k) if order is None else order
    assert torch.equal(columns, torch.argsort(torch.from_numpy(codes.column_group), stable=True))
    weight = quantized.dequantize()
    assert torch.equal(weight, expected[:, columns])
    # Small integers times weights whose exponents span 12 octaves: float64 sums them without rounding, in any order.
    x = torch.from_numpy(np.random.default_rng(0).integers(-8, 8, (3, k))).double()
    assert torch.equal(x[..., columns] @ weight.double().T, x @ expected.double().T)
