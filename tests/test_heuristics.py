"""Which implementation is chosen: pure functions, checked without a GPU."""

from __future__ import annotations

import re

import pytest

from hf_fastpath.build import source_dir
from hf_fastpath.heuristics import (
    W4A16Variant,
    attn_decode_int4_supports,
    attn_decode_supports,
    w4a16_gemm_runs_on,
    w4a16_gemm_variant,
    w4a16_variant,
)
from hf_fastpath.ops.w4a16_gemm import VARIANTS

H200, A100, RTX4090 = ((9, 0), 132), ((8, 0), 108), ((8, 9), 128)


def test_more_rows_than_the_decode_kernel_takes() -> None:
    for rows in (17, 64, 512, 8192):
        assert w4a16_variant("cuda", rows, capability=(9, 0)) is W4A16Variant.CUDA_GEMM
    for capability in ((8, 0), (8, 9), (10, 0)):
        assert w4a16_variant("cuda", 64, capability=capability) is W4A16Variant.CUDA_GEMM
        assert w4a16_variant("cuda", 65, capability=capability) is W4A16Variant.CUDA_DEQUANTIZE


def test_the_table_is_that_of_the_kernels() -> None:
    """In C++ a warp has 16 outputs and a token tile 8 tokens."""
    text = (source_dir() / "w4a16" / "gemm.cuh").read_text()
    table = text[text.index("kGemmVariants[] = {") :].split("};")[0]
    rows = re.findall(r"\{(\d+), (\d+), \d+, \d+, (\d+)\}", table)
    kernels = [(16 * int(warps), 8 * int(tiles), int(splits)) for warps, tiles, splits in rows]
    assert kernels == [(v.outputs, v.tokens, v.splits) for v in VARIANTS]
    first = re.search(r"kFirstSm90Variant = (\d+)", text)
    assert first
    mma = int(first[1])
    assert [v.instruction for v in VARIANTS] == ["mma"] * mma + ["wgmma"] * (len(VARIANTS) - mma)


@pytest.mark.parametrize("gpu", [H200, A100, RTX4090])
@pytest.mark.parametrize("rows", [17, 32, 33, 64, 65, 128, 512, 8192])
@pytest.mark.parametrize("out_features", [1, 2048, 28672])
@pytest.mark.parametrize("in_features", [32, 4096])
def test_every_shape_has_a_variant_that_runs(
    rows: int, out_features: int, in_features: int, gpu: tuple[tuple[int, int], int]
) -> None:
    capability, sm_count = gpu
    variant = w4a16_gemm_variant(rows, out_features, in_features, capability, sm_count)
    assert w4a16_gemm_runs_on(variant, capability)
    assert VARIANTS[variant].tokens <= max(32, 2 * rows)


@pytest.mark.parametrize(
    ("rows", "out_features", "in_features", "name"),
    [
        (32, 2048, 2048, "wgmma_128x32_splits4"),  # 16 tiles
        (32, 28672, 4096, "mma_128x32"),
        (64, 4096, 4096, "wgmma_128x64_splits4"),
        (64, 4096, 14336, "wgmma_128x64_splits8"),
        (64, 6144, 4096, "wgmma_128x64_splits4"),
        (64, 6144, 2048, "wgmma_128x64_splits2"),
        (64, 14336, 4096, "wgmma_128x64_splits2"),
        (64, 28672, 4096, "wgmma_128x64_splits1"),
        (64, 2048, 128, "wgmma_128x64_splits1"),  # nothing to divide
        (128, 2048, 2048, "wgmma_128x128_splits4"),
        (128, 4096, 4096, "wgmma_128x128_splits2"),
        (512, 2048, 2048, "wgmma_128x128_splits2"),
        (512, 4096, 14336, "wgmma_128x256_splits2"),
        (512, 6144, 4096, "wgmma_128x256_splits1"),
        (8192, 28672, 4096, "wgmma_128x256_splits1"),
    ],
)
def test_choices_on_an_h200(rows: int, out_features: int, in_features: int, name: str) -> None:
    assert VARIANTS[w4a16_gemm_variant(rows, out_features, in_features, *H200)].name == name


def test_wgmma_is_only_for_its_architecture() -> None:
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        fitting = [form.instruction for i, form in enumerate(VARIANTS) if w4a16_gemm_runs_on(i, capability)]
        assert fitting == ["mma", "mma"]


def test_head_sizes_of_decode_attention() -> None:
    sizes = range(1, 300)
    assert [size for size in sizes if attn_decode_supports(size)] == list(range(16, 257, 16))
    # 176, 208 and 240 channels are four parts of 44, 52 and 60.
    assert {size for size in sizes if attn_decode_int4_supports(size)} == set(range(16, 257, 16)) - {176, 208, 240}
