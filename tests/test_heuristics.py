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
    w4a16_gemm_swiglu_has,
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
    """In C++ a token tile is 8 tokens."""
    text = (source_dir() / "w4a16" / "gemm.cuh").read_text()
    table = text[text.index("kGemmVariants[] = {") :].split("};")[0]
    rows = re.findall(r"\{(\d+), \d+, \d+, (\d+)\}", table)
    kernels = [(8 * int(tiles), int(splits)) for tiles, splits in rows]
    assert kernels == [(v.tokens, v.splits) for v in VARIANTS]
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
        (32, 2048, 2048, "wgmma_128x32_splits6"),  # 16 tiles
        (32, 28672, 4096, "wgmma_128x32_splits1"),
        (64, 3072, 4096, "wgmma_128x64_splits4"),  # 24 tiles: all CTAs have a multiprocessor
        (64, 4096, 4096, "wgmma_128x64_splits7"),
        (64, 4096, 14336, "wgmma_128x64_splits7"),
        (64, 6144, 4096, "wgmma_128x64_splits2"),
        (64, 6144, 2048, "wgmma_128x64_splits2"),
        (64, 14336, 4096, "wgmma_128x64_splits1"),
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


# (rows, out features, in features): microseconds of the wgmma tiles with K divided by 1, 2, 4, 6 and 7, on an H200.
# Nothing else was faster by 1% (mma.sync, other divisions), but for 64 x 4096 x 4096: 11.17 with two tiles of 32 rows.
MEASURED = {
    (24, 2048, 2048): (9.97, 6.66, 5.23, 4.95, 5.67),
    (24, 4096, 4096): (18.32, 10.99, 10.53, 9.24, 9.04),
    (24, 4096, 14336): (59.62, 32.09, 28.99, 22.15, 20.27),
    (24, 6144, 2048): (10.14, 7.13, 7.38, 10.93, 11.86),
    (24, 6144, 4096): (18.45, 11.16, 11.52, 15.50, 16.49),
    (24, 14336, 2048): (10.52, 11.76, 15.26, 19.68, 24.17),
    (24, 14336, 4096): (19.20, 19.73, 23.72, 29.38, 33.86),
    (24, 28672, 4096): (32.71, 38.00, 46.65, 57.37, 62.98),
    (32, 2048, 2048): (9.99, 6.66, 5.25, 5.02, 5.96),
    (32, 4096, 4096): (18.46, 11.04, 10.62, 9.30, 9.39),
    (32, 4096, 14336): (59.66, 32.07, 29.15, 22.41, 20.63),
    (32, 6144, 2048): (10.22, 7.14, 7.53, 11.06, 12.34),
    (32, 6144, 4096): (18.57, 11.19, 11.53, 15.63, 16.90),
    (32, 14336, 2048): (10.64, 11.83, 15.53, 19.95, 24.93),
    (32, 14336, 4096): (19.31, 19.76, 23.96, 29.70, 34.52),
    (32, 28672, 4096): (32.78, 38.27, 47.20, 58.24, 64.68),
    (48, 2048, 2048): (11.97, 7.80, 5.94, 5.50, 6.97),
    (48, 4096, 4096): (22.13, 13.02, 12.81, 11.03, 11.01),
    (48, 4096, 14336): (72.33, 38.51, 34.17, 25.91, 23.36),
    (48, 6144, 2048): (12.18, 8.06, 8.94, 12.54, 14.61),
    (48, 6144, 4096): (22.11, 13.11, 13.12, 17.76, 19.98),
    (48, 14336, 2048): (12.59, 13.17, 18.51, 23.81, 29.18),
    (48, 14336, 4096): (23.05, 22.59, 27.26, 33.72, 39.48),
    (48, 28672, 4096): (38.42, 44.05, 53.05, 64.35, 72.66),
    (64, 2048, 2048): (12.23, 8.02, 6.08, 5.99, 8.05),
    (64, 4096, 4096): (22.43, 13.26, 13.13, 11.62, 11.83),
    (64, 4096, 14336): (72.57, 38.85, 34.61, 26.29, 23.76),
    (64, 6144, 2048): (12.44, 8.27, 9.52, 13.50, 16.31),
    (64, 6144, 4096): (22.52, 13.43, 13.50, 18.48, 21.35),
    (64, 14336, 2048): (12.80, 13.43, 18.80, 25.45, 32.19),
    (64, 14336, 4096): (23.26, 22.91, 27.71, 35.28, 41.73),
    (64, 28672, 4096): (38.75, 44.45, 53.06, 67.06, 76.28),
}


@pytest.mark.parametrize("size", MEASURED, ids=str)
def test_the_choice_is_near_the_fastest_on_an_h200(size: tuple[int, int, int]) -> None:
    form = VARIANTS[w4a16_gemm_variant(*size, *H200)]
    assert (form.instruction, form.tokens) == ("wgmma", 32 if size[0] <= 32 else 64)
    times = dict(zip((1, 2, 4, 6, 7), MEASURED[size], strict=True))
    assert times[form.splits] <= 1.03 * min(times.values())


def test_swiglu_is_part_of_the_products_of_decoding_on_wgmma() -> None:
    for rows in (17, 33, 64):
        assert w4a16_gemm_swiglu_has(w4a16_gemm_variant(rows, 28672, 4096, *H200))
        assert w4a16_gemm_swiglu_has(w4a16_gemm_variant(rows, 1024, 512, *H200))
        assert not w4a16_gemm_swiglu_has(w4a16_gemm_variant(rows, 28672, 4096, *A100))
    assert not w4a16_gemm_swiglu_has(w4a16_gemm_variant(65, 28672, 4096, *H200))


def test_wgmma_is_only_for_its_architecture() -> None:
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        fitting = [form.instruction for i, form in enumerate(VARIANTS) if w4a16_gemm_runs_on(i, capability)]
        assert fitting == ["mma", "mma"]


def test_head_sizes_of_decode_attention() -> None:
    sizes = range(1, 300)
    assert [size for size in sizes if attn_decode_supports(size)] == list(range(16, 257, 16))
    # 176, 208 and 240 channels are four parts of 44, 52 and 60.
    assert {size for size in sizes if attn_decode_int4_supports(size)} == set(range(16, 257, 16)) - {176, 208, 240}
