"""The router of a mixture of experts: which experts a token goes to, and how much each counts."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops._rms_norm import rms_norm

SCHEMA = (
    "moe_router(Tensor x, Tensor weight, Tensor? expert_bias, int top_k, bool normalize, float scaling, "
    "Tensor? norm_weight, float norm_eps) -> (Tensor, Tensor, Tensor, Tensor)"
)
_EPSILON = 1e-6


def moe_router_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    expert_bias: torch.Tensor | None,
    top_k: int,
    normalize: bool,
    scaling: float,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    normalized = x.new_empty((0, x.shape[1])) if norm_weight is None else rms_norm(x, norm_weight, norm_eps)
    x = x if norm_weight is None else normalized
    logits = torch.nn.functional.linear(x, weight)
    scores = logits.sigmoid()
    ranked = scores if expert_bias is None else scores + expert_bias
    chosen = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    shares = scores.gather(1, chosen)
    if normalize:
        shares = shares / (shares.sum(dim=-1, keepdim=True) + _EPSILON)
    return logits, shares * scaling, chosen, normalized


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    expert_bias: torch.Tensor | None,
    top_k: int,
    normalize: bool,
    scaling: float,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, shape = x.shape[0], (x.shape[0], top_k)
    normalized = x.new_empty((0 if norm_weight is None else rows, x.shape[1]))
    logits, shares = x.new_empty((rows, weight.shape[0])), x.new_empty(shape)
    return logits, shares, x.new_empty(shape, dtype=torch.int64), normalized


_op = _library.define(SCHEMA, moe_router_reference, _fake)


def moe_router(
    x: torch.Tensor,
    weight: torch.Tensor,
    expert_bias: torch.Tensor | None,
    top_k: int,
    normalize: bool,
    scaling: float,
    *,
    reference: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(logits (M, E), shares (M, top_k), experts (M, top_k))``, shares and experts by falling score.

    A score is the sigmoid of a logit ``x @ weight.T``. The experts are those with the largest sum of score and bias, of
    equal ones the first; their shares are their scores without the bias (Wang et al., 2024, "Auxiliary-Loss-Free Load
    Balancing Strategy for Mixture-of-Experts"), divided by their sum and 1e-6 if ``normalize``, times ``scaling``.

    Args:
        x: ``(M, H)``; weight: ``(E, H)``, both of one dtype, in which logits, scores and shares are rounded after each
            operation, as transformers does. Logits are accumulated in float32. On CUDA float16 or bfloat16, contiguous,
            aligned to 16 bytes, H a multiple of 32, E up to 256 and top_k up to 32.
        expert_bias: float32 ``(E,)`` or None.
        reference: run the reference implementation, on any device.

    ``experts`` is int64. A row's results do not depend on the other rows.
    """
    run = moe_router_reference if reference else _op
    logits, shares, experts, _ = run(x, weight, expert_bias, top_k, normalize, scaling, None, 0.0)
    return logits, shares, experts


def moe_norm_router(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    weight: torch.Tensor,
    expert_bias: torch.Tensor | None,
    top_k: int,
    normalize: bool,
    scaling: float,
    *,
    reference: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(RMSNorm(x) (M, H), shares (M, top_k), experts (M, top_k))``: :func:`moe_router` of x's RMSNorm, in one kernel.

    Args:
        norm_weight: ``(H,)``, contiguous, on CUDA aligned to 16 bytes and in ``x.dtype``.

    The norm rounds like LlamaRMSNorm (:func:`rms_norm`).
    """
    run = moe_router_reference if reference else _op
    router = (weight, expert_bias, top_k, normalize, scaling)
    _, shares, experts, normalized = run(x, *router, norm_weight, norm_eps)
    return normalized, shares, experts
