"""The emulator itself: it computes what the PTX ISA says, and notices what a GPU forbids or leaves undefined."""

from __future__ import annotations

import pytest
import torch
from emulator import IN_OUT, INPUT, OUTPUT, KernelFault, library, needs_emulator

pytestmark = needs_emulator

# What each planted fault is reported as; the numbers are those of faults.cu.
FAULTS = {
    "missing barrier": (1, "thread 0 of CTA 0: reads byte 252 of shared memory .values., .*, which nobody wrote"),
    "barrier in a branch": (
        2,
        "race: reads byte 104 of shared .*, without a barrier after thread 26 of CTA 0 wrote it",
    ),
    "end before a barrier": (3, "thread 37 of CTA 0: ended while other threads of its CTA wait at a barrier"),
    "two barriers": (4, r"waits at the barrier at faults.cu:\d+, others at the one at faults.cu:"),
    "read before": (5, "thread 37 of CTA 0: reads byte -4 of source, which has 512 .*faults.cu"),
    "read beyond": (6, "thread 37 of CTA 0: reads byte 512 of source, which has 512 .*faults.cu"),
    "write beyond": (7, "thread 37 of CTA 0: writes byte 512 of out"),
    "write to an input": (8, "writes the input byte 0 of source"),
    "misaligned": (9, "thread 37 of CTA 0: a misaligned access at .*ptx_emulated.cuh"),
    "read of undefined shared memory": (10, "reads byte 148 of shared memory .*, which nobody wrote"),
    "read of an undefined output": (11, "reads byte 0 of out, which has 512 .*, which nobody wrote"),
    "race of CTAs": (15, "race: writes byte 0 of out.*, without a barrier after thread .* of CTA 0 wrote it"),
    "index of an array": (16, "an array index out of bounds at .*faults.cu"),
    "overflow": (17, "an integer overflow at .*faults.cu"),
    "beyond shared memory": (18, "writes byte 256 of shared memory .*, which has 256"),
    "overwritten early": (19, "race: writes byte 252 of shared .*, without a barrier after thread 0 of CTA 0 read it"),
}


def run(entry: str, *args: torch.Tensor | int, out: torch.Tensor) -> torch.Tensor:
    sources = {f"source{i or ''}": (t, INPUT) for i, t in enumerate(args) if isinstance(t, torch.Tensor)}
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    library().call(
        entry, *tensors, out, *(a for a in args if not isinstance(a, torch.Tensor)), **sources, out=(out, OUTPUT)
    )
    return out


def reverse(fault: int) -> None:
    source = torch.arange(128, dtype=torch.int32)
    out = run("run_reverse", source, fault, out=torch.empty_like(source))
    assert torch.equal(out, source.view(2, 64).flip(1).flatten())


def test_a_correct_kernel_gives_its_result() -> None:
    for _ in range(3):  # and what one launch leaves behind does not disturb the next
        reverse(0)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name: str) -> None:
    fault, message = FAULTS[name]
    with pytest.raises(KernelFault, match=message):
        reverse(fault)
    reverse(0)


def test_warp_instructions_need_their_lanes() -> None:
    source = torch.arange(64, dtype=torch.int32)
    out = run("run_warp_sum", source, 0, out=torch.empty_like(source))
    assert torch.equal(out, source.view(2, 32).sum(1, dtype=torch.int32).repeat_interleave(32))
    messages = {
        12: "thread 5 of CTA 0: ended while a lane of its warp waits for it in __shfl_xor_sync at faults.cu",
        13: "lane 0 of a shuffle reads lane 16, which does not take part in it",
        14: "thread 0 of CTA 0: is not in the mask of its own __shfl_xor_sync at faults.cu",
    }
    for fault, message in messages.items():
        with pytest.raises(KernelFault, match=message):
            run("run_warp_sum", source, fault, out=torch.empty_like(source))


