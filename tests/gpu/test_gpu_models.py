"""patch_model and generate() on CUDA models, with the kernels in the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import make_llama

from hf_fastpath import Int8KVCache, StaticKVCache, Unsupported, fastpath_report, patch_model, unpatch_model
from hf_fastpath.caches import int8
from hf_fastpath.modules import W4A16Linear, w4a16_linear
from hf_fastpath.modules.decoder_step import DecoderStep

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_p": 0.9},
    "beams": {"num_beams": 3, "do_sample": False},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 4},
}


def cuda_llama(dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Any:
    return make_llama(dtype, **overrides).cuda()


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def generate(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(**{k: v.cuda() for k, v in inputs.items()}, max_new_tokens=12, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
def test_lossless_mode_is_identical_to_stock(dtype: Any, mode: str, padding: bool, prompt: Any, padded: Any) -> None:
    inputs = padded if padding else {"input_ids": prompt}
    expected = generate(cuda_llama(dtype), inputs, **MODES[mode])
    got = generate(patch_model(cuda_llama(dtype), weights=None, kv_cache="static"), inputs, **MODES[mode])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_default_config_runs_every_mode_and_is_repeatable(dtype: torch.dtype, mode: str, padded: Any) -> None:
    model = patch_model(cuda_llama(dtype), progress=False)
    first, second = (generate(model, padded, **MODES[mode]) for _ in range(2))
    assert torch.equal(first, second)
    assert 9 <= first.shape[1] <= 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [{}, {"hidden_size": 288, "num_attention_heads": 6, "head_dim": 48}], ids=["", "odd"])
@pytest.mark.parametrize("zero_points", [False, True])
def test_logits_on_cuda_agree_with_float32_on_the_same_weights(dtype: Any, shape: Any, zero_points: bool) -> None:
    """The patched CUDA model against a float32 CPU model that holds the dequantized weights, fed the same text."""
    model = patch_model(cuda_llama(dtype, initializer_range=0.05, **shape), progress=False, zero_points=zero_points)
    reference = make_llama(initializer_range=0.05, **shape)
    for name, module in model.named_modules():
        if isinstance(module, W4A16Linear):
            reference.get_submodule(name).weight.data = module.dequantized_weight().float().cpu()
    for name, parameter in model.named_parameters():
        reference.get_parameter(name).data = parameter.detach().float().cpu()
    ids = torch.randint(2, 199, (2, 24))
    with torch.no_grad():
        exact = reference(ids, past_key_values=Int8KVCache(reference.config, fresh_prefill=False)).logits
        whole = model(ids.cuda(), past_key_values=Int8KVCache(model.config, fresh_prefill=False)).logits.cpu()
        cache = Int8KVCache(model.config)
        steps = [model(ids[:, i : i + 1].cuda(), past_key_values=cache).logits.cpu() for i in range(24)]
    # About 20 roundings to 16 bit between input and logits, each relative eps / 2 at the most, adding at random.
    tolerance = 10 * torch.finfo(dtype).eps
    assert relative_error(whole, exact) < tolerance
    assert relative_error(torch.cat(steps, 1), exact) < tolerance


def test_decoding_runs_in_the_kernels(count_calls: Callable[..., Any], padded: Any) -> None:
    model = patch_model(cuda_llama(), progress=False)
    products, decodes = count_calls(w4a16_linear, "w4a16_linear"), count_calls(int8, "attn_step_int8")
    steps, expansions = count_calls(DecoderStep, "__call__"), count_calls(int8, "kv_int8_dequantize")
    generate(model, padded, do_sample=False, disable_compile=True)  # in a graph, a call is not seen
    assert len(decodes) == len(steps) == 2 * 11
    assert not products  # the prompt's 24 rows go through w4a16_gemm
    assert not expansions


def test_unpatching_restores_bits_and_frees_int4(prompt: torch.Tensor) -> None:
    model = cuda_llama()
    with torch.no_grad():
        before = model(prompt.cuda(), use_cache=False).logits
        patch_model(model, keep_original=True, progress=False)
        assert not torch.equal(model(prompt.cuda(), use_cache=False).logits, before)
        unpatch_model(model)
        assert torch.equal(model(prompt.cuda(), use_cache=False).logits, before)


def test_a_patched_model_moves_between_devices(prompt: torch.Tensor) -> None:
    model = patch_model(make_llama(torch.bfloat16), progress=False)
    with torch.no_grad():
        on_cpu = model(prompt, use_cache=False).logits
        on_cuda = model.cuda()(prompt.cuda(), use_cache=False).logits.cpu()
        back = model.cpu()(prompt, use_cache=False).logits
    assert torch.equal(back, on_cpu)
    # Different sums, and the CPU rounds zero points to bf16: a few steps of 2^-8 through two layers.
    assert relative_error(on_cuda, on_cpu) < 10 * 2**-7


@pytest.mark.parametrize("search", ["activation", "output"])
def test_peak_memory_while_patching(search: str) -> None:
    hidden, intermediate = 2048, 8192
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
    }
    one = make_llama(torch.bfloat16, num_hidden_layers=1, **sizes)
    layer = sum(p.nbytes for p in one.model.layers[0].parameters())
    model = cuda_llama(num_hidden_layers=8, **sizes)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    patch_model(model, progress=False, scale_search=search)
    peak, end = torch.cuda.max_memory_allocated() - start, torch.cuda.memory_allocated()
    # The search's float32 copies of one chunk, and activations of the pass that measures them.
    allowed = layer + 6 * 4 * (1 << 23) + 64e6
    if search == "output":  # as its docstring says: states, one block's second moments, and of a weight what follows
        states = 3 * 2 * 8192 * hidden
        moments = 4 * (3 * hidden**2 + intermediate**2)
        # The stacked weight, its codes, its float32 error; and some copies of a group's columns.
        allowed += states + moments + (2 + 1 + 4) * 2 * hidden * intermediate + 10 * 4 * 128 * 2 * intermediate
    assert peak < allowed
    report = fastpath_report(model)
    saved = report.bytes_before - report.bytes_after
    assert start - end >= 0.98 * saved


@pytest.mark.parametrize(
    ("build", "overrides", "message"),
    [
        (lambda: cuda_llama(torch.float32), {}, "model.to"),
        (lambda: cuda_llama(torch.float32), {"weights": None}, "model.to"),
        (lambda: cuda_llama(head_dim=40), {}, "multiple of 16"),
    ],
)
def test_what_cuda_cannot_do_is_said(build: Callable[[], Any], overrides: dict[str, Any], message: str) -> None:
    model = build()
    with pytest.raises(Unsupported, match=message):
        patch_model(model, progress=False, **overrides)
    assert not hasattr(model, "_fastpath")


def test_caches_alone_on_an_unpatched_cuda_model(padded: Any) -> None:
    model = cuda_llama()
    expected = generate(model, padded, do_sample=False)
    assert torch.equal(generate(model, padded, past_key_values=StaticKVCache(model.config), do_sample=False), expected)
    out = generate(model, padded, past_key_values=Int8KVCache(model.config), do_sample=False)
    assert out.shape == expected.shape
    with pytest.raises(Unsupported, match="float16 or bfloat16"):
        generate(cuda_llama(torch.float32), padded, past_key_values=Int8KVCache(model.config), do_sample=False)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    """Decode steps of rows 0..15 together and alone: the kernels split by shapes that do not depend on the batch."""
    model = patch_model(cuda_llama(), progress=False)
    attn, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    x = torch.randn(16, 1, 64, device="cuda", dtype=torch.bfloat16)
    for layer in (attn.q_proj, mlp.gate_proj):
        together = layer(x)
        for rows in (1, 3, 8, 9):
            assert torch.equal(layer(x[:rows]), together[:rows])
