"""Coordinate descent on a GPU: the recorded loop does what the launched one does, and leaves nothing behind."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch

from hf_fastpath import error_feedback
from hf_fastpath.column_steps import ColumnSteps
from hf_fastpath.error_feedback import Hessian, quantize_with_feedback
from hf_fastpath.quantize import GroupQuantized

pytestmark = pytest.mark.gpu


def problem(rows: int, channels: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the moment of inputs whose channels are driven together."""
    torch.manual_seed(seed)
    x = torch.randn(4 * channels, channels // 4, device="cuda") @ torch.randn(channels // 4, channels, device="cuda")
    x += torch.randn_like(x)
    return torch.randn(rows, channels, device="cuda").bfloat16(), x.T @ x / len(x)


def same(a: GroupQuantized, b: GroupQuantized) -> bool:
    return torch.equal(a.q, b.q) and torch.equal(a.scale, b.scale)


def output_error(found: GroupQuantized, weight: torch.Tensor, moment: torch.Tensor) -> float:
    """In float64, summed over the rows."""
    zero = 8.0 if found.zero is None else found.zero.double().unsqueeze(-1)
    codes = found.q.double().view(len(found.q), -1, found.group_size)
    error = weight.double() - ((codes - zero) * found.scale.double().unsqueeze(-1)).view(weight.shape)
    return float(((error @ Hessian(moment).rows(slice(None)).double()) * error).sum())


@pytest.mark.parametrize(("rows", "channels", "group"), [(80, 256, 128), (1000, 512, 64), (33, 96, 32)])
def test_recorded_and_launched_steps_are_the_same_bits(
    rows: int, channels: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, moment = problem(rows, channels)
    recordings: list[Any] = []
    record = ColumnSteps._record

    def counted(self: ColumnSteps) -> Any:
        recordings.append(record(self))
        return recordings[-1]

    monkeypatch.setattr(ColumnSteps, "_record", counted)
    recorded = quantize_with_feedback(weight, moment, group)
    assert len(recordings) == 1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = quantize_with_feedback(weight, moment, group)
    torch.cuda.synchronize()
    monkeypatch.setattr(ColumnSteps, "_record", lambda self: None)
    launched = quantize_with_feedback(weight, moment, group)
    assert same(recorded, launched)
    assert same(elsewhere, launched)


def test_chunks_of_other_sizes_have_recordings_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = problem(100, 256)
    whole = quantize_with_feedback(weight, moment, 64)
    monkeypatch.setattr(error_feedback, "_CHUNK_ELEMENTS", {"cuda": 256 * 48})
    pieces = quantize_with_feedback(weight, moment, 64)
    # Matrix products of other shapes add in another order, which can move a tie, and all that follows in that row.
    assert float((whole.q != pieces.q).float().mean()) < 0.02
    assert output_error(pieces, weight, moment) == pytest.approx(output_error(whole, weight, moment), rel=0.02)


def test_other_threads_may_use_the_gpu_meanwhile() -> None:
    weight, moment = problem(512, 512)
    expected = quantize_with_feedback(weight, moment, 128)
    done = threading.Event()

    def allocate() -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            size = 1
            while not done.is_set():
                size = size % (1 << 26) + (1 << 20)  # sizes that the cache has not seen make it ask the driver
                torch.empty(size, device="cuda", dtype=torch.uint8).zero_()
                stream.synchronize()

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        results = [quantize_with_feedback(weight, moment, 128) for _ in range(5)]
    finally:
        done.set()
        thread.join()
    assert all(same(result, expected) for result in results)


def test_nothing_stays_allocated() -> None:
    weight, moment = problem(512, 512)
    quantize_with_feedback(weight, moment, 128)  # cuBLAS's workspace stays
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        quantize_with_feedback(weight, moment, 128)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("zero_points", [False, True])
def test_as_little_error_as_on_the_cpu(zero_points: bool) -> None:
    """TF32 moves a step by some parts in 10^4, which decides between codes that are as good as each other."""
    weight, moment = problem(256, 1024)
    on_gpu = quantize_with_feedback(weight, moment, 128, zero_points=zero_points)
    on_cpu = quantize_with_feedback(weight.cpu(), moment.cpu(), 128, zero_points=zero_points)
    expected = output_error(on_cpu, weight.cpu(), moment.cpu())
    # A code that fell otherwise changes all that follows in its row, for better or worse: 256 rows, each some percent.
    assert output_error(on_gpu, weight, moment) == pytest.approx(expected, rel=0.01)
