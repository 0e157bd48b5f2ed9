"""What one layer of every cache format shares: preallocated storage that grows in blocks, and that it can be lent."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from hf_fastpath.packing import ceil_div

BLOCK_TOKENS = 256


class FastLayer(CacheLayerMixin):
    """One layer's keys and values, in ``storage``: tensors ``(B, H_kv, entries, ...)``, a row's state in its own part.

    Only the first ``get_seq_length()`` tokens mean anything. The length is a host integer, so that nothing here waits
    for the GPU; the kernels count for themselves in the last tensor of the storage, ``lengths``, int32 ``(B, H_kv)``,
    so that a captured graph appends wherever the cache ends. Each head has a copy, so that no CTA of a kernel that
    appends has to wait for that of another head. A subclass says what is stored (:meth:`allocate`), how tokens are
    written (:meth:`write`), and what ``update()`` hands to the attention function (:meth:`read`).

    ``tokens_per_entry``, one number a storage tensor: how many tokens an entry of its third dimension covers; 0 says
    that the tensor does not grow with the tokens.

    ``tickets``, int32 ``(B * H_kv,)``, all 0 between calls: what the kernels that attend count their parts with. They
    belong to the storage, which one stream uses at a time.
    """

    tokens_per_entry: tuple[int, ...]
    option_names: tuple[str, ...] = ()  # attributes that the storage and what is done with it depend on

    is_compileable = False
    is_sliding = False
    is_croppable = True
    # Whether the attention of a new token is a kernel that finds the length in GPU memory.
    attends_in_kernel = False

    # The layer in whose storage this one keeps its tokens, if it finds room there when it gets the first ones; None: in
    # storage of its own. And of such a lender, for how many rows it makes room, and whether it has been told already
    # that they hold nothing.
    lender: FastLayer | None = None
    lent_rows, emptied = 0, False

    def __init__(self, initial_tokens: int = 0) -> None:
        # Not super().__init__(): it assigns `keys` and `values`, which are computed here.
        self.initial_tokens = initial_tokens
        self.storage: list[torch.Tensor] = []
        self.tickets: torch.Tensor | None = None
        self.is_initialized = False
        self.length = 0

    @abstractmethod
    def allocate(self, key: torch.Tensor, value: torch.Tensor, capacity: int) -> list[torch.Tensor]:
        """Empty storage for ``capacity`` tokens of the shape, dtype and device of ``key`` and ``value``."""

    @abstractmethod
    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores ``(B, H_kv, q, D)`` keys and values behind the tokens that are counted, and counts them."""

    @abstractmethod
    def read(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the attention function gets, ``key`` and ``value`` being the tokens just written."""

    @abstractmethod
    def expand(self, which: str, length: int, dtype: torch.dtype) -> torch.Tensor:
        """``"keys"`` or ``"values"`` as a plain tensor ``(B, H_kv, length, D)``."""

    @abstractmethod
    def bytes_per_head(self, head_dim: int, dtype: torch.dtype) -> float:
        """Bytes that key and value of one token and KV head take in a model of this dtype, without what does not grow
        with the tokens."""

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """The stored keys as a plain tensor ``(B, H_kv, length, D)``; None before the first update."""
        return self.expand("keys", self.length, self.dtype) if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """The stored values as a plain tensor ``(B, H_kv, length, D)``; None before the first update."""
        return self.expand("values", self.length, self.dtype) if self.is_initialized else None

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.storage[0].shape[2] * self.tokens_per_entry[0] if self.storage else 0

    @property
    def has_storage(self) -> bool:
        """Whether anything is allocated."""
        return bool(self.storage)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.nbytes for tensor in self.storage)

    # Storage made in inference mode could not be written outside it, and a returned cache is continued anywhere.
    @torch.inference_mode(False)
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, key_states.shape[0]
        tokens = max(self.initial_tokens, key_states.shape[2], 1)
        lender = self.lender
        borrowed = None if lender is None else lender.lend(key_states, value_states, tokens)
        if lender is not None and borrowed is not None:
            self.storage, self.tickets = borrowed, lender.tickets
        else:
            capacity = ceil_div(tokens, BLOCK_TOKENS) * BLOCK_TOKENS
            self.storage = self.allocate(key_states, value_states, capacity)
            self.tickets = self._new_tickets(*key_states.shape[:2])
        self.is_initialized = True

    def _new_tickets(self, batch: int, kv_heads: int) -> torch.Tensor:
        return torch.zeros(batch * kv_heads, dtype=torch.int32, device=self.device)

    def lend(self, key: torch.Tensor, value: torch.Tensor, tokens: int) -> list[torch.Tensor] | None:
        """The storage of this layer's first rows, emptied, for another layer to keep such keys and values in; None when
        it has no room for them."""
        if not self.is_initialized:
            rows = max(self.lent_rows, key.shape[0])
            self.lazy_initialization(*(x.new_empty((rows, *x.shape[1:])) for x in (key, value)))
            self.kv_shape = key.shape[1], key.shape[3]
        same = (key.dtype, key.device, (key.shape[1], key.shape[3])) == (self.dtype, self.device, self.kv_shape)
        if not same or key.shape[0] > self.batch_size or not self.has_room(tokens):
            return None
        self.reset()
        rows = key.shape[0]
        return [tensor if rows == self.batch_size else tensor[:rows] for tensor in self.storage]

    def stores_into(self, lender: FastLayer) -> bool:
        """Whether what this layer stores is in the storage of ``lender``, where a graph finds it."""
        if self.lender is not lender or not self.is_initialized:
            return False
        return self.storage[0].data_ptr() == lender.storage[0].data_ptr()

    def has_room(self, tokens: int) -> bool:
        """Whether so many tokens of a row fit into the storage."""
        return tokens <= self.capacity

    def advance_to(self, length: int) -> None:
        """Counts the tokens that a graph wrote to the storage, up to ``length`` in all."""
        self.length = length

    @property
    def zero_if_empty(self) -> torch.Tensor:
        """What is 0 of a row that holds no token, rows first."""
        return self.storage[-1]

    def used(self, length: int) -> list[torch.Tensor]:
        """Of each tensor of the storage, rows first, what ``length`` tokens take."""
        pairs = zip(self.storage, self.tokens_per_entry, strict=True)
        return [tensor[:, :, : ceil_div(length, tokens)] if tokens else tensor for tensor, tokens in pairs]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"lender": None}  # a copy has storage of its own

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends ``(B, H_kv, q, D)`` keys and values; returns what the attention function is to use.

        What is stored holds no graph: gradients do not flow to earlier calls.
        """
        self._admit(key_states, value_states)
        self.write(key_states.detach(), value_states.detach())
        return self.read(key_states, value_states)

    def _admit(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Counts tokens that are about to be stored, and makes room for them."""
        if not self.is_initialized or (self.length == 0 and not self._fits(key)):
            self.lazy_initialization(key, value)
        if key.shape[0] != self.batch_size:
            raise ValueError(f"the cache holds a batch of {self.batch_size}, but got keys of {key.shape[0]}")
        start, self.length = self.length, self.length + key.shape[2]
        if self.length > self.capacity:
            self._reserve(start)

    def _fits(self, key: torch.Tensor) -> bool:
        return (key.shape[0], key.dtype, key.device) == (self.batch_size, self.dtype, self.device)

    @torch.inference_mode(False)
    def _reserve(self, used: int) -> None:
        """Makes room for ``length`` tokens, keeping the first ``used``. Growing by half keeps the copying per token
        constant however long the cache gets."""
        wanted = max(self.length, self.capacity + self.capacity // 2)
        capacity = ceil_div(wanted, BLOCK_TOKENS) * BLOCK_TOKENS
        for i, (old, tokens) in enumerate(zip(self.storage, self.tokens_per_entry, strict=True)):
            if not tokens:
                continue
            # One at a time: the extra memory is one tensor's.
            entries = ceil_div(used, tokens)
            new = old.new_zeros((*old.shape[:2], capacity // tokens, *old.shape[3:]))
            new[:, :, :entries] = old[:, :, :entries]
            self.storage[i] = new

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of :meth:`get_max_length` that transformers 5.17 still calls."""
        return -1

    def offload(self) -> None:
        self.storage = [tensor.to("cpu", non_blocking=True) for tensor in self.storage]

    def prefetch(self) -> None:
        self.storage = [tensor.to(self.device, non_blocking=True) for tensor in self.storage]

    def reset(self) -> None:
        """Forgets every token; the memory stays for the next use."""
        self.length = 0
        self._count()

    @torch.inference_mode(False)
    def _count(self) -> None:
        """Tells the kernels the length."""
        known, self.emptied = self.emptied and self.length == 0, False
        if self.is_initialized and not known:
            self.storage[-1].fill_(self.length)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens (the argument is negative or 0, as in transformers 5.23)."""
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, how many tokens to remove")
        self.length = max(0, self.length + tokens_to_remove)
        self._count()

    @torch.inference_mode(False)
    def _select_rows(self, rows: torch.Tensor) -> None:
        if not self.is_initialized:
            return
        rows = rows.to(self.device)
        same_batch = rows.numel() == self.batch_size
        for i, (old, tokens) in enumerate(zip(self.storage, self.tokens_per_entry, strict=True)):
            used = (slice(None), slice(None), slice(ceil_div(self.length, tokens))) if tokens else ()
            chosen = old[used].index_select(0, rows)
            if not same_batch:
                self.storage[i] = old.new_zeros((rows.numel(), *old.shape[1:]))
            self.storage[i][used] = chosen
        if not same_batch:
            self.tickets = self._new_tickets(rows.numel(), self.storage[0].shape[1])
        self.batch_size = rows.numel()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was; the storage stays where it is."""
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, one after the other."""
        if self.is_initialized:
            self._select_rows(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows ``indices`` (integers, or a boolean mask over the batch)."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._select_rows(indices)
