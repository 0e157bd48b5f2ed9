"""Sizes of products as the benchmarks' command lines write them."""

from __future__ import annotations


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """``"4096x28672,4096x4096"``: in features x out features, separated by commas."""
    try:
        pairs = [tuple(int(side) for side in item.lower().split("x")) for item in text.split(",")]
    except ValueError:
        pairs = [()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"shapes {text!r}: write them as 4096x28672,4096x4096 (in features x out features)")
    return tuple((k, n) for k, n in pairs)


def parse_rows(text: str) -> tuple[int, ...]:
    """``"1,16,64"``."""
    try:
        return tuple(int(item) for item in text.split(","))
    except ValueError:
        raise ValueError(f"rows {text!r}: write them as 1,16,64") from None
