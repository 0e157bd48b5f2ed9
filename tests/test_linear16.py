"""Products of plain 16-bit weights: the references, and a model's last norm and head on them."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import Target, generator
from linear16_cases import make_inputs
from tiny_models import FAMILIES, logits, long_batch, make_llama
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_fastpath import fastpath_report, heuristics, ops, patch_model, unpatch_model
from hf_fastpath.modules import DecodeHead, DecodeNorm, decode_head
from hf_fastpath.modules.logits_target import logits_go_to
from hf_fastpath.ops.linear_16bit import normalized_product

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
QUICK = {"progress": False, "scale_search": "absmax"}
IDS = torch.randint(0, 199, (2, 9), generator=torch.Generator().manual_seed(1))
Calls = list[tuple[Any, ...]]


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_references(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, with x normalized by transformers' own norm."""
    inputs = make_inputs(Target("cpu", ops), generator(1), 64, 96, dtype, norm=True, residual=True, rows=3)
    x, w, bias, residual = inputs.x, inputs.weight, inputs.bias, inputs.residual
    assert bias is not None
    assert residual is not None
    norm = LlamaRMSNorm(96, eps=1e-3).to(dtype).requires_grad_(False)
    norm.weight.copy_(inputs.norm_weight)
    assert torch.equal(ops.rms_norm(x, norm.weight, 1e-3), norm(x))
    tolerance = 3 * max(torch.finfo(dtype).eps, 2e-7)  # the result is rounded, and in swiglu two values in between
    for weight, rows in ((norm.weight, norm(x)), (None, x)):
        product = rows.double() @ w.double().T + bias.double()
        for band in (7, 4096):
            monkeypatch.setitem(normalized_product.__globals__, "BAND_ROWS", band)
            got = ops.linear_16bit(x, w, bias, weight, 1e-3, residual)
            assert got.dtype is dtype
            assert relative_error(got, product + residual.double()) < tolerance
        assert relative_error(got, product) > tolerance  # the residual counts
        assert torch.equal(ops.linear_16bit(x, w, bias, weight, 1e-3, residual, float32_out=True), got.float())
        assert relative_error(ops.linear_16bit(x, w, None, weight, 1e-3, None), product - bias.double()) < tolerance
        gate, up = product.chunk(2, dim=-1)
        got = ops.linear_16bit_swiglu(x, w, bias, weight, 1e-3)
        assert relative_error(got, nn.functional.silu(gate) * up) < tolerance
        assert relative_error(got, nn.functional.silu(up) * gate) > tolerance  # which half is the gate counts


def test_torchs_checks_of_schemas_and_fakes() -> None:
    inputs = make_inputs(Target("cpu", ops), generator(2), 32, 64, torch.bfloat16, norm=True, residual=True, rows=3)
    product = (inputs.x, inputs.weight, inputs.bias, inputs.norm_weight, 1e-5)
    for wide in (False, True):
        torch.library.opcheck(torch.ops.hf_fastpath.linear_16bit.default, (*product, inputs.residual, wide))
    torch.library.opcheck(torch.ops.hf_fastpath.linear_16bit_swiglu.default, product)
    torch.library.opcheck(torch.ops.hf_fastpath.rms_norm.default, (inputs.x, inputs.norm_weight, 1e-5))


def test_what_the_kernels_take() -> None:
    def supports(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, rows: int = 16, k: int = 4096,
                 capability: tuple[int, int] = (9, 0)) -> bool:  # fmt: skip
        return heuristics.linear_16bit_supports(device, dtype, rows, k, capability)

    assert supports()
    assert supports(dtype=torch.float16, rows=1, k=32, capability=(8, 0))
    assert not any((supports("cpu"), supports(dtype=torch.float32), supports(rows=17), supports(rows=0)))
    assert not any((supports(k=40), supports(k=0), supports(capability=(8, 9)), supports(capability=(12, 0))))
    assert heuristics.rms_norm_supports("cuda", torch.float16, 8)
    assert not heuristics.rms_norm_supports("cuda", torch.float16, 12)
    assert not heuristics.rms_norm_supports("cuda", torch.float32, 8)


@pytest.fixture
def head_calls(monkeypatch: pytest.MonkeyPatch, count_calls: Callable[[Any, str], Calls]) -> tuple[Calls, Calls]:
    """The CPU goes the ways that a GPU goes, on the references; the calls of the head's op and of the norm's."""
    monkeypatch.setattr(heuristics, "linear_16bit_supports", lambda device, dtype, rows, k, capability: 0 < rows <= 16)
    monkeypatch.setattr(heuristics, "rms_norm_supports", lambda device, dtype, columns: True)
    return count_calls(decode_head, "linear_16bit"), count_calls(decode_head, "rms_norm")


def patched(model: Any, **options: Any) -> Any:
    return patch_model(model, **(QUICK | options))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ours", [True, False])
