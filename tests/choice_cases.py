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
        done=torch.tensor(5 << 48, device=device),
        tokens=tokens[:rows, :capacity],
        counted=torch.tensor([[2]], device=device),
        report=torch.tensor(0, pin_memory=device != "cpu"),
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
        *(x.cpu().clone() for x in state[:4]),
        tokens=want_whole[:rows, :capacity],
        counted=state.counted.cpu().clone(),
        report=state.report.clone(),
    )
    inputs = [None if x is None else x.cpu() for x in (scores, noise, end, pad)]
    choose_tokens_reference(*inputs, *want)  # type: ignore[arg-type]
    target.ops.choose_tokens(scores, noise, end, pad, state)
    if state.ids.is_cuda:
        torch.cuda.synchronize()
    for mine, theirs, name in zip(state, want, TokenState._fields, strict=True):
        assert torch.equal(mine.cpu(), theirs), name
    assert torch.equal(whole.cpu(), want_whole)
    return want


# temperature, top_k, top_p, min_p
FILTERS = [
    (1.3, 20, 0.9, 0.0),
    (1.0, 0, 0.9, 0.0),
    (0.7, 0, 0.999, 0.0),
    (1.0, 50, 1.0, 0.0),
    (1.0, 0, 1.0, 0.05),
    (0.5, 7, 0.5, 0.1),
    (2.0, 4500, 0.8, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 0, 1e-7, 0.0),
    (5.0, 0, 0.95, 0.0),
]
KINDS = ["spread", "ties", "flat", "peak", "all equal", "masked"]


def make_logits(rng: torch.Generator, kind: str, rows: int, vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits as models have them, and as they should not."""
    x = torch.randn(rows, vocabulary, generator=rng)
    if kind == "spread":
        x *= 3
    elif kind == "ties":
        x = (x * 8).round() / 4 - 30
    elif kind == "flat":
        x = x / 100 + 7
    elif kind == "peak":
        x[:, vocabulary // 3] += 60
    elif kind == "all equal":
        x.fill_(-2.5)
    elif kind == "masked":
        x[:, ::3], x[:, 1] = -torch.inf, 1
    return x.to(dtype)


def check_weights(target: Target, logits: torch.Tensor, filters: tuple[float, int, float, float]) -> None:
    """Which tokens are kept, and their weights, in float64. Where a token's share is within 1e-6 of the edge of top-p's
    set, it may be kept or not: float32 exponentials are off by two units in the last place, 2.4e-7."""
    temperature, top_k, top_p, min_p = filters
    got = target.ops.sampling_weights(logits, *filters).cpu()
    # Scaled as the kernel scales; everything from there on is exact.
    scores = logits.cpu().float() * (1 / torch.tensor(temperature, dtype=torch.float32))
    kept = scores > -torch.inf
    if 0 < top_k < scores.shape[1]:
        kept &= scores >= scores.topk(top_k).values[:, -1:]
    apart = scores - scores.amax(-1, keepdim=True)  # rounded once, as in the kernel
    exact = apart.double().exp()
    unsure = torch.zeros_like(kept)
    if top_p < 1:
        shares = (exact * kept / (exact * kept).sum(-1, keepdim=True)).double()
        order = torch.where(kept, scores, -torch.inf).sort(stable=True).indices
        cumulative = torch.empty_like(shares).scatter(1, order, shares.gather(1, order).cumsum(-1))
        removed = float(torch.tensor(1 - top_p, dtype=torch.float32))
        unsure = kept & ((cumulative - removed).abs() < 1e-6) & (cumulative < 1 - 1e-12)
        kept &= (cumulative > removed) | torch.zeros_like(kept).scatter(1, order[:, -1:], True)
    unsure |= (exact - min_p).abs() < 1e-6 * min_p
    kept &= exact >= min_p
    wrong = ((got > 0) != (kept & (exact > 2.0**-126))) & ~unsure & ~((got == 0) & (exact < 2.0**-120))
    assert not wrong.any(), wrong.nonzero()[:10]
    both = (got > 0) & kept
    torch.testing.assert_close(got[both].double(), exact[both], rtol=4 * 2.0**-23, atol=2.0**-126)
