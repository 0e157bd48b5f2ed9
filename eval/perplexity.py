"""Perplexity of a text, with a KV cache in the loop when one is given.

A plain forward pass attends to unrounded keys and values, so it cannot see what a quantized cache costs. Here each
window goes through the cache that ``cache_factory`` makes: with ``Int8KVCache(config, fresh_prefill=False)`` every
token attends to the quantized past, as when decoding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

SLICE = Path(__file__).with_name("data") / "wikitext2_test_slice.txt"
_LOGIT_ROWS = 128  # rows whose logits are widened to float32 at a time: 25 MB with a vocabulary of 50,000


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Perplexity over ``tokens`` predicted tokens. ``token_nll`` and ``top1`` (the most likely token) are one each."""

    ppl: float
    nll: float
    tokens: int
    token_nll: torch.Tensor
    top1: torch.Tensor

    @classmethod
    def of(cls, token_nll: torch.Tensor, top1: torch.Tensor) -> Perplexity:
        nll = token_nll.double().mean().item()
        return cls(math.exp(nll), nll, token_nll.numel(), token_nll, top1)

    def change_from(self, reference: Perplexity) -> tuple[float, float]:
        """Relative change of the perplexity and its standard error (tokens paired, and taken as independent)."""
        difference = (self.token_nll - reference.token_nll).double()
        error = difference.std().item() / math.sqrt(self.tokens) if self.tokens > 1 else math.nan
        return math.expm1(difference.mean().item()), error * self.ppl / reference.ppl

    def top1_agreement(self, reference: Perplexity) -> float:
        """Share of tokens where both models find the same next token the most likely."""
        return (self.top1 == reference.top1).double().mean().item()


def window_starts(length: int, window: int, stride: int, max_windows: int | None = None) -> list[int]:
    """Where the windows begin. A shorter last one is left out, unless it is the only one."""
    if length < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, got {length}")
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(f"window={window}, stride={stride}: allowed are window >= 2 and 1 <= stride <= window")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows={max_windows}: must be 1 or more")
    starts = list(range(0, max(length - window, 0) + 1, stride))
    return starts[:max_windows]


@torch.inference_mode()
def perplexity(
    model: Any,
    token_ids: Sequence[int] | torch.Tensor,
    window: int,
    stride: int | None = None,
    *,
    max_windows: int | None = None,
    cache_factory: Callable[[], Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_logits: Callable[[torch.Tensor], None] | None = None,
) -> Perplexity:
    """Perplexity of ``token_ids`` under ``model``, window by window.

    Every token of a window but its first is predicted from the tokens before it in that window. With ``stride`` smaller
    than ``window`` the windows overlap, and a token is counted where it is met first.

    Args:
        token_ids: one sequence of token ids.
        window: tokens in one forward pass; the memory peak is its logits in the model's dtype.
        stride: tokens from one window to the next; None for ``window``.
        max_windows: stop after this many.
        cache_factory: makes an empty cache for each window; None runs without a cache.
        progress: called with (windows done, windows in all).
        on_logits: called for each window with the logits ``(tokens, vocabulary)`` of the tokens that are counted.

    Returns:
        The result; log-probabilities are computed in float32 and summed in float64.
    """
    ids = torch.as_tensor(token_ids, dtype=torch.long).flatten()
    stride = window if stride is None else stride
    starts = window_starts(ids.numel(), window, stride, max_windows)
    nll, top1 = [], []
    for done, start in enumerate(starts):
        chunk = ids[start : start + window].to(model.device)
        cache = None if cache_factory is None else cache_factory()
        logits = model(input_ids=chunk[None], past_key_values=cache, use_cache=cache is not None).logits[0]
        fresh = chunk.numel() - 1 if start == 0 else min(stride, chunk.numel() - 1)
        counted = logits[-fresh - 1 : -1]
        if on_logits is not None:
            on_logits(counted)
        window_nll, window_top1 = score(counted, chunk[-fresh:])
        nll.append(window_nll)
        top1.append(window_top1)
        if progress is not None:
            progress(done + 1, len(starts))
    return Perplexity.of(torch.cat(nll), torch.cat(top1))


class Divergence:
    """The Kullback-Leibler divergence, in nats a token, of a model's predictions from a reference's.

    Pass :meth:`remember` as ``on_logits`` for the reference, then :meth:`compare` for each model on the same text. The
    reference's log-probabilities are kept in fp16 on the CPU: 2 bytes x tokens x vocabulary.
    """

    def __init__(self) -> None:
        self._reference: list[torch.Tensor] = []
        self._window = 0
        self._sum, self._tokens = 0.0, 0

    def remember(self, logits: torch.Tensor) -> None:
        rows = [part.float().log_softmax(-1).half().cpu() for part in logits.split(_LOGIT_ROWS)]
        self._reference.append(torch.cat(rows))

    def compare(self, logits: torch.Tensor) -> None:
        reference = self._reference[self._window]
        self._window += 1
        for rows, known in zip(logits.split(_LOGIT_ROWS), reference.split(_LOGIT_ROWS), strict=True):
            log_p = known.to(rows.device).float()
            self._sum += float((log_p.exp() * (log_p - rows.float().log_softmax(-1))).sum(dtype=torch.float64))
            self._tokens += rows.shape[0]

    def take(self) -> float:
        """The mean since the last call, for the next model to start anew."""
        mean = self._sum / max(self._tokens, 1)
        self._window, self._sum, self._tokens = 0, 0.0, 0
        return mean


def score(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each target, and the most likely token, on the CPU."""
    nll = []
    for rows, wanted in zip(logits.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True):
        nll.append(torch.nn.functional.cross_entropy(rows.float(), wanted, reduction="none"))
    return torch.cat(nll).cpu(), logits.argmax(-1).cpu()
