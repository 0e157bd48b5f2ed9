"""fallback="reference": what runs, and what is said, on a GPU where the kernels cannot run."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import logits, make_llama

from hf_fastpath import FastpathConfig, Unsupported, checks, fastpath_report, patch_model, patching, runtime
from hf_fastpath.config import KVFormat
from hf_fastpath.generation import CACHES
from hf_fastpath.heuristics import W4A16Variant, w4a16_variant

GPU = torch.device("cuda", 0)
REASON = "no nvcc here"
IDS = torch.randint(0, 199, (2, 9), generator=torch.Generator().manual_seed(1))


def config(**options: Any) -> FastpathConfig:
    return FastpathConfig(progress=False, **options)


def choose(model: Any, monkeypatch: pytest.MonkeyPatch, reason: str = "", **options: Any) -> str:
    monkeypatch.setattr(checks, "why_no_kernels", lambda device, dtype: reason)
    return checks.choose_reference(model, config(**options), GPU)


def test_kernels_are_used_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(make_llama(), monkeypatch) == ""
    assert choose(make_llama(), monkeypatch, fallback="reference") == ""


def test_refused_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unsupported, match=rf"{REASON}; fallback='reference' runs the slow"):
        choose(make_llama(), monkeypatch, REASON)
    assert choose(make_llama(), monkeypatch, REASON, fallback="reference") == REASON


def test_lossless_modes_need_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(make_llama(), monkeypatch, REASON, weights=None, kv_cache="static") == ""


def test_a_head_size_that_the_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = make_llama(head_dim=24)
    with pytest.raises(Unsupported, match="multiple of 16 up to 256, not 24"):
        choose(odd, monkeypatch)
    assert "not 24" in choose(odd, monkeypatch, fallback="reference")
    assert choose(odd, monkeypatch, kv_cache="static") == ""


@pytest.mark.parametrize(
    ("head_dim", "options", "message"),
    [
        (
            24,
            {"kv_cache": "fp8"},
            "the fp8 KV cache on CUDA needs a head size that is a multiple of 16 up to 256, not 24",
        ),
        (176, {"kv_cache": "int4"}, "not 44 as of 176"),
        (16, {"kv_cache": "h2o", "kv_budget": 100}, "needs a kv_budget that is a multiple of 16, not 100"),
    ],
)
def test_shapes_that_the_kernels_do_not_take(
    head_dim: int, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unsupported, match=f"{message}.*fallback='reference'"):
        choose(make_llama(head_dim=head_dim), monkeypatch, **options)
    assert message in choose(make_llama(head_dim=head_dim), monkeypatch, **options, fallback="reference")
    kind = CACHES[KVFormat(options["kv_cache"])]
    cache = kind(make_llama(head_dim=head_dim).config, **{k: v for k, v in options.items() if k != "kv_cache"})
    with pytest.raises(Unsupported, match=rf"{message}.*reference=True"):
        cache.layers[0]._check_kernels(SimpleNamespace(is_cuda=True, shape=(1, 2, 3, head_dim)))


def test_every_format_has_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for kv_cache in ("int8", "fp8", "int4", "h2o"):
        assert choose(make_llama(head_dim=80), monkeypatch, kv_cache=kv_cache) == ""


def test_float32_and_old_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not torch.float32" in runtime.why_no_kernels(GPU, torch.float32)
    assert runtime.why_no_kernels(torch.device("cpu"), torch.float32) == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    runtime._gpu_reason.cache_clear()
    try:
        reason = runtime.why_no_kernels(GPU, torch.float16)
    finally:
        runtime._gpu_reason.cache_clear()
    assert reason == "Tesla T4 has compute capability 7.5; the kernels need 8.0 or newer"


def test_heuristics() -> None:
    assert w4a16_variant("cuda", 1, reference=True) is W4A16Variant.REFERENCE
    assert w4a16_variant("cuda", 1) is W4A16Variant.CUDA_KERNEL
    assert w4a16_variant("cpu", 1, reference=True) is W4A16Variant.CPU_INT4PACK


def test_no_op_is_called_in_a_model_that_runs_on_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is not needed to see who is called: the ops of the library are made to fail."""
    stock = patch_model(make_llama(), config(scale_search="absmax"))
    expected = stock.generate(IDS, max_new_tokens=4, do_sample=False)
    monkeypatch.setattr(patching, "choose_reference", lambda *args: REASON)
    model = patch_model(make_llama(), config(scale_search="absmax", fallback="reference"))
    monkeypatch.undo()

    def fail(*args: Any) -> None:
        raise AssertionError("an op was called")

    for name in ("kv_int8_append", "kv_int8_dequantize", "attn_decode_int8", "attn_step_int8"):
        monkeypatch.setattr(sys.modules[f"hf_fastpath.ops.{name}"], "_op", fail)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), expected)
    logits(model, IDS)
    assert all(m.reference for m in model.modules() if hasattr(m, "qweight"))
    assert fastpath_report(model)
