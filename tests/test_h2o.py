"""The H2O cache against a model of it in plain Python and float64, and inside generate()."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from cache_formats import E4M3, nearest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import long_batch, make_llama

from hf_fastpath import H2OKVCache, Int8KVCache, StaticKVCache, Unsupported, patch_model, register
from hf_fastpath.caches.attention import ATTENTION_NAME, fastpath_attention
from hf_fastpath.ops._rotation import rotate

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 16
SCALING = DIM**-0.5


@dataclasses.dataclass
class Token:
    """What a head keeps of a token."""

    number: int
    key: torch.Tensor
    value: torch.Tensor
    score: float = 0.0


class HeadModel:
    """One KV head of one row."""

    def __init__(self, budget: int, window: int, sinks: int, padding: int) -> None:
        self.budget, self.window, self.sinks, self.padding = budget, window, sinks, padding
        self.held: list[Token] = []  # slot by slot
        self.seen = 0

    @staticmethod
    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = 2.0 ** math.ceil(math.log2(float(x.abs().max()) / 448))
        return nearest(x / scale, E4M3) * scale

    def attend(self, queries: torch.Tensor, number: int, tokens: list[Token]) -> torch.Tensor:
        """Queries ``(n, D)`` of token ``number``; what they attend to is counted."""
        visible = [token for token in tokens if self.padding <= token.number <= number]
        if not visible:
            return torch.zeros_like(queries)
        scores = queries @ torch.stack([token.key for token in visible]).T * SCALING
        weights = scores.softmax(-1)
        if number >= self.padding:
            for token, gained in zip(visible, weights.sum(0).tolist(), strict=True):
                token.score += gained
        return weights @ torch.stack([token.value for token in visible])

    def priority(self, token: Token) -> float:
        if token.number < self.padding:
            return -1.0
        is_sink = token.number < self.padding + self.sinks
        return math.inf if is_sink or token.number > self.seen - 1 - self.window else token.score

    def prefill(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """A chunk: queries ``(n, q, D)``, keys and values ``(q, D)``."""
        fresh = [Token(self.seen + i, keys[i], values[i]) for i in range(len(keys))]
        everything = self.held + fresh
        out = [self.attend(queries[:, i], self.seen + i, everything) for i in range(len(keys))]
        self.seen += len(keys)
        for token in fresh:
            token.key, token.value = self.rounded(token.key), self.rounded(token.value)
        best = sorted(everything, key=lambda token: (self.priority(token), token.number), reverse=True)
        self.held = sorted(best[: self.budget], key=lambda token: token.number)
        return torch.stack(out, dim=1)

    def decode(self, queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        new = Token(self.seen, self.rounded(key), self.rounded(value))
        self.seen += 1
        if len(self.held) < self.budget:
            self.held.append(new)
        else:
            self.held[min(range(self.budget), key=lambda slot: self.priority(self.held[slot]))] = new
        return self.attend(queries, new.number, self.held)


def mask_of(padding: list[int], start: int, tokens: int) -> torch.Tensor:
    """``(B, 1, q, start + q)``: causal, and without each row's padding."""
    column, row = torch.arange(start + tokens), torch.arange(start, start + tokens)[:, None]
    return torch.stack([(column <= row) & (column >= pad) for pad in padding])[:, None]


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(1, 20),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    chunks=st.lists(st.sampled_from([1, 1, 1, 2, 7, 30]), min_size=1, max_size=12),
    padding=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    strict=st.booleans(),
)
# Tokens that are alike, here padding, in slots that are not in their order.
@example(budget=3, shares=(0.0, 0.0), chunks=[1, 1, 1, 1, 2], padding=(0, 4), strict=False)
def test_against_the_model(
    budget: int, shares: tuple[float, float], chunks: list[int], padding: tuple[int, int], strict: bool
) -> None:
    window = int(shares[0] * budget)
    sinks = int(shares[1] * (budget - window))
    layer = H2OKVCache.layer_class(budget=budget, window=window, sinks=sinks, fresh_prefill=not strict)
    models = [[HeadModel(budget, window, sinks, pad) for _ in range(KV_HEADS)] for pad in padding]
    generator, start = torch.Generator().manual_seed(budget), 0
    for tokens in chunks:
        key, value = torch.randn(2, BATCH, KV_HEADS, tokens, DIM, generator=generator)
        query = torch.randn(BATCH, HEADS, tokens, DIM, generator=generator) * 2
        mask = mask_of(list(padding), start, tokens) if any(padding) else None
        handles = layer.update(key, value)
        out = fastpath_attention(torch.nn.Module(), query, *handles, mask, scaling=SCALING)[0].transpose(1, 2)
        q, k = rotate(query).double(), rotate(key).double()
        for b in range(BATCH):
            for h in range(KV_HEADS):
                queries, rows = q[b, 2 * h : 2 * h + 2], slice(2 * h, 2 * h + 2)
                expected = step(models[b][h], queries, k[b, h], value[b, h].double(), strict)
                # float32 sums of up to 50 weights and values of about 1.
                torch.testing.assert_close(out[b, rows].double(), expected, rtol=0, atol=1e-4)
        start += tokens
        check(layer, models, start)


