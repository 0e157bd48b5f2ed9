"""The ``hf_fastpath::`` operator library. Each op file defines its schema, CPU implementation and fake here.

``torch.library.Library`` with Python implementations costs 3 to 4 us a call, ``torch.library.custom_op`` 27 to 39 us,
which the decode path cannot afford. CUDA implementations come from the compiled library (see ``build.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "hf_fastpath"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # must stay alive as long as the ops are used
SCHEMAS: dict[str, str] = {}
IN_PYTHON: set[str] = set()  # ops whose CUDA implementation is Python


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    on_cuda: Callable[..., Any] | None = None,
) -> Any:
    """Defines an op from its schema, with ``reference`` as its CPU implementation; returns the callable op.

    on_cuda: an implementation for CUDA in terms of other ops, instead of one in the compiled library.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    SCHEMAS[name] = schema
    if on_cuda is not None:
        LIBRARY.impl(name, on_cuda, "CUDA")
        IN_PYTHON.add(name)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
