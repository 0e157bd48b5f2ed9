"""Decoder layers in six operations: against the same patched model without them, and everything that forbids them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, long_batch, make_llama
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AutoModelForCausalLM, DynamicCache

from hf_fastpath import Int8KVCache, fastpath_report, heuristics, patch_model, unpatch_model
from hf_fastpath.caches import CompressedLayer
from hf_fastpath.config import KVFormat
from hf_fastpath.generation import CACHES
from hf_fastpath.heuristics import W4A16Variant
from hf_fastpath.modules import W4A16Linear
from hf_fastpath.modules.decoder_step import DecoderStep
from hf_fastpath.modules.merged import PER_ROW, merge, why_not_merged
from hf_fastpath.ops import QKTransform
from hf_fastpath.ops._append import rope
from hf_fastpath.ops._rms_norm import rms_norm

QUICK = {"progress": False, "scale_search": "absmax"}
FUSED_FAMILIES = ("llama", "mistral", "mistral, window", "qwen2", "qwen3")
FORMATS = ("int8", "fp8", "int4", "h2o", "static")
GREEDY = {"do_sample": False, "max_new_tokens": 12}
Calls = list[tuple[Any, ...]]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, count_calls: Callable[[Any, str], Calls]) -> Calls:
    """The CPU goes the ways that a GPU goes, on the references; the calls of DecoderStep."""
    monkeypatch.setattr(heuristics, "w4a16_variant", lambda *args: W4A16Variant.REFERENCE)
    monkeypatch.setattr(heuristics, "fuses_decoder_step", lambda device: True)
    return count_calls(DecoderStep, "__call__")


def without_steps(model: Any) -> Any:
    """The same model with transformers' own decoder layers."""
    for layer in model.model.layers:
        layer.__class__ = type(layer).__mro__[2]
    return model


