"""LFM2's short convolution: the ops against their formula, the states in the cache, padding that never gets in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import make_lfm2, make_lfm2_moe
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

from hf_fastpath import Int8KVCache, StaticKVCache, Unsupported, fastpath_report, patch_model, unpatch_model
from hf_fastpath.caches.conv_state import ConvStateLayer, LeftPadding
from hf_fastpath.generation import CACHES
from hf_fastpath.modules import ShortConv
from hf_fastpath.ops import short_conv_prefill, short_conv_step

QUIET = {"progress": False}


def by_formula(bcx: Any, state: Any, weight: Any, bias: Any, mask: Any) -> tuple[Any, Any]:
    """Row by row and token by token in float64; a masked token is left out of the state, and is 0 to its neighbours."""
    out, states = torch.zeros(*bcx.shape[:2], weight.shape[0], dtype=torch.float64), []
    for row in range(bcx.shape[0]):
        past = [state[row, :, tap].double() for tap in range(weight.shape[1])]
        kept = list(past)
        for token in range(bcx.shape[1]):
            gate_in, gate_out, x = bcx[row, token].double().chunk(3)
            real = mask is None or bool(mask[row, token])
            past.append(gate_in * x if real else torch.zeros_like(x))
            total = sum(past[token + 1 + tap] * weight[:, tap].double() for tap in range(weight.shape[1]))
            out[row, token] = gate_out * (total + (0 if bias is None else bias.double()))
            kept = list(past) if real else kept
        states.append(torch.stack(kept[-weight.shape[1] :], dim=1))
    return out, torch.stack(states)


def case(
    batch: int, tokens: int, channels: int, taps: int, seed: int = 0, dtype: Any = torch.float32
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return normal(batch, tokens, 3 * channels), normal(batch, channels, taps), normal(channels, taps), normal(channels)


MASKS = {
    "none": None,
    "left": lambda t: torch.arange(t) >= torch.tensor([0, 1, t // 2])[:, None],
    "right": lambda t: torch.arange(t) < torch.tensor([t, t - 1, t // 2])[:, None],
    "one row": lambda t: torch.tensor([True, False, True])[:, None].expand(3, t),
    "between": lambda t: (torch.arange(t) % 3 != 1).expand(3, t),
}


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("taps", [3, 4, 2])
@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
@pytest.mark.parametrize("biased", [True, False])
def test_the_op_computes_its_formula(masked: str, taps: int, tokens: int, biased: bool) -> None:
    bcx, state, weight, bias = case(3, tokens, 5, taps)
    make = MASKS[masked]
    mask, bias = None if make is None else make(tokens), bias if biased else None
    expected, expected_state = by_formula(bcx, state, weight, bias, mask)
    if mask is not None:
        bcx[~mask] = float("nan")  # whatever padding holds
    address, before = state.data_ptr(), state.clone()
    out = short_conv_prefill(bcx, state, weight, bias, mask)
    real = torch.ones(3, tokens, dtype=torch.bool) if mask is None else mask
    # A sum of 4 products and a bias, each of size 1, in float32: 6 roundings of 2^-24 of some units.
    torch.testing.assert_close(out[real].double(), expected[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-6, atol=1e-6)
    assert state.data_ptr() == address
    if tokens == 1:
        again = short_conv_step(bcx[:, 0], before, weight, bias, None if mask is None else mask[:, 0])
        assert torch.equal(again[real[:, 0]], out[:, 0][real[:, 0]])
        assert torch.equal(before, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_division_into_chunks_gives_the_same_bits(dtype: torch.dtype) -> None:
    bcx, _, weight, bias = case(2, 12, 7, 3, dtype=dtype)
    whole_state = torch.zeros(2, 7, 3, dtype=dtype)
    whole = short_conv_prefill(bcx, whole_state, weight, bias, None)
    for sizes in ((1,) * 12, (5, 1, 6), (2, 2, 8), (11, 1)):
        state = torch.zeros(2, 7, 3, dtype=dtype)
        parts = [
            short_conv_step(part[:, 0], state, weight, bias, None).unsqueeze(1)
            if part.shape[1] == 1
            else short_conv_prefill(part, state, weight, bias, None)
            for part in bcx.split(sizes, dim=1)
        ]
        assert torch.equal(torch.cat(parts, dim=1), whole)
        assert torch.equal(state, whole_state)


def generate(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    flags = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **flags, **kwargs)


def close(got: Any, expected: Any, padding: int) -> None:
    """One row's logits at every step. float32 sums in another order; one step of int8's 127 for a key."""
    for a, b in zip(got.logits, expected.logits, strict=True):
        assert float((a - b).abs().max()) <= 4e-3 * float(b.abs().max())
    assert torch.equal(got.sequences[:, padding:], expected.sequences)


@pytest.mark.parametrize("make", [make_lfm2, make_lfm2_moe])
@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("kv_cache", ["static", "int8"])
def test_padding_never_gets_into_the_state(make: Any, chunk: int | None, kv_cache: str, padded: Any) -> None:
    """With biases, which make something of the zeros that transformers puts in place of padding, and with chunks so
    short that some hold nothing else."""
    model = patch_model(make(conv_bias=True), weights=None, kv_cache=kv_cache)
    extra = {} if chunk is None else {"prefill_chunk_size": chunk}
    together = generate(model, padded, **extra)
    for row, padding in enumerate((0, 3, 5)):
        inputs = {name: value[row : row + 1] for name, value in padded.items()}
        alone = generate(model, {"input_ids": inputs["input_ids"][:, padding:]})
        one = generate(model, inputs, **extra)  # a padded batch of one
        close(one, alone, padding)
        assert torch.equal(together.sequences[row], one.sequences[0])
        for layer, other in zip(one.past_key_values.layers, alone.past_key_values.layers, strict=True):
            if isinstance(layer, ConvStateLayer):
                torch.testing.assert_close(layer.conv_states[0], other.conv_states[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kv_cache", CACHES)
def test_every_cache_has_the_states_beside_it(kv_cache: Any, padded: Any) -> None:
    model = patch_model(make_lfm2(), weights=None, kv_cache=kv_cache)
    for mode in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        torch.manual_seed(0)
        flags = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True} | mode
        first = model.generate(**padded, **flags)
        assert type(first.past_key_values) is CACHES[kv_cache]
        assert [isinstance(layer, ConvStateLayer) for layer in first.past_key_values.layers] == [True, False, True]
    cache = first.past_key_values
    assert cache.nbytes == sum(layer.nbytes for layer in cache.layers)
    assert cache.bytes_per_token > 0


def test_the_state_stays_where_it_is() -> None:
    model = patch_model(make_lfm2(), weights=None, kv_cache="static")
    cache = StaticKVCache(model.config)
    ids = torch.randint(2, 199, (4, 6), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    state = cache.layers[0].conv_states[0]
    address, before = state.data_ptr(), state.clone()
    cache.reorder_cache(torch.tensor([3, 3, 0, 1]))
    assert torch.equal(state, before[[3, 3, 0, 1]])
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
    cache.reset()
    assert not state.any()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert torch.equal(cache.layers[0].conv_states[0], before)
    assert cache.layers[0].conv_states[0].data_ptr() == address


def test_rows_are_repeated_and_selected() -> None:
    model = patch_model(make_lfm2(), weights=None, kv_cache="int8")
    cache = Int8KVCache(model.config)
    cache.batch_repeat_interleave(2)  # nothing yet
    ids = torch.randint(2, 199, (3, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids, past_key_values=cache)
        before = cache.layers[2].conv_states[0].clone()
        cache.batch_repeat_interleave(2)
        assert torch.equal(cache.layers[2].conv_states[0], before.repeat_interleave(2, 0))
        cache.batch_select_indices(torch.tensor([True, False, False, False, True, False]))
        assert torch.equal(cache.layers[2].conv_states[0], before[[0, 2]])
        got = model(ids[[0, 2], :1], past_key_values=cache).logits
        fresh = Int8KVCache(model.config)
        model(ids[[0, 2]], past_key_values=fresh)
        assert torch.equal(got, model(ids[[0, 2], :1], past_key_values=fresh).logits)
        with pytest.raises(ValueError, match=r"holds a batch of 2.*got 3"):
            model(ids[:, :1], past_key_values=cache)


def test_a_state_cannot_be_cropped_without_notice() -> None:
    model = patch_model(make_lfm2(), weights=None, kv_cache="static")
    cache, ids = StaticKVCache(model.config), torch.arange(2, 10)[None]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-1)
    cache = StaticKVCache(model.config)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        cache.activate_past_recording()
        model(ids[:, 5:], past_key_values=cache)
        cache.crop(-2)
        got = model(ids[:, 6:], past_key_values=cache).logits
        expected = model(ids, use_cache=False).logits[:, 6:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_left_padding_is_asked_for_only_while_it_lasts() -> None:
    padding = LeftPadding()
    padding.see(torch.tensor([[0], [1]]), 1)
    assert padding.mask is not None
    assert padding.mask.tolist() == [False, True]
    padding.see(torch.tensor([[0, 0, 1], [1, 1, 1]]), 2)
    assert padding.mask is None
    assert padding.over
    padding.see(torch.tensor([[0, 0, 1, 0]]), 1)  # not looked at
    assert padding.mask is None


def test_modules_change_class_and_back() -> None:
    model = make_lfm2()
    patch_model(model, weights=None, kv_cache="static")
    assert isinstance(model.model.layers[0].conv, ShortConv)
    assert isinstance(model.model.layers[0].conv, Lfm2ShortConv)
    assert "Forward passes of ours: 2 Lfm2ShortConv" in str(fastpath_report(model))
    unpatch_model(model)
    assert type(model.model.layers[0].conv) is Lfm2ShortConv
    patch_model(model, kv_cache=None, **QUIET)
    assert type(model.model.layers[0].conv) is Lfm2ShortConv


def test_another_cache_and_gradients_are_transformers_own(prompt: torch.Tensor) -> None:
    model, stock = patch_model(make_lfm2(), weights=None, kv_cache="static"), make_lfm2()
    expected = stock.generate(prompt, max_new_tokens=8, do_sample=False)
    got = model.generate(prompt, max_new_tokens=8, do_sample=False, cache_implementation="dynamic")
    assert torch.equal(got, expected)
    for each in (stock, model):
        each(prompt, labels=prompt).loss.backward()
    assert torch.equal(model.model.layers[0].conv.conv.weight.grad, stock.model.layers[0].conv.conv.weight.grad)


def test_a_model_of_convolutions_alone_is_refused() -> None:
    with pytest.raises(Unsupported, match="needs layers of full_attention"):
        StaticKVCache(make_lfm2(num_hidden_layers=1, layer_types=["conv"]).config)
