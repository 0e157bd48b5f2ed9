"""How tokens are chosen, on the GPU, against the reference."""

from __future__ import annotations

import pytest
import torch
from choice_cases import (
    DTYPES,
    FILTERS,
    KINDS,
    SHAPES,
    check_choice,
    check_weights,
    make_logits,
    make_scores,
    new_state,
)
from gpu_common import DEVICE, GPU
from kernel_cases import generator

from hf_fastpath.ops import choose_tokens, sampling_weights

pytestmark = pytest.mark.gpu

LARGE = [(1, 65536, 0, 0), (16, 128256, 0, 0), (64, 151936, 0, 0), (3, 50257, 0, 0), (300, 1000, 0, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_the_largest_score(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rng = generator(*shape, DTYPES.index(dtype))
    rows, vocabulary, shift, gap = shape
    scores = make_scores(rng, rows, vocabulary, shift, gap, dtype, DEVICE)
    check_choice(GPU, scores, None, None, None, new_state(rng, rows, device=DEVICE))


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 65536), (4, 199), (33, 128256), (16, 50257)])
def test_a_draw_and_rows_that_end(rows: int, vocabulary: int) -> None:
    rng = generator(rows, vocabulary)
    state, pad = new_state(rng, rows, device=DEVICE), torch.tensor(3, device=DEVICE)
    for _ in range(4):
        scores = torch.rand(rows, vocabulary, generator=rng).to(DEVICE)
        noise = torch.empty(rows, vocabulary).exponential_(generator=rng).to(DEVICE)
        end = torch.randint(0, vocabulary, (vocabulary // 2,), generator=rng).to(DEVICE)
        check_choice(GPU, scores, noise, end, pad, state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_count_as_in_argmax(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    rows = [[-inf] * 4, [1, nan, inf, nan], [-0.0, 0.0, -1, 0], [0.0, -0.0, 0, -2], [1, inf, inf, 5]]
    scores = torch.tensor(rows, dtype=dtype, device=DEVICE)
    check_choice(GPU, scores, None, None, None, new_state(generator(2), len(rows), device=DEVICE))


def test_in_a_graph_behind_what_makes_the_scores() -> None:
    """Replayed time and again, every launch sees the scores and the state of the one before."""
    rng = generator(4)
    state = new_state(generator(5), 2, 5000, DEVICE)
    noise = torch.randn(2, 65536, generator=rng).to(DEVICE)
    base = torch.zeros(2, 65536, device=DEVICE)

    def step() -> None:
        base.add_(noise).remainder_(1.0)
        choose_tokens(base, None, None, None, state)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for tensor in state:
        tensor.zero_()
    base.zero_()
    rows, scores = [], torch.zeros(2, 65536, device=DEVICE)
    for _ in range(50):
        graph.replay()
        scores.add_(noise).remainder_(1.0)
        rows.append(scores.argmax(-1))
    assert int(state.counted) == 50
    assert torch.equal(state.tokens[:, :50], torch.stack(rows, 1))
    assert state.positions.flatten().tolist() == [50, 50]


def test_what_is_wrong_is_said() -> None:
    state = new_state(generator(6), 2, device=DEVICE)
    with pytest.raises(RuntimeError, match="choose_tokens: what is chosen by must be float16 or bfloat16"):
        choose_tokens(torch.zeros(2, 4, dtype=torch.float64, device=DEVICE), None, None, None, state)
    with pytest.raises(RuntimeError, match="scores with noise must be float32"):
        choose_tokens(torch.zeros(2, 4, device=DEVICE).half(), torch.ones(2, 4, device=DEVICE), None, None, state)
    with pytest.raises(RuntimeError, match=r"ids must have shape \(B, 1\)"):
        choose_tokens(torch.zeros(3, 4, device=DEVICE), None, None, None, state)
    pageable = state._replace(report=torch.tensor(0))
    with pytest.raises(RuntimeError, match="report must be on the GPU or in the host's pinned memory"):
        choose_tokens(torch.zeros(2, 4, device=DEVICE), None, None, None, pageable)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(3, 199), (1, 65536), (16, 128256), (2, 2**18), (5, 50257)], ids=str)
def test_what_filters_keep(kind: str, filters: tuple[float, int, float, float], rows: int, vocabulary: int) -> None:
    dtype = DTYPES[(FILTERS.index(filters) + rows) % 3]
    logits = make_logits(generator(vocabulary, rows), kind, rows, vocabulary, dtype).to(DEVICE)
    check_weights(GPU, logits, filters)
    got = sampling_weights(logits, *filters)
    assert all(torch.equal(sampling_weights(logits, *filters), got) for _ in range(3))
    assert torch.equal(sampling_weights(logits[-1:], *filters), got[-1:])


def test_a_row_that_is_no_distribution_has_nan_and_spoils_no_other() -> None:
    logits = make_logits(generator(5), "spread", 4, 65536, torch.float32).to(DEVICE)
    logits[0, 7], logits[1, 9], logits[2] = float("nan"), float("inf"), -torch.inf
    got = sampling_weights(logits, 1.0, 5, 0.9, 0.1)
    assert got[:3].isnan().all()
    assert torch.equal(got[3:], sampling_weights(logits[3:], 1.0, 5, 0.9, 0.1))
