"""Every model family on a GPU: generate() against stock, packed experts and convolutions, the story models."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import FAMILIES, logits, make_lfm2, make_lfm2_moe

from hf_fastpath import FastpathConfig, patch_model, unpatch_model
from hf_fastpath.eval import bench_stories, story_models
from hf_fastpath.modules import PackedExperts
from hf_fastpath.quantize import quantize_int4

pytestmark = pytest.mark.gpu

LOSSLESS = {"weights": None, "kv_cache": "static"}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 4},
}
everywhere = pytest.mark.parametrize("family", FAMILIES)


def generate(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(**{k: v.cuda() for k, v in inputs.items()}, max_new_tokens=12, **kwargs)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_lossless_mode_is_identical_to_stock(family: str, dtype: torch.dtype, mode: str, padded: Any) -> None:
    expected = generate(FAMILIES[family](dtype).cuda(), padded, **MODES[mode])
    got = generate(patch_model(FAMILIES[family](dtype).cuda(), **LOSSLESS), padded, **MODES[mode])
    assert torch.equal(got, expected)


@everywhere
@pytest.mark.parametrize("mode", MODES)
def test_the_default_runs_every_mode_and_is_repeatable(family: str, mode: str, padded: Any) -> None:
    model = patch_model(FAMILIES[family](torch.bfloat16).cuda(), progress=False)
    first, second = (generate(model, padded, **MODES[mode]) for _ in range(2))
    assert torch.equal(first, second)


@everywhere
def test_packed_weights_compute_what_they_hold(family: str, prompt: torch.Tensor) -> None:
    model = FAMILIES[family](torch.float16, initializer_range=0.05).cuda()
    patch_model(model, kv_cache=None, progress=False)
    packed = logits(model, prompt.cuda()).double()
    unpatch_model(model, dequantize=True)
    plain = logits(model, prompt.cuda()).double()
    # Some 20 roundings to fp16 a layer on either side; one of a router can make an expert's share change with it.
    assert float((packed - plain).norm() / plain.norm()) < 20 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("make", [make_lfm2, make_lfm2_moe])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_padding_never_gets_into_the_state(make: Any, chunk: int | None, padded: Any) -> None:
    model = patch_model(make(conv_bias=True).cuda(), **LOSSLESS)
    extra = {"do_sample": False} | ({} if chunk is None else {"prefill_chunk_size": chunk})
    together = generate(model, padded, **extra)
    for row, padding in enumerate((0, 3, 5)):
        alone = generate(model, {"input_ids": padded["input_ids"][row : row + 1, padding:]}, do_sample=False)
        assert torch.equal(together[row, padding:], alone[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_packed_experts_on_a_gpu(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    stacks = [[quantize_int4(torch.randn(n, k).to(dtype), 128) for _ in range(6)] for n, k in ((512, 384), (384, 256))]
    packed = PackedExperts.from_quantized(*stacks)
    x, shares = torch.randn(rows, 384).to(dtype), torch.rand(rows, 2).to(dtype)
    chosen = torch.stack([torch.randperm(6)[:2] for _ in range(rows)])
    with torch.no_grad():
        expected = packed(x.float(), chosen, shares.float())
        got = packed.cuda()(x.cuda(), chosen.cuda(), shares.cuda())
        again = packed(x.cuda(), chosen.cuda(), shares.cuda())
        packed.reference = True
        reference = packed(x.cuda(), chosen.cuda(), shares.cuda())
    assert torch.equal(got, again)
    # gate, up, silu(gate), their product, the second product and the sum are rounded to 16 bit, each half a step.
    for result in (got, reference):
        assert float((result.float().cpu() - expected).abs().max()) <= 4 * torch.finfo(dtype).eps * float(
            expected.abs().max()
        )


@pytest.mark.parametrize("family", story_models.FAMILIES)
def test_the_story_models_cost_what_they_cost_on_the_cpu(family: str) -> None:
    options = {"progress": False, "scale_search": "output"}
    todo = [FastpathConfig(kv_cache=cache, **options) for cache in (None, "int8")]  # type: ignore[arg-type]
    stock, *rows = bench_stories.rows(family, todo, Console(file=io.StringIO()), 20, "cuda")
    assert stock["ppl"] < 5
    for row in rows:
        assert 0 < row["ppl_change"] < 0.06  # 0.017 and 0.031 on the CPU, in float32 and on all of the text
        assert row["top1"] > 0.88
