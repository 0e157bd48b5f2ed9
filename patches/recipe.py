"""What a model family's patch says: data, no code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import nn


@dataclasses.dataclass(frozen=True)
class Block:
    """What a decoder layer consists of, so that a family is known by its structure and not only by its name.

    Names are relative to a decoder layer. A layer that holds weights anywhere else is another kind of block.

    Attributes:
        norms: normalizations with one weight of ``hidden_size``.
        head_norms: normalizations of each head's queries and keys, with one weight of ``head_dim``; all or none.
    """

    norms: tuple[str, ...]
    head_norms: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one model family is patched.

    Attributes:
        family: the name shown in reports and errors.
        model_classes: transformers classes (with a language-model head) that this recipe fits, all of them tested.
        linears: names of linear layers relative to a decoder layer, such as ``"self_attn.q_proj"``; those that a layer
            has are replaced. Layers may differ: of a submodule's names a layer has all or none.
        decoder_layers: dotted path of the list of decoder layers in the model.
        experts: modules of a decoder layer that hold the experts of a mixture, with their class: SwiGLU experts with
            parameters ``gate_up_proj`` ``(E, 2 I, H)`` and ``down_proj`` ``(E, H, I)``, called with the hidden states
            ``(tokens, H)``, the chosen experts and their shares, both ``(tokens, top_k)``.
        modules: classes of the family's modules, each with what its modules become while our caches are in use: a
            subclass without state of its own, so that changing a module's class is all it takes, and to undo it too.
            Where a module may not be fit for it, the subclass has a ``why_not(module)``, which says why or "". One that
            keeps what it can make anew has ``prepare()``, which makes it at once, and ``forget()``.
        quantized_modules: the same for classes whose modules become another one where layers were packed and run on
            kernels, since stock's bits are not what is wanted there.
        single_modules: the same for modules of these dotted names only.
        capturable: whether the decode step of ``model_classes`` runs as a CUDA graph: nothing in it waits for the GPU.
        block: if given, the recipe also fits other models whose decoder layers all have this structure.
    """

    family: str
    model_classes: tuple[type[nn.Module], ...]
    linears: tuple[str, ...]
    decoder_layers: str = "model.layers"
    experts: Mapping[str, type[nn.Module]] = dataclasses.field(default_factory=dict)
    modules: Mapping[type[nn.Module], type[nn.Module]] = dataclasses.field(default_factory=dict)
    quantized_modules: Mapping[type[nn.Module], type[nn.Module]] = dataclasses.field(default_factory=dict)
    single_modules: Mapping[str, Mapping[type[nn.Module], type[nn.Module]]] = dataclasses.field(default_factory=dict)
    block: Block | None = None
    capturable: bool = False
