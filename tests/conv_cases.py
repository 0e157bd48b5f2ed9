"""Cases of the short convolution's ops, on a GPU (tests/gpu) and in the emulator alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from fused_cases import EPS, FusedInputs
from kernel_cases import ACCUMULATION, ROUNDING, SMALLEST, Target, Weight, assert_within, generator, poison

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MASKS = ("none", "left", "right", "holes", "one row", "nothing")


@dataclass(frozen=True)
class FusedStep:
    """What ``w4a16_short_conv`` takes beside a weight and its inputs of fused_cases.py."""

    state: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    mask: torch.Tensor | None

    @classmethod
    def make(cls, target: Target, rng: torch.Generator, taps: int, channels: int, dtype: torch.dtype) -> FusedStep:
        """Of 16 rows, every third of which is masked."""
        parts = (torch.randn(*shape, generator=rng) for shape in ((16, channels, taps), (channels, taps), (channels,)))
        state, weight, bias = (part.to(dtype).to(target.device) for part in parts)
        mask = torch.arange(16) % 3 != 1
        return cls(state, weight, bias if taps % 2 else None, mask.to(target.device) if channels > 16 else None)

    def run(self, inputs: FusedInputs, w: Weight, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The result of some rows, and their state afterwards."""
        x, state, mask = inputs.x[rows], self.state[rows].clone(), None if self.mask is None else self.mask[rows]
        packed = (x, w.qweight, w.scales, w.zeros, inputs.bias, inputs.norm_weight, EPS)
        return w.target.ops.w4a16_short_conv(*packed, state, self.weight, self.bias, mask, w.group), state

    def check(self, inputs: FusedInputs, w: Weight) -> None:
        """Against the product and the step, one after the other: the same bits, whatever the number of rows. One row
        has a kernel of its own (csrc/common/one_row.cuh), though not with groups of 32."""
        full = inputs.linear(w)
        for rows in (*(slice(0, m) for m in (16, 1, 2, 4, 5, 8, 9, 15)), slice(11, 12)):
            bcx = full[rows].clone() if w.group == 32 else inputs.rows(rows).linear(w)
            expected_state, mask = self.state[rows].clone(), None if self.mask is None else self.mask[rows]
            expected = w.target.ops.short_conv_step(bcx, expected_state, self.weight, self.bias, mask)
            out, state = self.run(inputs, w, rows)
            assert torch.equal(out, expected)
            assert torch.equal(state, expected_state)


@dataclass(frozen=True)
class ShortConvCase:
    """One call. offset: elements by which bcx lies off its alignment, with as many more between tokens and rows."""

    dtype: torch.dtype
    batch: int = 3
    tokens: int = 9
    channels: int = 40
    taps: int = 3
    mask: str = "none"
    biased: bool = True
    offset: int = 0

    def make_mask(self) -> torch.Tensor | None:
        """Rows differ; of a batch of one the row is padded too."""
        t, row = torch.arange(self.tokens), torch.arange(self.batch)[:, None] + (self.batch == 1)
        return {
            "none": None,
            "left": t >= row * self.tokens // 3,
            "right": t < self.tokens - row * self.tokens // 3,
            "holes": (t * 7 + row * 3) % 5 > 1,
            "one row": (row % 2 == 0).expand(-1, self.tokens),
            "nothing": torch.zeros(self.batch, self.tokens, dtype=torch.bool),
        }[self.mask]

    def inputs(self) -> dict[str, Any]:
        rng = generator(self.batch, self.tokens, self.channels, self.taps, DTYPES.index(self.dtype))

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=rng).to(self.dtype)

        token = 3 * self.channels + self.offset
        sizes = (self.batch, self.tokens, 3 * self.channels)
        buffer = torch.full((self.batch * (self.tokens * token + self.offset) + self.offset,), float("nan"))
        strides = (self.tokens * token + self.offset, token, 1)
        bcx = buffer.to(self.dtype).as_strided(sizes, strides, self.offset)
        bcx.copy_(randn(*sizes))
        mask = self.make_mask()
        if mask is not None:
            bcx[~mask] = float("nan")  # whatever padding holds
        return {
            "bcx": bcx,
            "state": randn(self.batch, self.channels, self.taps),
            "weight": randn(self.channels, self.taps),
            "bias": randn(self.channels) if self.biased else None,
            "mask": mask,
        }

    def check(self, target: Target) -> None:
        """Against float64, and the state bit by bit."""
        inputs = self.inputs()
        before, expected_state = inputs["state"].clone(), new_state(**inputs)
        moved = {name: to_device(x, target.device) for name, x in inputs.items()}
        address = moved["state"].data_ptr()
        poison(self.batch, self.tokens, self.channels, dtype=self.dtype, device=target.device)
        if self.tokens == 1:
            mask = moved["mask"]
            step = moved | {"bcx": moved["bcx"][:, 0], "mask": None if mask is None else mask[:, 0]}
            out = target.ops.short_conv_step(*step.values()).unsqueeze(1)
        else:
            out = target.ops.short_conv_prefill(*moved.values())
        assert out.shape == (self.batch, self.tokens, self.channels)
        assert out.dtype is self.dtype
        assert out.is_contiguous()
        assert torch.equal(moved["state"].cpu(), expected_state)
        assert moved["state"].data_ptr() == address
        check_out(out.cpu(), **(inputs | {"state": before}))