def test_shuffles_and_votes() -> None:
    source = torch.randint(0, 1000, (32,), dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    source[20] = 1000
    out = run("run_shuffles", source, out=torch.empty(6, 32, dtype=torch.int32))
    lane = torch.arange(32)
    part = lane // 8 * 8
    expected_lanes = [
        part + 3,  # __shfl_sync of lane 11, in parts of 8 lanes
        torch.where(lane ^ 12 >= part + 8, lane, lane ^ 12),  # xor: an earlier part can be read, a later one cannot
        torch.where(lane + 3 < part + 8, lane + 3, lane),  # down
        torch.where(lane - 3 >= part, lane - 3, lane),  # up
    ]
    for row, lanes in zip(out[:4], expected_lanes, strict=True):
        assert torch.equal(row, source[lanes])
    ballot = sum(1 << i for i in range(32) if source[i] % 2)
    assert out[4].tolist() == [ballot - (1 << 32) * (ballot >> 31)] * 32
    assert out[5].tolist() == [1] * 32
    source[20] = 1
    assert run("run_shuffles", source, out=out)[5].tolist() == [0] * 32


def test_a_warps_barrier_orders_its_lanes() -> None:
    source = torch.arange(64, dtype=torch.int32)
    out = run("run_neighbour", source, 0, out=torch.empty_like(source))
    assert torch.equal(out, source.view(32, 2).flip(1).flatten())
    with pytest.raises(KernelFault, match=r"byte 4 of shared memory \(values\), .*, which nobody wrote"):
        run("run_neighbour", source, 1, out=torch.empty_like(source))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mma_is_the_matrix_product(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(16, 16, generator=generator).to(dtype), torch.randn(16, 8, generator=generator).to(dtype)
    out = run("run_mma", a, b, int(dtype is torch.bfloat16), out=torch.empty(16, 8))
    assert torch.equal(out, (a.double() @ b.double()).float())  # one rounding


def test_asynchronous_copies_arrive_when_they_are_waited_for() -> None:
    source = torch.arange(1, 257, dtype=torch.int32)
    expected = source.view(-1, 2, 4).flip(1).flatten()
    expected[64:128] = 0
    assert torch.equal(run("run_async_copy", source, 0, out=torch.empty_like(source)), expected)
    messages = {
        1: "thread 0 of CTA 0: reads byte 16 of dynamic shared memory.*, which nobody wrote",  # its neighbour's copy
        20: "reads byte .* of dynamic shared memory.*, which nobody wrote",
        21: "ended with copies under way that it never waited for",
        22: r"reads byte \d+ of dynamic shared memory.*, which nobody wrote",
        23: "writes byte 0 of dynamic shared memory.*, under a copy",
        24: "reads 16 bytes, misaligned",
    }
    for fault, message in messages.items():
        with pytest.raises(KernelFault, match=message):
            run("run_async_copy", source, fault, out=torch.empty_like(source))


def test_the_last_cta_sees_what_the_others_did() -> None:
    source, counter = torch.arange(256, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    copy, out = torch.empty_like(source), torch.empty(64, dtype=torch.int32)
    buffers = {"source": (source, INPUT), "counter": (counter, IN_OUT), "copy": (copy, OUTPUT), "out": (out, OUTPUT)}
    messages = {
        25: "race: reads byte .* of copy, .*, without a barrier after thread .* wrote it",
        26: "race: reads byte .* of copy, .*, without a barrier after thread .* wrote it",
        27: "reads byte .* of copy, .*, which nobody wrote",
    }
    order = library().entry("emulator_set_cluster_order")
    try:
        for number in range(4):
            order(number)
            library().call("run_last_cta", source, counter, copy, out, 4, 0, **buffers)
            assert torch.equal(out, source.view(4, 64).sum(0, dtype=torch.int32))
            assert counter.item() == 0
    finally:
        order(0)
    for fault, message in messages.items():
        with pytest.raises(KernelFault, match=message):
            library().call("run_last_cta", source, counter, copy, out, 4, fault, **buffers)
        counter.zero_()


def test_movmatrix_transposes() -> None:
    matrix = torch.arange(64, dtype=torch.int16).view(8, 8)
    out = run("run_transpose", matrix.view(torch.int32), out=torch.empty(8, 4, dtype=torch.int32))
    assert torch.equal(out.view(torch.int16), matrix.T)


def test_impossible_launches_are_refused() -> None:
    source = torch.zeros(64, dtype=torch.int32)
    for threads in (0, 1025):
        with pytest.raises(KernelFault, match="CUDA error 9"):  # cudaErrorInvalidConfiguration
            run("run_threads", source, threads, out=torch.empty_like(source))
