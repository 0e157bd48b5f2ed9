"""Each op's reference (which is the CPU op) against float64, and torch's own checks of schema and fake."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_formats import filled_storage
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_fastpath import Fp8KVCache, H2OKVCache, Int4KIVICache, ops, packing, packing_int8
from hf_fastpath.ops import _attention
from hf_fastpath.ops._rms_norm import rms_norm
from hf_fastpath.ops.attn_decode_int8 import attn_decode_int8_reference
from hf_fastpath.ops.kv_int8_append import quantize_int8
from hf_fastpath.ops.w4a16_gemm import VARIANTS
from hf_fastpath.ops.w8a16_linear import w8a16_linear_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def packed_weight(n: int, k: int, group: int, zeros: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scale = (torch.rand(n, k // group) * 0.01 + 0.001).to(dtype)
    zero = torch.randint(0, 16, (n, k // group), dtype=torch.uint8) if zeros else None
    stored_zero = None if zero is None else packing.pack_per_group(zero, 8)
    exact_zero = torch.full_like(scale, 8).double() if zero is None else zero.double()
    exact = (q.double() - exact_zero.repeat_interleave(group, 1)) * scale.double().repeat_interleave(group, 1)
    return packing.pack_int4(q), packing.pack_per_group(scale, 0.0), stored_zero, exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "group"), [(1, 32, 32), (17, 96, 32), (100, 576, 64), (48, 256, 128)])
@pytest.mark.parametrize("zeros", [False, True])
def test_w4a16_linear(n: int, k: int, group: int, zeros: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(n + k)
    qweight, scales, stored_zero, exact = packed_weight(n, k, group, zeros, dtype)
    x, bias = torch.randn(3, 2 * k, dtype=dtype)[:, 1 : k + 1], torch.randn(n, dtype=dtype)
    got = ops.w4a16_linear(x, qweight, scales, stored_zero, bias, n, group)
    # The dequantized weight is rounded to 16 bit once, the result once: each relative 2^-8 (bf16) at the most.
    tolerance = 2 * torch.finfo(dtype).eps
    assert relative_error(got, x.double() @ exact.T + bias.double()) < tolerance
    exact[0, 0] += 20 * exact.abs().max()  # a planted fault of one weight is seen
    assert relative_error(got, x.double() @ exact.T + bias.double()) > tolerance


def test_w4a16_gemm_is_the_same_product_for_more_rows() -> None:
    torch.manual_seed(3)
    qweight, scales, zeros, exact = packed_weight(33, 288, 32, True, torch.bfloat16)
    x, bias = torch.randn(50, 288).bfloat16(), torch.randn(33).bfloat16()
    for variant in range(len(VARIANTS)):
        got = ops.w4a16_gemm(x, qweight, scales, zeros, bias, 33, 32, variant)
        assert relative_error(got, x.double() @ exact.T + bias.double()) < 2 * torch.finfo(torch.bfloat16).eps
    residual = torch.randn(50, 33).bfloat16()
    got = ops.w4a16_gemm(x, qweight, scales, zeros, bias, 33, 32, 0, residual)
    assert relative_error(got, x.double() @ exact.T + bias + residual) < torch.finfo(torch.bfloat16).eps


def test_w4a16_gemm_swiglu_is_swiglu_of_the_product() -> None:
    torch.manual_seed(4)
    qweight, scales, zeros, _ = packed_weight(64, 288, 32, True, torch.bfloat16)
    x, bias = torch.randn(50, 288).bfloat16(), torch.randn(64).bfloat16()
    gate, up = ops.w4a16_gemm(x, qweight, scales, zeros, bias, 64, 32, 0).chunk(2, dim=-1)
    got = ops.w4a16_gemm_swiglu(x, qweight, scales, zeros, bias, 32, 32, 7)
    assert torch.equal(got, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_has_transformers_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    norm = LlamaRMSNorm(96, eps=1e-5).to(dtype).requires_grad_(False)
    norm.weight.normal_(1, 0.2)
    x = (torch.randn(5, 96) * torch.logspace(-3, 3, 5)[:, None]).to(dtype)
    x[2] = 0
    assert torch.equal(rms_norm(x, norm.weight, 1e-5), norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [False, True])
def test_fused_products(zeros: bool, dtype: torch.dtype) -> None:
    """The unfused modules in float64, with x normalized by transformers' own norm."""
    torch.manual_seed(4)
    qweight, scales, stored_zero, exact = packed_weight(64, 96, 32, zeros, dtype)
    norm = LlamaRMSNorm(96, eps=1e-3).to(dtype).requires_grad_(False)
    norm.weight.normal_(1, 0.2)
    x, bias, residual = (torch.randn(shape).to(dtype) for shape in ((3, 96), (64,), (3, 64)))
    packed = (qweight, scales, stored_zero, bias)
    tolerance = 3 * max(torch.finfo(dtype).eps, 2e-7)  # a rounded weight, a result, and in swiglu two values in between
    for weight, rows in ((norm.weight, norm(x)), (None, x)):
        product = rows.double() @ exact.T + bias.double()
        got = ops.w4a16_linear_fused(x, *packed, weight, 1e-3, residual, 64, 32)
        assert relative_error(got, product + residual.double()) < tolerance
        assert relative_error(got, product) > tolerance  # the residual counts
        assert relative_error(ops.w4a16_linear_fused(x, *packed, weight, 1e-3, None, 64, 32), product) < tolerance
        gate, up = product.chunk(2, dim=-1)
        got = ops.w4a16_swiglu(x, *packed, weight, 1e-3, 32, 32)
        assert relative_error(got, torch.nn.functional.silu(gate) * up) < tolerance
        assert relative_error(got, torch.nn.functional.silu(up) * gate) > tolerance  # which half is the gate counts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(1, 32), (100, 96), (40, 288)])
