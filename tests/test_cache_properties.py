"""Any sequence of what generate() does to a cache, against a simple model of what each format holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_formats import CACHES, Mirror
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fastpath import Int4KIVICache

BATCH = 3
STEP = st.one_of(
    st.tuples(st.just("append"), st.sampled_from([1, 1, 2, 5, 31, 64, 70, 130])),
    st.tuples(st.just("crop"), st.sampled_from([0, 1, 3, 40, 66])),
    st.tuples(st.just("reorder_cache"), st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH)),
    st.tuples(st.just("select"), st.lists(st.integers(0, BATCH - 1), min_size=1, max_size=4)),
    st.tuples(st.just("reset"), st.none()),
)


def run(mirror: Mirror, operation: str, argument: Any) -> None:
    if operation == "append":
        mirror.append(argument)
    elif operation == "crop":
        mirror.crop(min(argument, mirror.cache.get_seq_length()))
    elif operation == "reset":
        mirror.reset()
    else:
        rows = torch.tensor([row % mirror.batch for row in argument])
        if operation == "reorder_cache":
            rows = (rows.repeat(mirror.batch))[: mirror.batch]
            mirror.both("reorder_cache", rows)
        elif mirror.cache.get_seq_length():
            mirror.both("batch_select_indices", rows)
            mirror.batch = len(rows)


VARIANTS: dict[str, tuple[type, dict[str, Any]]] = {kind.__name__: (kind, {}) for kind in CACHES}
VARIANTS["int4, groups of 32"] = (Int4KIVICache, {"group_tokens": 32, "sinks": 0})
VARIANTS["int4, many sinks"] = (Int4KIVICache, {"sinks": 70, "rotate_keys": False})


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=25, deadline=None)
@given(steps=st.lists(STEP, min_size=1, max_size=14))
def test_any_sequence_of_operations(variant: str, steps: list[tuple[str, Any]]) -> None:
    kind, options = VARIANTS[variant]
    mirror = Mirror(kind, BATCH, **options)
    mirror.append(1)
    for operation, argument in steps:
        run(mirror, operation, argument)
        if mirror.cache.get_seq_length():
            mirror.check()
