"""From scores to the next tokens, and what the decode loop notes about them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_fastpath.ops import _library

SCHEMA = (
    "choose_tokens(Tensor scores, Tensor? noise, Tensor? end, Tensor? pad, Tensor(a!) ids, Tensor(b!) positions, "
    "Tensor(c!) unfinished, Tensor(d!) done, Tensor(e!) tokens, Tensor(f!) count, Tensor(g!) report) -> ()"
)

# Of TokenState.done and .report: the number of a call, how many tokens had been chosen when the last row was finished,
# and in a report how many are.
CALL_SHIFT, DONE_SHIFT, COUNT_MASK = 48, 24, (1 << 24) - 1


class TokenState(NamedTuple):
    """What the decode loop notes of B rows.

    Attributes:
        ids, positions: int64 ``(B, 1)``, the tokens chosen last, and where they stand.
        unfinished: int64 ``(B,)``, 1 until a row has an end token, then 0.
        done: int64 ``()``, any number of a call below 2^15 times 2^48, plus, once no row is unfinished, 2^24 times how
            many tokens had been chosen when the last one got its end token.
        tokens: int64 ``(B, capacity)``, capacity below 2^24, rows any distance apart, of which ``counted`` ``(1, 1)``
            were chosen so far.
        report: int64 ``()``, of a GPU in its own or in the host's pinned memory: ``done + counted`` afterwards, if
            there are end tokens.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    unfinished: torch.Tensor
    done: torch.Tensor
    tokens: torch.Tensor
    counted: torch.Tensor
    report: torch.Tensor


def choose_tokens_reference(
    scores: torch.Tensor,
    noise: torch.Tensor | None,
    end: torch.Tensor | None,
    pad: torch.Tensor | None,
    ids: torch.Tensor,
    positions: torch.Tensor,
    unfinished: torch.Tensor,
    done: torch.Tensor,
    tokens: torch.Tensor,
    count: torch.Tensor,
    report: torch.Tensor,
) -> None:
    chosen = (scores if noise is None else scores / noise).argmax(-1)
    if end is not None and pad is not None:
        chosen = chosen * unfinished + pad * (1 - unfinished)
        unfinished &= ~torch.isin(chosen, end)
        first = (unfinished.max() == 0) & (done >> DONE_SHIFT & COUNT_MASK == 0)
        done += torch.where(first, count[0, 0] + 1 << DONE_SHIFT, 0)
        report.copy_(done + count[0, 0] + 1)
    ids.copy_(chosen[:, None])
    tokens.scatter_(1, count.expand(tokens.shape[0], 1), chosen[:, None])
    count += 1
    positions += 1


def _fake(
    scores: torch.Tensor,
    noise: torch.Tensor | None,
    end: torch.Tensor | None,
    pad: torch.Tensor | None,
    ids: torch.Tensor,
    positions: torch.Tensor,
    unfinished: torch.Tensor,
    done: torch.Tensor,
    tokens: torch.Tensor,
    count: torch.Tensor,
    report: torch.Tensor,
) -> None:
    return None


_op = _library.define(SCHEMA, choose_tokens_reference, _fake)


def choose_tokens(
    scores: torch.Tensor,
    noise: torch.Tensor | None,
    end: torch.Tensor | None,
    pad: torch.Tensor | None,
    state: TokenState,
    *,
    reference: bool = False,
) -> None:
    """Chooses a token a row: where ``scores`` are largest, or, with noise, ``scores / noise``; of equal ones the first,
    and a NaN before all, as :func:`torch.argmax` does. Then counts it, and its position.

    Probabilities over noise of an exponential distribution are a draw by these probabilities (as torch.multinomial
    draws): Yellott, 1977, "The relationship between Luce's Choice Axiom, Thurstone's Theory of Comparative Judgment,
    and the double exponential distribution".

    Args:
        scores: ``(B, V)``, rows any distance apart. On CUDA float16, bfloat16 or float32, V below 2^31.
        noise: float32 ``(B, V)``, contiguous; then ``scores`` are float32 and contiguous as well. Or None.
        end: int64 ``(E,)``, tokens that finish a row; None: nothing finishes one. pad: int64 ``()``, with ``end``: what
            a finished row goes on with.
        state: what is noted, in place. What is ``counted`` must be less than its capacity.
        reference: run the reference implementation, on any device.
    """
    run = choose_tokens_reference if reference else _op
    run(scores, noise, end, pad, *state)
