"""Which implementation is chosen: pure functions, checked without a GPU."""

from __future__ import annotations

import re

import pytest

from hf_fastpath.build import source_dir
from hf_fastpath.heuristics import W4A16Variant, w4a16_gemm_runs_on, w4a16_gemm_variant, w4a16_variant
from hf_fastpath.ops.w4a16_gemm import VARIANTS

H200, A100, RTX4090 = ((9, 0), 132), ((8, 0), 108), ((8, 9), 128)


def test_only_what_hardware_has_verified_is_the_default() -> None:
    for rows in (17, 64, 512, 8192):
        assert w4a16_variant("cuda", rows) is W4A16Variant.CUDA_DEQUANTIZE


def test_the_table_is_that_of_the_kernels() -> None:
    """Row tiles and token tiles in C++ are 128 outputs and 8 tokens."""
    text = (source_dir() / "w4a16" / "gemm.cuh").read_text()
    table = text[text.index("kGemmVariants[] = {") :].split("};")[0]
    rows = re.findall(r"\{(\d+), (\d+), \d+, \d+, (true|false), (true|false), (true|false), (\d)\}", table)
    found = [(128 * int(r), 8 * int(c), *(flag == "true" for flag in flags), int(s)) for r, c, *flags, s in rows]
    assert found == [(v.outputs, v.tokens, v.split, v.exact_weights, v.early_sum, v.steps) for v in VARIANTS]
    first = re.search(r"kFirstSm90Variant = (\d+), kFirstPrefillVariant = (\d+)", text)
    assert first
    wgmma, prefill = int(first[1]), int(first[2])
    names = ["mma"] * wgmma + ["wgmma"] * (prefill - wgmma) + ["prefill"] * (len(VARIANTS) - prefill)
    assert [v.instruction for v in VARIANTS] == names


@pytest.mark.parametrize("gpu", [H200, A100, RTX4090])
@pytest.mark.parametrize("rows", [17, 32, 33, 64, 65, 128, 512, 8192])
@pytest.mark.parametrize("out_features", [1, 2048, 28672])
def test_every_shape_has_a_variant_that_runs(rows: int, out_features: int, gpu: tuple[tuple[int, int], int]) -> None:
    capability, sm_count = gpu
    variant = w4a16_gemm_variant(rows, out_features, capability, sm_count)
    assert w4a16_gemm_runs_on(variant, capability)
    assert VARIANTS[variant].tokens <= max(32, 2 * rows)


def test_choices_on_an_h200() -> None:
    names = {
        (rows, n): VARIANTS[w4a16_gemm_variant(rows, n, *H200)].name
        for rows, n in [(32, 2048), (64, 28672), (128, 4096), (512, 4096), (8192, 28672)]
    }
    assert names == {
        (32, 2048): "wgmma_256x32_split",
        (64, 28672): "wgmma_256x64_split",
        (128, 4096): "prefill_128x128_split_steps2_early",
        (512, 4096): "prefill_128x256_split_steps2_early",
        (8192, 28672): "prefill_128x256_whole_steps2",
    }


def test_small_shared_memory_gets_small_tiles() -> None:
    assert not w4a16_gemm_runs_on(3, (8, 9))
    assert w4a16_gemm_runs_on(3, (8, 0))
    assert not any(w4a16_gemm_runs_on(i, (10, 0)) for i, form in enumerate(VARIANTS) if form.instruction != "mma")
