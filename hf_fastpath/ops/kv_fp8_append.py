"""Write new keys and values into the fp8 cache: into its full-precision tail, and as E4M3 when a group of tokens is
full.

E4M3 is the 8-bit float of Micikevicius et al., 2022, "FP8 Formats for Deep Learning": 3 bits of mantissa, up to 448.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_fastpath.ops import _append, _groups

GROUP_TOKENS = 64
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0

STORAGE = (
    "Tensor(a!) k_data, Tensor(b!) k_scale, Tensor(c!) k_tail, Tensor(d!) v_data, Tensor(e!) v_scale, "
    "Tensor(f!) v_tail, Tensor(g!) lengths"
)


def power_of_two_scale(largest: torch.Tensor) -> torch.Tensor:
    """The smallest power of two, float32, by which ``largest`` (float32, >= 0) divided is at most 448; 1 for 0.

    A power of two costs a float format nothing, and makes what was rounded once stay as it is when it is rounded with
    another scale, as happens to tokens that a crop() takes out of a group.
    """
    mantissa, exponent = torch.frexp(largest / FP8_MAX)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(largest), exponent.clamp(-126, 127))


def quantize_fp8_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 payload of x ``(B, H, n, D)``, n a multiple of 64, and float32 scales ``(B, H, n / 64)``.

    ``q = fp8(x / scale)``, rounded to nearest, with :func:`power_of_two_scale` of the group's largest magnitude.
    """
    groups = x.float().unflatten(2, (-1, GROUP_TOKENS))
    scale = power_of_two_scale(groups.abs().amax((3, 4)))
    return (groups / scale[..., None, None]).to(FP8).flatten(2, 3), scale


def _store(
    key: torch.Tensor,
    value: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    k_tail: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    v_tail: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    start = _groups.tokens_stored(lengths)
    first = _groups.quantized_of(start, GROUP_TOKENS)
    for x, data, scale, tail in ((key, k_data, k_scale, k_tail), (value, v_data, v_scale, v_tail)):
        full = _groups.tail_append(x, tail, start)
        if full.shape[2]:
            q, s = quantize_fp8_groups(full)
            data[:, :, first : first + full.shape[2]] = q
            scale[:, :, first // GROUP_TOKENS : (first + full.shape[2]) // GROUP_TOKENS] = s
    lengths += key.shape[2]


_op, kv_fp8_append_reference = _append.define("kv_fp8_append", STORAGE, _store)


def kv_fp8_append(
    key: torch.Tensor,
    value: torch.Tensor,
    storage: Sequence[torch.Tensor],
    transform: _append.QKTransform = _append.NOTHING,
    query: torch.Tensor | None = None,
    *,
    reference: bool = False,
) -> torch.Tensor | None:
    """Appends tokens, quantizes the groups that they fill, and counts both in the storage's ``lengths``.

    Args:
        key, value: ``(B, H_kv, q, D)``, any strides with a contiguous last dimension; fp16, bf16 (CPU also fp32).
        storage: that of :class:`hf_fastpath.caches.fp8.Fp8KVLayer`, which describes it, with room for the tokens.
        transform: what is done to the keys before they are stored, and to the query.
        query: ``(B, H, q, D)``, strides alike; None: nothing is returned.
        reference: run the reference implementation, on any device.

    Returns the query transformed, ``(B, H, q, D)``, in memory as ``(B, q, H, D)``.
    """
    append = kv_fp8_append_reference if reference else _op
    return _append.call(append, key, value, storage, transform, query)