def patched(family: str = "llama", kv_cache: str = "int8", dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    options = {"kv_budget": 48} if kv_cache == "h2o" else {}
    return patch_model(FAMILIES[family](dtype, **sizes), kv_cache=kv_cache, **options, **QUICK)


def run(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the logits of each step."""
    flags = {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, **flags, **(GREEDY | options))
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("padding", [(0,), (0, 5, 60)], ids=["one row", "padded"])
@pytest.mark.parametrize("kv_cache", FORMATS)
@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_it_computes_what_the_layers_compute(
    family: str, kv_cache: str, padding: tuple[int, ...], steps: Calls
) -> None:
    """In float32 only the order of sums differs, in products whose rows are together now."""
    if "window" in family and kv_cache == "h2o":
        pytest.skip("h2o takes no windows")
    model, inputs = patched(family, kv_cache), long_batch(padding)
    tokens, logits = run(model, inputs)
    assert len(steps) == 2 * 11  # two layers; the prompt gives the first of 12 tokens
    expected_tokens, expected = run(without_steps(model), inputs)
    assert len(steps) == 2 * 11
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_rounds_less_than_the_layers_do(dtype: torch.dtype, steps: Calls) -> None:
    """Against the same weights in float32: leaving out two roundings of six must not add error."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 199, (8, 40), generator=generator)

    def last_logits(model: Any) -> torch.Tensor:
        cache = CACHES[model._fastpath.config.kv_cache](model.config)
        with torch.no_grad():
            model(ids[:, :20], past_key_values=cache)
            return torch.stack([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 40)]).double()

    model = patched("qwen2", "int8", dtype, num_hidden_layers=1)
    exact = copy.deepcopy(model).float()
    fused, plain = last_logits(model), last_logits(without_steps(model))
    assert len(steps) == 20
    truth = last_logits(exact)
    error, plain_error = float((fused - truth).norm()), float((plain - truth).norm())
    assert 0 < error < 1.05 * plain_error  # both are means over 30,000 logits


def test_sampling_beams_and_chunks(steps: Calls) -> None:
    model, inputs = patched("qwen3", "fp8"), long_batch((0, 3))
    modes: list[dict[str, Any]] = [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
        {"prefill_chunk_size": 16},
        {"assistant_model": make_llama(seed=1)},
    ]
    for mode in modes:
        rows = {name: x[:1] for name, x in inputs.items()} if "assistant_model" in mode else inputs
        del steps[:]
        torch.manual_seed(3)
        tokens = model.generate(**rows, **(GREEDY | mode))
        assert bool(steps)
        twin = without_steps(copy.deepcopy(model))
        torch.manual_seed(3)
        assert torch.equal(tokens, twin.generate(**rows, **(GREEDY | mode)))


@pytest.mark.parametrize("rows", [16, 17, 40])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_any_number_of_rows(family: str, rows: int, steps: Calls) -> None:
    """More than 16 run in other operations."""
    model, inputs = patched(family), long_batch(tuple(range(rows)), rows + 9)
    tokens, logits = run(model, inputs, max_new_tokens=4)
    assert len(steps) == 6
    expected_tokens, expected = run(without_steps(model), inputs, max_new_tokens=4)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kv_cache", FORMATS)
@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_prompts_run_so_too(family: str, kv_cache: str, count_calls: Callable[[Any, str], Calls], steps: Calls) -> None:
    if "window" in family and kv_cache == "h2o":
        pytest.skip("h2o takes no windows")
    prompts = count_calls(DecoderStep, "prompt")
    model, inputs = patched(family, kv_cache), long_batch((0, 5, 60))
    tokens, logits = run(model, inputs, prefill_chunk_size=25)
    assert len(prompts) == 2 * 3
    expected_tokens, expected = run(without_steps(model), inputs, prefill_chunk_size=25)
    assert len(prompts) == 2 * 3
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kv_cache", FORMATS)
@pytest.mark.parametrize("norms", [False, True])
def test_a_caches_step_is_its_update_and_its_attention(kv_cache: str, norms: bool) -> None:
    """The same storage and, where it is ours, the same attention, bit for bit, over groups that fill up."""
    config = make_llama().config
    twins = [CACHES[KVFormat(kv_cache)](config).layers[0] for _ in range(2)]
    rng = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    weights = (randn(16) + 1, randn(16) + 1) if norms else (None, None)
    prompt = randn(2, 2, 60, 16), randn(2, 2, 60, 16)
    for layer in twins:
        layer.update(*prompt)
        if getattr(layer, "attends_chunks", False):
            layer.attend(torch.zeros(2, 4, 60, 16), None, 0.3)
    for token in range(60, 72):
        q, k, v = randn(2, 8, 1, 16).split([4, 2, 2], 1)
        cos, sin = randn(2, 1, 16), randn(2, 1, 16)
        mask = torch.rand((2, token + 1), generator=rng) < 0.8
        mask[:, -1] = True
        transform = QKTransform(*weights, 1e-5, cos, sin, twins[0].rotate_keys)
        got = twins[0].step(q, k, v, transform, mask, 0.3)
        if norms:
            q, k = (rms_norm(x, w, 1e-5) for x, w in zip((q, k), weights, strict=True))
        keys, values = twins[1].update(rope(k, cos, sin), v)
        turned = rope(q, cos, sin)
        if kv_cache == "static":
            want = sdpa(turned, keys, values, mask[:, None, None], scale=0.3, enable_gqa=True).squeeze(2)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # float32, summed in another order
        else:
            assert torch.equal(got, twins[1].decode(turned.squeeze(2), mask, 0.3))
        assert twins[0].get_seq_length() == token + 1
        for a, b in zip(twins[0].storage, twins[1].storage, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_a_step_admits_what_update_admits() -> None:
    layer = Int8KVCache(make_llama().config).layers[0]
    assert isinstance(layer, CompressedLayer)
    x = torch.randn(2, 8, 1, 16)
    layer.step(*x.split([4, 2, 2], 1), QKTransform(rotate=True), None, 0.3)
    with pytest.raises(ValueError, match="holds a batch of 2, but got keys of 1"):
        layer.step(*x[:1].split([4, 2, 2], 1), QKTransform(rotate=True), None, 0.3)


class TestPlainForward:
    """What the layers' own forward runs, as if there were no step."""

    @pytest.fixture
    def model(self, steps: Calls) -> Any:
        model = patched()
        run(model, long_batch((0,)))
        assert steps
        steps.clear()
        return model

    def check(self, model: Any, steps: Calls, **inputs: Any) -> None:
        tokens = model.generate(**long_batch((0, 2)), **GREEDY, **inputs)
        assert not steps
        assert tokens.shape == (2, 82)

    def test_a_hook_sees_everything(self, model: Any, steps: Calls) -> None:
        seen = []
        layer = model.model.layers[1]
        hooks = (layer.mlp.register_forward_hook, layer.self_attn.q_proj.register_forward_pre_hook)
        for register in hooks:
            handle = register(lambda *args: seen.append(args[0]))
            run(model, long_batch((0,)))
            assert len(seen) == 12
            assert len(steps) == 11  # of the other layer
            handle.remove()
            seen.clear(), steps.clear()
        run(model, long_batch((0,)))
        assert len(steps) == 22

    def test_a_hook_on_every_module_sees_everything(self, model: Any, steps: Calls) -> None:
        handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
        try:
            self.check(model, steps)
        finally:
            handle.remove()

    def test_a_replaced_forward(self, model: Any, steps: Calls) -> None:
        for layer in model.model.layers:
            layer.mlp.forward = layer.mlp.forward
        self.check(model, steps)

    def test_a_wrapped_layer(self, model: Any, steps: Calls) -> None:
        class Adapter(nn.Module):
            def __init__(self, base: nn.Module) -> None:
                super().__init__()
                self.base = base

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.base(x) + x[..., :1]

        for layer in model.model.layers:
            layer.self_attn.v_proj = Adapter(layer.self_attn.v_proj)
        self.check(model, steps)

    def test_another_cache(self, model: Any, steps: Calls) -> None:
        self.check(model, steps, past_key_values=DynamicCache(config=model.config))

    def test_another_attention(self, model: Any, steps: Calls) -> None:
        model.set_attn_implementation("eager")
        self.check(model, steps)

    def test_gradients_and_training(self, model: Any, steps: Calls) -> None:
        cache = Int8KVCache(model.config)
        ids = long_batch((0,))["input_ids"]
        with torch.no_grad():
            model(ids, past_key_values=cache)
        out = model(ids[:, :1], past_key_values=cache).logits
        assert out.requires_grad
        model.train()
        with torch.no_grad():
            model(ids[:, :1], past_key_values=cache)
        assert not steps

    def test_a_mask_of_each_head(self, model: Any, steps: Calls) -> None:
        cache = Int8KVCache(model.config)
        with torch.no_grad():
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
            model(torch.tensor([[5]]), past_key_values=cache, attention_mask=mask)
            assert len(steps) == 2
            model(torch.tensor([[5]]), past_key_values=cache, attention_mask=torch.zeros(1, 1, 1, 2))
            assert len(steps) == 2


def test_hidden_states_are_recorded(steps: Calls) -> None:
    model, inputs = patched(), long_batch((0,))
    flags = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    got = model.generate(**inputs, **GREEDY, **flags)
    assert len(steps) == 22
    want = without_steps(copy.deepcopy(model)).generate(**inputs, **GREEDY, **flags)
    assert len(steps) == 22
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        assert len(a) == len(b) == 3
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-4 * float(y.abs().max()))


def storages(model: nn.Module) -> int:
    """Bytes in memory, shared ones once."""
    tensors = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in model.state_dict().values()}
    return sum(tensors.values())


