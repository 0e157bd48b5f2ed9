"""Telling transformers about the names that this package brings."""

from __future__ import annotations

from hf_fastpath import generation, quantizer


def register() -> None:
    """Makes hf_fastpath known to transformers, for every model; idempotent.

    ``cache_implementation="fastpath_int8"`` (and so on), ``attn_implementation="fastpath"``, and packed
    checkpoints in ``from_pretrained``. ``patch_model`` and ``quantization_config=FastpathConfig()`` call it.
    """
    generation.register()
    quantizer.register_quantizer()
