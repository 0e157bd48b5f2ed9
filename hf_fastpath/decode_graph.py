"""The CUDA graphs of one patched model's generate(): its slots, and whether the model is still what was captured."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from hf_fastpath.capture import Capture, CudaCapture
from hf_fastpath.model_watch import ModelWatch
from hf_fastpath.packing import ceil_div
from hf_fastpath.slot import Slot
from hf_fastpath.spare_rows import SpareRows, spare_rows_of

# A call that needs a little more than the last one finds the same slot; all rows of a slot together have about this.
CAPACITY_TOKENS = 2048
LEAST_CAPACITY_TOKENS = 256

# Slots that no cache uses are kept while they take at most this part of the GPU's memory.
KEPT_PART_OF_MEMORY = 1 / 16


def batch_bucket(batch: int) -> int:
    """How many rows the slot of a batch has: the next power of two."""
    return 1 << (batch - 1).bit_length()


def capacity_for(rows: int, tokens: int) -> int:
    """For how many tokens a row a slot is made that has to hold ``tokens``."""
    block = max(CAPACITY_TOKENS // rows, LEAST_CAPACITY_TOKENS)
    return ceil_div(max(tokens, 1), block) * block


class DecodeGraphs:
    """All slots of one patched model. A copy of it has none.

    Args:
        new_capture: makes what records the graphs of one slot on a device; None: on the GPU.
    """

    def __init__(self, new_capture: Callable[[torch.device], Capture] | None = None) -> None:
        self.new_capture = new_capture or CudaCapture
        self.slots: list[Slot] = []
        self._lock = threading.Lock()
        self.spare = SpareRows.NONE
        self._watch: ModelWatch | None = None
        self._vetted: weakref.ref[Any] | None = None

    def __reduce__(self) -> Any:
        return DecodeGraphs, ()

    def watch(self, model: Any) -> None:
        """Notes what the model consists of; :meth:`why_not` tells when that was changed."""
        self.spare = spare_rows_of(model)  # which merges weights that were not
        self._watch = ModelWatch(model)

    def lend(self, cache: Any, batch: int, tokens: int, device: torch.device) -> None:
        """Puts a slot for ``batch`` rows of ``tokens`` tokens behind a FastCache that never held anything."""
        rows = batch_bucket(batch)
        with self._lock:
            same = [slot for slot in self.slots if slot.free and slot.rows == rows and slot.kind == cache.kind]
            slot = next((slot for slot in same if slot.capacity >= tokens), None)
            if slot is None:
                # Too short: their memory goes first. What grew once will grow again, so by half at least.
                tokens = max([tokens, *(slot.capacity + slot.capacity // 2 for slot in same)])
                self.slots = [slot for slot in self.slots if slot not in same]
                same.clear()
                capacity = capacity_for(rows, tokens)
                new_capture, spare = self.new_capture(device), self.spare
                slot = Slot(cache.empty_like(capacity), rows, capacity, new_capture, device, spare)
            else:
                self.slots.remove(slot)
            slot.lend_to(cache)
            self._drop_unused(device)
            self.slots.append(slot)

    def _drop_unused(self, device: torch.device) -> None:
        """Frees slots that no cache uses, the longest unused first, until the others are small."""
        if device.type != "cuda":
            return
        most = torch.cuda.get_device_properties(device).total_memory * KEPT_PART_OF_MEMORY
        unused = [slot for slot in self.slots if slot.free]
        while unused and sum(slot.nbytes for slot in unused) > most:
            self.slots.remove(unused.pop(0))

    def slot_behind(self, cache: Any) -> Slot | None:
        """The slot that a cache got, be there anything in it or not."""
        return next((slot for slot in self.slots if slot.owner is not None and slot.owner() is cache), None)

    def slot_of(self, cache: Any) -> Slot | None:
        """The slot that everything in a cache is stored in; None when there is none."""
        slot = self.slot_behind(cache)
        return slot if slot is not None and slot.holds(cache) else None

    def why_not(self, model: Any) -> str:
        """Why the model as it is now cannot be captured; "" when it can: nothing was wrapped, hooked or replaced since
        :meth:`watch`. Weights that were moved are captured anew."""
        if self.new_capture is CudaCapture and model.device.type != "cuda":
            return "the model is not on a GPU"
        if model.training:
            return "the model is in training mode"
        if torch.is_autocast_enabled(model.device.type):
            return "autocast is on"
        if self._watch is None:
            self.watch(model)
        assert self._watch is not None
        if reason := self._watch.why_not(model):
            return reason
        if self._watch.tensors_moved:
            self.spare = spare_rows_of(model)
            self._watch.note_addresses()
            self.release()
        return ""

    def vet(self, model: Any, cache: Any) -> bool:
        """Whether :meth:`why_not` has nothing against a generate() call that begins, with this cache; None: with one
        that gets no slot."""
        fits = cache is not None and not self.why_not(model)
        self._vetted = weakref.ref(cache) if fits else None
        return fits

    def why_not_now(self, model: Any, cache: Any) -> str:
        """:meth:`why_not`, which is not asked twice in the call that :meth:`vet` was asked for."""
        vetted, self._vetted = self._vetted, None
        return "" if vetted is not None and vetted() is cache else self.why_not(model)

    def release(self) -> None:
        """Forgets all graphs and their memory; a cache that is in use keeps what it stores into."""
        with self._lock:
            self.slots = []