def test_merging_takes_no_memory(steps: Calls) -> None:
    model = patched("qwen2")
    before, state = storages(model), {name: x.clone() for name, x in model.state_dict().items()}
    run(model, long_batch((0,)))
    assert storages(model) == before
    for name, x in model.state_dict().items():
        assert torch.equal(x, state[name]), name
    attention = model.model.layers[0].self_attn
    starts = [getattr(attention, name).qweight.data_ptr() for name in ("q_proj", "k_proj", "v_proj")]
    assert starts[1] - starts[0] == attention.q_proj.qweight.nbytes
    assert starts[2] - starts[1] == attention.k_proj.qweight.nbytes


def test_copies_files_and_new_weights(steps: Calls, tmp_path: Path) -> None:
    model, inputs = patched("qwen2"), long_batch((0, 4))
    want = run(model, inputs)[0]
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model.save_pretrained(tmp_path)
    twins.append(AutoModelForCausalLM.from_pretrained(tmp_path))
    for twin in twins:
        steps.clear()
        assert torch.equal(run(twin, inputs)[0], want)
        assert len(steps) == 22
    other = patch_model(FAMILIES["qwen2"](seed=4), kv_cache="int8", **QUICK)
    model.load_state_dict(other.state_dict())
    assert torch.equal(run(model, inputs)[0], run(other, inputs)[0])
    twins[0].load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(run(twins[0], inputs)[0], run(other, inputs)[0])
    assert torch.equal(run(twins[1], inputs)[0], want)


