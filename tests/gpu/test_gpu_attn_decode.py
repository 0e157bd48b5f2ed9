"""Decode attention over every format on the GPU, against float64."""

from __future__ import annotations

from functools import partial

import attention_cases
import pytest
import torch
from attention_cases import FORMATS, FP8
from gpu_common import DEVICE, GPU, graph_nodes, randn
from kernel_cases import DTYPES, generator, masks

from hf_fastpath import ops
from hf_fastpath.ops import attn_decode_int8, attn_decode_static, kv_int8_append

pytestmark = pytest.mark.gpu

make_attention = partial(attention_cases.make_attention, GPU)
LENGTHS = [0, 1, 2, 63, 64, 65, 255, 256, 1000, 4097, 9000]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_and_dimensions(form: str, length: int, dim: int, dtype: torch.dtype) -> None:
    for sharpness in (1.0, 6.0):
        case = make_attention(generator(length, dim), form, 8, 2, dim, [length] * 2, dtype, sharpness=sharpness)
        case.check(case.run())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (7, 1), (28, 4), (8, 1), (9, 1), (32, 2), (40, 1), (32, 8)]
)
@pytest.mark.parametrize("length", [33, 1500])
def test_ratios_of_heads_and_rows_of_several_lengths(form: str, length: int, heads: int, kv_heads: int) -> None:
    rng = generator(heads, kv_heads, length)
    case = make_attention(rng, form, heads, kv_heads, 64, [length, 7, 3 * length], torch.bfloat16)
    case.check(case.run())


@pytest.mark.parametrize(("group", "front"), [(32, 0), (32, 40), (64, 0), (64, 17)])
@pytest.mark.parametrize("length", [3, 64, 150, 2000])
def test_groups_and_first_tokens_of_int4(length: int, group: int, front: int) -> None:
    case = make_attention(generator(length, group), "int4", 4, 2, 96, [length], DTYPES[0], group=group, front=front)
    case.check(case.run())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_masks(form: str, length: int) -> None:
    rng = generator(length, 2)
    case = make_attention(rng, form, 8, 2, 128, [length] * 5, torch.bfloat16)
    plain = case.run()
    wide = torch.ones(5, length + 9, dtype=torch.bool, device=DEVICE)  # a row stride that is not the length
    case.mask = wide
    assert torch.equal(case.run(), plain)
    wide[:, :length] = masks(rng, 5, length).to(DEVICE)
    for mask in (wide, wide[:, :length], wide[:, : length // 2 + 1]):  # beyond its columns nothing is attended
        case.mask = mask
        out = case.run()
        case.check(out)
        assert (out[3] == 0).all()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("window", [1, 60, 1000, 20000])
def test_windows_softcap_and_sinks(form: str, window: int) -> None:
    rng = generator(window)
    for lengths in ([40, 300], [5000, 0]):
        case = make_attention(rng, form, 8, 2, 128, lengths, torch.bfloat16, sharpness=6.0)
        case.window = window
        case.check(case.run())
        case.softcap = 3.0
        case.check(case.run())
        case.sinks = torch.randn(8, generator=rng).to(DEVICE)
        case.check(case.run())
        case.mask = (torch.rand(2, max(lengths), generator=rng) < 0.5).to(DEVICE)
        case.check(case.run())


@pytest.mark.parametrize("form", FORMATS)
def test_a_rows_bits_depend_neither_on_its_batch_nor_on_the_capacity(form: str) -> None:
    lengths = [40, 1000, 9000, 1000, 1, 300, 4097, 64, 2000]
    case = make_attention(generator(4), form, 12, 4, 128, lengths, torch.bfloat16)
    full = case.run()
    assert torch.equal(full, case.run())  # nor on the run
    for i, length in enumerate(lengths):
        row = case.rows(slice(i, i + 1))
        assert torch.equal(row.run(), full[i : i + 1])
        small = make_attention(generator(4), form, 12, 4, 128, [length], torch.bfloat16)
        for to, source in zip(small.storage[:-1], row.storage[:-1], strict=True):
            to.copy_(source[:, :, : to.shape[2]])
        small.query = row.query
        assert torch.equal(small.run(), full[i : i + 1])


@pytest.mark.parametrize("form", FORMATS)
def test_a_captured_call_goes_on_with_new_lengths(form: str) -> None:
    case = make_attention(generator(12), form, 8, 2, 64, [3000] * 2, torch.bfloat16)
    expected = {}
    for length in (3000, 17, 1024):
        case.storage[-1].fill_(length)
        expected[length] = case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = getattr(ops, f"attn_decode_{form}")(case.query, case.storage, None, case.scaling)
    for length, result in expected.items():
        case.storage[-1].fill_(length)
        out.fill_(float("nan"))
        graph.replay()
        # fp8 and int4 hold other tokens in their tails at other lengths; the same call gives the same bits all the same
        assert torch.equal(out.nan_to_num(7.0), result.nan_to_num(7.0))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 32, 8), (5, 12, 1), (64, 8, 2)])
