"""int4 codes and scales for the experts of a mixture, by the inputs that their own tokens bring them.

The experts of a layer read the same hidden states, so what is known of their inputs is taken over all tokens: an expert
is sent only a part of them, too few to know its channels by. Between its two products each expert has inputs of its
own, those of the tokens that are sent to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_fastpath.config import FastpathConfig, ScaleSearch
from hf_fastpath.error_feedback import quantize_with_feedback
from hf_fastpath.precision import tensor_float32
from hf_fastpath.quantize import GroupQuantized, quantize_int4

# An expert that fewer tokens were sent to is measured on all of them: wrong ones say more than a handful.
_LEAST_TOKENS = 64
_BAND = 4096  # tokens in one product


@dataclasses.dataclass
class ExpertInputs:
    """What a mixture was called with: hidden states ``(tokens, H)`` and chosen experts ``(tokens, top_k)``."""

    hidden: torch.Tensor
    chosen: torch.Tensor

    def without_first(self, length: int) -> ExpertInputs:
        """Without the first token of each sequence of ``length``, which holds what depends on being first."""
        rows = (values.unflatten(0, (-1, length))[:, 1:].flatten(0, 1) for values in (self.hidden, self.chosen))
        return ExpertInputs(*rows)

    def of(self, expert: int) -> torch.Tensor:
        """The hidden states that were sent to an expert, or all if those are too few."""
        sent = self.hidden[(self.chosen == expert).any(dim=-1)]
        return sent if len(sent) >= _LEAST_TOKENS else self.hidden


@contextmanager
def watching_experts(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, ExpertInputs]]:
    """What the mixtures ``names`` are called with within it, by name, calls one after the other."""
    seen: dict[str, ExpertInputs] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            hidden, chosen = args[0].detach(), args[1]
            if name in seen:
                hidden, chosen = torch.cat((seen[name].hidden, hidden)), torch.cat((seen[name].chosen, chosen))
            seen[name] = ExpertInputs(hidden, chosen)

        return note

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def inner_activations(hidden: torch.Tensor, gate_up: torch.Tensor) -> Iterator[torch.Tensor]:
    """What an expert's second product reads, float32 ``(tokens, I)``, some tokens at a time."""
    for part in hidden.split(_BAND):
        gate, up = nn.functional.linear(part, gate_up.to(part.dtype)).chunk(2, dim=-1)
        yield (nn.functional.silu(gate) * up).float()


@torch.no_grad()
def quantize_experts(
    experts: Any, groups: tuple[int, int], config: FastpathConfig, inputs: ExpertInputs | None
) -> tuple[list[GroupQuantized], list[GroupQuantized]]:
    """Quantizes every expert's gate_up and down.

    Args:
        experts: a module with ``gate_up_proj`` ``(E, 2 I, H)`` and ``down_proj`` ``(E, H, I)``.
        groups: the group sizes of the two.
        inputs: what the searches "activation" and "output" measure on; the others look at the weights alone.

    Raises:
        ValueError: a weight, or an input, holds NaN or infinity.
    """
    count = experts.gate_up_proj.shape[0]
    if config.scale_search is not ScaleSearch.OUTPUT:
        energy = None if inputs is None else _checked(inputs.hidden.float().square().mean(dim=0))
        gate_up = [_by_energy(experts.gate_up_proj[e], groups[0], config, energy) for e in range(count)]
        down = [
            _by_energy(experts.down_proj[e], groups[1], config, _inner_energy(experts, e, inputs)) for e in range(count)
        ]
        return gate_up, down
    assert inputs is not None
    # All rows of all experts as one weight: what takes the time is the number of columns.
    stacked = experts.gate_up_proj.flatten(0, 1)
    together = quantize_with_feedback(stacked, _moment([inputs.hidden]), groups[0], zero_points=config.zero_points)
    rows = experts.gate_up_proj.shape[1]
    gate_up = [together.rows(slice(e * rows, (e + 1) * rows)) for e in range(count)]
    down = []
    for expert in range(count):  # the error that the first product makes by now is seen by the second
        moment = _moment(inner_activations(inputs.of(expert), gate_up[expert].dequantize()))
        weight = experts.down_proj[expert]
        down.append(quantize_with_feedback(weight, moment, groups[1], zero_points=config.zero_points))
    return gate_up, down


def _by_energy(
    weight: torch.Tensor, group_size: int, config: FastpathConfig, energy: torch.Tensor | None
) -> GroupQuantized:
    return quantize_int4(
        weight, group_size, zero_points=config.zero_points, search=config.scale_search, importance=energy
    )


def _inner_energy(experts: Any, expert: int, inputs: ExpertInputs | None) -> torch.Tensor | None:
    if inputs is None:
        return None
    hidden = inputs.of(expert)
    parts = inner_activations(hidden, experts.gate_up_proj[expert])
    return _checked(torch.stack([part.square().sum(dim=0) for part in parts]).sum(dim=0) / len(hidden))


def _checked(values: torch.Tensor) -> torch.Tensor:
    if not bool(values.isfinite().all()):
        raise ValueError("the experts' inputs are not finite; scale_search='mse' does not look at activations")
    return values


def _moment(parts: Any) -> torch.Tensor:
    """``E[x x^T]`` over the rows of all parts, float32 ``(K, K)``."""
    total, count = None, 0
    for part in parts:
        rows = part.float()
        total = rows.new_zeros((rows.shape[1], rows.shape[1])) if total is None else total
        with tensor_float32():
            total.addmm_(rows.t(), rows)
        count += len(rows)
    assert total is not None
    return _checked(total.div_(count))
