"""The innermost loop of coordinate descent: neighbouring columns, one after the other, in as few launches as can be."""

from __future__ import annotations

import torch

# Columns that take their steps one by one; what comes after them hears of it by one matrix product.
BAND = 32


class ColumnSteps:
    """Moves the codes of ``BAND`` columns of a weight, each to its minimum given those before it.

    Three small operations a column: on a GPU launching them takes far longer than running them, so they are recorded as
    a CUDA graph, on buffers that stay, and replayed from the second band on. It is freed with this object.

    ``wanted``, float32 ``(BAND, rows)``, is for the caller to fill: the step, in codes and not rounded, that each
    column would take if the others of the band stayed where they are.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        buffers = torch.empty((3, BAND, rows), dtype=torch.float32, device=device)
        self.wanted, self._low, self._high = buffers.unbind()
        self._weights = torch.empty((BAND, BAND), dtype=torch.float32, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def take(self, codes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The steps that the columns take, whole numbers that leave codes within 0..15, ``(BAND, rows)``.

        They are in ``wanted``, and valid until that is filled again.

        Args:
            codes: float32 ``(BAND, rows)``.
            weights: ``(BAND, BAND)``: a step of column i takes ``weights[i, k]`` off what column k wants.
        """
        self._weights.copy_(weights)
        torch.neg(codes, out=self._low)
        torch.add(self._low, 15, out=self._high)
        if self._graph is not None:
            self._graph.replay()
            return self.wanted
        self._loop()
        if self.wanted.is_cuda:
            self._graph = self._record()  # after it ran once, because loading a kernel cannot be recorded
        return self.wanted

    def _loop(self) -> None:
        rows = zip(self.wanted.unbind(), self._low.unbind(), self._high.unbind(), self._weights.unbind(), strict=True)
        for i, (step, low, high, weight) in enumerate(rows, start=1):
            step.round_().clamp_(low, high)
            self.wanted[i:].addr_(weight[i:], step, alpha=-1)

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Recording allocates nothing, so it needs neither the waiting for the device nor the emptying of the
        # allocator's cache that torch.cuda.graph() begins with. Other threads may go on using the device.
        with torch.cuda.stream(torch.cuda.Stream(self.wanted.device)):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._loop()
            finally:
                graph.capture_end()
        return graph
