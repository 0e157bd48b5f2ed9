"""How strongly each input channel of each linear layer is driven, measured without data, one decoder layer at a time.

A few channels of a transformer carry values many times larger than the rest, and they do so for whatever tokens the
model reads. So a thousand random token ids are enough to see them, and an error in a weight can be counted by what
it costs in the output: ``E|x W^T - x Q^T|^2`` is, to the diagonal of ``E[x x^T]``, ``sum_k E[x_k^2] (W - Q)_k^2``.
(The diagonal is AWQ's observation that channels with large activations are salient: Lin et al., 2023, section 3.1;
that random tokens serve almost as well as text was measured here: see "Accuracy" in the README.)

Only the decoder layer that runs has to be in memory, so a model can be quantized while it is being loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_fastpath.expert_search import ExpertInputs, watching_experts
from hf_fastpath.layer_walk import LayerWalk, watching_inputs

# 256 tokens leave a fifth more perplexity, 4,096 no less: measured on SmolLM2-135M.
_SEQUENCES, _TOKENS, _SEED = 16, 64, 20260


def input_energy(
    model: Any, decoder_layers: str, names: Iterable[str], experts: Iterable[str] = (), *, progress: bool = False
) -> dict[str, torch.Tensor | ExpertInputs]:
    """The mean square of each input channel of the linear layers ``names``, float32 ``(in_features,)`` each.

    Args:
        decoder_layers: dotted path of the list of decoder layers; a name outside of it reads the body's output.
        experts: names of modules with the experts of a mixture, whose inputs are returned as they are.

    Raises:
        ValueError: the activations are not finite.
    """
    energy: dict[str, torch.Tensor | ExpertInputs] = {}
    walk = random_walk(model, decoder_layers)
    wanted, mixtures = list(names), list(experts)
    layers = range(len(walk.layers))
    for index in tqdm(layers, desc="Measuring activations", unit="layer", disable=not progress, leave=False):
        prefix = f"{decoder_layers}.{index}."
        inside = ([name for name in some if name.startswith(prefix)] for some in (wanted, mixtures))
        energy |= layer_energy(walk, index, *inside)
    head = [name for name in wanted if name not in energy]
    return energy | (dict.fromkeys(head, head_energy(walk)) if head else {})


def random_walk(model: Any, decoder_layers: str) -> LayerWalk:
    """A walk on random token ids, always the same ones, in one batch."""
    generator = torch.Generator("cpu").manual_seed(_SEED)
    length = min(_TOKENS, getattr(model.config, "max_position_embeddings", None) or _TOKENS)
    tokens = torch.randint(model.config.vocab_size, (_SEQUENCES, length), generator=generator, device="cpu")
    return LayerWalk(model, decoder_layers, tokens, batch=_SEQUENCES)


def layer_energy(
    walk: LayerWalk, index: int, names: Iterable[str], experts: Iterable[str] = ()
) -> dict[str, torch.Tensor | ExpertInputs]:
    """Runs decoder layer ``index``; the mean square of the input channels of its linear layers ``names``.

    Args:
        names: full names, such as ``"model.layers.3.mlp.up_proj"``.
        experts: those of modules with the experts of a mixture.

    Returns:
        float32 ``(in_features,)`` for each of the names; for experts their inputs.

    Raises:
        ValueError: the inputs are not finite.
    """
    energy: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor) -> None:
        energy[name] = _mean_square(x)

    with watching_inputs(walk.model, names, see), watching_experts(walk.model, experts) as calls:
        walk.run_layer(index)
    for name, values in energy.items():
        _check_finite(name, values, walk.model)
    return energy | {name: inputs.without_first(walk.tokens.shape[1]) for name, inputs in calls.items()}


def head_energy(walk: LayerWalk) -> torch.Tensor:
    """The mean square of the output of the body, float32 ``(hidden_size,)``, once every layer has run.

    Raises:
        ValueError: it is not finite.
    """
    (energy,) = (_mean_square(x) for x in walk.head_inputs())
    _check_finite("the language-model head", energy, walk.model)
    return energy


def _mean_square(x: torch.Tensor) -> torch.Tensor:
    """Over all positions of ``(n, T, K)`` but the first, which holds what depends on being first, not on the token."""
    x = x[:, 1:].float()
    return x.square().mean(dim=tuple(range(x.dim() - 1)))


def _check_finite(name: str, values: torch.Tensor, model: Any) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"{name}: its inputs are not finite on random tokens in {model.dtype}; "
            "scale_search='mse' does not look at activations"
        )
