"""The states of LFM2's short convolutions, beside the keys and values of the attention layers in one cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from hf_fastpath.heuristics import short_conv_supports
from hf_fastpath.runtime import why_no_kernels


class LeftPadding:
    """Whether a single new token may still be padding, which transformers does not ask: it drops the mask of a call
    with one token, and a prompt that is read in chunks can have chunks of one.

    All convolutions of a cache share one. ``mask``: bool ``(batch,)``, of the present call's only token, or None.
    """

    def __init__(self) -> None:
        self.over, self.mask = False, None

    over: bool
    mask: torch.Tensor | None

    def see(self, attention_mask: Any, new_tokens: int) -> None:
        """Called before a forward pass with ``(batch, all tokens)`` or None, and the number of new tokens.

        Waits for the GPU while the padding lasts, so not once the prompt has been read.
        """
        self.mask = None
        if self.over or not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
            return
        latest = attention_mask[:, -1].bool()
        self.over = bool(latest.all())
        if new_tokens == 1 and not self.over:
            self.mask = latest

    def end(self) -> None:
        """From now on there are only tokens that were generated."""
        self.over, self.mask = True, None


class ConvStateLayer(LinearAttentionLayer):
    """The last L inputs of one layer's convolution, ``conv_states[0]``: ``(batch, H, L)``, changed in place.

    transformers' own layer and its own modules' protocol, so an unpatched model works with it; but the state stays at
    one address whatever is done to the batch, rows can be repeated and selected, and it can be written outside of the
    inference mode that it was made in.
    """

    # As in hf_fastpath.caches.layer.FastLayer: whose first rows are the state; of a lender, for how many it makes room,
    # and whether they are zeros.
    lender: ConvStateLayer | None = None
    lent_rows, emptied = 0, False

    def __init__(self, padding: LeftPadding) -> None:
        super().__init__()
        self.padding = padding
        self.in_kernel = False  # known once there is a state

    def ready(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """The state to go on from, zeros at first, for a module that changes it in place. shape: ``(batch, H, L)``.

        Raises:
            ValueError: it is that of another batch.
        """
        state = self.conv_states[0]
        if not self.has_previous_state[0]:
            if state is None or state.shape != shape or (state.dtype, state.device) != (like.dtype, like.device):
                self._begin(shape, like)
            self.has_previous_state[0] = True
            state = self.conv_states[0]
        assert state is not None
        if state.shape[0] != shape[0]:
            raise ValueError(f"the cache holds a batch of {state.shape[0]}, but got {shape[0]} rows")
        return state

    @torch.inference_mode(False)
    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        super().lazy_initialization(*args, **kwargs)
        self.in_kernel = self._fits_kernel(self.conv_states[0])

    @staticmethod
    def _fits_kernel(state: torch.Tensor | None) -> bool:
        """Whether our ops run this state's convolution; else torch does, on any GPU, as on the CPU."""
        if state is None or not state.is_cuda:
            return state is not None
        dtypes = (torch.float16, torch.bfloat16, torch.float32)
        return state.dtype in dtypes and short_conv_supports(state.shape[-1]) and not why_no_kernels(state.device)

    def _begin(self, shape: tuple[int, ...], like: torch.Tensor) -> None:
        """Makes an empty state, in the lender's first rows if there is a lender, and room."""
        lender = self.lender
        lent = None if lender is None else lender.lend(shape, like)
        if lender is None or lent is None:
            self.lazy_initialization(conv_states=like.new_empty(shape))
            return
        # What transformers notes with a state of the layer's own, in attributes that it declares None.
        noted: Any = self
        noted.dtype, noted.device, self.in_kernel = lent.dtype, lent.device, lender.in_kernel
        self.conv_kernel_size[0], self.is_conv_states_initialized[0] = shape[-1], True
        self.conv_states[0] = lent

    @torch.inference_mode(False)
    def lend(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor | None:
        """This layer's first rows, zeros, for another layer's state of this shape, and of the dtype and device of
        ``like``; None when it has no such."""
        if self.conv_states[0] is None:
            count = max(self.lent_rows, shape[0])
            self.lazy_initialization(conv_states=like.new_empty((count, *shape[1:])))
            self.emptied = True
        self.has_previous_state[0], self.record_past = True, False  # what steps of all its rows go by
        own, emptied = self.conv_states[0], self.emptied
        assert own is not None
        if (shape[1:], like.dtype, like.device) != (own.shape[1:], own.dtype, own.device) or shape[0] > own.shape[0]:
            return None
        self.emptied = False
        rows = own[: shape[0]]
        return rows if emptied else rows.zero_()

    def stores_into(self, lender: ConvStateLayer) -> bool:
        """Whether the state is in that of ``lender``, where a graph finds it."""
        own, theirs = self.conv_states[0], lender.conv_states[0]
        if self.lender is not lender or self.record_past or own is None or theirs is None:
            return False
        return own.data_ptr() == theirs.data_ptr()

    def advance_to(self, length: int) -> None:
        """There is nothing to count."""

    @property
    def zero_if_empty(self) -> torch.Tensor:
        """What is 0 of a row that has had no token, rows first."""
        state = self.conv_states[0]
        assert state is not None
        return state

    def used(self, length: int) -> list[torch.Tensor]:
        """The same, of however many tokens."""
        return [self.zero_if_empty]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"lender": None}  # a copy has a state of its own

    @property
    def has_storage(self) -> bool:
        """Whether there is a state."""
        return self.conv_states[0] is not None

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        state = self.conv_states[0]
        return 0 if state is None else state.nbytes

    def reset(self) -> None:
        """Forgets every token; the memory stays for the next use."""
        super().reset()
        self.record_past, self.padding.over, self.padding.mask = False, False, None

    @torch.inference_mode(False)
    def _select_rows(self, rows: torch.Tensor) -> None:
        state = self.conv_states[0]
        if state is None:
            return
        chosen = state.index_select(0, rows.to(state.device))
        if chosen.shape == state.shape:
            state.copy_(chosen)
        else:
            self.conv_states[0] = chosen

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was; the state stays where it is."""
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, one after the other."""
        state = self.conv_states[0]
        if state is not None:
            self._select_rows(torch.arange(state.shape[0], device=state.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows ``indices`` (integers, or a boolean mask over the batch)."""
        self._select_rows(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)
