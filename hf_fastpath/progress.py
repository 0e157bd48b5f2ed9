"""How far the kernels that choose tokens are, without a call of CUDA's: a word of the host's memory that they write.

Between two graphs a copy to the host, or an event, keeps the GPU idle for 10 to 30 us.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref

import torch

from hf_fastpath.ops.choose_tokens import CALL_SHIFT, COUNT_MASK, DONE_SHIFT

_PAGE_WORDS = 512
_CALLS = 1 << 15

# The first waits are for a step that will be done at once; a longer one leaves the core to others.
_SPIN_S, _SLEEP_S = 2e-4, 1e-5
# Nothing for so long: is the GPU still at work?
_PATIENCE_S = 1.0

_calls = itertools.count(1)
_lock = threading.Lock()
_free: dict[bool, list[torch.Tensor]] = {True: [], False: []}


def _take_word(pinned: bool) -> torch.Tensor:
    """An int64 ``()``. Words are never given back to anybody else: a kernel may still write one when nobody waits."""
    with _lock:
        free = _free[pinned]
        if not free:
            with torch.inference_mode(False):
                free += torch.zeros(_PAGE_WORDS, dtype=torch.int64, pin_memory=pinned).unbind()
        return free.pop()


class Progress:
    """Of one :class:`hf_fastpath.slot.Slot`.

    Attributes:
        report: int64 ``()`` in the host's memory, what :func:`hf_fastpath.ops.choose_tokens` reports to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, pinned = device, device.type == "cuda"
        self.report, self._call = _take_word(pinned), 0
        self._word = self.report.numpy()
        weakref.finalize(self, _free[pinned].append, self.report)

    def begin(self, done: torch.Tensor) -> None:
        """Of a row of steps that begin with this ``done``, int64 ``()`` on the device; what kernels before report, to
        which nobody listened any more, is not taken for theirs."""
        self._call = next(_calls) % _CALLS
        done.fill_(self._call << CALL_SHIFT)

    def finished_by(self, count: int) -> int:
        """Waits until ``count`` tokens were chosen; then how many had been when all rows were finished, be it later
        than asked for, or 0.

        Raises:
            RuntimeError: the GPU failed, or it has nothing to do any more and did not choose as many.
        """
        start = checked = time.monotonic()
        while True:
            word = int(self._word)
            if word >> CALL_SHIFT == self._call and word & COUNT_MASK >= count:
                return word >> DONE_SHIFT & COUNT_MASK
            now = time.monotonic()
            time.sleep(0 if now - start < _SPIN_S else _SLEEP_S)
            if now - checked > _PATIENCE_S:
                checked = now
                self._check(word, count)

    def _check(self, word: int, count: int) -> None:
        idle = self.device.type != "cuda" or torch.cuda.current_stream(self.device).query()
        if idle and int(self._word) == word:
            raise RuntimeError(f"token {count} was never chosen: the last that the GPU reported is {word & COUNT_MASK}")