def step(
    model: HeadModel, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, strict: bool
) -> torch.Tensor:
    if len(keys) > 1 and not strict:
        return model.prefill(queries, keys, values)
    return torch.stack([model.decode(queries[:, i], keys[i], values[i]) for i in range(len(keys))], dim=1)


def check(layer: Any, models: list[list[HeadModel]], seen: int) -> None:
    used = min(seen, layer.budget)
    assert layer.get_seq_length() == seen
    k_data, k_scale, v_data, v_scale, scores, positions, counts = layer.storage
    assert bool((counts[..., 0] == seen).all())
    for b, row in enumerate(models):
        for h, model in enumerate(row):
            order = positions[b, h, :used].argsort()
            held = sorted(model.held, key=lambda token: token.number)
            assert positions[b, h, order].tolist() == [token.number for token in held]
            wanted = torch.tensor([token.score for token in held], dtype=torch.float64)
            torch.testing.assert_close(scores[b, h, order].double(), wanted, rtol=1e-4, atol=1e-4)
            keys = k_data[b, h, order].double() * k_scale[b, h, order, None].double()
            values = v_data[b, h, order].double() * v_scale[b, h, order, None].double()
            assert torch.equal(keys, torch.stack([token.key for token in held]))
            assert torch.equal(values, torch.stack([token.value for token in held]))


def cache_of(**options: Any) -> H2OKVCache:
    return H2OKVCache(make_llama().config, **options)


def patched(seed: int = 0, **options: Any) -> Any:
    settings = {"kv_budget": 24, "kv_window": 10, "kv_sinks": 2} | options
    return patch_model(make_llama(seed=seed), weights=None, kv_cache="h2o", **settings)


def generate(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(**inputs, **{"max_new_tokens": 12} | kwargs)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 50},
    "beams": {"num_beams": 3, "do_sample": False},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 16},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_generate(mode: str) -> None:
    model, inputs = patched(), long_batch((0, 3, 60))
    first, second = (generate(model, inputs, **MODES[mode], return_dict_in_generate=True) for _ in range(2))
    assert torch.equal(first.sequences, second.sequences)
    assert first.sequences.shape == (3 * MODES[mode].get("num_return_sequences", 1), 82)
    cache = first.past_key_values
    assert isinstance(cache, H2OKVCache)
    assert cache.get_seq_length() == 81
    assert cache.layers[0].storage[0].shape[2] == 24


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_with_room_for_everything_it_is_a_cache_in_8_bits(mode: str) -> None:
    """Logits as near to full precision as 8-bit floats are (see test_generate_caches)."""
    inputs, flags = long_batch((0, 3, 60)), {"return_dict_in_generate": True, "output_logits": True}
    got = generate(patched(kv_budget=100), inputs, **MODES[mode], **flags)
    want = generate(make_llama(), inputs, **MODES[mode], **flags)
    torch.testing.assert_close(got.logits[0], want.logits[0], rtol=0, atol=1e-3)
    assert float((got.logits[1] - want.logits[1]).norm() / want.logits[1].norm()) < 0.2
    small = generate(patched(kv_budget=14), inputs, **MODES[mode], **flags)
    assert float((small.logits[1] - want.logits[1]).norm() / want.logits[1].norm()) > 0.2