def to_device(x: torch.Tensor | None, device: str) -> torch.Tensor | None:
    """With the strides and the offset from an aligned address that it has."""
    if x is None or x.device.type == device:
        return x
    elements = x.untyped_storage().nbytes() // x.element_size()
    storage = x.as_strided((elements,), (1,), 0).to(device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def all_inputs(bcx: torch.Tensor, state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What the convolution goes over, ``(batch, H, L + T)``: the state, then B x rounded, 0 for masked tokens."""
    gate, _, x = bcx.transpose(1, 2).chunk(3, dim=1)
    gated = (gate.double() * x.double()).to(bcx.dtype)
    if mask is not None:
        gated = torch.where(mask[:, None], gated, 0)
    return torch.cat((state, gated), dim=2)


def new_state(bcx: torch.Tensor, state: torch.Tensor, mask: torch.Tensor | None, **_: Any) -> torch.Tensor:
    """Row by row: the L inputs up to the last token that is not masked."""
    inputs, taps = all_inputs(bcx, state, mask), state.shape[2]
    rows = []
    for row in range(bcx.shape[0]):
        real = range(bcx.shape[1]) if mask is None else mask[row].nonzero().flatten().tolist()
        end = real[-1] + 1 if len(real) else 0
        rows.append(inputs[row, :, end : end + taps])
    return torch.stack(rows)


def check_out(
    out: torch.Tensor,
    bcx: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> None:
    """Of the tokens that are not masked: the very bits where rounding the sum does not hang on its order, elsewhere
    within a bound that follows each rounding."""
    tokens, (_, taps) = bcx.shape[1], weight.shape
    windows = all_inputs(bcx, state, mask).double().unfold(2, taps, 1)[:, :, 1:]
    products = windows * weight.double()[:, None]
    sums, magnitude = products.sum(-1), products.abs().sum(-1)
    if bias is not None:
        sums, magnitude = sums + bias.double()[:, None], magnitude + bias.double().abs()[:, None]
    error = (taps + 1) * ACCUMULATION * magnitude  # float32 sums; the constant is generous to those
    gate = bcx[..., weight.shape[0] : 2 * weight.shape[0]].transpose(1, 2).double()
    real = torch.ones(bcx.shape[0], tokens, dtype=torch.bool) if mask is None else mask
    real = real[:, None].expand(-1, weight.shape[0], -1)
    certain = real & ((sums - error).to(out.dtype) == (sums + error).to(out.dtype))
    got = out.transpose(1, 2)
    assert torch.equal(got[certain], (gate * sums.to(out.dtype).double()).to(out.dtype)[certain])
    if out.dtype is not torch.float32 and real.any():
        assert certain.double().mean() > 0.9 * real.double().mean()
    rounding = {**ROUNDING, torch.float32: 2.0**-24}[out.dtype]
    error = error + rounding * (sums.abs() + error) + SMALLEST
    exact = gate * sums
    bound = gate.abs() * error + 1.01 * rounding * (exact.abs() + gate.abs() * error) + SMALLEST
    assert_within(got[real], exact[real], bound[real])
