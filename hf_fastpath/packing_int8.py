"""The packed int8 weight layout. This file is its only description; kernels and modules follow it.

A weight ``W`` of shape ``(N, K)``, K a multiple of 32, is stored as ``W[n, k] = q[n, k] * scale[n]`` with q a signed
byte, -128..127, and one 16-bit ``scale`` for each output n (``scales``: ``(N,)``).

``qweight``: int8 ``(ceil(N/16), K/32, 32, 16)``. One tile covers 16 rows by 32 columns and is the 512 bytes that one
warp reads with one 16-byte load a lane. Lane ``l = 4 * g + t`` (g in 0..7, t in 0..3) holds the A fragments of two
``mma.m16n8k16`` (PTX ISA, "Matrix Fragments for mma.m16n8k16"): rows ``g`` and ``g + 8`` of the tile, columns
``8 * t .. 8 * t + 7``. Byte ``4 * j + b`` of the lane (byte b of its word j) is::

    row    g + 8 * (b % 2)            column   8 * t + 2 * j + b // 2

so that bytes 0 and 2 of a word are a pair of neighbouring columns of row g, and bytes 1 and 3 of row ``g + 8``: the
registers of a fragment. A lane's columns are 8 consecutive ones, so its activations are one 16-byte load; which column
the tensor core calls "k" does not matter, as long as both operands agree.

Rows beyond N are padding, q = 0. Slicing any number of 16-row tiles is a view.
"""

from __future__ import annotations

import functools

import torch

from hf_fastpath.packing import TILE_ROWS, ceil_div

TILE_COLS = 32


@functools.cache
def _tile_index() -> torch.Tensor:
    """For each of the 512 bytes of a tile, in storage order, its position ``row * 32 + column`` in the tile."""
    lane, word, byte = torch.meshgrid(torch.arange(32), torch.arange(4), torch.arange(4), indexing="ij")
    row = lane // 4 + 8 * (byte % 2)
    col = 8 * (lane % 4) + 2 * word + byte // 2
    return (row * TILE_COLS + col).reshape(-1)


@functools.cache
def _tile_index_inverse() -> torch.Tensor:
    return torch.argsort(_tile_index())


def pack_int8(q: torch.Tensor) -> torch.Tensor:
    """Packs int8 values of shape ``(N, K)`` into ``qweight`` as described above.

    Raises ValueError when q is not a 2-D int8 tensor or K is not a multiple of 32.
    """
    if q.dtype is not torch.int8 or q.dim() != 2 or q.shape[1] % TILE_COLS:
        raise ValueError(
            f"pack_int8 needs a 2-D int8 tensor with columns a multiple of 32, got {q.dtype} of shape {tuple(q.shape)}"
        )
    n, k = q.shape
    nt, kt = ceil_div(n, TILE_ROWS), k // TILE_COLS
    padded = q.new_zeros(nt * TILE_ROWS, k)
    padded[:n] = q
    tiles = padded.view(nt, TILE_ROWS, kt, TILE_COLS).transpose(1, 2).reshape(nt, kt, -1)
    return tiles[..., _tile_index().to(q.device)].view(nt, kt, 32, 16)


def unpack_int8(qweight: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of :func:`pack_int8`: int8 ``(rows, K)``."""
    nt, kt = qweight.shape[:2]
    tiles = qweight.reshape(nt, kt, -1)[..., _tile_index_inverse().to(qweight.device)]
    return tiles.view(nt, kt, TILE_ROWS, TILE_COLS).transpose(1, 2).reshape(nt * TILE_ROWS, kt * TILE_COLS)[:rows]


def dequantize_int8(qweight: torch.Tensor, scales: torch.Tensor, out_features: int) -> torch.Tensor:
    """The float weight ``(out_features, K)`` in ``scales.dtype``.

    q is exact in 16 bits and its product with the scale is rounded once, so every implementation that computes this
    expression gives the same bits.
    """
    return unpack_int8(qweight, out_features).to(scales.dtype) * scales.unsqueeze(-1)
