"""What happens to queries and keys before a cache stores them: transformers' own functions, bit for bit."""

from __future__ import annotations

import pytest
import torch
from cache_formats import filled_storage
from transformers.models.lfm2.modeling_lfm2 import Lfm2RMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from hf_fastpath import Fp8KVCache, H2OKVCache, Int4KIVICache, Int8KVCache, StaticKVCache, ops
from hf_fastpath.ops import QKTransform
from hf_fastpath.ops._append import rope, transformed
from hf_fastpath.ops._rms_norm import rms_norm
from hf_fastpath.ops._rotation import rotate

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def angles(batch: int, tokens: int, rotary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    turned = (torch.rand(batch, tokens, rotary // 2) * 6).repeat(1, 1, 2)
    return turned.cos().to(dtype), turned.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_are_transformers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 3, 5, 48) * torch.logspace(-3, 3, 5)[:, None]).to(dtype)
    for kind in (Qwen3RMSNorm, Lfm2RMSNorm):
        norm = kind(48, eps=1e-5).to(dtype)
        torch.nn.init.normal_(norm.weight, 1.0)
        assert torch.equal(rms_norm(x, norm.weight, 1e-5), norm(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_rope_is_transformers(batch: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    query, key = torch.randn(2, 2, 4, 7, 64).to(dtype)
    for rotary in (64, 32):
        cos, sin = angles(batch, 7, rotary, dtype)
        want = apply_rotary_pos_emb(query[..., :rotary], key[..., :rotary], cos, sin)
        for x, turned in zip((query, key), want, strict=True):
            assert torch.equal(rope(x, cos, sin), torch.cat([turned, x[..., rotary:]], -1))


@pytest.mark.parametrize("cache", ["static", "int8", "fp8", "int4", "h2o"])
def test_every_append_transforms_before_it_stores(cache: str) -> None:
    """The fused call is the same as the steps one after the other, for the storage and the query."""
    torch.manual_seed(2)
    kinds = {"static": StaticKVCache, "int8": Int8KVCache, "fp8": Fp8KVCache, "int4": Int4KIVICache, "h2o": H2OKVCache}
    tokens = 1 if cache == "h2o" else 5
    key, value = torch.randn(2, 2, 2, tokens, 32)
    query = torch.randn(2, 6, tokens, 32)
    transform = QKTransform(torch.rand(32), torch.rand(32), 1e-6, *angles(2, tokens, 32, torch.float32), rotate=True)
    if cache == "h2o":
        storage = [x for x in kinds[cache].layer_class(budget=8, window=3, sinks=1).allocate(key, key, 256)]
    else:
        storage = filled_storage(kinds[cache], 2, 70, 32)
    plain = [x.clone() for x in storage]
    rule = (3, 1) if cache == "h2o" else ()
    append = getattr(ops, f"kv_{cache}_append")
    got = append(key, value, storage, *rule, transform, query)
    assert append(transformed(key, transform.k_norm, transform), value, plain, *rule) is None
    for fused, separate in zip(storage, plain, strict=True):
        assert torch.equal(fused.view(torch.uint8), separate.view(torch.uint8))
    want = rotate(rope(rms_norm(query, transform.q_norm, 1e-6), transform.cos, transform.sin))
    assert torch.equal(got, want)
    assert got.transpose(1, 2).is_contiguous()
