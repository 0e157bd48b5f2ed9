"""The caches: everything that generate() calls, against the same operations on plain tensors."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_formats import CACHES, Mirror, random_kv
from tiny_models import FAMILIES, long_batch, make_llama

from hf_fastpath import Fp8KVCache, H2OKVCache, Int4KIVICache, Int8KVCache, StaticKVCache, Unsupported
from hf_fastpath.caches import attention
from hf_fastpath.caches.layer import BLOCK_TOKENS
from hf_fastpath.caches.lazy import LazyKV

make_mistral = FAMILIES["mistral"]
COMPRESSED = [kind for kind in CACHES if kind is not StaticKVCache]


@pytest.fixture(params=CACHES, ids=lambda kind: kind.__name__)
def mirror(request: pytest.FixtureRequest) -> Mirror:
    return Mirror(request.param)


def test_append_and_growth(mirror: Mirror) -> None:
    for tokens in (7, 1, 1, BLOCK_TOKENS, 3 * BLOCK_TOKENS, 1):
        mirror.append(tokens)
        mirror.check()
    assert mirror.cache.layers[0].capacity % BLOCK_TOKENS == 0


def test_no_copy_per_token(mirror: Mirror) -> None:
    mirror.append(5)
    addresses = [tensor.data_ptr() for tensor in mirror.cache.layers[0].storage]
    moves = 0
    for _ in range(2000):
        mirror.cache.layers[0].update(*random_kv(3, 1))
        now = [tensor.data_ptr() for tensor in mirror.cache.layers[0].storage]
        moves, addresses = moves + (now != addresses), now
    assert moves <= 6  # 256 -> 512 -> 768 -> 1280 -> 2048


def test_preallocation_is_one_allocation() -> None:
    cache = StaticKVCache(make_llama().config, max_cache_len=1000)
    cache.update(*random_kv(1, 5), 0)
    assert cache.layers[0].capacity == 1024


@pytest.mark.parametrize("start", [6, 63, 128])  # 128: the crop undoes a group of 64
def test_reorder_repeat_select_crop_reset(start: int, mirror: Mirror) -> None:
    mirror.append(start)
    mirror.both("reorder_cache", torch.tensor([2, 0, 0]))
    mirror.check()
    mirror.append(2)
    mirror.crop(3)
    mirror.check()
    mirror.append(1)
    mirror.both("batch_repeat_interleave", 2)
    mirror.batch = 6
    mirror.append(2)
    mirror.check()
    mirror.both("batch_select_indices", torch.tensor([5, 1]))
    mirror.batch = 2
    mirror.append(1)
    mirror.check()
    mirror.reset()
    assert mirror.cache.get_seq_length() == 0
    mirror.batch = 4  # after a reset a cache may serve another batch
    mirror.append(3)
    mirror.check()


def test_boolean_selection_and_operations_before_use(mirror: Mirror) -> None:
    mirror.cache.reset()
    mirror.cache.crop(-1)
    mirror.cache.reorder_cache(torch.tensor([1, 0, 2]))
    mirror.cache.batch_repeat_interleave(2)
    mirror.append(3)
    mirror.both("batch_select_indices", torch.tensor([True, False, True]))
    mirror.check()


def test_copies_are_independent_and_caches_can_be_saved(mirror: Mirror) -> None:
    mirror.append(4)
    other = copy.deepcopy(mirror.cache)
    other.layers[0].update(*random_kv(3, 1), 0)
    mirror.check()
    file = io.BytesIO()
    torch.save(mirror.cache, file)
    file.seek(0)
    mirror.cache = torch.load(file, weights_only=False)
    mirror.append(1)
    mirror.check()


def test_mistakes_are_named(mirror: Mirror) -> None:
    mirror.append(4)
    with pytest.raises(ValueError, match="holds a batch of 3, but got keys of 2"):
        mirror.cache.update(*random_kv(2, 1), 0)
    with pytest.raises(ValueError, match="pass a negative number"):
        mirror.cache.crop(2)
    mirror.check()
    with pytest.raises(ValueError, match="max_cache_len=-1"):
        mirror.kind(make_llama().config, max_cache_len=-1)


@pytest.mark.parametrize("first_inside", [True, False])
def test_inference_mode_and_normal_mode_mix(first_inside: bool, mirror: Mirror) -> None:
    for step in range(4):
        with torch.inference_mode((step % 2 == 0) == first_inside):
            mirror.append(BLOCK_TOKENS - 2 if step == 1 else 3)
            mirror.cache.reorder_cache(torch.tensor([0, 1, 2]))
            mirror.cache.batch_repeat_interleave(1)
    mirror.check()


def test_a_reset_cache_serves_another_dtype(mirror: Mirror) -> None:
    mirror.append(3)
    mirror.cache.reset()
    key, value = (new.bfloat16() for new in random_kv(3, 2))
    keys, values = mirror.cache.update(key, value, 0)
    assert keys.dtype == values.dtype == torch.bfloat16
    assert mirror.cache.layers[0].keys.dtype == torch.bfloat16


def test_crop_takes_a_tensor_and_keeps_a_host_length(mirror: Mirror) -> None:
    mirror.append(5)
    mirror.cache.crop(torch.tensor(-2))
    assert type(mirror.cache.get_seq_length()) is int
    assert mirror.cache.get_seq_length() == 3


def test_offload_and_prefetch_keep_the_content(mirror: Mirror) -> None:
    mirror.append(5)
    for layer in mirror.cache.layers:
        layer.offload()
        layer.prefetch()
    mirror.check()


@pytest.mark.parametrize("kind", COMPRESSED)
def test_keys_and_values_of_different_widths_are_refused(kind: type) -> None:
    cache = kind(make_llama().config)
    with pytest.raises(Unsupported, match="keys and values of one shape"):
        cache.update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 8), 0)


@pytest.mark.parametrize("kind", CACHES)
def test_other_layers_are_refused(kind: type) -> None:
    config = make_llama().config
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(
        Unsupported, match=r"layers of full_attention, sliding_attention, .* this model has chunked_attention, full"
    ):
        kind(config)
    with pytest.raises(
        Unsupported, match=r"layers of full_attention, beside .* this model has full_attention, sliding_attention"
    ):
        H2OKVCache(make_mistral(sliding_window=24).config)


@pytest.mark.parametrize("attention_name", ["sdpa", "eager", "fastpath"])
@pytest.mark.parametrize("padding", [(0, 0), (0, 50)], ids=str)
def test_a_sliding_window_shorter_than_the_text(padding: tuple[int, ...], attention_name: str) -> None:
    """The static cache holds every token, transformers' DynamicCache those in the window: the same text."""
    attention.register_attention()
    inputs, options = long_batch(padding), {"max_new_tokens": 40, "do_sample": False}
    flags = {"return_dict_in_generate": True, "output_logits": True}
    stock = make_mistral(sliding_window=24, attn_implementation="eager" if attention_name == "eager" else "sdpa")
    model = make_mistral(sliding_window=24, attn_implementation=attention_name)
    want = stock.generate(**inputs, **options, **flags)
    got = model.generate(**inputs, **options, **flags, past_key_values=StaticKVCache(model.config))
    assert torch.equal(got.sequences, want.sequences)
    # Sums over masked tokens besides, in float32.
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-3, atol=1e-3)
    wide = make_mistral(sliding_window=1000, attn_implementation=attention_name)
    unlimited = wide.generate(**inputs, **options, past_key_values=StaticKVCache(wide.config))
    assert not torch.equal(unlimited, want.sequences)  # the window matters
    chunks = model.generate(**inputs, **options, past_key_values=StaticKVCache(model.config), prefill_chunk_size=16)
    assert torch.equal(chunks, want.sequences)


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_caches_of_a_sliding_window(kind: type) -> None:
    """Their own attention and the expanded cache under sdpa agree, and see the window alone."""
    attention.register_attention()
    inputs = long_batch((0, 3))
    flags = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = []
    for name in ("fastpath", "sdpa"):
        model = make_mistral(sliding_window=24, attn_implementation=name)
        out.append(model.generate(**inputs, **flags, past_key_values=kind(model.config)).logits)
    wide = make_mistral(sliding_window=1000, attn_implementation="fastpath")
    unlimited = wide.generate(**inputs, **flags, past_key_values=kind(wide.config)).logits
    for a, b, other in zip(*out, unlimited, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.02  # as in test_generate_caches.py
        assert float((other - b).norm() / b.norm()) > 0.2


STORAGE = {
    Int8KVCache: {torch.int8, torch.float16, torch.int32},
    Fp8KVCache: {torch.float8_e4m3fn, torch.float32, torch.int32},
    Int4KIVICache: {torch.uint8, torch.int32},
}
LARGEST = {Int8KVCache: 0.53, Fp8KVCache: 0.53, Int4KIVICache: 0.30}


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize("head_dim", [48, 64, 128])
def test_storage_is_as_small_as_promised(kind: type, head_dim: int) -> None:
    """Everything counted that is allocated for 4,096 tokens, against fp16."""
    config = make_llama(head_dim=head_dim, dtype=torch.float16).config
    config.dtype = torch.float16
    cache, plain = kind(config, max_cache_len=4096), StaticKVCache(config, max_cache_len=4096)
    before = cache.bytes_per_token
    for layer in range(2):
        key, value = torch.randn(2, 3, 2, 4096, head_dim).half()
        cache.update(key, value, layer)
        plain.update(key, value, layer)
    assert before == cache.bytes_per_token  # known before any token
    growing = 3 * 4096 * cache.bytes_per_token
    # bytes_per_token is rounded up, and leaves out what does not grow with the tokens.
    assert growing - 3 * 4096 < cache.nbytes < growing + 0.02 * plain.nbytes
    assert {tensor.dtype for tensor in cache.layers[0].storage} - {torch.float16} == STORAGE[kind] - {torch.float16}
    ratio = cache.nbytes / plain.nbytes
    assert ratio <= LARGEST[kind] + (1 / 96 if head_dim < 64 else 0)  # the scales of a smaller head count more


@pytest.mark.parametrize("kind", COMPRESSED)
def test_handles_expand_only_when_computed_with(kind: type, count_calls: Callable[..., Any]) -> None:
    expansions = count_calls(kind.layer_class, "expand")
    cache = kind(make_llama().config)
    key, value = random_kv(2, 70)
    assert cache.update(key, value, 0)[0] is key  # the first prompt chunk attends to its own unrounded keys
    keys, values = cache.update(*random_kv(2, 1), 0)
    assert type(keys) is LazyKV
    assert keys.shape == values.shape == (2, 2, 71, 16)
    assert not expansions
    assert torch.equal(keys * 1, cache.layers[0].keys)
    assert len(expansions) == 2  # one for the product, one for the property
    assert "LazyKV(keys" in repr(keys)
    strict = kind(make_llama().config, fresh_prefill=False)
    assert type(strict.update(key, value, 0)[0]) is LazyKV


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize("padding", [False, True])
def test_decoding_never_expands_the_cache(kind: type, padding: bool, count_calls: Callable[..., Any]) -> None:
    model = make_llama()
    model.set_attn_implementation("sdpa")
    expansions = count_calls(kind.layer_class, "expand")
    decodings = count_calls(kind.layer_class, "decode")
    inputs = long_batch((0, 3, 65) if padding else (0, 0, 0))

    def generate() -> torch.Tensor:
        return model.generate(**inputs, past_key_values=kind(model.config), max_new_tokens=6, do_sample=False)

    plain = generate()
    assert len(expansions) >= 2 * 2 * 5  # sdpa: keys and values of two layers in each of the five decode steps
    assert not decodings
    expansions.clear()
    attention.register_attention()
    model.set_attn_implementation("fastpath")
    assert torch.equal(generate(), plain)
    assert not expansions
    assert len(decodings) == 2 * 5
    assert (decodings[0][2] is not None) == padding


def test_one_strict_forward_is_token_by_token_decoding() -> None:
    model = make_llama()
    attention.register_attention()
    model.set_attn_implementation("fastpath")
    ids = torch.randint(2, 199, (1, 40))
    with torch.no_grad():
        whole = model(ids, past_key_values=Int8KVCache(model.config, fresh_prefill=False)).logits
        cache = Int8KVCache(model.config)
        steps = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40)], 1)
        exact = model(ids, use_cache=False).logits
        chunks_cache = Int8KVCache(model.config, fresh_prefill=False)
        chunks = torch.cat([model(part, past_key_values=chunks_cache).logits for part in ids.split(16, 1)], 1)
    assert float((whole - steps).abs().max()) < 1e-3 * float(whole.abs().max())
    assert float((whole - chunks).abs().max()) < 1e-3 * float(whole.abs().max())
    difference = float((whole - exact).abs().max() / whole.abs().max())
    assert 1e-3 < difference < 0.2  # the cache's own error is in there, and is small


def test_other_masks_and_softcap_take_the_expanding_path(count_calls: Callable[..., Any]) -> None:
    query = torch.randn(1, 4, 1, 16)
    cache = Int8KVCache(make_llama().config)
    cache.update(*random_kv(1, 6), 0)
    keys, values = cache.update(*random_kv(1, 1), 0)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    calls = count_calls(Int8KVCache.layer_class, "decode")
    additive = torch.zeros(1, 1, 1, 7)
    per_head = torch.ones(1, 4, 1, 7, dtype=torch.bool)
    plain = attention.fastpath_attention(module, query, keys, values, None)[0]
    assert len(calls) == 1
    for mask in (additive, per_head):
        got = attention.fastpath_attention(module, query, keys, values, mask)[0]
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)
    wants_gradient = query.clone().requires_grad_()
    attention.fastpath_attention(module, wants_gradient, keys, values, None)[0].sum().backward()
    assert wants_gradient.grad is not None
    attention.fastpath_attention(module, query, keys, values, None, dropout=0.5)
    with contextlib.suppress(ValueError):  # sdpa itself does not know it, and says so in newer transformers
        attention.fastpath_attention(module, query, keys, values, None, softcap=30.0)
    assert len(calls) == 1
