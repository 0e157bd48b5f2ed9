"""How tokens are chosen: the CUDA kernels in the emulator, against the reference."""

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
from emulated import EmulatedOps
from emulator import KernelFault, needs_emulator
from kernel_cases import Target, generator

pytestmark = needs_emulator


def target(sm_count: int = 3) -> Target:
    return Target("cpu", EmulatedOps(sm_count))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_largest_score(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rng = generator(*shape, DTYPES.index(dtype))
    rows, vocabulary, shift, gap = shape
    check_choice(
        target(), make_scores(rng, rows, vocabulary, shift, gap, dtype), None, None, None, new_state(rng, rows)
    )


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 4096), (4, 199), (33, 300)])
def test_a_draw_and_rows_that_end(rows: int, vocabulary: int) -> None:
    rng = generator(rows, vocabulary)
    state, pad = new_state(rng, rows), torch.tensor(3)
    for _ in range(4):
        scores = torch.rand(rows, vocabulary, generator=rng)
        noise = torch.empty(rows, vocabulary).exponential_(generator=rng)
        end = torch.randint(0, vocabulary, (vocabulary // 2,), generator=rng)
        check_choice(target(), scores, noise, end, pad, state)
    assert int(state.counted) == 6


def test_all_rows_are_done_when_the_last_one_is() -> None:
    state, end = new_state(generator(1), 3), torch.tensor([5, 9])
    state.unfinished.copy_(torch.tensor([0, 1, 1]))
    scores = torch.zeros(3, 16)
    scores[0, 1] = scores[1, 5] = scores[2, 6] = 1
    assert check_choice(target(), scores, None, end, torch.tensor(0), state).report == (5 << 48) + 3
    assert state.ids[:, 0].tolist() == [0, 5, 6]
    scores[2, 9] = 2
    assert check_choice(target(), scores, None, end, torch.tensor(0), state).report == (5 << 48) + (4 << 24) + 4
    assert state.ids[:, 0].tolist() == [0, 0, 9]
    assert check_choice(target(), scores, None, end, torch.tensor(0), state).report == (5 << 48) + (4 << 24) + 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_count_as_in_argmax(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    rows = [
        [-inf] * 4,
        [1, nan, inf, nan],
        [-0.0, 0.0, -1, 0],
        [0.0, -0.0, 0, -2],
        [1, inf, inf, 5],
        [-inf, -3, -2, -2],
    ]
    scores = torch.tensor(rows, dtype=dtype)
    state = new_state(generator(2), len(rows))
    check_choice(target(), scores, None, None, None, state)
    assert state.ids[:, 0].tolist() == [0, 1, 0, 0, 1, 2]


def test_more_tokens_than_there_is_room_for_end_the_kernel() -> None:
    state = new_state(generator(3), 2)
    state.counted.fill_(7)
    with pytest.raises(KernelFault, match="__trap"):
        target().ops.choose_tokens(torch.rand(2, 9), None, None, None, state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_what_filters_keep(kind: str, filters: tuple[float, int, float, float]) -> None:
    dtype = DTYPES[FILTERS.index(filters) % 3]
    check_weights(target(), make_logits(generator(1), kind, 2, 1999, dtype), filters)


@pytest.mark.parametrize(
    ("kind", "filters"),
    [
        ("spread", (1.0, 0, 0.9, 0.0)),
        ("flat", (1.0, 0, 0.95, 0.0)),  # more tokens are kept than the list takes; those at the edge fit
        ("flat", (2.0, 4500, 0.8, 0.0)),
        ("all equal", (1.0, 0, 0.5, 0.0)),  # nor do those at the edge
    ],
)
def test_more_tokens_than_the_list_takes(kind: str, filters: tuple[float, int, float, float]) -> None:
    check_weights(target(), make_logits(generator(2), kind, 1, 5000, torch.float32), filters)


@pytest.mark.parametrize("vocabulary", [1, 2, 31])
def test_filters_of_few_tokens(vocabulary: int) -> None:
    for filters in FILTERS:
        for kind in ("spread", "all equal"):
            check_weights(target(), make_logits(generator(9), kind, 3, vocabulary, torch.float16), filters)


def test_a_row_that_is_no_distribution_has_nan_and_spoils_no_other() -> None:
    logits = make_logits(generator(5), "spread", 4, 300, torch.float32)
    logits[0, 7], logits[1, 9], logits[2] = float("nan"), float("inf"), -torch.inf
    got = target().ops.sampling_weights(logits, 1.0, 5, 0.9, 0.1)
    assert got[:3].isnan().all()
    check_weights(target(), logits[3:].clone(), (1.0, 5, 0.9, 0.1))
    assert torch.equal(got[3:], target().ops.sampling_weights(logits[3:].clone(), 1.0, 5, 0.9, 0.1))


def test_more_tokens_than_the_kernel_takes_are_refused() -> None:
    with pytest.raises(KernelFault, match="CUDA error 1"):
        target().ops.sampling_weights(torch.zeros(1, 2**18 + 1), 1.0, 5, 0.9, 0.1)
