"""What the graphs of generate() read and write: captured once, replayed for every token.

A graph replays fixed addresses. So what changes from token to token is in device memory that stays where it is: the new
tokens, their positions and the padding mask in a :class:`Slot`, and what the caches hold in the tensors that the slot
lends them. A slot serves batches up to its rows and any length up to its capacity, one cache at a time; its graphs
outlive the cache. A step's graph is of all rows, where a row's bits do not hang on how many there are
(:mod:`hf_fastpath.spare_rows`), otherwise of one batch size. One graph may be of a step and of the choice behind it,
for all of its rows: between two graphs a GPU does nothing for some microseconds. Choices that draw are of one batch
size, as the random numbers are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from hf_fastpath.capture import Capture, CapturedCalls, Graph
from hf_fastpath.modules.logits_target import logits_go_to
from hf_fastpath.ops import TokenState
from hf_fastpath.ops.w4a16_linear import MAX_ROWS
from hf_fastpath.progress import Progress
from hf_fastpath.spare_rows import SpareRows, empty_rows, repeat_rows


class Slot:
    """What graphs read and write, and the graphs.

    Attributes:
        cache, kind: one whose storage is lent, and what caches like it have in common.
        rows, capacity: the largest batch, and the tokens of a row that there is room for.
        spare: what steps do with rows that a batch leaves over (:mod:`hf_fastpath.spare_rows`).
        ids, positions: int64 ``(rows, 1)``, the tokens that the next step gets, and their positions; before the first
            are chosen, the positions before.
        logits: ``(rows, V)`` in the model's dtype, of the latest step; None before the first.
        unfinished: int64 ``(rows,)``, 1 until a row has its end token, and 0 of a spare row of its own. tokens: int64
            ``(rows, capacity)``, those that were chosen, ``count`` ``(1, 1)`` of them. done, and what reports it and
            the count to the host, ``progress``: see :class:`~hf_fastpath.ops.TokenState`.
    """

    def __init__(
        self, cache: Any, rows: int, capacity: int, capture: Capture, device: torch.device, spare: SpareRows
    ) -> None:
        self.cache, self.kind, self.rows, self.capacity = cache, cache.kind, rows, capacity
        self.device, self.spare = device, spare if rows <= MAX_ROWS else SpareRows.NONE
        self.owner: weakref.ref[Any] | None = None
        self.batch, self.masked = 0, False
        self.logits: torch.Tensor | None = None
        self._calls = CapturedCalls(capture)
        self._stream: Any = None
        self.progress = Progress(device)
        with torch.inference_mode(False):  # tensors made in inference mode cannot be written outside it
            self._inputs, self.unfinished, self.tokens, self.count = (
                torch.zeros(shape, dtype=torch.long, device=device)
                for shape in ((2, rows, 1), (rows,), (rows, capacity), (1, 1))
            )
            self.ids, self.positions = self._inputs
            self.mask = torch.ones((rows, 1, 1, capacity), dtype=torch.bool, device=device)
            self.done = torch.zeros((), dtype=torch.long, device=device)

    @property
    def free(self) -> bool:
        """Whether no cache that is still in use holds it."""
        return self.owner is None or self.owner() is None

    @property
    def nbytes(self) -> int:
        """Bytes of the storage that it lends."""
        return sum(layer.nbytes for layer in self.cache.layers)

    def lend_to(self, cache: Any) -> None:
        """Makes ``cache``, which holds nothing yet, store into this slot from its first token on."""
        self._order_streams()
        self.owner = weakref.ref(cache)
        used = [layer for layer in self.cache.layers if layer.has_storage]
        with torch.inference_mode(False):
            empty_rows(used, slice(None))  # all layers at once: one by one takes the host as long as some of a prompt
        for layer in used:
            layer.emptied = True
        for own, theirs in zip(self.cache.layers, cache.layers, strict=True):
            own.lent_rows = self.rows
            theirs.lender = own

    def holds(self, cache: Any) -> bool:
        """Whether everything that ``cache`` stores is here, so that a graph would find it."""
        return all(theirs.stores_into(own) for own, theirs in zip(self.cache.layers, cache.layers, strict=True))

    def begin(self, positions: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Before the first of a row of steps, each of which adds a token that is no padding.

        Args:
            positions: int64 ``(B, 1)``, of the next tokens. mask: ``(B, T)`` of 0 and 1, of all tokens so far; None:
                no padding.
        """
        self._order_streams()
        batch = self.batch = positions.shape[0]
        cache = self._cache()
        if cache.padding is not None:
            cache.padding.end()
        self.positions[:batch].copy_(positions - 1)
        self.unfinished.fill_(1)
        self.count.zero_()
        self.progress.begin(self.done)
        self._calls.short_of_memory = False
        self.masked = mask is not None
        if mask is not None:
            self.mask.fill_(True)
            self.mask[:batch, 0, 0, : mask.shape[1]].copy_(mask)
        self._begin_spare_rows(cache.get_seq_length())

    @property
    def step_rows(self) -> int:
        """Rows of a step's graph: those of the slot, or of the batch where the number counts."""
        return self.batch if self.spare is SpareRows.NONE else self.rows

    def _begin_spare_rows(self, length: int) -> None:
        """They get a token at each step, as the others do, so they must not have more of them than those, ``length``:
        kernels trap where there is no room."""
        rows = slice(self.batch, self.rows)
        if self.batch == self.step_rows:
            return
        if self.spare is SpareRows.EMPTY:
            self._inputs[:, rows].zero_()
            self.unfinished[rows].zero_()  # nobody waits for their end
            empty_rows(self.cache.layers, rows)
        else:
            self._repeat(self.mask)
            repeat_rows(self.cache.layers, rows, length)
            self.put_spare()

    def put_spare(self) -> None:
        """Makes spare rows that are other rows once more get their tokens."""
        self._repeat(self._inputs.transpose(0, 1))

    def _repeat(self, tensor: torch.Tensor) -> None:
        """Of a tensor, all of a slot's rows first, makes those that are other rows once more be that. A batch has more
        than half of the rows."""
        if self.spare is SpareRows.REPEATED and self.batch < self.rows:
            tensor[self.batch :] = tensor[: self.rows - self.batch]

    def state(self, count: int) -> TokenState:
        """What is noted of the first ``count`` rows as tokens are chosen."""
        rows = slice(0, count)
        return TokenState(
            *(self.ids[rows], self.positions[rows], self.unfinished[rows], self.done, self.tokens[rows], self.count),
            self.progress.report,
        )

    def put(self, tokens: torch.Tensor) -> None:
        """Makes ``(B,)`` the tokens that the next step gets, where :attr:`state` is not used to choose them."""
        self.ids[: self.batch].copy_(tokens[:, None])
        self.positions[: self.batch] += 1
        self.put_spare()

    def run(self, key: tuple[Any, ...], call: Callable[[], None], keep: Any = None) -> None:
        """:meth:`CapturedCalls.run` of these graphs. The first part of ``key`` says what ``call`` is."""
        self._order_streams()
        self._calls.run(key, call, keep)

    def step(
        self, forward: Callable[..., Any], choose: Callable[[], None] | None = None, key: Any = None, keep: Any = None
    ) -> None:
        """One token a row, from ``ids`` to ``logits``; ``forward`` is the model's, for the first two times.

        Args:
            choose: chooses the next tokens by the logits, in the same graph, for all rows of the step. key, keep: what
                tells it from others, and what has to live as long as the graph.
        """
        forward = self._offering_logits(forward)
        cache = self._cache()
        length = cache.get_seq_length()

        def call() -> None:
            self._forward(forward, length)
            if choose is not None:
                choose()

        self.run(("step" if choose is None else "token", self.step_rows, self.masked, key), call, keep)
        for layer in cache.layers:
            layer.advance_to(length + 1)

    @property
    def captured(self) -> list[tuple[str, Graph]]:
        """What was captured, ``"step"``, ``"choice"`` or ``"token"``, which is a step and then a choice, and its graph;
        the one that was used last is at the end. Replaying choice and step, or a token, adds a token to each row, for
        which there has to be room."""
        return [(key[0], graph) for key, graph in self._calls.captured]

    def _cache(self) -> Any:
        cache = None if self.owner is None else self.owner()
        assert cache is not None
        return cache

    def _forward(self, forward: Callable[..., Any], length: int) -> None:
        rows, cache = self.step_rows, self._cache() if self.spare is SpareRows.NONE else self.cache
        for layer in cache.layers:  # a capture that failed has counted
            layer.advance_to(length)
        out = forward(
            input_ids=self.ids[:rows],
            position_ids=self.positions[:rows],
            attention_mask=self.mask[:rows] if self.masked else None,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        self.take(out.logits)

    def _offering_logits(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A model's ``forward``, whose head may write into :attr:`logits`: :meth:`take` then has nothing to do."""

        def offering(**inputs: Any) -> Any:
            rows = inputs["input_ids"].shape[0]
            with logits_go_to(None if self.logits is None else self.logits[:rows]):
                return forward(**inputs)

        return offering

    @torch.inference_mode(False)
    def take(self, logits: torch.Tensor) -> None:
        """Puts ``(B, T, V)`` logits of the last token into :attr:`logits`."""
        if self.logits is None:
            self.logits = logits.new_empty((self.rows, logits.shape[2]))
        elif logits.data_ptr() == self.logits.data_ptr():
            return  # the head has put them there
        rows = logits.shape[0]
        self.logits[:rows].copy_(logits[:, -1].detach())
        if rows == self.batch:  # of a prompt, or there are no spare rows
            self._repeat(self.logits)

    def _order_streams(self) -> None:
        """Makes the current stream wait for what was queued on another one, by another thread say."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream
