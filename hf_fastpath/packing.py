"""The packed int4 weight layout. This file is its only description; kernels and modules follow it.

A weight ``W`` of shape ``(N, K)`` (``nn.Linear``: N = out_features, K = in_features) is stored as::

    W[n, k]  =  (q[n, k] - zero[n, k // group]) * scale[n, k // group],      0 <= q <= 15

with ``zero`` an integer in 0..15 (8 when ``zeros`` is None: the symmetric format).

``qweight``: int32 ``(ceil(N/16), ceil(K/64), 32, 4)``. One tile covers 16 rows by 64 columns and is the 512 bytes
that one warp reads with one 16-byte load a lane. Lane ``l = 4 * g + t`` (g in 0..7, t in 0..3) holds, in word ``j``
(0..3), the A fragment of one ``mma.m16n8k16`` (PTX ISA, "Matrix Fragments for mma.m16n8k16"): rows ``g`` and ``g + 8``
of the tile and four columns that start at ``kb = 32 * (j // 2) + 8 * t + 4 * (j % 2)``. Nibble ``p = i + 4 * h``
(bits ``4p .. 4p + 3``) of the word is::

    row    g + 8 * (i % 2)            column   kb + 2 * (i // 2) + h

so that ``(word >> 4 * i) & 0x000f000f`` is the pair of neighbouring columns of fragment register ``i``. The columns of
a lane are 8 consecutive ones in each half tile, so its activations are two 16-byte loads; which column the tensor
core calls "k" does not matter, as long as both operands agree.

``scales``: 16-bit floats ``(ceil(N/16), K/group, 16)``; ``zeros``: uint8 of the same shape, or None.

Rows beyond N and columns beyond K (K is a multiple of 32) are padding: q = 8, scale = 0, zero = 8. Slicing any
number of 16-row tiles is a view of all three tensors, so projections that share an input can share one tensor.
"""

from __future__ import annotations

import functools

import torch

TILE_ROWS = 16
TILE_COLS = 64
GROUP_SIZES = (128, 64, 32)
SYMMETRIC_ZERO = 8


def ceil_div(a: int, b: int) -> int:
    """Smallest integer >= a / b."""
    return -(-a // b)


@functools.cache
def _tile_index() -> torch.Tensor:
    """For each of the 1,024 nibbles of a tile, in storage order, its position ``row * 64 + column`` in the tile."""
    lane, word, nibble = torch.meshgrid(torch.arange(32), torch.arange(4), torch.arange(8), indexing="ij")
    g, t = lane // 4, lane % 4
    i, h = nibble % 4, nibble // 4
    row = g + 8 * (i % 2)
    col = 32 * (word // 2) + 8 * t + 4 * (word % 2) + 2 * (i // 2) + h
    return (row * TILE_COLS + col).reshape(-1)


@functools.cache
def _tile_index_inverse() -> torch.Tensor:
    return torch.argsort(_tile_index())


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """Packs integers 0..15 of shape ``(N, K)`` (any integer dtype) into ``qweight`` as described above.

    Raises ValueError when q is not 2-D or K is not a multiple of 32. Values outside 0..15 are a caller's bug and raise
    as well, since they would silently corrupt their neighbours.
    """
    if q.dim() != 2 or q.shape[1] % 32:
        raise ValueError(f"pack_int4 needs a 2-D tensor with columns a multiple of 32, got shape {tuple(q.shape)}")
    if q.numel() and (int(q.min()) < 0 or int(q.max()) > 15):
        raise ValueError("pack_int4 needs values in 0..15")
    n, k = q.shape
    nt, kt = ceil_div(n, TILE_ROWS), ceil_div(k, TILE_COLS)
    padded = torch.full((nt * TILE_ROWS, kt * TILE_COLS), SYMMETRIC_ZERO, dtype=torch.uint8, device=q.device)
    padded[:n, :k] = q.to(torch.uint8)
    tiles = padded.view(nt, TILE_ROWS, kt, TILE_COLS).transpose(1, 2).reshape(nt, kt, -1)
    ordered = tiles[..., _tile_index().to(q.device)].view(nt, kt, 32, 4, 4, 2)
    packed_bytes = ordered[..., 0] | (ordered[..., 1] << 4)  # two nibbles a byte, low one first
    return packed_bytes.contiguous().view(torch.int32).view(nt, kt, 32, 4)


def unpack_int4(qweight: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The inverse of :func:`pack_int4`: uint8 ``(rows, cols)`` with values 0..15."""
    nt, kt = qweight.shape[:2]
    packed_bytes = qweight.contiguous().view(torch.uint8).view(nt, kt, -1)
    ordered = torch.stack((packed_bytes & 15, packed_bytes >> 4), dim=-1).view(nt, kt, -1)
    tiles = ordered[..., _tile_index_inverse().to(qweight.device)].view(nt, kt, TILE_ROWS, TILE_COLS)
    return tiles.transpose(1, 2).reshape(nt * TILE_ROWS, kt * TILE_COLS)[:rows, :cols]


def pack_per_group(values: torch.Tensor, fill: float) -> torch.Tensor:
    """Scales or zeros ``(N, K/group)`` to the stored ``(ceil(N/16), K/group, 16)``, padded rows set to ``fill``."""
    n, groups = values.shape
    nt = ceil_div(n, TILE_ROWS)
    padded = torch.full((nt * TILE_ROWS, groups), fill, dtype=values.dtype, device=values.device)
    padded[:n] = values
    return padded.view(nt, TILE_ROWS, groups).transpose(1, 2).contiguous()


def unpack_per_group(stored: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of :func:`pack_per_group`: ``(rows, K/group)``."""
    return stored.transpose(1, 2).reshape(-1, stored.shape[1])[:rows]


def dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
) -> torch.Tensor:
    """The float weight ``(out_features, in_features)`` in ``scales.dtype``.

    ``q - zero`` is exact and the product with the scale is rounded once, so every implementation that computes
    this expression in that order gives the same bits.
    """
    q = unpack_int4(qweight, out_features, in_features).to(torch.int8).view(out_features, -1, group_size)
    zero = SYMMETRIC_ZERO if zeros is None else unpack_per_group(zeros, out_features).to(torch.int8).unsqueeze(-1)
    scale = unpack_per_group(scales, out_features).unsqueeze(-1)
    return ((q - zero).to(scale.dtype) * scale).view(out_features, in_features)