def test_the_parts_are_added_by_whoever_is_last(form: str, batch: int, heads: int, kv_heads: int) -> None:
    """Calls behind one another count with the same tickets, whatever the rows' lengths."""
    rng = generator(batch, heads)
    lengths = torch.randint(0, 6000, (batch,), generator=rng).tolist()
    case = make_attention(rng, form, heads, kv_heads, 128, lengths, torch.bfloat16)
    expected = case.run()
    case.check(expected)
    call = partial(getattr(ops, f"attn_decode_{form}"), case.query, case.storage, None, case.scaling)
    assert torch.equal(call(), expected)  # with tickets of its own
    outs = [call(tickets=case.tickets) for _ in range(200)]
    assert all(torch.equal(out, expected) for out in outs)
    assert case.tickets is not None
    for length in (1, 129, 300, 1500, 4000):
        case.storage[-1].fill_(length)
        results = [call(tickets=case.tickets) for _ in range(20)]
        alone = call().nan_to_num(7.0)
        assert all(torch.equal(out.nan_to_num(7.0), alone) for out in results)
        assert not bool(case.tickets.any())


def test_calls_on_several_streams_and_in_replayed_graphs() -> None:
    """Each stream has tickets and scratch of its own: CTAs of all calls run at the same time."""
    cases = [make_attention(generator(i), "int8", 16, 4, 128, [700 + 900 * i] * 3, torch.bfloat16) for i in range(4)]
    expected = [case.run() for case in cases]
    streams, graphs = [torch.cuda.Stream() for _ in cases], []
    for case, stream in zip(cases, streams, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outs = [attn_decode_int8(case.query, case.storage, None, case.scaling, tickets=case.tickets) for _ in "ab"]
        graphs.append((graph, outs))
    eager: list[list[torch.Tensor]] = [[] for _ in cases]
    torch.cuda.synchronize()
    for i in range(100):
        for case, stream, (graph, _), results in zip(cases, streams, graphs, eager, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                if i % 10 == 0:
                    out = attn_decode_int8(case.query, case.storage, None, case.scaling, tickets=case.tickets)
                    results.append(out)
    torch.cuda.synchronize()
    for case, exact, (_, outs), results in zip(cases, expected, graphs, eager, strict=True):
        assert all(torch.equal(out, exact) for out in (*outs, *results))
        assert case.tickets is not None
        assert not bool(case.tickets.any())


@pytest.mark.parametrize("form", FORMATS)
def test_a_call_is_one_kernel(form: str) -> None:
    case = make_attention(generator(3), form, 8, 2, 128, [3000], torch.bfloat16)
    case.run()
    call = partial(getattr(ops, f"attn_decode_{form}"), case.query, case.storage, None, case.scaling)
    assert graph_nodes(lambda: call(tickets=case.tickets)) == 1
    assert graph_nodes(call) == 2  # the tickets are zeroed first


def test_scales_that_differ_widely() -> None:
    """An attention sink: the token with most of the weight has values a thousand times smaller than the others."""
    case = make_attention(generator(5), "int8", 8, 2, 128, [300] * 2, torch.float16)
    k_data, k_scale, v_data, v_scale, _ = case.storage
    v_scale[:, :, 0] *= 1e-3
    k_data[:, :, 0] = 127 * case.query[:, ::4].sign().to(torch.int8)
    case.keys[:, :, 0] = k_data[:, :, 0].double() * k_scale[:, :, 0, None].double()
    case.values[:, :, 0] = v_data[:, :, 0].double() * v_scale[:, :, 0, None].double()
    case.check(case.run())
    v_scale[:, :, :300] = 0
    assert (case.run() == 0).all()


@pytest.mark.parametrize("form", FORMATS)
def test_a_query_that_starts_anywhere_gives_the_same_bits(form: str) -> None:
    case = make_attention(generator(11), form, 8, 2, 80, [300] * 2, torch.bfloat16)
    expected = case.run()
    buffer = torch.zeros(case.query.numel() + 1, dtype=torch.bfloat16, device=DEVICE)
    case.query = buffer[1:].view(case.query.shape).copy_(case.query)
    assert torch.equal(case.run(), expected)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e4])
