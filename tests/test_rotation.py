"""The rotation of keys: orthonormal, its own inverse, and worth having."""

from __future__ import annotations

import pytest
import torch

from hf_fastpath.ops._rotation import rotate, rotation_matrix
from hf_fastpath.ops.kv_int8_append import quantize_int8


@pytest.mark.parametrize("dim", [1, 40, 48, 64, 96, 128])
def test_orthonormal_symmetric_and_mixing(dim: int) -> None:
    matrix = rotation_matrix(dim).double()
    torch.testing.assert_close(matrix @ matrix, torch.eye(dim).double(), rtol=0, atol=1e-6)
    assert torch.equal(matrix, matrix.T)
    assert float(matrix.abs().max()) <= (dim & -dim) ** -0.5 + 1e-7


def test_products_of_queries_and_keys_stay() -> None:
    query, key = torch.randn(2, 5, 96).double()
    torch.testing.assert_close(rotate(query) @ rotate(key).T, query @ key.T, rtol=0, atol=1e-5)


def test_the_error_of_keys_with_large_channels_is_halved() -> None:
    torch.manual_seed(0)
    keys = torch.randn(1, 1, 500, 64)
    keys[..., [5, 37]] *= 12

    def error(x: torch.Tensor) -> float:
        q, scale = quantize_int8(x)
        return float((q.float() * scale.float().unsqueeze(-1) - x).square().mean().sqrt())

    assert error(rotate(keys)) < 0.5 * error(keys)
    assert error(rotate(keys.bfloat16()).float()) < 0.6 * error(keys)


def test_a_matrix_made_in_inference_mode_serves_training() -> None:
    rotation_matrix.cache_clear()
    with torch.inference_mode():
        rotate(torch.randn(3, 64))
    x = torch.randn(3, 64, requires_grad=True)
    rotate(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=0, atol=1e-5)
