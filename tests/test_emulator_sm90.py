"""The emulator's barriers in shared memory and warpgroup products: what the PTX ISA says, and its faults noticed."""

from __future__ import annotations

import pytest
import torch
from emulator import KernelFault, needs_emulator
from test_emulator import run

pytestmark = needs_emulator


def test_a_ring_of_stages_keeps_its_order() -> None:
    source = torch.arange(1, 1025, dtype=torch.int32)
    assert torch.equal(run("run_pipeline", source, 0, out=torch.empty_like(source)), source)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, r"reads byte \d+ of dynamic shared memory.*, (which nobody wrote|without a barrier after thread \d+)"),
        (2, r"race: (reads|writes) byte \d+ of dynamic shared memory.*, without a barrier after"),
        (3, "uses an mbarrier at faults_sm90.cu:.* without a barrier after its initialization"),
        (4, "stuck: .* threads wait in mbarrier_wait at faults_sm90.cu"),
        (5, r"reads byte \d+ of dynamic shared memory.*, which nobody wrote"),
        (6, r"race: writes byte \d+ of dynamic shared memory.*, without a barrier after .* read it"),
    ],
)
def test_a_broken_ring_is_noticed(fault: int, message: str) -> None:
    source = torch.arange(1, 1025, dtype=torch.int32)
    with pytest.raises(KernelFault, match=message):
        run("run_pipeline", source, fault, out=torch.empty_like(source))


def product(fault: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(5)
    a, b = torch.randn(64, 64, generator=rng).to(dtype), torch.randn(32, 64, generator=rng).to(dtype)
    out = run("run_wgmma", a, b, fault, dtype is torch.bfloat16, out=torch.empty(64, 32))
    return out, 2 * (a.double() @ b.double().T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wgmma(dtype: torch.dtype) -> None:
    out, exact = product(0, dtype)
    # Four roundings to float32 of sums of at most 64 products of about 1.
    assert float((out - exact).abs().max()) < 4 * 2**-24 * 200


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, r"wgmma reads byte \d+ of dynamic shared memory.*, without a proxy fence after thread \d+"),
        (2, "wgmma without a wgmma_fence"),
        (4, "a fragment changed while wgmma was reading it"),
        (5, r"race: .* dynamic shared memory"),
        (6, "ended with wgmma under way"),
    ],
)
def test_a_broken_product_is_noticed(fault: int, message: str) -> None:
    with pytest.raises(KernelFault, match=message):
        product(fault, torch.float16)


def test_accumulators_hold_nothing_until_they_are_waited_for() -> None:
    out, _ = product(3, torch.float16)
    assert out.isnan().all()


def box(fault: int, rows: int = 56, cols: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.arange(rows * cols, dtype=torch.int16).view(rows, cols)
    return source, run("run_box", source, rows, cols, fault, out=torch.full((cols, rows), -1, dtype=torch.int16))


@pytest.mark.parametrize(("rows", "cols"), [(64, 64), (56, 40), (8, 64)])
def test_boxes_of_matrices_are_copied_and_transposed(rows: int, cols: int) -> None:
    source, out = box(0, rows, cols)
    assert torch.equal(out, source.T)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, r"stuck: .* threads wait in mbarrier_wait|reads byte \d+ of dynamic shared memory.*, which nobody wrote"),
        (2, r"tensor_store reads byte \d+ of dynamic shared memory.*, without a proxy fence after thread \d+"),
        (3, "ended before its tensor_store"),
        (5, "a tensor copy that is not aligned to 1,024 bytes"),
        (6, "uses barrier number 1 at faults_sm90.cu:.*, which is another warpgroup's"),
    ],
)
def test_a_broken_copy_of_a_box_is_noticed(fault: int, message: str) -> None:
    with pytest.raises(KernelFault, match=message):
        box(fault)


def test_stores_of_boxes_read_as_late_as_they_may() -> None:
    source, out = box(4)
    assert not torch.equal(out, source.T)


def cluster(fault: int, ctas: int = 6, size: int = 3, way: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.arange(ctas * 256, dtype=torch.float32)
    return source, run(f"run_cluster{way}", source, ctas, size, fault, out=torch.empty_like(source))


@pytest.mark.parametrize("way", ["", "_store"])
@pytest.mark.parametrize(("ctas", "size"), [(6, 3), (8, 8), (2, 1)])
def test_a_cluster_reads_its_neighbours(ctas: int, size: int, way: str) -> None:
    """Or they write to it."""
    source, out = cluster(0, ctas, size, way)
    assert torch.equal(out, source)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, "race: .* dynamic shared memory|which nobody wrote"),
        (3, "of CTA 2: names rank 3 of a cluster of 3 at faults_sm90.cu"),
    ],
)
def test_a_broken_store_in_a_cluster_is_noticed(fault: int, message: str) -> None:
    with pytest.raises(KernelFault, match=message):
        cluster(fault, way="_store")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, r"thread 0 of CTA 0: reads byte 0 of dynamic shared memory.*, which nobody wrote"),
        (2, "of CTA 2: reads the shared memory of a CTA that has ended at faults_sm90.cu"),
        (3, "of CTA 2: names rank 3 of a cluster of 3 at faults_sm90.cu"),
        (4, "thread 0 of CTA 1: ended while other threads of its cluster wait at a barrier"),
        (5, "race: .* dynamic shared memory.*, without a barrier after thread .* of CTA . (read|wrote) it"),
    ],
)
def test_a_broken_cluster_is_noticed(fault: int, message: str) -> None:
    with pytest.raises(KernelFault, match=message):
        cluster(fault)


@pytest.mark.parametrize(("ctas", "size"), [(6, 4), (16, 16)])
def test_a_grid_that_clusters_do_not_divide_is_refused(ctas: int, size: int) -> None:
    with pytest.raises(KernelFault, match="the launch of run_cluster was refused: CUDA error 9"):
        cluster(0, ctas, size)
