"""GPTQ checkpoints against weights computed from the published formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_checkpoints import (
    assert_converts,
    gptq_tensors,
    groups_in_order,
    pack_columns,
    random_codes,
)

from hf_fastpath.checkpoints import CheckpointFormat, GPTQFormat, detect_format
from hf_fastpath.errors import Unsupported

LAYER = "model.layers.0.mlp.up_proj"


def gptq(**options: Any) -> CheckpointFormat:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False, "desc_act": False}
    return detect_format(config | options)


@settings(max_examples=60, deadline=None)
@given(
    words=st.integers(1, 5),
    blocks=st.integers(1, 12),
    group_size=st.sampled_from([-1, 32, 64, 96, 128, 256]),
    version=st.sampled_from([1, 2]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(
    words: int, blocks: int, group_size: int, version: int, symmetric: bool, dtype: torch.dtype, seed: int
) -> None:
    """A last group that K does not fill is one of them."""
    groups = groups_in_order(32 * blocks, group_size)
    codes = random_codes(8 * words, groups, seed=seed, symmetric=symmetric, lowest_zero=2 - version, dtype=dtype)
    fmt = gptq(group_size=group_size, sym=symmetric, checkpoint_format={1: "gptq", 2: "gptq_v2"}[version])
    assert_converts(fmt, LAYER, gptq_tensors(LAYER, codes, version=version), codes)


@settings(max_examples=30, deadline=None)
@given(groups=st.integers(2, 6), group_size=st.sampled_from([32, 64, 128, 256]), seed=st.integers(0, 2**31))
def test_desc_act_sorts_columns_by_group(groups: int, group_size: int, seed: int) -> None:
    column_group = np.random.default_rng(seed).permutation(groups_in_order(groups * group_size, group_size))
    codes = random_codes(16, column_group, seed=seed, lowest_zero=1)
    assert_converts(gptq(group_size=group_size, desc_act=True), LAYER, gptq_tensors(LAYER, codes), codes)


@pytest.mark.parametrize(
    ("k", "group_size", "got"),
    [(256, 128, 128), (256, -1, 128), (192, -1, 64), (96, -1, 32), (1024, 512, 128), (192, 128, 64), (288, 96, 32)],
)
def test_the_largest_group_size_that_fits_is_taken(k: int, group_size: int, got: int) -> None:
    codes = random_codes(8, groups_in_order(k, group_size), seed=3, lowest_zero=1)
    quantized, _ = gptq(group_size=group_size).convert(LAYER, gptq_tensors(LAYER, codes))
    assert quantized.group_size == got


@pytest.mark.parametrize("written", [None, torch.zeros(256, dtype=torch.int32)])
def test_g_idx_that_was_never_set(written: torch.Tensor | None) -> None:
    codes = random_codes(8, groups_in_order(256, 64), seed=4, lowest_zero=1)
    tensors = gptq_tensors(LAYER, codes)
    del tensors[f"{LAYER}.g_idx"]
    if written is not None:
        tensors[f"{LAYER}.g_idx"] = written
    assert_converts(gptq(group_size=64), LAYER, tensors, codes)


def subtracted_words(zero: np.ndarray) -> torch.Tensor:
    """Version 1 zero points as GPTQModel writes them: 0x11111111 less in each word of version 2, modulo 2^32."""
    version2 = pack_columns(zero).numpy().view(np.uint32).astype(np.int64)
    return torch.from_numpy(((version2 - 0x11111111) % 2**32).astype(np.uint32).view(np.int32))


def test_zero_points_of_zero_from_gptqmodel() -> None:
    codes = random_codes(64, groups_in_order(512, 32), seed=5)
    assert (codes.zero == 0).any()
    tensors = gptq_tensors(LAYER, codes, version=2) | {f"{LAYER}.qzeros": subtracted_words(codes.zero.T)}
    assert_converts(gptq(group_size=32, meta={"quantizer": ["gptqmodel:4.0.0"]}), LAYER, tensors, codes)
    assert_converts(gptq(group_size=32, meta={"quantizer": "gptqmodel:0.9.1"}), LAYER, tensors, codes)
    with pytest.raises(Unsupported, match=rf"{LAYER}.qzeros holds zero points of 0.*gptq_v2"):
        gptq(group_size=32).convert(LAYER, tensors)


@pytest.mark.parametrize("lowest_zero_row", [0, 3, 7])
def test_zero_points_of_zero_from_others_are_refused(lowest_zero_row: int) -> None:
    """AutoGPTQ shifts the 32-bit -1 of a zero point of 0 over all that are above it in the word."""
    codes = random_codes(8, groups_in_order(64, 64), seed=6, lowest_zero=1)
    smeared = np.where(np.arange(8) < lowest_zero_row, codes.zero.T - 1, 15)
    tensors = gptq_tensors(LAYER, codes) | {f"{LAYER}.qzeros": pack_columns(smeared)}
    with pytest.raises(Unsupported, match="zero points of 0"):
        gptq(group_size=64, meta={"quantizer": "optimum:1.16"}).convert(LAYER, tensors)


def test_which_layers_are_quantized() -> None:
    fmt = gptq()
    assert fmt.quantizes(LAYER)
    assert not fmt.quantizes("lm_head")
    assert not fmt.quantizes("model.embed_tokens")
    assert gptq(lm_head=True).quantizes("lm_head")
    some = gptq(modules_in_block_to_quantize=[["self_attn.q_proj"], ["mlp.up_proj", "mlp.down_proj"]])
    assert [some.quantizes(f"model.layers.11.{name}") for name in ("mlp.up_proj", "self_attn.q_proj")] == [True, True]
    assert [some.quantizes(f"model.layers.11.{name}") for name in ("mlp.gate_proj", "q_proj")] == [False, False]
    assert not gptq(block_name_to_quantize="model.vision").quantizes(LAYER)
    skipping = gptq(dynamic={r"-:.*\.down_proj": {}, "+:.*up.*": {"damp_percent": 0.1}})
    assert [skipping.quantizes(f"model.layers.0.mlp.{name}") for name in ("down_proj", "up_proj")] == [False, True]


def test_names_of_tensors() -> None:
    fmt = gptq()
    assert fmt.tensor_names("a.b") == ("a.b.qweight", "a.b.qzeros", "a.b.scales", "a.b.g_idx")
    assert fmt.optional_suffixes == ("g_idx",)
    assert gptq(desc_act=True).optional_suffixes == ()
    assert isinstance(fmt, GPTQFormat)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8}, "bits 8 cannot be converted: allowed is 4"),
        ({"bits": None}, "bits None"),
        ({"group_size": 16}, "group_size 16 cannot be converted: allowed are -1"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": None}, "group_size None"),
        ({"group_size": True}, "group_size True"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' cannot be converted: allowed are 'gptq'"),
        ({"is_marlin_format": True}, "checkpoint_format 'marlin'"),
        ({"format": "gptq_p"}, "checkpoint_format 'gptq_p'"),
        ({"pack_dtype": "int64"}, "pack_dtype 'int64' cannot be converted"),
        ({"rotation": "hadamard"}, "rotation 'hadamard' needs more"),
        ({"adapter": {"name": "lora"}}, "adapter .* needs more"),
        ({"dynamic": {"+:.*q_proj": {"bits": 8, "group_size": 32}}}, "'\\+:.*' sets bits, group_size for some layers"),
        ({"dynamic": {".*q_proj": {"sym": True}}}, "sets sym for some layers"),
        ({"dynamic": {"-:(": {}}}, "dynamic rule '\\(' is not a regular expression"),
    ],
)
def test_configurations_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=f"GPTQ checkpoint: .*{message}"):
        gptq(**options)


@pytest.mark.parametrize("method", [None, "bitsandbytes"])
def test_unknown_methods_name_the_possible_ones(method: str | None) -> None:
    with pytest.raises(Unsupported, match=f"{str(method).lower()}.*'gptq', 'awq', 'compressed-tensors'"):
        detect_format({"quant_method": method})


def damaged(name: str) -> dict[str, torch.Tensor]:
    codes = random_codes(16, groups_in_order(256, 128), seed=8, lowest_zero=1)
    tensors = gptq_tensors(LAYER, codes)
    qweight, qzeros, scales = (tensors[f"{LAYER}.{suffix}"] for suffix in ("qweight", "qzeros", "scales"))
    changes: dict[str, tuple[str, torch.Tensor | None]] = {
        "no scales": ("scales", None),
        "codes of another type": ("qweight", qweight.long()),
        "codes of one dimension": ("qweight", qweight.flatten()),
        "no codes": ("qweight", qweight[:0]),
        "an odd number of rows": ("qweight", qweight[:, :-1]),
        "a group too many": ("qzeros", torch.cat((qzeros, qzeros))),
        "float64 scales": ("scales", scales.double()),
        "scales that no 16-bit type holds": ("scales", scales.float() * 1.0001),
        "a scale of infinity": ("scales", scales.index_fill(1, torch.tensor([3]), float("inf"))),
        "g_idx too short": ("g_idx", torch.zeros(255, dtype=torch.int32)),
        "g_idx reordered": ("g_idx", torch.arange(256, dtype=torch.int32) % 2),
    }
    suffix, tensor = changes[name]
    del tensors[f"{LAYER}.{suffix}"]
    return tensors if tensor is None else tensors | {f"{LAYER}.{suffix}": tensor}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no scales", f"{LAYER}: the checkpoint has no {LAYER}.scales"),
        ("codes of another type", f"{LAYER}.qweight is torch.int64, expected torch.int32"),
        ("codes of one dimension", r"qweight has the shape \(512,\), expected two dimensions"),
        ("no codes", r"qweight has the shape \(0, 16\), expected two dimensions, not empty"),
        ("an odd number of rows", "qweight has 15 columns"),
        ("a group too many", rf"{LAYER}.qzeros has the shape \(4, 2\), expected \(2, 2\)"),
        ("float64 scales", "scales is torch.float64, expected torch.float16 or torch.bfloat16 or torch.float32"),
        ("scales that no 16-bit type holds", "scales is float32 and neither float16 nor bfloat16"),
        ("a scale of infinity", "scales holds NaN or infinity"),
        ("g_idx too short", r"g_idx has the shape \(255,\), expected \(256,\)"),
        ("g_idx reordered", "g_idx reorders columns although the configuration says desc_act=false"),
    ],
)
def test_tensors_that_are_refused(damage: str, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        gptq().convert(LAYER, damaged(damage))


def test_desc_act_needs_g_idx_and_equal_groups() -> None:
    codes = random_codes(8, groups_in_order(256, 128), seed=9, lowest_zero=1)
    tensors = gptq_tensors(LAYER, codes)
    for g_idx in (torch.zeros(256), torch.arange(256) // 64, torch.arange(256) // 128 - 1, torch.arange(256) // 96):
        with pytest.raises(Unsupported, match=r"g_idx does not put the columns into groups of 128, 256 columns in all"):
            gptq(desc_act=True).convert(LAYER, tensors | {f"{LAYER}.g_idx": g_idx.int()})
    del tensors[f"{LAYER}.g_idx"]
    with pytest.raises(Unsupported, match=f"no {LAYER}.g_idx"):
        gptq(desc_act=True).convert(LAYER, tensors)


def test_zero_points_that_contradict_sym() -> None:
    codes = random_codes(8, groups_in_order(256, 128), seed=10, lowest_zero=1)
    with pytest.raises(Unsupported, match="zero points other than 8 although the configuration says sym=true"):
        gptq(sym=True).convert(LAYER, gptq_tensors(LAYER, codes))
    symmetric = random_codes(8, groups_in_order(256, 128), seed=11, symmetric=True)
    assert_converts(gptq(sym=None), LAYER, gptq_tensors(LAYER, symmetric), symmetric)


def test_a_width_that_no_group_divides() -> None:
    codes = random_codes(8, groups_in_order(40, -1), seed=12, lowest_zero=1)
    with pytest.raises(Unsupported, match=f"{LAYER}: in_features 40 in groups of 40 columns cannot be cut"):
        gptq(group_size=-1).convert(LAYER, gptq_tensors(LAYER, codes))


@pytest.mark.parametrize("exact", [torch.float16, torch.bfloat16])
def test_float32_scales_that_a_16_bit_type_holds(exact: torch.dtype) -> None:
    """2^-20 (1 + 2^-7) is a bfloat16 that float16 would round; the others are float16 that bfloat16 would round."""
    codes = random_codes(8, groups_in_order(128, 128), seed=13, lowest_zero=1, dtype=exact)
    codes.scale[0, 0] = 2**-20 * (1 + 2**-7) if exact is torch.bfloat16 else 1 + 2**-10
    tensors = gptq_tensors(LAYER, codes)
    tensors[f"{LAYER}.scales"] = tensors[f"{LAYER}.scales"].float()
    assert_converts(gptq(), LAYER, tensors, codes)