def test_another_dtype(steps: Calls) -> None:
    model, inputs = patched(), long_batch((0,))
    run(model, inputs)
    model.to(torch.bfloat16)
    steps.clear()
    run(model, inputs)
    assert len(steps) == 22


def test_unpatching_leaves_nothing(steps: Calls) -> None:
    model, inputs = make_llama(), long_batch((0,))
    before = model.generate(**inputs, **GREEDY)
    attributes = [sorted(vars(layer)) for layer in model.model.layers]
    kinds = [type(layer) for layer in model.model.layers]
    patch_model(model, keep_original=True, **QUICK)
    run(model, inputs)
    assert steps
    unpatch_model(model)
    assert [sorted(vars(layer)) for layer in model.model.layers] == attributes
    assert [type(layer) for layer in model.model.layers] == kinds
    assert torch.equal(model.generate(**inputs, **GREEDY), before)


def test_the_report_says_which_layers_and_why() -> None:
    assert "Forward passes of ours: 6 Embedding, Linear, LlamaDecoderLayer, LlamaRMSNorm" in str(
        fastpath_report(patched())
    )
    skipped = patch_model(make_llama(), skip_modules=("model.layers.1.mlp.up_proj",), **QUICK)
    text = str(fastpath_report(skipped))
    assert "Forward passes of ours: 5 Embedding, Linear, LlamaDecoderLayer, LlamaRMSNorm" in text
    assert "Forward passes of transformers' own: 1 LlamaDecoderLayer, linear layers of one input are" in text
    odd = make_llama()
    odd.model.layers[0].mlp.act_fn = nn.GELU()
    odd.model.layers[1].self_attn.head_dim = 16
    text = str(fastpath_report(patch_model(odd, **QUICK)))
    assert "1 LlamaDecoderLayer, its mlp.act_fn is a GELU, no SiLUActivation" in text


def make_layer(out_features: int, in_features: int = 64, group_size: int = 32, **options: Any) -> W4A16Linear:
    layer = W4A16Linear.empty(
        in_features, out_features, group_size, **({"zeros": True, "bias": True, "dtype": torch.float32} | options)
    ).to_empty(device="cpu")
    for tensor in layer.buffers():
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) % 13)
    return layer


def test_what_cannot_be_merged() -> None:
    layer = make_layer(32)
    assert why_not_merged([layer, make_layer(16)]) == ""
    assert "neither all int4 nor all plain" in why_not_merged([layer, nn.Linear(64, 32)])
    differing = "differ in group size, zero points, bias or dtype"
    for options in ({"zeros": False}, {"bias": False}, {"dtype": torch.bfloat16}, {"group_size": 64}):
        assert differing in why_not_merged([layer, make_layer(32, **options)])
    assert "order of their own" in why_not_merged([make_layer(32, input_order=True)])
    assert "multiple of 16" in why_not_merged([make_layer(24)])


def test_merged_rows_are_the_layers_rows() -> None:
    layers = [make_layer(32), make_layer(16), make_layer(48)]
    parts = {name: [getattr(layer, name).clone() for layer in layers] for name in PER_ROW}
    whole = merge(layers)
    assert whole.out_features == 96
    for name in PER_ROW:
        assert torch.equal(getattr(whole, name), torch.cat(parts[name]))
        for layer, part in zip(layers, parts[name], strict=True):
            assert torch.equal(getattr(layer, name), part)
    layers[1].bias.fill_(7.0)
    assert torch.equal(whole.bias[32:48], torch.full((16,), 7.0))
