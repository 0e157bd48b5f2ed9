"""Inputs and checks of the ops that append to a cache, on a GPU (tests/gpu) and in the emulator alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kernel_cases import ACCUMULATION, ROUNDING, SMALLEST, Target, assert_within, generator

from hf_fastpath.caches import Fp8KVCache, H2OKVCache, Int4KIVICache, Int8KVCache, StaticKVCache
from hf_fastpath.ops import QKTransform
from hf_fastpath.ops._append import NOTHING, call, rope
from hf_fastpath.ops._rotation import rotation_matrix

SENTINEL = 42
FORMATS: dict[str, Any] = {
    "static": StaticKVCache,
    "int8": Int8KVCache,
    "fp8": Fp8KVCache,
    "int4": Int4KIVICache,
    "h2o": H2OKVCache,
}


@dataclass(frozen=True)
class Case:
    """A layer's storage, and what is appended to it in steps of ``steps`` tokens."""

    cache: str
    dtype: torch.dtype
    dim: int = 64
    batch: int = 2
    kv_heads: int = 2
    ratio: int = 2  # query heads a KV head; 0: no query
    steps: tuple[int, ...] = (5, 1, 1)
    norm: bool = False
    rotary: int = 0
    rotate: bool = False
    vectors: bool = True  # False: inputs whose rows are aligned to one element only
    shared_angles: bool = False  # one row of cosines and sines for the batch
    options: tuple[tuple[str, Any], ...] = ()

    def new_store(self, device: str) -> Store:
        """Everything a sentinel but the counts; three tokens more than are appended, in whole blocks."""
        layer = FORMATS[self.cache].layer_class(**dict(self.options))
        key = torch.empty(self.batch, self.kv_heads, 1, self.dim, dtype=self.dtype)
        capacity = -(-(sum(self.steps) + 3) // 64) * 64
        return Store.like(layer.allocate(key, key, capacity), device)

    def rule(self) -> tuple[Any, ...]:
        """What the op takes behind the storage."""
        options = dict(self.options)
        return (options["window"], options["sinks"]) if self.cache == "h2o" else ()

    def inputs(self, step: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, QKTransform]:
        """Key, value, query and transform of a step."""
        rng = generator(step, self.dim, self.batch, len(self.steps))
        tokens, heads = self.steps[step], self.kv_heads
        rows = [as_projected(rng, self.batch, tokens, n, self.dim, self.dtype) for n in (heads, heads)]
        rows += [as_projected(rng, self.batch, tokens, heads * max(self.ratio, 1), self.dim, self.dtype)]
        key, value, query = (x.to(device) if self.vectors else shifted(x.to(device)) for x in rows)
        return key, value, query if self.ratio else None, self.transform(rng, tokens, device)

    def transform(self, rng: torch.Generator, tokens: int, device: str) -> QKTransform:
        weights = (torch.rand(2, self.dim, generator=rng) + 0.5).to(self.dtype).to(device)
        rows = 1 if self.shared_angles else self.batch
        angles = torch.rand(rows, tokens, self.rotary // 2, generator=rng).repeat(1, 1, 2).to(device) * 6
        turned = (angles.cos().to(self.dtype), angles.sin().to(self.dtype)) if self.rotary else (None, None)
        q_norm, k_norm = (weights[0].clone(), weights[1].clone()) if self.norm else (None, None)
        return QKTransform(q_norm, k_norm, 1e-5, *turned, self.rotate)

    def check(self, target: Target) -> None:
        """The reference's bits in the storage and beside it, step by step.

        What sums in another order than the reference (norm, rotation) is checked against float64; then the query's
        result for the same rows, which has the same bits, stands for the key.
        """
        store, expected = self.new_store(target.device), self.new_store("cpu").views
        name = f"kv_{self.cache}_append"
        for step in range(len(self.steps)):
            key, value, query, transform = self.inputs(step, target.device)
            exact_key = key
            if self.norm or self.rotate:
                same = QKTransform(**vars(transform) | {"q_norm": transform.k_norm})
                scratch = self.new_store(target.device)
                exact_key = call(getattr(target.ops, name), key, value, (*scratch.views, *self.rule()), same, key)
                assert exact_key is not None
                check_transformed(exact_key, key, transform.k_norm, transform)
            got = call(getattr(target.ops, name), key, value, (*store.views, *self.rule()), transform, query)
            on_cpu = QKTransform(
                **{k: x.cpu() if isinstance(x, torch.Tensor) else x for k, x in vars(transform).items()}
            )
            reference = getattr(torch.ops.hf_fastpath, name)
            plain = on_cpu if exact_key is key else NOTHING
            call(reference, exact_key.cpu(), value.cpu(), (*expected, *self.rule()), plain, None)
            store.check(expected)
            if query is not None and got is not None:
                check_transformed(got, query, transform.q_norm, transform)


def check_uncounted(target: Target, tokens: int) -> None:
    """Tokens that nobody counts go where the first ones of an empty cache do."""
    case = Case("static", torch.bfloat16, norm=True, rotary=64, steps=(tokens,))
    counted, uncounted = case.new_store(target.device), case.new_store(target.device)
    key, value, query, transform = case.inputs(0, target.device)
    append = target.ops.kv_static_append
    want = call(append, key, value, counted.views, transform, query)
    got = call(append, key, value, (*uncounted.views[:2], None), transform, query)
    assert got is not None
    assert want is not None
    assert torch.equal(got, want)
    assert int(counted.views[2].min()) == tokens
    uncounted.check([*(view.cpu() for view in counted.views[:2]), torch.zeros_like(counted.views[2]).cpu()])


@dataclass
class Store:
    """The storage of one layer inside larger buffers."""

    views: list[torch.Tensor]
    buffers: list[torch.Tensor]

    @staticmethod
    def like(tensors: Sequence[torch.Tensor], device: str) -> Store:
        """All of it a sentinel but the last tensor, the count, which is 0."""
        views, buffers = [], []
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            buffers.append(torch.full((size + 64,), SENTINEL, dtype=torch.uint8, device=device))
            views.append(buffers[-1][32 : 32 + size].view(tensor.dtype).view(tensor.shape))
        views[-1].zero_()
        return Store(views, buffers)

    def check(self, expected: Sequence[torch.Tensor]) -> None:
        """These bits, the sentinel where no token belongs included, and the sentinel around."""
        for number, (got, want) in enumerate(zip(self.views, expected, strict=True)):
            assert_same_bits(got.cpu(), want, f"storage tensor {number}")
        for buffer in self.buffers:
            assert bool((buffer[:32] == SENTINEL).all())
            assert bool((buffer[-32:] == SENTINEL).all())


def assert_same_bits(got: torch.Tensor, want: torch.Tensor, what: str = "") -> None:
    """The same bits, but that a NaN may be any NaN."""
    assert got.shape == want.shape
    a, b = (x.contiguous().view(torch.uint8).view(*x.shape, x.element_size()) for x in (got, want))
    different = (a != b).any(-1)
    if want.dtype.is_floating_point:
        different &= ~(got.float().isnan() & want.float().isnan())
    assert not bool(different.any()), (
        f"{what}: {int(different.sum())} of {want.numel()} differ, first at {different.nonzero()[0].tolist()}"
    )


def check_transformed(got: torch.Tensor, x: torch.Tensor, norm: torch.Tensor | None, transform: QKTransform) -> None:
    """Queries or keys: the reference's bits after RoPE alone, else within the roundings of float64."""
    assert got.transpose(1, 2).is_contiguous()
    assert got.shape == x.shape
    turned = transform.cos is not None and transform.sin is not None
    if norm is None and not transform.rotate:
        want = rope(x, transform.cos, transform.sin) if turned else x
        assert_same_bits(got.cpu(), want.contiguous().cpu(), "query")
        return
    rounding = ROUNDING[x.dtype] * 1.01
    exact, error = x.double(), torch.zeros_like(x, dtype=torch.float64)
    if norm is not None:
        exact = rms_norm_float64(exact, norm.double(), transform.eps)
        error = (2 * rounding + 2**-20) * exact.abs() + SMALLEST  # two roundings; the sum and the root, a few of 2^-24
    if turned:
        cos, sin = transform.cos.double(), transform.sin.double()  # type: ignore[union-attr]
        magnitude = rope(exact.abs() + error, cos.abs(), -sin.abs())  # rope() subtracts in its first half
        magnitude = torch.maximum(magnitude, rope(exact.abs() + error, cos.abs(), sin.abs()))
        spread = torch.maximum(rope(error, cos.abs(), -sin.abs()), rope(error, cos.abs(), sin.abs()))
        exact, error = rope(exact, cos, sin), spread + 2 * rounding * magnitude + 3 * SMALLEST
    if transform.rotate:
        matrix = rotation_matrix(x.shape[-1]).double().to(x.device)
        size = (exact.abs() + error) @ matrix.abs()
        error = error @ matrix.abs() + 16 * ACCUMULATION * size + SMALLEST
        exact = exact @ matrix
        error = error + rounding * (exact.abs() + error)
    assert_within(got, exact, error)


def rms_norm_float64(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def as_projected(rng: torch.Generator, batch: int, tokens: int, heads: int, dim: int, dtype: Any) -> torch.Tensor:
    """``(B, heads, q, D)`` as a projection leaves it: ``(B, q, heads, D)`` transposed. Tokens differ in size."""
    size = torch.randn(batch, tokens, heads, 1, generator=rng).exp()
    return (torch.randn(batch, tokens, heads, dim, generator=rng) * size).to(dtype).transpose(1, 2)


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same at an odd offset with odd strides, NaN around it: the path without vector loads."""
    batch, heads, tokens, dim = x.shape
    row = heads * dim + 3
    buffer = torch.full((batch * tokens * row + 1,), float("nan"), dtype=x.dtype, device=x.device)
    view = buffer.as_strided(x.shape, (tokens * row, dim, row, 1), 1)
    view.copy_(x)
    return view
