"""What temperature, top-k, top-p and min-p leave of a next token's distribution."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library

SCHEMA = "sampling_weights(Tensor logits, float temperature, int top_k, float top_p, float min_p) -> Tensor"
MAX_VOCABULARY = 1 << 18


def sampling_weights_reference(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    scores = logits.float() / temperature
    if 0 < top_k < scores.shape[1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ascending, order = scores.sort()  # as transformers: equal ones in an order that is torch's affair
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        removed[:, -1] = False
        scores = scores.masked_fill(removed.scatter(1, order, removed), -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights.masked_fill(weights < min_p, 0)


def _fake(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float32)


_op = _library.define(SCHEMA, sampling_weights_reference, _fake)


def sampling_weights(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    *,
    reference: bool = False,
) -> torch.Tensor:
    """Each token's probability divided by that of the most probable one, float32 ``(B, V)``; 0 where a filter removes
    it. The filters follow one another as in transformers, each with its definition there: TemperatureLogitsWarper,
    TopKLogitsWarper (Fan et al., 2018, "Hierarchical Neural Story Generation"), TopPLogitsWarper (Holtzman et al.,
    2020, "The Curious Case of Neural Text Degeneration"), MinPLogitsWarper (Nguyen et al., 2024, "Turning Up the
    Heat").

    Tokens of equal logits are all kept by top-k. Of those at the edge of top-p's set the last ones are kept on CUDA, as
    by torch's sort there, which leaves equal ones in their order where there are more than 32 tokens. The sums of top-p
    are of integers with 40 bits behind the point, exact in any order. transformers' are of float32, on a GPU in an
    order that differs from run to run: a token at the edge whose share is within about 1e-6 of it may be kept by the
    one and removed by the other.

    Args:
        logits: ``(B, V)``, rows any distance apart. On CUDA float16, bfloat16 or float32, V up to 2^18. A row with a
            NaN, an infinite logit or none that is finite has NaN weights.
        temperature: positive; logits are multiplied by its reciprocal on CUDA, as torch's division by a number does
            there. top_k: 0 keeps all tokens. top_p: 1 keeps all. min_p: 0 keeps all.
        reference: run the reference implementation, on any device.
    """
    run = sampling_weights_reference if reference else _op
    return run(logits, temperature, top_k, top_p, min_p)
