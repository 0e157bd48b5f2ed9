"""The two small models that ship with the package, for families of which no checkpoint is small enough to ship."""

from __future__ import annotations

from pathlib import Path

from hf_fastpath.errors import Unsupported

FOLDER = Path(__file__).with_name("data") / "story_models"
HELD_OUT = FOLDER / "held_out.txt"  # stories that they were not trained on
FAMILIES = {"lfm2": FOLDER / "lfm2_moe", "gpt2": FOLDER / "gpt2"}


def folder(family: str) -> Path:
    """The checkpoint of a family.

    Raises:
        ValueError: no such family ships with the package.
        Unsupported: this install lacks its files.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r}: allowed are {', '.join(map(repr, FAMILIES))}")
    if not (FAMILIES[family] / "model.safetensors").is_file():
        raise Unsupported(f"{FAMILIES[family]} holds no model: this install was made without its data files")
    return FAMILIES[family]
