"""AWQ checkpoints against weights computed from the published formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_checkpoints import assert_converts, awq_tensors, groups_in_order, pack_rows, random_codes

from hf_fastpath.checkpoints import AWQFormat, CheckpointFormat, detect_format
from hf_fastpath.errors import Unsupported

LAYER = "model.layers.3.self_attn.q_proj"


def awq(**options: Any) -> CheckpointFormat:
    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    return detect_format(config | options)


@settings(max_examples=60, deadline=None)
@given(
    words=st.integers(1, 5),
    blocks=st.integers(1, 12),
    group_size=st.sampled_from([-1, 32, 64, 128, 256]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(words: int, blocks: int, group_size: int, symmetric: bool, dtype: torch.dtype, seed: int) -> None:
    codes = random_codes(
        8 * words, groups_in_order(32 * blocks, group_size), seed=seed, symmetric=symmetric, dtype=dtype
    )
    fmt = awq(group_size=group_size, zero_point=not symmetric)
    assert_converts(fmt, LAYER, awq_tensors(LAYER, codes), codes)


def test_the_order_in_a_word_by_hand() -> None:
    """0x76543210 holds i in bits 4i: by the order 0 2 4 6 1 3 5 7 that is row 0, 2, 4, 6, 1, 3, 5, 7 of the eight."""
    tensors = {
        f"{LAYER}.qweight": torch.full((32, 1), 0x76543210, dtype=torch.int32),
        f"{LAYER}.qzeros": torch.zeros(1, 1, dtype=torch.int32),
        f"{LAYER}.scales": torch.ones(1, 8, dtype=torch.float16),
    }
    quantized, order = awq(group_size=32).convert(LAYER, tensors)
    assert quantized.q[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert order is None


def test_older_names_of_options() -> None:
    fmt = detect_format({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"})
    assert isinstance(fmt, AWQFormat)
    assert (fmt.group_size, fmt.symmetric) == (64, False)


def test_which_layers_are_quantized() -> None:
    fmt = awq(modules_to_not_convert=["visual", "mlp.gate"])
    assert fmt.quantizes(LAYER)
    assert not fmt.quantizes("model.layers.3.mlp.gate")
    assert not fmt.quantizes("visual.blocks.0.attn.qkv")
    assert not fmt.quantizes("lm_head")
    assert awq(modules_to_not_convert=None).quantizes("model.layers.3.mlp.gate")
    assert not awq(dynamic={"-:.*q_proj": {}}).quantizes(LAYER)
    assert fmt.tensor_names("a") == ("a.qweight", "a.qzeros", "a.scales")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8}, "bits 8 cannot be converted: allowed is 4"),
        ({"bits": None}, "bits None"),
        ({"version": "gemv"}, "version 'gemv' cannot be converted: allowed is 'gemm'"),
        ({"version": "gemv_fast"}, "version 'gemv_fast'"),
        ({"version": "marlin"}, "version 'marlin'"),
        ({"version": "exllama"}, "version 'exllama'"),
        ({"version": None, "format": "llm-awq"}, "version 'llm-awq'"),
        ({"group_size": 16}, "group_size 16 cannot be converted"),
        ({"dynamic": {"lm_head": {"bits": 8}}}, "dynamic rule 'lm_head' sets bits"),
    ],
)
def test_configurations_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=f"AWQ checkpoint: .*{message}"):
        awq(**options)


def test_tensors_that_are_refused() -> None:
    codes = random_codes(16, groups_in_order(256, 128), seed=1)
    tensors = awq_tensors(LAYER, codes)
    packed_like_gptq = {f"{LAYER}.qweight": pack_rows(codes.q.T)}
    with pytest.raises(Unsupported, match=rf"{LAYER}.qzeros has the shape \(2, 2\), expected \(1, 16\)"):
        awq().convert(LAYER, tensors | packed_like_gptq)
    with pytest.raises(Unsupported, match=r"scales has the shape \(2, 15\), expected \(2, 16\)"):
        awq().convert(LAYER, tensors | {f"{LAYER}.scales": tensors[f"{LAYER}.scales"][:, 1:]})
    with pytest.raises(Unsupported, match="zero points other than 8 although the configuration says zero_point=false"):
        awq(zero_point=False).convert(LAYER, tensors)
    with pytest.raises(Unsupported, match=r"the checkpoint has no other\.qweight"):
        awq().convert("other", tensors)
