"""Language-model heads that share their weight with the embeddings: taking them apart, and together again."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tie:
    """How the head ``name`` was tied: what :func:`tie_again` needs."""

    name: str
    keys: dict[str, str]  # model.all_tied_weights_keys


def untie(model: Any, name: str) -> Tie:
    """Makes the model forget that head ``name`` shares the embeddings' weight.

    Otherwise ``model.tie_weights()``, which lm-eval and others call, would hang the embeddings onto the packed head.
    """
    tie = Tie(name, model.all_tied_weights_keys)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {key: to for key, to in tie.keys.items() if not key.startswith(f"{name}.")}
    return tie


def tie_again(model: Any, tie: Tie) -> None:
    """Undoes :func:`untie`, once the original head is back in its place."""
    model.config.tie_word_embeddings = True
    model.all_tied_weights_keys = tie.keys
    model.get_submodule(tie.name).weight = model.get_input_embeddings().weight
