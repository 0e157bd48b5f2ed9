"""CUDA graphs of calls: how they are recorded, and which of many calls are."""

from __future__ import annotations

import functools
import gc
import threading
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch

# Of :class:`CapturedCalls`. Capturing a model's step again takes a tenth of a second.
MAX_GRAPHS = 32


class Graph(Protocol):
    """Recorded kernels."""

    def replay(self) -> None:
        """Runs them again, on the current stream."""


# Records what a call puts on the GPU, without running it.
Capture = Callable[[Callable[[], None]], Graph]


_capturing = threading.Lock()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures of a GPU: libraries keep a workspace for each stream that they ever saw."""
    return torch.cuda.Stream(device)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of PyTorch, CUDA or cuBLAS says that there is too little GPU memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


class CudaCapture:
    """Captures into one memory pool for all its graphs: what a replay leaves there is read before the next."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool, self._holds_pool = device, torch.cuda.graph_pool_handle(), False

    def __call__(self, call: Callable[[], None]) -> Graph:
        """Calls ``call`` twice where memory was short the first time: what PyTorch keeps for later cannot be given to
        the pool of a graph while there is a capture."""
        with _capturing:
            try:
                return self._record(call)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    error.add_note(
                        "hf_fastpath was capturing a CUDA graph: patch_model(model, cuda_graphs=False) needs none"
                    )
                    raise
            torch.cuda.empty_cache()
            return self._record(call)

    def _record(self, call: Callable[[], None]) -> Graph:
        # Not torch.cuda.graph: it first gives all memory that PyTorch keeps back to the driver, which costs
        # milliseconds, and lets other processes take what the next call needs.
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        torch.cuda.synchronize(self.device)
        gc.disable()  # a finalizer may do what a capture forbids
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(_capture_stream(self.device)):
                # Another thread may allocate meanwhile, which the default mode takes for a mistake; but not capture.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    call()
                finally:
                    graph.capture_end()
            self._holds_pool = True
        except BaseException:
            if not self._holds_pool:  # nor does the graph that failed: PyTorch does not take such a pool again
                self.pool = torch.cuda.graph_pool_handle()
            raise
        finally:
            if collects:
                gc.enable()
            # All graphs read from one place where their random numbers start. PyTorch (2.11, not 2.13) puts 0 there on
            # the capture's stream as a capture begins, and on the replay's what is right as a replay does, and orders
            # neither behind the other. A capture that failed has done so, too.
            _capture_stream(self.device).synchronize()
        return graph


class CapturedCalls:
    """Calls by key: as they are the first time that a key comes, captured the second time, and replayed from then on:
    libraries set themselves up in their first call, which a capture forbids.

    Attributes:
        short_of_memory: whether there was no memory for a graph, which is not tried again until this is set to False.
    """

    def __init__(self, capture: Capture) -> None:
        self.short_of_memory = False
        self._capture = capture
        self._graphs: dict[Any, tuple[Graph | None, Any]] = {}

    @property
    def captured(self) -> list[tuple[Any, Graph]]:
        """Keys and graphs; the one that was used last is at the end."""
        return [(key, graph) for key, (graph, _) in self._graphs.items() if graph is not None]

    def run(self, key: Any, call: Callable[[], None], keep: Any = None) -> None:
        """Calls, captures or replays ``call``, which every time does the same on the GPU. ``keep`` lives as long as the
        graph.

        ``call`` may be called once more where it was captured in vain, for want of memory.
        """
        known = self._graphs.pop(key, None)
        if known is None:
            if len(self._graphs) >= MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]  # the one that was not used for longest
            self._graphs[key] = None, None
            call()
            return
        graph, kept = known
        if graph is None:
            graph, kept = self._graph_of(call), keep
        self._graphs[key] = graph, kept
        if graph is None:
            call()
        else:
            graph.replay()

    def _graph_of(self, call: Callable[[], None]) -> Graph | None:
        if self.short_of_memory:
            return None
        try:
            return self._capture(call)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            warnings.warn(f"generate() goes on without a CUDA graph, and slower: {error}", stacklevel=2)
            self.short_of_memory = True
            return None