def test_w8a16_linear(n: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(n)
    q = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale, bias = (torch.rand(n) * 0.01 + 0.001).to(dtype), torch.randn(n).to(dtype)
    exact = q.double() * scale.double()[:, None]
    x = torch.randn(3, 2 * k).to(dtype)[:, 1 : k + 1]
    for tiles in (1, 2, 256):  # in bands of rows, the last one shorter
        monkeypatch.setitem(w8a16_linear_reference.__globals__, "BAND_TILES", tiles)
        got = ops.w8a16_linear(x, packing_int8.pack_int8(q), scale, bias, n)
        # Rounded once.
        assert relative_error(got, x.double() @ exact.T + bias.double()) < torch.finfo(dtype).eps
        plain = ops.w8a16_linear(x, packing_int8.pack_int8(q), scale, None, n)
        assert relative_error(plain, x.double() @ exact.T) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_quantization(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 3, 5, 48) * torch.logspace(-3, 3, 5)[:, None]).to(dtype)
    x[0, 0, 0] = 0
    q, scale = quantize_int8(x)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float16
    assert not q[0, 0, 0].any()
    back = q.double() * scale.double().unsqueeze(-1)
    # Half a step; where fp16 rounded the scale down by 2^-11, the largest value (127 steps) clips by 0.06 of a step;
    # scales below fp16's smallest normal number (6.1e-5) are rounded to a multiple of 6e-8 instead.
    step = scale.double().clamp(min=6.1e-5).unsqueeze(-1)
    assert bool(((back - x.double()).abs() <= step * (0.5 + 127 * 2**-11)).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_writes_its_tokens_and_no_others(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    key, value = (torch.randn(2, 4, 3, 32, dtype=dtype).transpose(1, 2) for _ in range(2))  # strided, as in a model
    storage = [torch.full((2, 3, 9, 32), 99, dtype=torch.int8), torch.full((2, 3, 9), 99.0, dtype=torch.float16)]
    storage += [tensor.clone() for tensor in storage] + [torch.full((2, 3), 2, dtype=torch.int32)]
    ops.kv_int8_append(key, value, storage)
    assert bool((storage[4] == 6).all())
    for new, data, scale in ((key, *storage[:2]), (value, *storage[2:4])):
        q, s = quantize_int8(new)
        assert torch.equal(data[:, :, 2:6], q)
        assert torch.equal(scale[:, :, 2:6], s)
        untouched = [0, 1, 6, 7, 8]
        assert bool((data[:, :, untouched] == 99).all())
        assert bool((scale[:, :, untouched] == 99).all())


def int8_cache(batch: int, kv_heads: int, capacity: int, length: int, dim: int) -> list[torch.Tensor]:
    """A cache whose tokens beyond ``length`` are poison: whoever reads them gets NaN."""
    storage = []
    for _ in range(2):
        data = torch.randint(-127, 128, (batch, kv_heads, capacity, dim), dtype=torch.int8)
        scale = (torch.rand(batch, kv_heads, capacity) * 0.02 + 0.001).half()
        scale[:, :, length:] = float("nan")
        storage += [data, scale]
    return storage


def counted(storage: list[torch.Tensor], length: int) -> tuple[torch.Tensor, ...]:
    """Storage with the number of its tokens, as attention takes it."""
    return *storage, torch.full(storage[0].shape[:2], length, dtype=torch.int32)


def exact_attention(
    query: torch.Tensor, storage: list[torch.Tensor], mask: torch.Tensor | None, length: int, scaling: float
) -> torch.Tensor:
    k, v = (
        (data.double() * scale.double().unsqueeze(-1))[:, :, :length].repeat_interleave(
            query.shape[1] // data.shape[1], 1
        )
        for data, scale in (storage[:2], storage[2:])
    )
    scores = (query.double().unsqueeze(2) @ k.transpose(2, 3)).squeeze(2) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, :length], float("-inf"))
    return (scores.softmax(-1).nan_to_num(0).unsqueeze(2) @ v).squeeze(2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 48), (9, 3, 64), (8, 1, 80), (7, 1, 40)])
