"""Running a model's body on tokens one decoder layer at a time, so that layers can be replaced as the walk goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_fastpath.calibration import evaluating


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


class LayerWalk:
    """Runs a model's decoder layers on ``tokens``, in the caller's time.

    In the order of the layers, ``outputs(index)`` runs one and stays where it is, as often as wanted, and
    ``run_layer(index)`` runs it and moves on; ``head_inputs()`` after the last. Each layer is called with what the
    model calls it with (masks may differ from layer to layer), and computes with its weights as they are then.

    Holds the hidden states of all tokens. Besides the embeddings, only the layer that runs has to be in memory.

    Args:
        decoder_layers: dotted path of the list of decoder layers.
        tokens: int64 ``(n, T)``, on any device.
        batch: sequences in one forward pass.
    """

    def __init__(self, model: Any, decoder_layers: str, tokens: torch.Tensor, batch: int) -> None:
        self.model, self.tokens, self.batch = model, tokens, batch
        self.layers: list[nn.Module] = list(model.get_submodule(decoder_layers))
        # Of each batch: the hidden states, and each layer's other arguments.
        self.hidden: list[torch.Tensor] = []
        self.calls: list[list[tuple[list[Any], dict[str, Any]]]] = []

    @torch.no_grad()
    def outputs(self, index: int) -> Iterator[torch.Tensor]:
        """What decoder layer ``index`` puts out for each batch, ``(batch, T, hidden_size)``."""
        if not self.hidden:
            self._enter()
        layer = self.layers[index]
        for hidden, calls in zip(self.hidden, self.calls, strict=True):
            args, kwargs = calls[index]
            with evaluating(layer):
                out = layer(hidden, *args, **kwargs)
            yield out[0] if isinstance(out, tuple) else out

    def run_layer(self, index: int) -> None:
        """Runs decoder layer ``index`` and moves on to the next."""
        for batch, out in enumerate(self.outputs(index)):
            self.hidden[batch] = out

    @torch.no_grad()
    def head_inputs(self) -> Iterator[torch.Tensor]:
        """What the body puts out for each batch, ``(batch, T, hidden_size)``, once every layer has run."""
        for ids, hidden in zip(self.tokens.split(self.batch), self.hidden, strict=True):
            with self._each_layer_as(lambda *args, arrived=hidden, **kwargs: arrived):
                last = self._run_body(ids)[0]
            yield last

    def _enter(self) -> None:
        """Finds what each layer is called with, and the first one's input, without running any."""
        for ids in self.tokens.split(self.batch):
            seen: list[tuple[list[Any], dict[str, Any]]] = []

            def note(*args: Any, seen: list[Any] = seen, **kwargs: Any) -> torch.Tensor:
                hidden, *others = args if args else (kwargs.pop("hidden_states"),)
                seen.append((others, kwargs))
                if len(seen) == len(self.layers):
                    self.hidden.append(hidden)
                    raise _Stop  # what follows the layers may not be in memory yet
                return hidden

            with contextlib.suppress(_Stop), self._each_layer_as(note):
                self._run_body(ids)
            self.calls.append(seen)

    def _run_body(self, ids: torch.Tensor) -> Any:
        with evaluating(self.model):
            device = self.model.get_input_embeddings().weight.device
            return self.model.base_model(ids.to(device), use_cache=False)

    @contextmanager
    def _each_layer_as(self, stub: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Every decoder layer computes ``stub`` within it."""
        originals = [vars(layer).get("forward") for layer in self.layers]
        for layer in self.layers:
            layer.forward = stub
        try:
            yield
        finally:
            for layer, original in zip(self.layers, originals, strict=True):
                del layer.forward
                if original is not None:
                    layer.forward = original


@contextmanager
def watching_inputs(model: nn.Module, names: Iterable[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Within it, ``see(name, x)`` is called with each input ``x`` of the modules ``names``, before it is read."""

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda module, args: see(name, args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
