"""The packed layout, against its description written out as loops, and by properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fastpath import packing


def codes(rows: int, cols: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 16, (rows, cols), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def read_nibble(qweight: torch.Tensor, row: int, col: int) -> int:
    """One code, found by the formula in packing.py read backwards."""
    tile_row, r, tile_col, c = row // 16, row % 16, col // 64, col % 64
    half, within = c // 32, c % 32
    t, word, offset = within // 8, 2 * half + (within % 8) // 4, within % 4
    lane = 4 * (r % 8) + t
    i, h = 2 * (offset // 2) + r // 8, offset % 2
    return (int(qweight[tile_row, tile_col, lane, word]) >> (4 * (i + 4 * h))) & 15


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 70), cols=st.integers(1, 9).map(lambda n: 32 * n), seed=st.integers(0, 2**31))
def test_unpack_inverts_pack(rows: int, cols: int, seed: int) -> None:
    q = codes(rows, cols, seed)
    packed = packing.pack_int4(q)
    assert packed.shape == (-(-rows // 16), -(-cols // 64), 32, 4)
    assert packed.dtype == torch.int32
    assert torch.equal(packing.unpack_int4(packed, rows, cols), q)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), cols=st.integers(1, 5).map(lambda n: 32 * n), data=st.data())
def test_every_code_lies_where_the_description_says(rows: int, cols: int, data: st.DataObject) -> None:
    q = codes(rows, cols, seed=rows * cols)
    packed = packing.pack_int4(q)
    row, col = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    assert read_nibble(packed, row, col) == int(q[row, col])


def test_padding_is_the_symmetric_zero() -> None:
    packed = packing.pack_int4(codes(17, 32, 0))
    everything = packing.unpack_int4(packed, 32, 64)
    assert (everything[17:] == packing.SYMMETRIC_ZERO).all()
    assert (everything[:, 32:] == packing.SYMMETRIC_ZERO).all()


@settings(max_examples=40, deadline=None)
@given(tiles=st.integers(2, 5), first=st.integers(0, 3), cols=st.sampled_from([32, 96, 128]), zeros=st.booleans())
def test_row_slices_are_views(tiles: int, first: int, cols: int, zeros: bool) -> None:
    first = min(first, tiles - 1)
    rows, groups = 16 * tiles, cols // 32
    generator = torch.Generator().manual_seed(tiles)
    qweight = packing.pack_int4(codes(rows, cols, 3))
    scales = packing.pack_per_group(torch.rand(rows, groups, generator=generator).bfloat16(), 0.0)
    zero = packing.pack_per_group(codes(rows, groups, 4), 8) if zeros else None
    whole = packing.dequantize(qweight, scales, zero, cols, rows, 32)
    part = packing.dequantize(
        qweight[first:], scales[first:], None if zero is None else zero[first:], cols, rows - 16 * first, 32
    )
    assert qweight[first:].data_ptr() == qweight.data_ptr() + first * qweight[0].nbytes
    assert torch.equal(part, whole[16 * first :])


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), groups=st.integers(1, 6))
def test_per_group_values_round_trip(rows: int, groups: int) -> None:
    values = torch.rand(rows, groups)
    stored = packing.pack_per_group(values, 0.0)
    assert stored.shape == (-(-rows // 16), groups, 16)
    assert torch.equal(packing.unpack_per_group(stored, rows), values)


def test_dequantize_is_code_minus_zero_times_scale() -> None:
    q, zero = codes(20, 64, 5), codes(20, 2, 6)
    scale = torch.rand(20, 2).half()
    got = packing.dequantize(
        packing.pack_int4(q), packing.pack_per_group(scale, 0.0), packing.pack_per_group(zero, 8), 64, 20, 32
    )
    exact = (q.double() - zero.double().repeat_interleave(32, 1)) * scale.double().repeat_interleave(32, 1)
    assert got.dtype == torch.float16
    assert torch.equal(got, exact.half())  # one rounding


@pytest.mark.parametrize("bad", [torch.zeros(4, 33), torch.zeros(4), torch.full((4, 32), 16), torch.full((4, 32), -1)])
def test_bad_codes_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="pack_int4 needs"):
        packing.pack_int4(bad.long())