@pytest.mark.parametrize("length", [1, 63, 1024, 1025, 2100])
def test_decode_attention(heads: int, kv_heads: int, dim: int, length: int, dtype: torch.dtype) -> None:
    torch.manual_seed(length + dim)
    query = torch.randn(2, heads, dim).to(dtype)
    storage = int8_cache(2, kv_heads, length + 5, length, dim)
    mask = torch.rand(2, length + 3) > 0.3
    mask[:, 0] = True
    for chosen in (None, mask):
        got = ops.attn_decode_int8(query, counted(storage, length), chosen, dim**-0.5)
        exact = exact_attention(query, storage, chosen, length, dim**-0.5)
        # Computed in float32 and rounded once to the query's dtype.
        assert relative_error(got, exact) < max(torch.finfo(dtype).eps, 2e-5)


def test_decode_attention_of_a_fully_masked_row_is_zero() -> None:
    storage = int8_cache(2, 2, 40, 40, 32)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1] = False
    got = ops.attn_decode_int8(torch.randn(2, 4, 32), counted(storage, 40), mask, 0.2)
    assert bool(got[0].any())
    assert not bool(got[1].any())


def test_a_nan_in_a_query_is_not_hidden() -> None:
    query = torch.randn(2, 4, 32)
    query[1, 2, 0] = float("nan")
    mask = torch.ones(2, 40, dtype=torch.bool)
    for chosen in (None, mask):
        got = ops.attn_decode_int8(query, counted(int8_cache(2, 2, 40, 40, 32), 40), chosen, 0.2)
        assert bool(got[1, 2].isnan().all())
        assert int(got.isnan().sum()) == 32


