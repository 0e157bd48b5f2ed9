"""Cases of how tokens are chosen, for the emulator and the GPU: what the reference does, in exactly the same way."""

from __future__ import annotations

import torch
from kernel_cases import Target

from hf_fastpath.ops import TokenState
from hf_fastpath.ops.choose_tokens import choose_tokens_reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Rows, vocabulary, elements that the scores are shifted by, and between their rows.
SHAPES = [(1, 1, 0, 0), (1, 5000, 0, 0), (3, 199, 0, 0), (17, 8192, 0, 0), (2, 4096, 1, 3), (5, 2056, 8, 16)]


def new_state(rng: torch.Generator, rows: int, capacity: int = 7, device: str = "cpu") -> TokenState:
    """One of a loop that is under way; rows beside its own are in memory, and stay as they are."""
    tokens = torch.randint(0, 99, (rows + 1, capacity + 3), generator=rng).to(device)
    return TokenState(
        ids=torch.full((rows, 1), -7, device=device),
        positions=torch.randint(0, 99, (rows, 1), generator=rng).to(device),
        unfinished=torch.randint(0, 2, (rows,), generator=rng).to(device),
        done=torch.tensor(False, device=device),
        tokens=tokens[:rows, :capacity],
        counted=torch.tensor([[2]], device=device),
    )


def make_scores(
    rng: torch.Generator, rows: int, vocabulary: int, shift: int, gap: int, dtype: torch.dtype, device: str = "cpu"
) -> torch.Tensor:
    """Scores of which many are equal, in a view."""
    numbers = torch.randint(-40, 41, (rows * (vocabulary + gap) + shift,), generator=rng) / 8
    return numbers.to(dtype).to(device)[shift:].view(rows, vocabulary + gap)[:, :vocabulary]


def check_choice(
    target: Target,
    scores: torch.Tensor,
    noise: torch.Tensor | None,
    end: torch.Tensor | None,
    pad: torch.Tensor | None,
    state: TokenState,
) -> TokenState:
    """Everything that is noted, in place, equals what the reference notes on the CPU."""
    # The rows and columns beside the view of the tokens, too.
    whole = state.tokens._base
    assert whole is not None
    want_whole = whole.cpu().clone()
    rows, capacity = state.tokens.shape
    want = TokenState(
        *(x.cpu().clone() for x in state[:4]), tokens=want_whole[:rows, :capacity], counted=state.counted.cpu().clone()
    )
    inputs = [None if x is None else x.cpu() for x in (scores, noise, end, pad)]
    choose_tokens_reference(*inputs, *want)  # type: ignore[arg-type]
    target.ops.choose_tokens(scores, noise, end, pad, state)
    for mine, theirs, name in zip(state, want, TokenState._fields, strict=True):
        assert torch.equal(mine.cpu(), theirs), name
    assert torch.equal(whole.cpu(), want_whole)
    return want
