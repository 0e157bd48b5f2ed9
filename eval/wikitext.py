"""Perplexity of a text by the published convention, with the KV cache in the loop.

The text (WikiText-2's raw test set, its rows joined with two newlines) is tokenized as a whole and cut into disjoint
windows of 2,048 tokens (or the model's limit; the stride is the window); what is left at the end is not used. Every
token of a window but its first is predicted from those before it in the window, as GPTQ (Frantar et al., 2022) and
those after it report it. Every prediction attends to what the cache holds at that moment of decoding.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hf_fastpath.eval.chunks import KV_CHUNK, logits_in_chunks
from hf_fastpath.eval.perplexity import Divergence, score
from hf_fastpath.eval.processes import Processes

WINDOW = 2048


@dataclasses.dataclass(frozen=True)
class Text:
    """A tokenized text: ``windows``, token ids ``(n, T)``, and the numbers of tokens, words (what white space
    separates) and UTF-8 bytes of all of it."""

    windows: torch.Tensor
    tokens: int
    words: int
    bytes: int

    @classmethod
    def read(
        cls, tokenizer: Any, text: str, window: int = WINDOW, limit: int | None = None, most: int | None = None
    ) -> Text:
        """Tokenizes ``text``; at most ``most`` windows of ``window`` tokens, or ``limit``, what the model can read.

        Raises:
            ValueError: fewer than two tokens, or numbers out of range.
        """
        window = min(window, limit or window)
        if window < 2 or (most is not None and most < 1):
            raise ValueError(f"window={window}, windows={most}: allowed are window >= 2 and windows >= 1")
        ids = torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.long)
        if ids.numel() < 2:
            raise ValueError(f"perplexity needs a text of at least 2 tokens, got {ids.numel()}")
        window = min(window, ids.numel())
        windows = ids[: ids.numel() // window * window].view(-1, window)[:most]
        words = len(re.findall(r"\S+", text))
        return cls(windows, ids.numel(), words, len(text.encode("utf-8")))


@dataclasses.dataclass(frozen=True)
class TextScore:
    """``window_nll``: the mean of each window in nats a token. ``kl``, ``top1``: divergence from stock's predictions in
    nats a token, and share of the same likeliest tokens, over the first ``compared`` predictions."""

    window_nll: tuple[float, ...]
    predictions: int
    tokens_per_word: float
    tokens_per_byte: float
    kl: float | None = None
    top1: float | None = None
    compared: int = 0

    @property
    def nll(self) -> float:
        """Nats a token."""
        return statistics.fmean(self.window_nll)

    @property
    def token_perplexity(self) -> float:
        return math.exp(self.nll)

    @property
    def word_perplexity(self) -> float:
        """``exp(nats a token x tokens a word)``, tokens and words being those of the whole text."""
        return math.exp(self.nll * self.tokens_per_word)

    @property
    def bits_per_byte(self) -> float:
        return self.nll * self.tokens_per_byte / math.log(2)

    def change_from(self, stock: TextScore) -> tuple[float, float | None]:
        """Relative change of the token perplexity, and its standard error: windows paired, taken as independent."""
        differences = [own - other for own, other in zip(self.window_nll, stock.window_nll, strict=True)]
        change = math.expm1(statistics.fmean(differences))
        if len(differences) < 2:
            return change, None
        return change, statistics.stdev(differences) / math.sqrt(len(differences)) * (1 + change)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, from which :meth:`from_dict` makes the same."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TextScore:
        return cls(**{**fields, "window_nll": tuple(fields["window_nll"])})


class StockPredictions:
    """What the stock model predicts in the first windows: 2 bytes x tokens x vocabulary, on the CPU."""

    def __init__(self) -> None:
        self.divergence = Divergence()
        self.top1: list[torch.Tensor] = []

    def __bool__(self) -> bool:
        return bool(self.top1)


@torch.inference_mode()
def score_text(
    model: Any,
    text: Text,
    make_cache: Callable[[], Any],
    *,
    kv_chunk: int = KV_CHUNK,
    batch_size: int = 1,
    stock: StockPredictions | None = None,
    compared: int = 0,
    processes: Processes | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TextScore:
    """The score of ``model`` as it stands.

    Args:
        make_cache: makes an empty cache, see :func:`hf_fastpath.eval.chunks.chunk_sizes`.
        kv_chunk: tokens fed at once: the speed, not the result. batch_size: windows at once.
        stock: filled by the first call, which is the stock model's; later ones are compared with it, in the first
            ``compared`` windows.
        processes: those that share the windows; each must make the same calls.
        progress: called with (windows done, windows in all) of this process.
    """
    processes = processes or Processes()
    edge = min(compared, len(text.windows)) if stock is not None else 0
    parts = range(edge), range(edge, len(text.windows))
    # Processes share batches, so that their number does not change one.
    mine = [batch for part in parts for batch in _batches(part, batch_size)][processes.rank :: processes.count]
    seen, known = stock or None, list(stock.top1) if stock is not None else []
    nll: dict[int, float] = {}
    same = 0
    for batch in mine:
        look: Callable[[torch.Tensor], None] = _ignore
        if stock is not None and batch[0] < edge:
            look = stock.divergence.compare if seen else stock.divergence.remember
        ids = text.windows[batch].to(model.device)
        means, top1 = _score_batch(model, ids, make_cache(), kv_chunk, look)
        nll |= dict(zip(batch, means.tolist(), strict=True))
        if stock is not None and batch[0] < edge:
            if seen:
                same += int((top1 == known.pop(0)).sum())
            else:
                stock.top1.append(top1)
        progress(len(nll), sum(map(len, mine)))
    predictions = text.windows.shape[1] - 1
    compared_here = sum(index < edge for index in nll) * predictions if seen else 0
    kl_sum = seen.divergence.take() * compared_here if seen else 0.0
    everyone = processes.gather((nll, kl_sum, same, compared_here))
    together = {index: value for part in everyone for index, value in part[0].items()}
    kl_sums, sames, counts = (sum(part[column] for part in everyone) for column in (1, 2, 3))
    return TextScore(
        window_nll=tuple(together[index] for index in sorted(together)),
        predictions=predictions * len(together),
        tokens_per_word=text.tokens / text.words,
        tokens_per_byte=text.tokens / text.bytes,
        kl=kl_sums / counts if counts else None,
        top1=sames / counts if counts else None,
        compared=counts,
    )


def _batches(indices: Sequence[int], size: int) -> list[list[int]]:
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


def _ignore(logits: torch.Tensor) -> None:
    pass


def _score_batch(
    model: Any, ids: torch.Tensor, cache: Any, kv_chunk: int, look: Callable[[torch.Tensor], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats a token of each window, float64 ``(n,)``, and the likeliest tokens ``(n, T - 1)``, both on the CPU."""
    nll, top1, start = [], [], 1
    for logits in logits_in_chunks(model, ids[:, :-1], cache, kv_chunk):
        size = logits.shape[1]
        part_nll, part_top1 = score(logits.flatten(0, 1), ids[:, start : start + size].flatten())
        nll.append(part_nll.view(-1, size))
        top1.append(part_top1.view(-1, size))
        if look is not _ignore:
            for position in logits.unbind(1):
                look(position)
        start += size
    return torch.cat(nll, 1).double().mean(1), torch.cat(top1, 1)