def test_decode_attention_never_expands_more_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention, "TILE_TOKENS", 16)
    storage = int8_cache(1, 1, 64, 64, 32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype.is_floating_point:
                largest = max(largest, out.numel())
            return out

    with Watch():
        attn_decode_int8_reference(torch.randn(1, 2, 32), *counted(storage, 64), None, None, 0.2, 0, 0.0, None)
    assert largest == 16 * 32


def h2o_storage() -> list[torch.Tensor]:
    layer = H2OKVCache.layer_class(budget=16, window=5, sinks=2)
    layer.update(*torch.randn(2, 2, 2, 20, 32))
    layer.attend(torch.randn(2, 4, 20, 32), None, 0.2)
    return layer.storage


def expert_stack(rows: int, columns: int) -> list[torch.Tensor]:
    """The packed weights of two experts: qweight, scales and zeros."""
    weights = [packed_weight(rows, columns, 32, True, torch.bfloat16)[:3] for _ in range(2)]
    return [torch.stack(parts) for parts in zip(*weights, strict=True)]


def token_state(rows: int) -> ops.TokenState:
    integers = [torch.ones(shape, dtype=torch.long) for shape in ((rows, 1), (rows, 1), (rows,), (rows, 5), (1, 1))]
    return ops.TokenState(*integers[:3], torch.tensor(0), *integers[3:], torch.tensor(0))


def op_inputs() -> list[tuple[str, tuple[Any, ...]]]:
    torch.manual_seed(0)
    qweight, scales, zero, _ = packed_weight(20, 64, 32, True, torch.bfloat16)
    cache = int8_cache(2, 2, 16, 16, 32)
    new = torch.randn(2, 2, 3, 32)
    angles = torch.rand(2, 2, 3, 16)

    def appended(tokens: int) -> tuple[Any, ...]:
        """What the arguments of an op that appends begin with."""
        key, query = new[:, :, :tokens], torch.randn(2, 4, tokens, 32)
        norms, turned = (torch.rand(32), torch.rand(32), 1e-5), angles[:, 0, :tokens].unbind(0)
        cos, sin = (x.unsqueeze(0) for x in turned)
        return (query, key, key.clone(), *norms, cos, sin, True, torch.empty_like(query))

    x, norm_weight = torch.randn(3, 64).bfloat16(), torch.randn(64).bfloat16()
    merged = packed_weight(32, 64, 32, False, torch.bfloat16)[:3]
    thirds = packed_weight(48, 64, 32, True, torch.bfloat16)[:3]
    int8 = packing_int8.pack_int8(torch.randint(-128, 128, (20, 64), dtype=torch.int8)), torch.rand(20).bfloat16()
    fp8 = filled_storage(Fp8KVCache, 2, 100, 32)
    lengths = torch.full((2, 2), 4, dtype=torch.int32)
    int4 = filled_storage(Int4KIVICache, 2, 100, 32)
    h2o = h2o_storage()
    conv, state = (torch.randn(2, 4, 18), torch.randn(2, 6, 3), torch.randn(6, 3), torch.randn(6)), torch.randn(2, 6, 3)
    gate_up, down = (expert_stack(64, 64), expert_stack(64, 32))
    plain = torch.randn(32, 64).bfloat16()
    sent = x, torch.tensor([[1, 0]] * 3), torch.rand(3, 2).bfloat16()
    padding = torch.tensor([[False, True, True, True], [True] * 4])
    tickets = torch.zeros(4, dtype=torch.int32)
    return [
        ("short_conv_prefill", (*conv, padding)),
        ("moe_router", (x, torch.randn(6, 64).bfloat16(), torch.randn(6), 2, True, 1.0, None, 0.0)),
        ("moe_router", (x, torch.randn(6, 64).bfloat16(), None, 2, True, 1.0, norm_weight, 1e-5)),
        ("moe_experts", (*sent, *gate_up, *down, 32, 32, 32, 0, None)),
        ("moe_experts", (*sent, *gate_up, *down, 32, 32, 32, 0, x)),
        ("moe_experts_16bit", (*sent, torch.randn(2, 64, 64).bfloat16(), torch.randn(2, 64, 32).bfloat16(), x)),
        ("short_conv_step", (conv[0][:, 0], state, *conv[2:], padding[:, 0])),
        ("choose_tokens", (torch.randn(2, 9), torch.rand(2, 9), torch.tensor([3]), torch.tensor(0), *token_state(2))),
        ("sampling_weights", (torch.randn(2, 9).bfloat16(), 0.7, 5, 0.9, 0.1)),
        ("choose_tokens", (torch.randn(2, 9).bfloat16(), None, None, None, *token_state(2))),
        ("kv_h2o_append", (*appended(1), *h2o, 5, 2)),
        ("attn_decode_h2o", (torch.randn(2, 4, 32), *h2o, None, torch.ones(2, 20, dtype=torch.bool), 0.2)),
        ("attn_prefill_h2o", (torch.randn(2, 4, 3, 32), new, new.clone(), *h2o, None, 20, 0.2, 5, 2)),
        ("attn_received", (*torch.randn(2, 2, 2, 3, 32), torch.zeros(2, 2, 3), h2o[5], None, 20, 0.2)),
        ("kv_int4_append", (*appended(3), *int4)),
        ("kv_int4_dequantize", (*int4[:4], int4[8], False, 3, torch.empty(2, 2, 90, 32))),
        ("kv_int4_dequantize", (*int4[4:], True, 3, torch.empty(2, 2, 90, 32))),
        ("attn_decode_int4", (torch.randn(2, 4, 32), *int4, None, None, 0.2, 0, 0.0, None)),
        ("kv_fp8_append", (*appended(3), *fp8)),
        ("kv_fp8_dequantize", (*fp8[:3], fp8[6], 3, torch.empty(2, 2, 90, 32))),
        ("attn_decode_fp8", (torch.randn(2, 4, 32), *fp8, None, None, 0.2, 0, 0.0, None)),
        ("w4a16_linear_fused", (x, qweight, scales, zero, None, norm_weight, 1e-5, x[:, :20].contiguous(), 20, 32)),
        (
            "w4a16_short_conv",
            (
                x,
                *thirds,
                None,
                norm_weight,
                1e-5,
                torch.randn(3, 16, 4).bfloat16(),
                torch.randn(16, 4).bfloat16(),
                None,
                padding[0, :3],
                32,
            ),
        ),
        ("rms_norm", (x, norm_weight, 1e-5)),
        ("add_rms_norm", (x, x + 1, norm_weight, 1e-5)),
        ("swiglu", (x,)),
        ("embedding_rows", (torch.tensor([2, 0]), plain)),
        ("rope_angles", (torch.arange(6).view(2, 3), torch.rand(8), 1.25, x)),
        ("linear_16bit", (x, plain, plain[:, 0], norm_weight, 1e-5, None, False)),
        ("linear_16bit", (x, plain, None, None, 0.0, torch.randn(3, 32).bfloat16(), False)),
        ("linear_16bit", (x, plain, None, norm_weight, 1e-5, None, True)),
        ("linear_16bit_into", (x, plain, plain[:, 0], torch.empty(3, 32).bfloat16())),
        ("linear_16bit_swiglu", (x, plain, None, norm_weight, 1e-5)),
        ("w4a16_swiglu", (x, *merged, None, None, 0.0, 16, 32)),
        ("w8a16_linear", (x, *int8, None, 20)),
        ("w8a16_dequantize", (*int8, 20)),
        ("w4a16_linear", (torch.randn(3, 64).bfloat16(), qweight, scales, zero, None, 20, 32)),
        ("w4a16_gemm", (torch.randn(30, 64).bfloat16(), qweight, scales, zero, None, 20, 32, 0, None)),
        ("w4a16_gemm_swiglu", (x, *merged, None, 16, 32, 2)),
        ("w4a16_dequantize", (qweight, scales, zero, 64, 20, 32)),
        ("kv_int8_append", (*appended(3), *cache, lengths)),
        ("attn_step_int8", (*appended(1)[:-1], *cache, lengths, tickets, None, 0.2)),
        ("attn_step_static", (*appended(1)[:-1], *torch.zeros(2, 2, 2, 16, 32), lengths, None, None, 0.2)),
        ("kv_static_append", (*appended(3), torch.zeros(2, 2, 16, 32), torch.zeros(2, 2, 16, 32), lengths)),
        ("kv_int8_dequantize", (*cache[:2], 3, torch.empty(2, 2, 10, 32))),
        ("attn_decode_int8", (torch.randn(2, 4, 32), *counted(cache, 16), tickets, None, 0.2, 9, 2.0, torch.randn(4))),
        ("attn_decode_static", (torch.randn(2, 4, 32), *counted([new, new], 2), None, None, 0.2, 0, 0.0, None)),
    ]


def test_every_op_is_checked_below() -> None:
    assert {name for name, _ in op_inputs()} == set(ops.SCHEMAS)


@pytest.mark.parametrize(("name", "args"), op_inputs(), ids=lambda value: value if isinstance(value, str) else "")
def test_schema_and_fake_agree_with_the_reference(name: str, args: tuple[Any, ...]) -> None:
    op = getattr(getattr(torch.ops, ops.NAMESPACE), name).default
    # The check of the schema compares tensors in ways that torch does not have for 8-bit floats.
    tests = ("test_schema",) if not any(getattr(arg, "dtype", None) is torch.float8_e4m3fn for arg in args) else ()
    torch.library.opcheck(op, args, test_utils=(*tests, "test_faketensor"))