def test_padded_rows_give_what_they_give_alone() -> None:
    flags = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    model, inputs = patched(), long_batch((0, 5, 50))
    together = generate(model, inputs, **flags)
    for row, padding in enumerate((0, 5, 50)):
        alone = generate(model, {"input_ids": inputs["input_ids"][row : row + 1, padding:]}, **flags)
        assert torch.equal(together.sequences[row, 70:], alone.sequences[0, 70 - padding :])
        for a, b in zip(together.logits, alone.logits, strict=True):
            assert float((a[row] - b[0]).abs().max()) <= 1e-3 * float(b.abs().max())


def test_250_tokens_in_48_slots() -> None:
    """Memory does not grow, the first and latest tokens are there, and the text depends on them alone."""
    model = patched(kv_budget=48, kv_window=None, kv_sinks=4)
    inputs = long_batch((0, 7), tokens=40)
    flags = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "max_new_tokens": 250}
    out = generate(model, inputs, **flags)
    assert all(bool(logits.isfinite().all()) for logits in out.logits)
    assert len(out.sequences[:, 40:].unique()) > 40
    for layer in out.past_key_values.layers:
        positions = layer.storage[5]
        assert positions.shape == (2, 2, 48)
        for row, padding in enumerate((0, 7)):
            for held in positions[row].tolist():
                assert len(set(held)) == 48
                assert set(held) >= {*range(padding, padding + 4), *range(289 - 24, 289)}
    assert out.past_key_values.nbytes == cache_of(kv_budget=48).layers[0].budget * 2 * 2 * 2 * (2 * 18 + 8) + 2 * 32


@pytest.mark.parametrize("tokens", [1, 3])
def test_what_padding_on_the_right_attends_to_counts_for_nothing(tokens: int) -> None:
    layer, reference = (H2OKVCache.layer_class(budget=12, window=4, sinks=1) for _ in range(2))
    key, value = torch.randn(2, 1, 2, 6, 16)
    query = torch.randn(1, 4, 6 + tokens, 16)
    for each in (layer, reference):
        each.update(key, value)
        each.attend(query[:, :, :6], None, SCALING)
    mask = mask_of([0], 6, tokens)[:, 0]
    mask[:, :, 6:] = False
    layer.update(*torch.randn(2, 1, 2, tokens, 16))
    layer.attend(query[:, :, 6:], mask, SCALING)
    assert torch.equal(layer.storage[4][..., :6], reference.storage[4][..., :6])
    assert not bool(layer.storage[4][..., 6:].any())


def test_a_token_that_gets_attention_stays() -> None:
    layer = H2OKVCache.layer_class(budget=12, window=4, sinks=1)
    wanted = torch.zeros(1, 1, 1, 16)
    wanted[..., 3] = 8.0
    torch.manual_seed(0)
    for number in range(60):
        key = wanted if number == 5 else torch.randn(1, 1, 1, 16) * 0.1
        layer.update(key, torch.randn(1, 1, 1, 16))
        layer.decode(wanted[:, :, 0], None, SCALING)
    held = set(layer.storage[5][0, 0].tolist())
    assert held >= {0, 5, 56, 57, 58, 59}


def test_one_strict_forward_is_token_by_token_decoding() -> None:
    model = make_llama()
    register()
    model.set_attn_implementation(ATTENTION_NAME)
    ids = long_batch((0, 0), tokens=40)["input_ids"]
    budget = {"kv_budget": 16, "kv_window": 6}
    with torch.no_grad():
        whole = model(ids, past_key_values=cache_of(fresh_prefill=False, **budget)).logits
        cache = cache_of(**budget)
        steps = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40)], 1)
        exact = model(ids, use_cache=False).logits
    # The last bits differ, so a value may be rounded to the next of fp8's steps, which are up to an eighth of it.
    assert float((whole - steps).norm()) < 0.01 * float(whole.norm())
    assert float((whole - exact).norm()) > 0.2 * float(whole.norm())  # much was evicted


