"""The packed int8 layout, against its description read backwards, and by properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fastpath import packing_int8


def values(rows: int, cols: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (rows, cols), dtype=torch.int8, generator=generator)


def read_byte(qweight: torch.Tensor, row: int, col: int) -> int:
    """One value, found by the formula in packing_int8.py read backwards."""
    r, c = row % 16, col % 32
    lane = 4 * (r % 8) + c // 8
    word, b = (c % 8) // 2, r // 8 + 2 * (c % 2)
    return int(qweight[row // 16, col // 32, lane, 4 * word + b])


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 70), cols=st.integers(1, 9).map(lambda n: 32 * n), seed=st.integers(0, 2**31))
def test_unpack_inverts_pack(rows: int, cols: int, seed: int) -> None:
    q = values(rows, cols, seed)
    packed = packing_int8.pack_int8(q)
    assert packed.shape == (-(-rows // 16), cols // 32, 32, 16)
    assert packed.dtype == torch.int8
    assert packed.is_contiguous()
    assert torch.equal(packing_int8.unpack_int8(packed, rows), q)
    assert not packing_int8.unpack_int8(packed, 16 * packed.shape[0])[rows:].any()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), cols=st.integers(1, 5).map(lambda n: 32 * n), data=st.data())
def test_every_byte_lies_where_the_description_says(rows: int, cols: int, data: st.DataObject) -> None:
    q = values(rows, cols, seed=rows * cols)
    packed = packing_int8.pack_int8(q)
    row, col = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    assert read_byte(packed, row, col) == int(q[row, col])


@settings(max_examples=40, deadline=None)
@given(tiles=st.integers(2, 5), first=st.integers(0, 3), cols=st.sampled_from([32, 96, 128]))
def test_row_slices_are_views(tiles: int, first: int, cols: int) -> None:
    first = min(first, tiles - 1)
    packed = packing_int8.pack_int8(values(16 * tiles, cols, 3))
    scales = torch.rand(16 * tiles, generator=torch.Generator().manual_seed(tiles)).bfloat16()
    whole = packing_int8.dequantize_int8(packed, scales, 16 * tiles)
    part = packing_int8.dequantize_int8(packed[first:], scales[16 * first :], 16 * (tiles - first))
    assert packed[first:].data_ptr() == packed.data_ptr() + first * packed[0].nbytes
    assert torch.equal(part, whole[16 * first :])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dequantize_is_value_times_scale_rounded_once(dtype: torch.dtype) -> None:
    q, scale = values(20, 64, 5), torch.rand(20).to(dtype)
    got = packing_int8.dequantize_int8(packing_int8.pack_int8(q), scale, 20)
    assert got.dtype == dtype
    assert torch.equal(got, (q.double() * scale.double()[:, None]).to(dtype))


@pytest.mark.parametrize(
    "bad", [torch.zeros(4, 33, dtype=torch.int8), torch.zeros(4, dtype=torch.int8), torch.zeros(4, 32)]
)
def test_bad_values_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="pack_int8 needs a 2-D int8 tensor with columns a multiple of 32, got"):
        packing_int8.pack_int8(bad)
