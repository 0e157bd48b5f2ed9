"""What a model family's patch says: data, no code."""

from __future__ import annotations

import dataclasses

from torch import nn


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one model family is patched.

    Attributes:
        family: the name shown in reports and errors.
        model_class: the transformers class (with a language-model head) that this recipe fits.
        linears: names of linear layers relative to a decoder layer, such as ``"self_attn.q_proj"``; all are replaced.
        decoder_layers: dotted path of the list of decoder layers in the model.
    """

    family: str
    model_class: type[nn.Module]
    linears: tuple[str, ...]
    decoder_layers: str = "model.layers"