def test_logits_are_written_where_they_are_wanted(
    ours: bool, bias: bool, head_calls: tuple[Calls, Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not ours:
        monkeypatch.setattr(heuristics, "linear_16bit_supports", lambda *args: False)
    head = nn.Linear(64, 48, bias=bias).requires_grad_(False)
    x, buffer = torch.randn(3, 1, 64), torch.full((5, 48), torch.nan)
    expected = head(x)
    head.__class__ = DecodeHead
    with torch.no_grad():
        with logits_go_to(buffer[:3]):
            out = head(x)
            assert head(x[:2]).data_ptr() != buffer.data_ptr()  # other rows
            with logits_go_to(None):
                assert head(x).data_ptr() != buffer.data_ptr()
        assert out.data_ptr() == buffer.data_ptr()
        assert out.shape == (3, 1, 48)
        torch.testing.assert_close(out, expected)
        assert buffer[3:].isnan().all()
        for wrong in (buffer[:3].double(), buffer[:3, :40]):
            with logits_go_to(wrong):
                assert head(x).data_ptr() != wrong.data_ptr()
        assert head(x).data_ptr() != buffer.data_ptr()  # no longer offered
    with logits_go_to(buffer[:3]):
        assert head(x.requires_grad_()).requires_grad  # gradients


def test_another_thread_does_not_write_there(head_calls: tuple[Calls, Calls]) -> None:
    head, buffer, found = nn.Linear(64, 48), torch.zeros(3, 48), []
    head.__class__ = DecodeHead

    @torch.no_grad()
    def call() -> None:
        found.append(head(torch.randn(3, 1, 64)).data_ptr() == buffer.data_ptr())

    with logits_go_to(buffer):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        call()
    assert found == [False, True]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "lfm2", "lfm2_moe", "gpt2"])
def test_steps_end_in_our_ops(family: str, head_calls: tuple[Calls, Calls]) -> None:
    """In float32 only the order of sums differs."""
    model, inputs = patched(FAMILIES[family](torch.float32)), long_batch((0, 5))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "output_logits": True}
    out = model.generate(**inputs, **options, return_dict_in_generate=True)
    heads, norms = head_calls
    assert len(heads) == 6  # the prompt's last token too
    assert len(norms) == (0 if family == "gpt2" else 5)
    assert {tuple(call[0].shape) for call in heads} == {(2, model.config.hidden_size)}
    for module in (model.get_output_embeddings(), *model.base_model.children()):
        if isinstance(module, (DecodeHead, DecodeNorm)):
            module.__class__ = type(module).__mro__[1 if isinstance(module, DecodeHead) else 2]
    expected = model.generate(**inputs, **options, return_dict_in_generate=True)
    assert len(heads) == 6
    assert torch.equal(out.sequences, expected.sequences)
    for got, want in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_stays_a_linear_layer(tied: bool, tmp_path: Path) -> None:
    model = make_llama(torch.bfloat16, tie_word_embeddings=tied)
    original, names = model.lm_head, set(model.state_dict())
    patched(model, keep_original=True)
    assert model.get_output_embeddings() is original
    assert isinstance(original, DecodeHead)
    assert isinstance(original, nn.Linear)
    assert isinstance(model.model.norm, LlamaRMSNorm)
    assert (original.weight is model.model.embed_tokens.weight) == tied
    model.tie_weights()
    assert (original.weight is model.model.embed_tokens.weight) == tied
    assert {name for name in model.state_dict() if name.startswith(("lm_head", "model.norm"))} == {
        name for name in names if name.startswith(("lm_head", "model.norm"))
    }
    before = logits(model, IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.lm_head, DecodeHead)
        assert torch.equal(logits(other, IDS), before)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert isinstance(loaded.lm_head, DecodeHead)
    assert torch.equal(loaded.lm_head.weight, original.weight)
    unpatch_model(model)
    assert model.lm_head is original
    assert type(original) is nn.Linear
    assert type(model.model.norm) is LlamaRMSNorm


def test_what_is_not_for_the_ops(head_calls: tuple[Calls, Calls], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, autocast, a compiler, many rows, a weight that is a view with gaps: the bits of nn.Linear."""
    heads, norms = head_calls
    torch.manual_seed(0)
    head = nn.Linear(64, 48, bias=True)
    norm = LlamaRMSNorm(64)
    plain = copy.deepcopy(head), copy.deepcopy(norm)
    head.__class__ = DecodeHead
    norm.__class__ = type("FastNorm", (DecodeNorm, LlamaRMSNorm), {})

    def both(x: torch.Tensor) -> None:
        assert torch.equal(head(x), plain[0](x))
        assert torch.equal(norm(x), plain[1](x))

    x = torch.randn(2, 1, 64)
    both(x)  # gradients
    loss = head(x).sum() + norm(x).sum()
    loss.backward()
    assert head.weight.grad is not None
    with torch.no_grad():
        both(torch.randn(17, 2, 64))
        both(torch.randn(0, 1, 64))
        with torch.autocast("cpu", torch.bfloat16):
            both(x)
        with monkeypatch.context() as compiling:
            compiling.setattr(torch.compiler, "is_compiling", lambda: True)
            both(x)
        gaps = torch.randn(64, 96)[:, :64]
        head.weight.data = plain[0].weight.data = gaps[:48]
        assert torch.equal(head(x), plain[0](x))
    assert not heads
    assert not norms


def test_hooks_see_what_they_would(head_calls: tuple[Calls, Calls]) -> None:
    model = patched(make_llama())
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.extend((args[0], out)))
    model.model.norm.register_forward_hook(lambda module, args, out: out * 2)
    with torch.no_grad():
        out = model(IDS[:, :1])
    assert len(head_calls[0]) == 1
    assert len(head_calls[1]) == 1
    torch.testing.assert_close(seen[1], nn.functional.linear(seen[0], model.lm_head.weight))
    assert torch.equal(out.logits, seen[1])


def test_when_they_are_swapped() -> None:
    assert "Forward passes of ours: 6 Embedding, Linear, LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding" in str(
        fastpath_report(patched(make_llama()))
    )
    full_precision = patched(make_llama(), weights=None)
    assert type(full_precision.lm_head) is nn.Linear  # its bits are stock's
    assert type(full_precision.model.norm) is LlamaRMSNorm
    packed = patched(make_llama(torch.bfloat16), lm_head="int8")
    assert not isinstance(packed.lm_head, DecodeHead)
    assert isinstance(packed.model.norm, DecodeNorm)
    for layer in packed.model.layers:
        assert type(layer.input_layernorm) is LlamaRMSNorm
