"""Tokens of an int8 cache back to floats: for later prompt chunks and for attention code that is not ours."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library

SCHEMA = "kv_int8_dequantize(Tensor data, Tensor scale, int start, Tensor(a!) out) -> ()"


def kv_int8_dequantize_reference(data: torch.Tensor, scale: torch.Tensor, start: int, out: torch.Tensor) -> None:
    tokens = slice(start, start + out.shape[2])
    out.copy_(data[:, :, tokens].float() * scale[:, :, tokens].float().unsqueeze(-1))


def _fake(data: torch.Tensor, scale: torch.Tensor, start: int, out: torch.Tensor) -> None:
    return None


_op = _library.define(SCHEMA, kv_int8_dequantize_reference, _fake)


def kv_int8_dequantize(
    data: torch.Tensor, scale: torch.Tensor, tokens: slice, dtype: torch.dtype, *, reference: bool = False
) -> torch.Tensor:
    """The tokens ``tokens.start .. tokens.stop``, ``(B, H_kv, n, D)`` in ``dtype`` (fp16, bf16; CPU also fp32).

    Args:
        data: int8 ``(B, H_kv, capacity, D)``; scale: float16 ``(B, H_kv, capacity)``; both contiguous.
        reference: run the reference implementation, on any device.

    ``q * scale`` is computed in float32 and rounded once.
    """
    shape = (*data.shape[:2], tokens.stop - tokens.start, data.shape[3])
    out = torch.empty(shape, dtype=dtype, device=data.device)
    (kv_int8_dequantize_reference if reference else _op)(data, scale, tokens.start, out)
    return out