def test_copies_saving_rows_and_reset(tmp_path: Any) -> None:
    model, inputs = patched(), long_batch((0, 4))
    whole = generate(model, inputs, do_sample=False, max_new_tokens=12)
    first = generate(model, inputs, do_sample=False, max_new_tokens=5, return_dict_in_generate=True)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)
    torch.save(first.past_key_values, tmp_path / "cache.pt")
    for cache in (copy.deepcopy(first.past_key_values), torch.load(tmp_path / "cache.pt", weights_only=False)):
        longer = {"input_ids": first.sequences, "attention_mask": mask}
        assert torch.equal(generate(model, longer, do_sample=False, max_new_tokens=7, past_key_values=cache), whole)
    cache = first.past_key_values
    before = [tensor.clone() for tensor in cache.layers[1].storage]
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 0, 1]))
    cache.batch_select_indices(torch.tensor([True, False, True, True]))
    for old, new in zip(before, cache.layers[1].storage, strict=True):
        assert torch.equal(new.view(torch.uint8), old[[1, 0, 0]].view(torch.uint8))
    cache.reset()
    assert cache.get_seq_length() == 0
    again = generate(model, inputs, do_sample=False, max_new_tokens=12, past_key_values=cache)
    assert torch.equal(again, whole)


def test_what_it_cannot_do_is_refused_in_words() -> None:
    model, ids = patched(), long_batch((0,))["input_ids"]
    with pytest.raises(Unsupported, match=r"cannot forget its latest tokens.*Assisted decoding.*another kv_cache"):
        model.generate(ids, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3)
    stock = make_llama(attn_implementation="sdpa")
    with pytest.raises(Unsupported, match="needs attn_implementation='fastpath', which patch_model"):
        stock.generate(ids, max_new_tokens=3, past_key_values=H2OKVCache(stock.config))
    with pytest.raises(Unsupported, match="gradients are wanted"):
        model(ids, past_key_values=cache_of())
    cache = cache_of()
    cache.update(*torch.randn(2, 1, 2, 3, 16), 0)
    with pytest.raises(Unsupported, match="before those of the last call attended"):
        cache.update(*torch.randn(2, 1, 2, 3, 16), 0)
    handles = cache_of().update(*torch.randn(2, 1, 2, 3, 16), 0)
    with pytest.raises(Unsupported, match="mask is not a boolean one"):
        fastpath_attention(torch.nn.Module(), torch.randn(1, 4, 3, 16), *handles, torch.zeros(1, 1, 3, 3))
    cache_of().crop(-3)  # nothing is in it
    cache.crop(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_budget": 0}, "kv_budget=0: must be an integer of 1 or more"),
        (
            {"kv_budget": 8, "kv_window": 5, "kv_sinks": 4},
            "kv_window=5 and kv_sinks=4 are more tokens than kv_budget=8",
        ),
        ({"kv_window": -1}, "kv_window=-1"),
        ({"kv_sinks": 1.5}, "kv_sinks=1.5"),
        ({"kv_budget": "many"}, "kv_budget='many'"),
    ],
)
def test_budgets_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cache_of(**options)
    with pytest.raises(ValueError, match=f"FastpathConfig.{message}"):
        patch_model(make_llama(), weights=None, kv_cache="h2o", **options)


def test_the_options_reach_the_cache_by_every_way() -> None:
    model, ids = patched(), long_batch((0,))["input_ids"]
    with torch.no_grad():
        layer = model(ids).past_key_values.layers[0]
    assert (layer.budget, layer.window, layer.sinks) == (24, 10, 2)
    out = model.generate(ids, max_new_tokens=2, cache_implementation="fastpath_h2o", return_dict_in_generate=True)
    assert out.past_key_values.layers[0].budget == 24
    other = model.generate(ids, max_new_tokens=2, cache_implementation="fastpath_int8", return_dict_in_generate=True)
    assert isinstance(other.past_key_values, Int8KVCache)
    assert cache_of(kv_budget=10).layers[0].window == 5


def test_a_quarter_of_the_tokens_takes_an_eighth_of_the_memory() -> None:
    config = make_llama(head_dim=128).config
    sizes = []
    for cache in (H2OKVCache(config, kv_budget=1024), StaticKVCache(config, max_cache_len=4096)):
        cache.update(*torch.randn(2, 1, 2, 1, 128).half(), 0)
        sizes.append(cache.layers[0].nbytes)
    assert sizes[0] / sizes[1] <= 0.53 / 4
    assert cache_of().bytes_per_token == 2 * 2 * (2 * 18 + 8)
