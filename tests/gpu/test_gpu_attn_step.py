"""A token's append and attention in one kernel on the GPU: the bits of the two kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from gpu_common import DEVICE, GPU, graph_nodes
from kernel_cases import DTYPES, generator
from step_cases import FORMATS, Step

from hf_fastpath import ops

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
def test_lengths_and_dimensions(form: str, dim: int, dtype: torch.dtype) -> None:
    """Those where the new token begins a tile, ends one, and where there are several CTAs with and without work."""
    for lengths in ([0, 1, 15], [31, 63, 64], [127, 300, 3], [4095, 768, 20]):
        Step(form, dtype, lengths, dim=dim, steps=3).check(GPU)
    Step(form, dtype, [259, 1100], dim=dim, room=9000).check(GPU)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("change", [
    {"rotary": 64}, {"rotary": 32, "dim": 80, "kv_heads": 4}, {"norm": True, "rotary": 128, "dim": 128, "heads": 32},
    {"rotate": True, "dim": 96}, {"norm": True, "rotate": True, "rotary": 256, "dim": 256},
    {"norm": True, "rotary": 64, "rotate": True, "heads": 16, "kv_heads": 2}, {"masked": True, "rotary": 64},
    {"norm": True, "rotary": 64, "vectors": False}, {"rotary": 64, "rotate": True, "heads": 9, "kv_heads": 1},
    {"rotary": 128, "rotate": True, "dim": 128, "heads": 32, "kv_heads": 8},
], ids=str)  # fmt: skip
def test_transforms_ratios_and_masks(form: str, change: dict[str, Any]) -> None:
    for dtype, lengths in zip(DTYPES, ([40, 7], [2300, 129]), strict=True):
        Step(form, dtype, lengths, **change).check(GPU)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_many_steps(form: str, batch: int) -> None:
    """A hundred tokens, through the ends of tiles and groups of CTAs, in rows of any lengths."""
    lengths = torch.randint(0, 3000, (batch,), generator=generator(batch)).tolist()
    Step(form, torch.bfloat16, lengths, 32, 8, 128, 100, rotary=128, rotate=form == "int8").check(GPU)


@pytest.mark.parametrize("form", FORMATS)
def test_steps_behind_one_another_and_in_graphs_on_several_streams(form: str) -> None:
    """Nothing waits between them: every step finds the length that the one before left."""
    steps = 60
    cases = [Step(form, torch.bfloat16, [200 + 400 * i, 7], 16, 4, 128, steps, rotary=128) for i in range(4)]
    op = partial(getattr(ops, f"attn_step_{form}"), mask=None, scaling=0.1)
    found, wanted, streams = [], [], [torch.cuda.Stream() for _ in cases]
    for case, stream in zip(cases, streams, strict=True):
        *new, transform = case.inputs(0, DEVICE)
        stores = [case.storage(GPU) for _ in range(2)]
        tickets = torch.zeros(8, dtype=torch.int32, device=DEVICE)
        results = []
        for _ in range(steps):
            results.append(op(*new, storage=stores[0], transform=transform, tickets=tickets))
            torch.cuda.synchronize()
        wanted.append((results, stores[0]))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = op(*new, storage=stores[1], transform=transform, tickets=tickets)
        found.append((graph, out, stores[1], tickets, new, transform, []))
    torch.cuda.synchronize()
    for i in range(steps):
        for stream, (graph, out, store, tickets, new, transform, outs) in zip(streams, found, strict=True):
            with torch.cuda.stream(stream):
                if i % 3:
                    graph.replay()
                    outs.append(out.clone())
                else:
                    outs.append(op(*new, storage=store, transform=transform, tickets=tickets))
    torch.cuda.synchronize()
    for (results, store), (*_, got_store, tickets, _, _, outs) in zip(wanted, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(outs, results, strict=True))
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(got_store, store, strict=True))
        assert not bool(tickets.any())


@pytest.mark.parametrize("form", FORMATS)
def test_a_step_is_one_kernel(form: str) -> None:
    case = Step(form, torch.bfloat16, [3000], 32, 8, 128, 4, rotary=128)
    *new, transform = case.inputs(0, DEVICE)
    storage = case.storage(GPU)
    tickets = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    call = partial(getattr(ops, f"attn_step_{form}"), *new, storage, None, 0.1, transform=transform)
    call(tickets=tickets)
    assert graph_nodes(lambda: call(tickets=tickets)) == 1


def test_bad_arguments_are_refused_in_words() -> None:
    case = Step("int8", torch.float16, [20, 20])
    query, key, value, transform = case.inputs(0, DEVICE)
    storage = case.storage(GPU)
    two = [x.repeat(1, 1, 2, 1) for x in (query, key, value)]
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("takes one new token a row, got 2", (*two, storage)),
        ("query must have shape", (query[:1], key, value, storage)),
        ("the cache must have key's H_kv 1, got 2", (query, key[:, :1], value[:, :1], storage)),
        ("must have shape", (query[:1], key[:1], value[:1], storage)),
        ("query and key must have the same dtype", (query.bfloat16(), key, value, storage)),
    ]
    for message, args in cases:
        with pytest.raises(RuntimeError, match=message):
            ops.attn_step_int8(*args, None, 1.0, transform=transform)