def test_queries_of_any_size(form: str, size: float) -> None:
    case = make_attention(generator(6), form, 8, 2, 128, [300] * 2, torch.bfloat16)
    case.query, case.scaling = case.query * size, case.scaling / size
    case.check(case.run())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("length", [40, 1000, 9000])
def test_a_nan_in_a_query_is_not_hidden(form: str, length: int) -> None:
    case = make_attention(generator(13), form, 8, 2, 64, [length] * 2, torch.bfloat16)
    case.query[1, 3, 5] = float("nan")
    out = case.run()
    assert bool(out[1, 3].isnan().all())
    assert int(out.isnan().sum()) == 64


@pytest.mark.parametrize("form", FORMATS)
def test_the_comparison_sees_a_missing_token_and_one_wrong_value(form: str) -> None:
    case = make_attention(generator(8), form, 4, 1, 128, [257], torch.float16)
    out = case.run()
    case.check(out)
    case.storage[-1] -= 1
    with pytest.raises(AssertionError):
        case.check(case.run())
    case.values[0, 0, 40, 77] += 4.0
    with pytest.raises(AssertionError, match="beyond their bound"):
        case.check(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (12, 1, 128), (8, 2, 80), (32, 8, 128)])
@pytest.mark.parametrize(("slots", "seen"), [(48, 30), (208, 500), (1024, 3000), (8000, 9000)])
def test_h2o(slots: int, seen: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """Against the reference in float32: its attention, what every slot got, and the padding that was counted."""
    rng = generator(slots, dim)
    shape = (2, kv_heads, slots)
    data = [(torch.randn(*shape, dim, generator=rng) * 30).to(FP8).to(DEVICE) for _ in range(2)]
    scales = [(2.0 ** torch.randint(-7, -4, shape, generator=rng)).half().to(DEVICE) for _ in range(2)]
    used = torch.rand(2, kv_heads, seen, generator=rng).argsort(-1)[..., :slots].int()
    positions = torch.nn.functional.pad(used, (0, slots - used.shape[2]), value=10**6).to(DEVICE)
    query = torch.randn(2, heads, dim, generator=rng).to(dtype).to(DEVICE)
    holes = torch.rand(2, seen + 3, generator=rng) < 0.6
    holes[:, seen - 1] = True
    padding = holes.clone()
    padding[0, :seen] = False
    for mask, first in ((None, 2), (holes.to(DEVICE), 2), (padding.to(DEVICE), seen - 1)):
        counts = torch.tensor([seen, first], dtype=torch.int32, device=DEVICE).expand(2, kv_heads, 2)
        storage = [data[0], scales[0], data[1], scales[1], torch.rand(shape, device=DEVICE), positions, counts]
        ours, reference = ([tensor.clone() for tensor in storage] for _ in range(2))
        out = ops.attn_decode_h2o(query, ours, mask, dim**-0.5)
        exact = ops.attn_decode_h2o(query.float(), reference, mask, dim**-0.5, reference=True)
        # Weights are rounded to fp16, the result once to the query's dtype.
        assert float((out - exact).norm()) <= (2.0**-11 + torch.finfo(dtype).eps / 2) * float(exact.norm())
        # The scores' weights add up to the number of heads in fp32; a weight is off by its score's error.
        torch.testing.assert_close(ours[4], reference[4], rtol=2e-5, atol=1e-6 * heads)
        assert torch.equal(ours[6], reference[6])


def test_offsets_beyond_32_bits() -> None:
    """A cache of more than 2^31 elements: append at its end, then attend to all of it."""
    batch, kv_heads, dim, capacity = 2, 8, 128, 1_050_000
    assert batch * kv_heads * dim * capacity > 2**31
    rng = generator(9)
    shape = (batch, kv_heads, capacity)
    k_data, v_data = (torch.randint(-127, 128, (*shape, dim), dtype=torch.int8, device=DEVICE) for _ in range(2))
    k_scale, v_scale = (torch.full(shape, 1 / 127, dtype=torch.float16, device=DEVICE) for _ in range(2))
    new = randn(rng, batch, kv_heads, 2, dim, dtype=torch.bfloat16) * 8
    lengths = torch.full(shape[:2], capacity - 2, dtype=torch.int32, device=DEVICE)
    kv_int8_append(new, new, (k_data, k_scale, v_data, v_scale, lengths))
    restored = k_data[1, 7, -2:].float() * k_scale[1, 7, -2:, None].float()
    assert (restored - new[1, 7].float()).abs().max() <= float(k_scale[1, 7, -2:].max()) / 2 * 1.01
    query = randn(rng, batch, 32, dim, dtype=torch.bfloat16) * 4
    lengths = torch.full((batch, kv_heads), capacity, dtype=torch.int32, device=DEVICE)
    out = attn_decode_int8(query, (k_data, k_scale, v_data, v_scale, lengths), None, dim**-0.5)[1, 28:]
    k, v = (
        data[1, 7].double() * scale[1, 7, :, None].double() for data, scale in ((k_data, k_scale), (v_data, v_scale))
    )
    exact = (query[1, 28:].double() @ k.T * dim**-0.5).softmax(-1) @ v
    # One rounding to bf16; the sums of a million weights that are much alike are off by far less.
    assert float((out - exact).norm()) <= 2.0**-8 * float(exact.norm())


def test_bad_arguments_are_refused_in_words() -> None:
    case = make_attention(generator(10), "int8", 8, 2, 64, [20] * 2, torch.float16)
    query, storage = case.query, case.storage
    mask = torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
    odd = [t[:, :, :20].contiguous() for t in storage[:4]]
    cases: list[tuple[str, tuple[object, ...], dict[str, object]]] = [
        ("query must be float16 or bfloat16", (query.float(), storage, None, 1.0), {}),
        ("query must be contiguous", (query.mT.contiguous().mT, storage, None, 1.0), {}),
        ("multiples of 16 up to 256, got 40", (query[..., :40].contiguous(), storage, None, 1.0), {}),
        ("8 is not a multiple of H_kv 3", (query, [t[:, :1].repeat_interleave(3, 1) for t in storage], None, 1.0), {}),
        ("k_data must have shape", (query[:1], storage, None, 1.0), {}),
        ("multiples of 16, got 20", (query, [*odd, storage[4]], None, 1.0), {}),
        ("lengths must be int32", (query, [*storage[:4], storage[4].long()], None, 1.0), {}),
        ("lengths must have shape", (query, [*storage[:4], storage[4][:, :1]], None, 1.0), {}),
        ("lengths must be on cuda:0", (query, [*storage[:4], storage[4].cpu()], None, 1.0), {}),
        ("mask must be bool", (query, storage, mask.int(), 1.0), {}),
        ("mask must have shape", (query, storage, mask[:1], 1.0), {}),
        ("mask must be on cuda:0", (query, storage, mask.cpu(), 1.0), {}),
        ("tickets must be int32", (query, storage, None, 1.0), {"tickets": storage[4].flatten().long()}),
        ("at least 4 elements, got 3", (query, storage, None, 1.0), {"tickets": storage[4].flatten()[:3]}),
        ("window must be 0", (query, storage, None, 1.0), {"window": -1}),
        ("softcap must be 0", (query, storage, None, 1.0), {"softcap": -1.0}),
        ("sinks must be float32", (query, storage, None, 1.0), {"sinks": query[0, :, 0].contiguous()}),
        ("sinks must have shape", (query, storage, None, 1.0), {"sinks": torch.zeros(7, device=DEVICE)}),
    ]
    for message, args, options in cases:
        with pytest.raises(RuntimeError, match=message):
            attn_decode_int8(*args, **options)  # type: ignore[arg-type]
    k = torch.zeros(2, 2, 32, 64, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(RuntimeError, match="k must be of query's dtype"):
        attn_decode_static(query, (k, k, storage[4]), None, 1.0)
