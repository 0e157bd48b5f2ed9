"""How strongly each input channel of each linear layer is driven, measured without data, one decoder layer at a time.

A few channels of a transformer carry values many times larger than the rest, and they do so for whatever tokens the
model reads. So a thousand random token ids are enough to see them, and an error in a weight can be counted by what
it costs in the output: ``E|x W^T - x Q^T|^2`` is, to the diagonal of ``E[x x^T]``, ``sum_k E[x_k^2] (W - Q)_k^2``.
(The diagonal is AWQ's observation that channels with large activations are salient: Lin et al., 2023, section 3.1;
that random tokens serve almost as well as text was measured here: see "Accuracy" in the README.)

Only the decoder layer that runs has to be in memory, so a model can be quantized while it is being loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_fastpath.calibration import evaluating

# 256 tokens leave a fifth more perplexity, 4,096 no less: measured on SmolLM2-135M.
_SEQUENCES, _TOKENS, _SEED = 16, 64, 20260


def input_energy(
    model: Any, decoder_layers: str, names: Iterable[str], *, progress: bool = False
) -> dict[str, torch.Tensor]:
    """The mean square of each input channel of the linear layers ``names``, float32 ``(in_features,)`` each.

    Args:
        decoder_layers: dotted path of the list of decoder layers; a name outside of it reads the body's output.

    Raises:
        ValueError: the activations are not finite.
    """
    energy: dict[str, torch.Tensor] = {}
    walk = LayerWalk(model, decoder_layers)
    wanted = list(names)
    layers = range(len(walk.layers))
    for index in tqdm(layers, desc="Measuring activations", unit="layer", disable=not progress, leave=False):
        prefix = f"{decoder_layers}.{index}."
        energy |= walk.run_layer(index, [name for name in wanted if name.startswith(prefix)])
    head = [name for name in wanted if name not in energy]
    return energy | (dict.fromkeys(head, walk.run_head()) if head else {})


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


class LayerWalk:
    """Runs a model's body on random token ids (always the same ones), layer by layer, in the caller's time.

    ``run_layer(0)``, ``run_layer(1)``, ... in order, each returning the mean square of the input channels of the linear
    layers asked for, float32 ``(in_features,)``; then ``run_head()`` for what reads the body's output. What a layer
    passes on is computed with its weights as they are when it runs: replace them afterwards.

    The first position is left out of the means: what it holds depends on being first, not on the token.
    """

    def __init__(self, model: Any, decoder_layers: str) -> None:
        self.model = model
        self.layers: list[nn.Module] = list(model.get_submodule(decoder_layers))
        self.arguments: list[dict[str, Any]] = []
        self.hidden: torch.Tensor | None = None

    @torch.no_grad()
    def run_layer(self, index: int, names: Iterable[str] = ()) -> dict[str, torch.Tensor]:
        """Runs decoder layer ``index``.

        Args:
            names: full names of linear layers inside it.

        Raises:
            ValueError: their inputs are not finite.
        """
        with evaluating(self.model):
            if self.hidden is None:
                self._enter()
            with _recording(self.model, names) as energy:
                out = self.layers[index](self.hidden, **self.arguments[index])
        self.hidden = out[0] if isinstance(out, tuple) else out
        return _checked(energy, self.model)

    @torch.no_grad()
    def run_head(self) -> torch.Tensor:
        """The mean square of the output of the body, float32 ``(hidden_size,)``, once every layer has run."""
        assert self.hidden is not None
        with evaluating(self.model), self._stubbed():
            last = self.model.base_model(self._tokens(), use_cache=False)[0]
        return _checked({"the language-model head": _mean_square(last)}, self.model)["the language-model head"]

    def _tokens(self) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(_SEED)
        tokens = torch.randint(self.model.config.vocab_size, (_SEQUENCES, _TOKENS), generator=generator, device="cpu")
        return tokens.to(self.model.get_input_embeddings().weight.device)

    def _enter(self) -> None:
        """Finds what each layer is called with, and the first one's input, without running any."""
        try:
            with self._stubbed():
                self.model.base_model(self._tokens(), use_cache=False)
        except _Stop:
            pass

    @contextmanager
    def _stubbed(self) -> Iterator[None]:
        """Layers that only note their arguments; the last ends the pass, or returns what the walk has arrived at."""
        arrived, arguments = self.hidden, []
        originals = [vars(layer).get("forward") for layer in self.layers]

        def stub(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            arguments.append(kwargs)
            if arrived is None and len(arguments) == len(self.layers):
                self.arguments, self.hidden = arguments, hidden
                raise _Stop
            return hidden if arrived is None else arrived

        for layer in self.layers:
            layer.forward = stub
        try:
            yield
        finally:
            for layer, original in zip(self.layers, originals, strict=True):
                del layer.forward
                if original is not None:
                    layer.forward = original


def _mean_square(x: torch.Tensor) -> torch.Tensor:
    x = x[:, 1:].float()
    return x.square().mean(dim=tuple(range(x.dim() - 1)))


@contextmanager
def _recording(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    energy: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            energy[name] = _mean_square(args[0])

        return record

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield energy
    finally:
        for handle in handles:
            handle.remove()


def _checked(energy: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    for name, values in energy.items():
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"{name}: its inputs are not finite on random tokens in {model.dtype}; "
                "scale_search='mse' does not look at activations"
            )
    return energy
