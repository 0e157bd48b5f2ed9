"""Cosine and sine of rotary embeddings (Su et al., 2021) in one kernel, where transformers takes nine operations."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library

SCHEMA = "rope_angles(Tensor positions, Tensor inv_freq, float scaling, Tensor like) -> (Tensor, Tensor)"


def rope_angles_reference(
    positions: torch.Tensor, inv_freq: torch.Tensor, scaling: float, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    half = positions[..., None].float() * inv_freq
    angles = torch.cat((half, half), dim=-1)
    return (angles.cos() * scaling).to(like.dtype), (angles.sin() * scaling).to(like.dtype)


def _fake(
    positions: torch.Tensor, inv_freq: torch.Tensor, scaling: float, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*positions.shape, 2 * inv_freq.shape[0])
    return like.new_empty(shape), like.new_empty(shape)


_op = _library.define(SCHEMA, rope_angles_reference, _fake)


def rope_angles(
    positions: torch.Tensor, inv_freq: torch.Tensor, scaling: float, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, ``(B, T, D_rot)`` in the dtype of ``like``, contiguous, of ``positions`` times ``inv_freq``.

    Args:
        positions: int64 ``(B, T)``, on CUDA contiguous.
        inv_freq: float32 ``(D_rot / 2,)``, on CUDA contiguous: radians a position. Both halves of the result have
            those angles.
        scaling: what cosine and sine are multiplied by.
        like: a tensor of which only the dtype is read; on CUDA float16, bfloat16 or float32.

    The bits are those of LlamaRotaryEmbedding: products, cosines and sines are rounded in float32, one by one, and the
    result once more. Raises RuntimeError, in words, for arguments that do not fit.
    """
    return _op(positions, inv_freq, scaling, like)
