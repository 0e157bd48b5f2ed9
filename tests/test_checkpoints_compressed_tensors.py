"""compressed-tensors checkpoints against weights computed from the published formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_checkpoints import assert_converts, compressed_tensors_tensors, groups_in_order, random_codes

from hf_fastpath.checkpoints import CheckpointFormat, detect_format
from hf_fastpath.errors import Unsupported

LAYER = "model.layers.0.mlp.up_proj"


def config(
    weights: dict[str, Any] | None = None, group: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """A configuration as llm-compressor writes it, with changes to its weights, its only group or itself."""
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128} | (weights or {})
    first = {"targets": ["Linear"], "weights": scheme, "input_activations": None, "output_activations": None}
    whole = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": first | (group or {})},
        "ignore": ["lm_head"],
    }
    return whole | options


def compressed(**weights: Any) -> CheckpointFormat:
    return detect_format(config(weights))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    groups=st.integers(1, 6),
    group_size=st.sampled_from([-1, 32, 64, 128, 256]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(n: int, groups: int, group_size: int, symmetric: bool, dtype: torch.dtype, seed: int) -> None:
    """N that is not a multiple of 8 leaves the last word of zero points padded."""
    column_group = groups_in_order(groups * (32 if group_size == -1 else group_size), group_size)
    codes = random_codes(n, column_group, seed=seed, symmetric=symmetric, dtype=dtype)
    strategy = "channel" if group_size == -1 else "group"
    fmt = compressed(strategy=strategy, group_size=None if group_size == -1 else group_size, symmetric=symmetric)
    assert_converts(fmt, LAYER, compressed_tensors_tensors(LAYER, codes, symmetric=symmetric), codes)


@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(2, 6),
    group_size=st.sampled_from([32, 64, 128]),
    actorder=st.sampled_from(["group", "dynamic", True]),
    seed=st.integers(0, 2**31),
)
def test_actorder_group_sorts_columns(groups: int, group_size: int, actorder: Any, seed: int) -> None:
    column_group = np.random.default_rng(seed).permutation(groups_in_order(groups * group_size, group_size))
    codes = random_codes(13, column_group, seed=seed)
    fmt = compressed(group_size=group_size, symmetric=False, actorder=actorder)
    assert_converts(fmt, LAYER, compressed_tensors_tensors(LAYER, codes, symmetric=False, reordered=True), codes)


@pytest.mark.parametrize("actorder", ["weight", "static", False, None])
def test_other_actorders_do_not_change_the_layout(actorder: Any) -> None:
    codes = random_codes(8, groups_in_order(256, 128), seed=1, symmetric=True)
    fmt = compressed(actorder=actorder)
    assert fmt.tensor_names("a") == ("a.weight_packed", "a.weight_scale", "a.weight_shape")
    assert_converts(fmt, LAYER, compressed_tensors_tensors(LAYER, codes), codes)


def test_g_idx_that_was_never_set() -> None:
    codes = random_codes(8, groups_in_order(256, 128), seed=2, symmetric=True)
    tensors = compressed_tensors_tensors(LAYER, codes) | {f"{LAYER}.weight_g_idx": torch.full((256,), -1)}
    assert_converts(compressed(actorder="group"), LAYER, tensors, codes)


def test_zero_points_of_older_releases_are_plain_int8() -> None:
    codes = random_codes(11, groups_in_order(256, 64), seed=3)
    tensors = compressed_tensors_tensors(LAYER, codes, symmetric=False)
    plain = torch.from_numpy((codes.zero - 8).astype(np.int8))
    fmt = compressed(group_size=64, symmetric=False)
    assert_converts(fmt, LAYER, tensors | {f"{LAYER}.weight_zero_point": plain}, codes)
    plain[0, 0] = -16
    with pytest.raises(Unsupported, match=r"weight_zero_point holds -16 to .*, expected -8 to 7"):
        fmt.convert(LAYER, tensors | {f"{LAYER}.weight_zero_point": plain})


def test_weight_shape_may_be_missing() -> None:
    codes = random_codes(8, groups_in_order(256, 128), seed=4, symmetric=True)
    tensors = compressed_tensors_tensors(LAYER, codes)
    del tensors[f"{LAYER}.weight_shape"]
    assert compressed().optional_suffixes == ("weight_shape",)
    assert_converts(compressed(), LAYER, tensors, codes)


def test_names_of_tensors() -> None:
    fmt = compressed(symmetric=False, actorder="group")
    assert fmt.tensor_names("a") == (
        "a.weight_packed",
        "a.weight_scale",
        "a.weight_shape",
        "a.weight_zero_point",
        "a.weight_g_idx",
    )


def test_which_layers_are_quantized() -> None:
    ignore = ["lm_head", r"re:.*\.down_proj$", "model.layers.1.mlp.up_proj"]
    fmt = detect_format(config(ignore=ignore))
    assert fmt.quantizes(LAYER)
    refused = ("lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj")
    assert not any(fmt.quantizes(name) for name in refused)
    some = detect_format(config(group={"targets": [r"re:model\.layers\.[0-3]\..*", "score"]}))
    assert [some.quantizes(name) for name in (LAYER, "score", "x." + LAYER, "head")] == [True, True, False, False]


def test_groups_that_are_stored_alike_are_one_format() -> None:
    groups = config(group={"targets": ["re:.*up_proj"]})["config_groups"]
    groups["group_1"] = config(group={"targets": ["re:.*down_proj"]})["config_groups"]["group_0"]
    fmt = detect_format(config(config_groups=groups))
    assert [fmt.quantizes(f"model.layers.0.{name}") for name in ("up_proj", "down_proj", "q_proj")] == [
        True,
        True,
        False,
    ]
    groups["group_1"]["weights"]["group_size"] = 64
    with pytest.raises(Unsupported, match="config_groups with different weights cannot be converted"):
        detect_format(config(config_groups=groups))


def test_a_nested_configuration() -> None:
    nested = {"quant_method": "compressed-tensors", "quantization_config": config({"group_size": 64})}
    assert detect_format(nested).group_size == 64


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (config(format="int-quantized"), "format 'int-quantized' cannot be converted: allowed is 'pack-quantized'"),
        (config(format="marlin-24"), "format 'marlin-24'"),
        (config(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (config(quantization_status="frozen"), "quantization_status 'frozen' cannot be converted"),
        (config(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config with format 'sparse-24-bitmask'"),
        (config(transform_config={"config_groups": {"R1": {}}}), "transform_config cannot be converted"),
        (config(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme cannot be converted: .*config.json"),
        (config(config_groups={}), "without config_groups"),
        (config(config_groups={"W4A16": ["Linear"]}), r"preset \['Linear'\]"),
        (config({"num_bits": 8}), "int8 weights cannot be converted: allowed are int4 weights"),
        (config({"type": "float"}), "float4 weights"),
        (config({"dynamic": True}), "dynamic quantization of weights"),
        (config({"strategy": "tensor", "group_size": None}), "weights with strategy 'tensor'"),
        (config({"strategy": None, "group_size": None}), "weights with strategy 'tensor'"),
        (config({"strategy": "block", "group_size": None}), "weights with strategy 'block'"),
        (config({"group_size": 16}), "group_size 16 cannot be converted"),
        (config({"group_size": None}), "group_size None cannot be converted"),
        (config(group={"weights": None}), "int8 weights"),
        (config(group={"input_activations": {"num_bits": 8}}), "input_activations cannot be converted"),
        (config(group={"output_activations": {"num_bits": 8}}), "output_activations"),
        (config(group={"format": "int-quantized"}), "config group of format 'int-quantized'"),
        (config(ignore=["re:("]), r"the pattern '\(' is not a regular expression"),
    ],
)
def test_configurations_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=f"compressed-tensors checkpoint: .*{message}"):
        detect_format(given)


def test_a_width_with_a_tail_is_refused() -> None:
    codes = random_codes(8, groups_in_order(100, -1), seed=5, symmetric=True)
    with pytest.raises(Unsupported, match=f"{LAYER}: in_features 100 in groups of 100 columns cannot be cut"):
        compressed(strategy="channel", group_size=None).convert(LAYER, compressed_tensors_tensors(LAYER, codes))


def test_tensors_that_are_refused() -> None:
    codes = random_codes(12, groups_in_order(256, 128), seed=6)
    tensors = compressed_tensors_tensors(LAYER, codes, symmetric=False, reordered=True)
    fmt = compressed(symmetric=False, actorder="group")

    def refused(suffix: str, tensor: torch.Tensor, message: str) -> None:
        with pytest.raises(Unsupported, match=rf"{LAYER}.{suffix} {message}"):
            fmt.convert(LAYER, tensors | {f"{LAYER}.{suffix}": tensor})

    refused("weight_packed", tensors[f"{LAYER}.weight_packed"].float(), "is torch.float32, expected torch.int32")
    refused("weight_shape", torch.tensor([12, 255 - 8]), r"holds \[12, 247\], which does not fit weight_packed")
    refused("weight_shape", torch.tensor([13, 256]), r"holds \[13, 256\]")
    refused("weight_scale", tensors[f"{LAYER}.weight_scale"][:, :1], r"has the shape \(12, 1\), expected \(12, 2\)")
    zero = tensors[f"{LAYER}.weight_zero_point"]
    refused("weight_zero_point", zero[:1], r"has the shape \(1, 2\), expected \(2, 2\)")
    refused("weight_zero_point", torch.zeros(2, 2, dtype=torch.int8), r"has the shape \(2, 2\), expected \(12, 2\)")
    for g_idx in (torch.zeros(256).long(), torch.arange(256) // 127, torch.arange(256) // 64, torch.arange(256) - 300):
        refused("weight_g_idx", g_idx, "does not put 128 columns into each of 2 groups")
