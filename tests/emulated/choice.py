"""What chooses tokens."""

from __future__ import annotations

import torch
from emulator import IN_OUT, OUTPUT

from emulated.base import EmulatedKernels, inputs_of
from hf_fastpath.ops import TokenState


class EmulatedChoice(EmulatedKernels):
    """See :class:`emulated.EmulatedOps`."""

    def choose_tokens(
        self,
        scores: torch.Tensor,
        noise: torch.Tensor | None,
        end: torch.Tensor | None,
        pad: torch.Tensor | None,
        state: TokenState,
    ) -> None:
        rows, vocabulary = scores.shape
        ends = 0 if end is None else end.numel()
        parts = torch.empty(
            (rows, self._floats("emulated_choose_tokens_parts", rows, vocabulary, self.sm_count)), dtype=torch.int64
        )
        dtype = (torch.float16, torch.bfloat16, torch.float32).index(scores.dtype)
        self._library.call(
            "emulated_choose_tokens",
            *(scores, scores.stride(0), noise, end, ends, pad, state.ids, state.positions, state.unfinished),
            *(state.done, state.report, state.tokens, state.tokens.stride(0), state.tokens.shape[1], state.counted),
            *(parts, rows, vocabulary, dtype, self.sm_count),
            **inputs_of(scores=scores, noise=noise, end=end, pad=pad),
            ids=(state.ids, OUTPUT),
            positions=(state.positions, IN_OUT),
            unfinished=(state.unfinished, IN_OUT),
            done=(state.done, IN_OUT),
            report=(state.report, IN_OUT),
            tokens=(state.tokens, IN_OUT),
            count=(state.counted, IN_OUT),
            parts=(parts, OUTPUT),
        )

    def sampling_weights(
        self, logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
    ) -> torch.Tensor:
        rows, vocabulary = logits.shape
        out, thresholds = torch.empty(rows, vocabulary), torch.empty(rows, 2, dtype=torch.int64)
        factor = float(1 / torch.tensor(temperature, dtype=torch.float32))
        self._library.call(
            "emulated_sampling_weights",
            *(logits, logits.stride(0), out, factor, top_k if top_k < vocabulary else 0, 1 - top_p, min_p),
            *(thresholds, rows, vocabulary, (torch.float16, torch.bfloat16, torch.float32).index(logits.dtype)),
            **inputs_of(logits=logits),
            out=(out, OUTPUT),
            thresholds=(thresholds, OUTPUT),
        )
        return out
