"""Several processes that share the work of one evaluation, as ``accelerate launch`` starts them."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

_PATIENCE = timedelta(days=7)  # a process waits that long for one with more work


class Processes:
    """This process among those that ``accelerate launch`` or ``torchrun`` started; alone: number 0 of 1.

    Making one joins the processes, and on GPUs makes each use its own one. Every process does the same with its share
    of the work, and :meth:`gather` gives all of them the results of all: they need not agree about anything else.
    """

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.count > 1 else 0
        if self.count > 1 and not distributed.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            distributed.init_process_group("gloo", timeout=_PATIENCE)  # Python objects travel, no tensors of a GPU

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def gather(self, mine: Any) -> list[Any]:
        """What every process passed, by rank."""
        if self.count == 1:
            return [mine]
        everyone: list[Any] = [None] * self.count
        distributed.all_gather_object(everyone, mine)
        return everyone
